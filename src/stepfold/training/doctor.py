"""`stepfold doctor`: is the teacher read correctly? Findings with numbers, before hours are spent."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import psutil
import torch
from torch import Tensor

from stepfold.config import Config, TeacherSettings, validate
from stepfold.errors import UserError
from stepfold.maths.routes import reference_route
from stepfold.maths.tangent import total_derivative
from stepfold.objectives.consistency import STEEPEST, derivative_size, tangent_direction
from stepfold.objectives.contract import Networks
from stepfold.randomness import Draws, normal, uniform
from stepfold.spaces.generation import pairs_from, walk
from stepfold.spaces.records import Pairs
from stepfold.students.lora import lora_student
from stepfold.students.whole import new_student
from stepfold.teachers.contract import Condition, Student
from stepfold.teachers.conventions import conventions
from stepfold.teachers.loading import choose_objective, load_teacher
from stepfold.teachers.oracle import agreement
from stepfold.teachers.pipeline import SIGMA_DATA, PipelineTeacher
from stepfold.training.accelerators import make_accelerator
from stepfold.training.allowed import allowed_methods
from stepfold.training.choices import choose_tangent, full_float32
from stepfold.training.memory import peak_memory_gib
from stepfold.training.optimisers import make_optimiser
from stepfold.training.steepness import of_pairs, without_tangent
from stepfold.training.terms import add_gradients, terms_of

PROMPTS = ("red heart on blue background", "a picture of pizza", "fox", "green apple on yellow background")
TRIED, TIMES = 2, 4
"""Prompts of a trajectory each, and its steps: few, so that a large teacher is checked where it can be trained."""


@dataclass(frozen=True)
class Finding:
    """One check: what was measured, what is wanted, whether it is so, and what to do where it is not."""

    check: str
    number: str
    want: str
    ok: bool
    fix: str = ""


ROUNDING = {"float32": 1e-4, "bfloat16": 5e-2}
"""How far two ways to the same result may differ, by the dtype of the teacher's weights."""
ROUNDED = 1e-3
"""And two calls in float32 of a network that rounds to bfloat16 within: a number between two of it goes either way."""
SAMPLED = 0.3
"""And two calls in bfloat16: FLUX's pipeline rounds its time to steps of 4 in 1000."""
QUANTISED = {"int8": 0.05, "fp8": 0.1, "nf4": 0.3}
"""How far a velocity may be from that of the plain weights."""
OTHER_CALL = "stepfold calls this network in another way than its pipeline; do not train, and report the table"
IN_FLOAT32 = "rounding alone may do it; run doctor without --dtype, and train in bfloat16 where that is ok"
"""What to do where the network's calls differ from its pipeline's."""
MISREAD = 0.1
"""How far its states may be from a schedule that was read right: some solvers end a little above noise level 0."""


@full_float32()
def examine(settings: TeacherSettings, device: str, lora: int = 0) -> list[Finding]:
    """All checks of one teacher.

    Args:
        settings: which teacher, at which size; a short max_tokens saves time.
        device: torch device.
        lora: rank of the student's LoRA; 0 for a student with all weights of its own.

    Raises:
        UserError: the teacher does not load, or no student can be made of it.
    """
    if settings.quantise != "none" and not lora:
        raise UserError(f"--quantise {settings.quantise} leaves no weights to train; add --lora 64")
    plain = plain_velocity(settings, device) if rounded_parts(settings) else None
    teacher = load_teacher(settings, device)
    student = lora_student(teacher, lora) if lora else new_student(teacher)
    prompts = (teacher.examples or PROMPTS)[:TRIED]
    condition = teacher.encode(prompts)
    count, n = len(prompts), TIMES
    noise = teacher.sigma_data * noise_of(teacher, count)
    guidance = torch.full((count,), teacher.default_guidance, device=device)
    route = reference_route(uniform((1, n), 0, "doctor route")).expand(count, n).to(device)
    trajectory = walk(teacher.velocity, noise, route, condition, guidance)
    keep = torch.ones(count, dtype=torch.bool, device=device)
    pairs = pairs_from(trajectory, condition, guidance, keep_first=False, keep=keep)
    config = choose_objective(validate({"prompts": "", "teacher": settings.model_dump(), "student": {"lora": lora}}))
    rounding = ROUNDING[settings.dtype if lora else "float32"]
    ways = without_tangent(teacher.retimable)
    agree, size = backends_agree(student, pairs, rounding), tangent_size(student, pairs, ways)
    allowed = allowed_methods(teacher, why_no_tangent(agree, size, ways))
    if config.objective != "continuous":
        agree, size = without_need(agree), without_need(size)
    return [
        *own_loop(teacher, prompts, condition, guidance),
        *quantised_velocity(teacher, settings, plain),
        same_network(teacher, student, pairs),
        agree,
        chosen_backend(student, condition.rows(slice(0, 1)), teacher.latent_shape, config, lora),
        size,
        guidance_effect(teacher, pairs),
        latent_statistics(pairs),
        *[Finding(name, words, "any", True) for name, words in conventions(teacher).items()],
        *one_step(student, pairs, teacher, config.objective),
        *(Finding(f"method: {name}", said, "any", True) for name, said in allowed.items()),
    ]


