"""`stepfold doctor`: is the teacher understood? Findings with numbers, before hours are spent."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from diffusers import SanaSprintPipeline
from torch import Tensor

from stepfold.config import Config, TeacherSettings, validate
from stepfold.jobs import peak_memory_gib
from stepfold.maths.routes import reference_route
from stepfold.maths.tangent import total_derivative
from stepfold.objectives.consistency import tangent_direction
from stepfold.randomness import generator, normal, uniform
from stepfold.sampling import sample_teacher
from stepfold.spaces.generation import pairs_from, walk
from stepfold.spaces.pairs import Pairs
from stepfold.teachers.contract import Condition, Student
from stepfold.teachers.loading import load_teacher
from stepfold.teachers.pipeline import SIGMA_DATA, PipelineTeacher
from stepfold.training.choices import choose_tangent, full_float32
from stepfold.training.distill import make_accelerator
from stepfold.training.optimisers import make_optimiser
from stepfold.training.update import update

PROMPTS = ("red heart on blue background", "a picture of pizza", "fox", "green apple on yellow background")


@dataclass(frozen=True)
class Finding:
    """One check: what was measured, what is wanted, and whether it is so."""

    check: str
    number: str
    want: str
    ok: bool


@full_float32()
def examine(settings: TeacherSettings, device: str) -> list[Finding]:
    """All checks of one teacher.

    Args:
        settings: which teacher, at which size; a short max_tokens saves time.
        device: torch device.

    Raises:
        UserError: the teacher does not load, or no student can be made of it.
    """
    teacher = load_teacher(settings, device)
    student = teacher.new_student()
    prompts = teacher.examples or PROMPTS
    condition = teacher.encode(prompts)
    count, n = len(prompts), 8
    noise = teacher.sigma_data * noise_of(teacher, count)
    guidance = torch.full((count,), teacher.default_guidance, device=device)
    route = reference_route(uniform((1, n), 0, "doctor route")).expand(count, n).to(device)
    trajectory = walk(teacher.velocity, noise, route, condition, guidance)
    keep = torch.ones(count, dtype=torch.bool, device=device)
    pairs = pairs_from(trajectory, condition, guidance, keep_first=False, keep=keep)
    return [
        same_sampler(teacher, prompts, condition, guidance),
        same_network(teacher, student, pairs),
        backends_agree(student, pairs),
        chosen_backend(student, condition.rows(slice(0, 1)), teacher.latent_shape),
        tangent_size(student, pairs),
        guidance_effect(teacher, pairs),
        *one_step(student, pairs, teacher),
    ]


def noise_of(teacher: PipelineTeacher, count: int) -> Tensor:
    """Unit noise [count, ...], of the doctor's own random stream."""
    return torch.stack([normal(teacher.latent_shape, 0, "doctor", i) for i in range(count)]).to(teacher.device)


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm())


def same_sampler(teacher: PipelineTeacher, prompts: Sequence[str], condition: Condition, guidance: Tensor) -> Finding:
    """The wrapped teacher and the pipeline's own loop, through the same scheduler, end in the same latents.

    Args:
        teacher: the teacher.
        prompts, condition: what to draw, and its encoding.
        guidance: scales, all the same.
    """
    check = "wrapped teacher = pipeline's own sampler, 4 steps"
    if isinstance(teacher.pipe, SanaSprintPipeline):
        return Finding(check, "not run", "its sampler is SCMScheduler's", True)
    draws = [generator(0, "doctor", i) for i in range(len(prompts))]
    theirs = teacher.pipeline_latents(prompts, draws, float(guidance[0]), 4)
    noise = teacher.sigma_data * noise_of(teacher, len(prompts))
    ours = sample_teacher(teacher, noise, condition, guidance, 4, even=teacher.even_ladder) / teacher.sigma_data
    error = relative(ours, theirs)
    return Finding(check, f"relative difference {error:.1e}", "<= 1e-4", error <= 1e-4)


@torch.no_grad()
def same_network(teacher: PipelineTeacher, student: Student, pairs: Pairs) -> Finding:
    """Before the first step, the student's F is the teacher's: unguided, or at equal scales where both embed them."""
    scale = pairs.guidance if teacher.guidance_kind == "embedded" else torch.ones_like(pairs.guidance)
    ours = teacher.sigma_data * student(pairs.x / teacher.sigma_data, pairs.t, pairs.condition, pairs.guidance)
    theirs = teacher.velocity(pairs.x, pairs.t, pairs.condition, scale)
    error = relative(ours, theirs)
    return Finding("student = teacher at step 0", f"relative difference {error:.1e}", "<= 1e-4", error <= 1e-4)


