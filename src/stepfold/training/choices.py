"""What `auto` becomes on this machine, for this model: precision and the tangent's backend."""

import ctypes
import math
import platform
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from stepfold.config import Config
from stepfold.errors import UserError
from stepfold.maths.attention import QUERY_CHUNK, LongestAttention
from stepfold.maths.tangent import total_derivative
from stepfold.methods import METHODS
from stepfold.randomness import normal
from stepfold.teachers.contract import Condition, Student
from stepfold.training.states import states_per_prompt
from stepfold.training.terms import terms_of

AGREEMENT = 1e-3  # relative difference between exact tangents in float32 that rounding explains
HALF_AGREEMENT = 5e-2  # and in bfloat16, in which a LoRA on a teacher of such weights computes
TRIALS = 3  # states at which they may differ by more before they are said to
MEMORY_SHARE = 0.8  # of the device's memory, that the estimate of a step may take
LARGEST_HEAP_BLOCK = 32 * 2**20  # bytes; glibc takes larger ones from the system whatever it is told
STATES_PER_WEIGHT = {"adamw": 5, "came": 4}  # weight, gradient, average, first moment; AdamW's second


def choose_precision(config: Config, device: str = "auto") -> Config:
    """`auto` becomes what this machine is faster with on a device, so that the run folder says what was used."""
    fast = "bf16" if has_bf16(device_here() if device == "auto" else torch.device(device)) else "no"
    names = ("precision", "walk_precision")
    changes = {name: fast for name in names if getattr(config.training, name) == "auto"}
    if "precision" in changes and config.training.tangent == "finite_difference":
        changes["precision"] = "no"  # rounding would swamp the difference
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def device_here() -> torch.device:
    """The accelerator, if there is one; a torch that was built for one names it even on a machine without."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware; where it does not, float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextmanager
def full_float32() -> Iterator[None]:
    """Within it float32 is float32: by default torch lets a GPU round the inputs of convolutions to TF32, 1e-3 each."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def keep_freed_memory(device: torch.device) -> bool:
    """Has the C library keep what a step on a CPU frees, for the next step; says whether it does.

    By default it gives large blocks back to the system, and every step waits for fresh pages (docs/lab-log.md). Linux
    with glibc only. What a process takes at most stays the same for the bundled teacher; fragments made it half as much
    again for Sana 0.6B at 1024 px.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3  # names and numbers of malloc.h
    return bool(mallopt(mmap_threshold, LARGEST_HEAP_BLOCK) and mallopt(trim_threshold, 2**31 - 1))


@dataclass(frozen=True)
class TangentChoice:
    """Which backend, and why.

    Attributes:
        backend: a name from `tangent.BACKENDS`, or `none`.
        recompute: whether the backward pass computes the blocks' forward again.
        reason: for people.
    """

    backend: str
    recompute: bool
    reason: str


def choose_tangent(
    config: Config,
    student: Student,
    condition: Condition,
    latent_shape: tuple[int, ...],
    num_prompts: int | None = None,
    critics: Iterable[nn.Module] = (),
) -> TangentChoice:
    """The backend of `training.tangent`; `auto` follows this rule, in this order.

    1. Most objectives have no tangent (`METHODS`).
    2. `one_pass`, if on this model it runs and agrees with `two_pass` (on one pair, in float32); else `two_pass`, or
       where that does not run either, `finite_difference`.
    3. Compiled, `one_pass` becomes `two_pass` where block and tangent cannot be one piece of code: torch does not
       compile the tangent of a group norm, and unfused attention of many queries would be in memory whole.
    4. Where that step is estimated to need more than 80% of the device's memory, the blocks are recomputed, if the
       student knows them: `one_pass` becomes `block`. The estimate: what autograd keeps for the pairs of a backward
       pass, the weights as often as the optimiser has them, and on a GPU what this run holds there besides: teacher,
       text encoder.

    Args:
        config: the settings.
        student: on its device.
        condition: one row.
        latent_shape: of one sample.
        num_prompts: trajectories that this process has in a step; None for all of `training.prompts_per_step`.
        critics: networks that are trained beside the student.
    """
    training = config.training
    if not (without := METHODS[config.objective].no_tangent) and training.tangent != "auto":
        return TangentChoice(training.tangent, training.checkpointing or training.tangent == "block", "as set")
    count = num_prompts or training.prompts_per_step
    need, fits = memory_estimate(config, student, condition, latent_shape, count, critics)
    recompute = training.checkpointing or (not fits and student.can_recompute)
    if without:
        name, reason = "none", without
    else:
        half = config.student_in_half
        name, reason = runs_here(student, condition, latent_shape, HALF_AGREEMENT if half else AGREEMENT)
        if training.compile and name == "one_pass" and (problem := not_in_one_piece(student, condition, latent_shape)):
            name, reason = "two_pass", f"compiled, {problem}, so two_pass"
        if half and name == "finite_difference":
            raise UserError(f"{reason}, which needs float32; leave teacher.dtype out, or take objective=discrete")
    much = f"about {need:.2g} GiB" if math.isfinite(need) else "more than there is"
    memory = f"activations and states {much}" + (", blocks recomputed" if recompute else "")
    if not fits and not recompute:
        memory += ", which may be too much, and its blocks are not known; lower training.micro_batch"
    return TangentChoice("block" if name == "one_pass" and recompute else name, recompute, f"{reason}; {memory}")


def runs_here(
    student: Student, condition: Condition, latent_shape: tuple[int, ...], agreement: float
) -> tuple[str, str]:
    """The cheapest backend that this model allows, and why no cheaper one; tried on a pair, without autocast.

    `agreement` is the relative difference between `one_pass` and `two_pass` that is taken for rounding. Where they
    differ by more, other states are tried: with a ReLU at its kink rounding decides on which side it is taken.
    """
    difference = math.inf
    for attempt in range(TRIALS):
        network, x, t = trial(student, condition, latent_shape, attempt)
        direction = (normal(latent_shape, attempt, "tangent trial")[None].to(x), torch.full_like(t, 0.5))
        found: dict[str, Tensor] = {}
        problems: dict[str, str] = {}
        for backend in ("one_pass", "two_pass"):
            try:
                with torch.no_grad(), full_float32():
                    found[backend] = total_derivative(network, x, t, *direction, backend=backend).dF
            except (UserError, RuntimeError, TypeError, ValueError) as error:
                line = (str(error).strip().splitlines() or [type(error).__name__])[0]
                problems[backend] = f"{backend} cannot follow this model ({line})"
        if "two_pass" in problems:  # then what one_pass found cannot be trusted either
            return "finite_difference", f"{problems['two_pass']}, so finite_difference"
        if "one_pass" in problems:
            return "two_pass", f"{problems['one_pass']}, so two_pass"
        away = float((found["one_pass"] - found["two_pass"]).norm() / found["two_pass"].norm().clamp(min=1e-12))
        difference = min(difference, away)
        if difference <= agreement:
            return "one_pass", "one_pass agrees with two_pass on this model"
    return "two_pass", f"one_pass differs from two_pass by {difference:.1e} on this model, so two_pass"


def not_in_one_piece(student: Student, condition: Condition, latent_shape: tuple[int, ...]) -> str | None:
    """Why blocks of this model are not compiled together with their tangents; None where they are."""
    if any(isinstance(module, nn.GroupNorm) for module in student.modules()):
        return "and torch cannot compile the tangent of a group norm"
    network, x, t = trial(student, condition, latent_shape)
    with torch.no_grad(), LongestAttention() as longest:
        network(x, t)
    if longest.queries > QUERY_CHUNK:
        return f"and unfused attention of {longest.queries} queries would be in memory whole"
    return None


def trial(
    student: Student, condition: Condition, latent_shape: tuple[int, ...], number: int = 0, count: int = 1
) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    """The student as a function of a made-up state x / sigma_data [count, ...] and its time [count], and these two."""
    device, condition = next(student.parameters()).device, condition.expand(count)
    guidance = torch.full((count,), 4.5, device=device)
    x = normal((count, *latent_shape), number, "trial").to(device)
    return lambda x, t: student(x, t, condition, guidance), x, torch.full((count,), 0.8, device=device)


def memory_estimate(
    config: Config,
    student: Student,
    condition: Condition,
    latent_shape: tuple[int, ...],
    num_prompts: int,
    critics: Iterable[nn.Module] = (),
) -> tuple[float, bool]:
    """(GiB that the student's part of a step needs with all activations kept, whether the device has them to spare).

    Infinitely many where not even three pairs have room.
    """
    device = next(student.parameters()).device
    pairs = num_prompts * max(states_per_prompt(term.space, config) for term in terms_of(config))
    trained = sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
    kept_still = [*(p for p in student.parameters() if not p.requires_grad), *student.buffers()]
    frozen = sum(value.numel() * value.element_size() for value in kept_still)

    def kept(count: int) -> int:
        network, x, t = trial(student, condition, latent_shape, count=count)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.training.precision == "bf16"):
            return kept_bytes(lambda: network(x, t))

    try:
        two, three = kept(2), kept(3)  # autocast's copies of the weights are in both; of one, some is a view
    except torch.OutOfMemoryError:
        return math.inf, False
    need = two + (three - two) * (min(config.training.micro_batch or pairs, pairs) - 2)
    states = STATES_PER_WEIGHT[config.optimiser.name]
    beside = sum(p.numel() * p.element_size() for critic in critics for p in critic.parameters() if p.requires_grad)
    need += states * trained + frozen + (states - 1) * beside  # a critic has no average
    need += held_besides(trained + frozen + beside, device)
    return need / 2**30, need <= MEMORY_SHARE * device_memory(device)


def held_besides(own: int, device: torch.device) -> int:
    """Bytes that this process has on a GPU besides `own` of the student's; 0 on a CPU, where it is not known."""
    return max(0, torch.cuda.memory_allocated(device) - own) if device.type == "cuda" else 0


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """What autograd would keep of a forward pass for its backward pass, leaves such as weights left out.

    Nothing is kept: the pass takes the memory of one without a graph.
    """
    total, alive = 0, set[int]()

    def note(value: Tensor) -> None:
        nonlocal total
        storage = value.untyped_storage()
        number = storage._cdata
        if not value.is_leaf and number not in alive:
            total += storage.nbytes()
            alive.add(number)
            weakref.finalize(storage, alive.discard, number)  # the next one may get its number

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda nothing: nothing):
        forward()
    return total


def device_memory(device: torch.device) -> int:
    """All of a device's memory in bytes, so that the choice does not depend on what else runs."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