def why_no_tangent(agree: Finding, size: Finding, ways: str) -> str:
    """Why the continuous objective is not for a teacher, from findings about its tangent; empty where it is.

    `ways` are those around a large dF/dt.
    """
    if not size.ok:
        return f"dF/dt is {size.number}, above {STEEPEST:g}; take {ways}"
    return "" if agree.ok else "the tangent's backends do not agree; take objective=discrete"


def without_need(finding: Finding) -> Finding:
    """A finding about the tangent of a teacher that `objective=auto` distils without one: a number, no fault."""
    return replace(finding, want=f"any: objective=auto is discrete, without it; continuous: {finding.want}", ok=True)


def noise_of(teacher: PipelineTeacher, count: int) -> Tensor:
    """Unit noise [count, ...], of the doctor's own random stream."""
    return torch.stack([normal(teacher.latent_shape, 0, "doctor", i) for i in range(count)]).to(teacher.device)


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def median_relative(a: Tensor, b: Tensor) -> float:
    """The median of `relative` over the rows."""
    return float(torch.tensor([relative(ours, theirs) for ours, theirs in zip(a, b, strict=True)]).median())


def own_loop(teacher: PipelineTeacher, prompts: Sequence[str], condition: Condition, guidance: Tensor) -> list[Finding]:
    """Beside the pipeline's own loop, with its own scheduler: the network's calls, and the schedule that was read.

    Args:
        teacher: the teacher.
        prompts, condition: what to draw, and its encoding.
        guidance: scales, all the same.
    """
    found = agreement(teacher, prompts, condition, guidance)
    most = SAMPLED if teacher.dtype == torch.bfloat16 else ROUNDED if teacher.rounds else ROUNDING["float32"]
    scheduler = type(teacher.pipe.scheduler).__name__ + (f" without {found.left_out}" if found.left_out else "")
    off = max(found.schedule, found.end)
    calls = close("network = the pipeline's own, 4 calls", found.network, most)
    return [
        replace(calls, fix=IN_FLOAT32 if teacher.dtype == torch.bfloat16 else OTHER_CALL),
        Finding(
            f"schedule = that of {scheduler}",
            f"its steps to a known picture are {off:.1e} off",
            f"<= {MISREAD:g}",
            off <= MISREAD,
            "the folder's scheduler does not describe its network; take the one of the base model",
        ),
    ]


def velocity_at(teacher: PipelineTeacher) -> Tensor:
    """Its velocity [TRIED * TIMES, ...] under guidance, at times from noise on, on the CPU."""
    prompts = (teacher.examples or PROMPTS)[:TRIED]
    condition, count = teacher.encode(prompts).repeat_interleave(TIMES), TRIED * TIMES
    x = teacher.sigma_data * noise_of(teacher, count)
    t = torch.linspace(teacher.start_time, 0.3, TIMES, device=teacher.device).repeat(TRIED)
    return teacher.velocity(x, t, condition, torch.full_like(t, teacher.default_guidance)).cpu()