def backends_agree(student: Student, pairs: Pairs) -> Finding:
    """The two exact tangents, and the finite difference along the trajectory."""
    exact, beside, rough = (tangent(student, pairs, b) for b in ("two_pass", "one_pass", "finite_difference"))
    error, small = relative(rough, exact), relative(beside, exact)
    return Finding(
        "tangent backends agree",
        f"relative difference {small:.1e} (one_pass), {error:.1e} (finite difference)",
        "<= 1e-4, <= 5e-2",
        small <= 1e-4 and error <= 5e-2,
    )


def chosen_backend(student: Student, condition: Condition, latent_shape: tuple[int, ...]) -> Finding:
    """What training.tangent=auto takes for this model with the default settings, and why."""
    choice = choose_tangent(validate({"teacher": {"source": "emoji"}}), student, condition, latent_shape)
    return Finding("tangent backend, training.tangent=auto", f"{choice.backend}: {choice.reason}", "any", True)


def tangent(student: Student, pairs: Pairs, backend: str) -> Tensor:
    """cos t sin t dF/dt along the teacher's velocity."""
    dx, dt = tangent_direction(pairs.x, pairs.t, pairs.dxdt, SIGMA_DATA)
    step = 1e-3 if backend == "finite_difference" else None  # small: ReLU in linear attention has kinks
    with torch.no_grad():
        return total_derivative(
            lambda x, t: student(x, t, pairs.condition, pairs.guidance),
            pairs.x / SIGMA_DATA,
            pairs.t,
            dx,
            dt,
            backend,
            step,
        ).dF


def tangent_size(student: Student, pairs: Pairs) -> Finding:
    """How fast F turns along the trajectory; networks whose time runs to 1000 turn a thousand times as fast."""
    scale = (pairs.t.cos() * pairs.t.sin()).view(-1, *[1] * (pairs.x.ndim - 1))
    size = float((tangent(student, pairs, "two_pass") / scale).square().mean().sqrt())
    return Finding(
        "size of dF/dt (root mean square)",
        f"{size:.2f}",
        "<= 50; else objective=discrete, or stepfold retime (Sana)",
        size <= 50,
    )


def guidance_effect(teacher: PipelineTeacher, pairs: Pairs) -> Finding:
    """A guided and an unguided velocity differ."""
    guided = teacher.velocity(pairs.x, pairs.t, pairs.condition, pairs.guidance)
    plain = teacher.velocity(pairs.x, pairs.t, pairs.condition, torch.ones_like(pairs.guidance))
    effect = relative(guided, plain)
    wanted = teacher.guidance_kind != "none"
    return Finding(
        "guidance changes the velocity", f"{effect:.1%}", ">= 1%" if wanted else "any", effect >= 0.01 or not wanted
    )


def free_bytes(device: torch.device) -> int:
    """Memory that nobody has."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def one_step(student: Student, pairs: Pairs, teacher: PipelineTeacher) -> list[Finding]:
    """One real optimiser step: every parameter moves, the loss is finite; what it needs in memory."""
    needed = 4 * sum(p.numel() * p.element_size() for p in student.parameters())  # before, gradient, AdamW's two
    if needed > (free := free_bytes(teacher.device)):
        said = f"all weights and AdamW need {needed / 2**30:.0f} GiB more, {free / 2**30:.0f} are free"
        return [Finding("one step changes the weights", f"not run: {said}", "any; try student.lora=64", True)]
    config: Config = validate(
        {"teacher": {"source": "emoji"}, "optimiser": {"name": "adamw", "lr": 1e-4}, "consistency": {"r_warmup": 0}}
    )
    accelerator = make_accelerator("no")
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    optimiser = make_optimiser(student.parameters(), config.optimiser)
    gc.collect()
    figures = update(student, pairs, config, 0, teacher.sigma_data, accelerator)
    still = [n for n, p in student.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    optimiser.step()
    moved = sum(not torch.equal(before[n], p) for n, p in student.named_parameters())
    total = len(before)
    waiting = [n for n in still if any(part in n for part in teacher.idle_parameters())]
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