def plain_velocity(settings: TeacherSettings, device: str) -> Tensor | None:
    """`velocity_at` of the weights as they are; None where the device has no room for them."""
    try:
        return velocity_at(load_teacher(settings.plain(), device))
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()


def rounded_parts(settings: TeacherSettings) -> dict[str, str]:
    """Part of a teacher that is quantised -> how."""
    kinds = {"weights": settings.quantise, "text encoders": settings.quantise_encoders}
    return {part: kind for part, kind in kinds.items() if kind != "none"}


def quantised_velocity(teacher: PipelineTeacher, settings: TeacherSettings, plain: Tensor | None) -> list[Finding]:
    """How far quantised weights lead from the plain ones; nothing of a teacher that has these."""
    if not (parts := rounded_parts(settings)):
        return []
    check = "velocity with " + " and ".join(f"{kind} {part}" for part, kind in parts.items())
    if plain is None:
        return [Finding(check, "not run: the plain weights do not fit beside it", "any", True)]
    error, most = median_relative(velocity_at(teacher), plain), sum(QUANTISED[kind] for kind in parts.values())
    return [Finding(check, f"relative difference {error:.1e} from the plain ones", f"<= {most:g}", error <= most)]


def close(check: str, error: float, most: float) -> Finding:
    """Whether a relative difference is one of rounding."""
    return Finding(check, f"relative difference {error:.1e}", f"<= {most:.0e}", error <= most)


@torch.no_grad()
def same_network(teacher: PipelineTeacher, student: Student, pairs: Pairs) -> Finding:
    """Before the first step, the student's F is the teacher's: unguided, or at equal scales where both embed them."""
    scale = pairs.guidance if teacher.guidance_kind == "embedded" else none_like(teacher, pairs.guidance)
    ours = teacher.sigma_data * student(pairs.x / teacher.sigma_data, pairs.t, pairs.condition, pairs.guidance)
    theirs = teacher.velocity(pairs.x, pairs.t, pairs.condition, scale)
    most = ROUNDING[str(teacher.dtype).removeprefix("torch.")]
    return close("student = teacher at step 0", relative(ours, theirs), most)


def backends_agree(student: Student, pairs: Pairs, rounding: float = 1e-4) -> Finding:
    """The two exact tangents; and, unless rounding swamps it, the finite difference along the trajectory.

    In the median over the states: where a ReLU stands at its kink, rounding alone decides on which side it is taken.
    """
    exact = tangent(student, pairs, "two_pass")
    small = median_relative(tangent(student, pairs, "one_pass"), exact)
    check, number, want = "tangent backends agree", f"relative difference {small:.1e} (one_pass)", f"<= {rounding:.0e}"
    if rounding > ROUNDING["float32"]:
        return Finding(check, number, want, small <= rounding)
    error = median_relative(tangent(student, pairs, "finite_difference"), exact)
    ok = small <= rounding and error <= 5e-2
    return Finding(check, f"{number}, {error:.1e} (finite difference)", f"{want}, <= 5e-2", ok)


def chosen_backend(
    student: Student, condition: Condition, latent_shape: tuple[int, ...], config: Config, lora: int
) -> Finding:
    """What training.tangent=auto takes for this model with the default settings but its own and a LoRA, and why."""
    config = config.model_copy(update={"student": config.student.model_copy(update={"lora": lora})})
    choice = choose_tangent(config, student, condition, latent_shape)
    return Finding("tangent backend, training.tangent=auto", f"{choice.backend}: {choice.reason}", "any", True)


def tangent(student: Student, pairs: Pairs, backend: str) -> Tensor:
    """cos t sin t dF/dt along the teacher's velocity."""
    dx, dt = tangent_direction(pairs.x, pairs.t, pairs.dxdt, SIGMA_DATA)
    step = 1e-3 if backend == "finite_difference" else None  # small: ReLU in linear attention has kinks
    with torch.no_grad():
        F = partial(of_pairs, student, pairs)
        return total_derivative(F, pairs.x / SIGMA_DATA, pairs.t, dx, dt, backend, step).dF


def tangent_size(student: Student, pairs: Pairs, ways: str) -> Finding:
    """How fast F turns along the trajectory, and the ways around where that is too fast."""
    size = derivative_size(partial(of_pairs, student, pairs), pairs.x, pairs.t, pairs.dxdt, SIGMA_DATA)
    return Finding(
        "size of dF/dt (root mean square)",
        f"{size:.2f}",
        f"<= {STEEPEST:g} (else {ways})",
        size <= STEEPEST,
    )


def none_like(teacher: PipelineTeacher, guidance: Tensor) -> Tensor:
    """The scales [B] that turn guidance off."""
    return torch.full_like(guidance, teacher.no_guidance)


def guidance_effect(teacher: PipelineTeacher, pairs: Pairs) -> Finding:
    """A guided and an unguided velocity differ."""
    guided = teacher.velocity(pairs.x, pairs.t, pairs.condition, pairs.guidance)
    plain = teacher.velocity(pairs.x, pairs.t, pairs.condition, none_like(teacher, pairs.guidance))
    effect = relative(guided, plain)
    wanted = teacher.guidance_kind != "none"
    return Finding(
        "guidance changes the velocity", f"{effect:.1%}", ">= 1%" if wanted else "any", effect >= 0.01 or not wanted
    )


def latent_statistics(pairs: Pairs) -> Finding:
    """Mean and deviation of a picture's latents, for `decoupled.statistics`; root mean square over pictures."""
    y = pairs.x0.float().flatten(1) / SIGMA_DATA
    std = y.var(1).mean().sqrt()
    return Finding(f"an image's latents after {TIMES} steps", f"mean {y.mean():.2f}, deviation {std:.2f}", "any", True)


def free_bytes(device: torch.device) -> int:
    """Memory that nobody has."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def one_step(student: Student, pairs: Pairs, teacher: PipelineTeacher, objective: str = "continuous") -> list[Finding]:
    """One real optimiser step of an objective: every parameter moves, the loss is finite; what it needs in memory.

    A state at a time, and blocks computed again in the backward pass: as little memory as a run can do with.
    """
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    needed = 4 * sum(p.numel() * p.element_size() for p in trained.values())  # before, gradient, AdamW's two
    if needed > (free := free_bytes(teacher.device)):
        said = f"all weights and AdamW need {needed / 2**30:.0f} GiB more, {free / 2**30:.0f} are free"
        return [Finding("one step changes the weights", f"not run: {said}", "any; try --lora 64", True)]
    config: Config = validate(
        {
            "teacher": {"source": "emoji"},
            "objective": objective,
            "optimiser": {"name": "adamw", "lr": 1e-4},
            "consistency": {"r_warmup": 0},
            "training": {"micro_batch": 1},
        }
    )
    if student.can_recompute:
        student.recompute_blocks()
    accelerator = make_accelerator("no")
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimiser = make_optimiser(list(trained.values()), config.optimiser)
    gc.collect()
    networks = Networks(student, teacher, precision=lambda: accelerator.autocast())
    [term], draws = terms_of(config), Draws(config.seed, [], teacher.device)
    figures = add_gradients([term], networks, {term.space: pairs}, draws, config, 0, accelerator)[term.space]
    still = [n for n, p in trained.items() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    optimiser.step()
    moved = sum(not torch.equal(before[n], p) for n, p in trained.items())
    total = len(before)
    idle = (*teacher.idle_parameters(), ".lora_A.")  # behind LoRA's zeros nothing arrives in the first step
    idle += ("variance_head.",) if objective != "continuous" else ()  # the adaptive weight is the continuous one's
    waiting = [n for n in still if any(part in n for part in idle)]
    loss = float(figures["loss"].mean())
    return [
        Finding(
            "one step changes the weights",
            f"{moved} of {total} tensors",
            f">= {total - len(waiting)}",
            len(still) == len(waiting),
        ),
        Finding("loss is finite", f"{loss:.3f}", "finite", bool(torch.isfinite(figures["loss"]).all())),
        Finding("peak memory up to here", f"{peak_memory_gib(teacher.device):.2f} GiB", "any", True),
    ]
