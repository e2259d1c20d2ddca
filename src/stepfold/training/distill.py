"""The loop: prompts in, one-step student out. One batch is `draw`, `walk`, `update`; read `distill` top to bottom."""

import copy
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stepfold.config import Config, SpaceSettings
from stepfold.errors import NonFiniteError, UserError
from stepfold.maths.routes import logit_normal_route, random_route, reference_route
from stepfold.maths.schedules import tangent_warmup
from stepfold.maths.tangent import total_derivative
from stepfold.objectives.consistency import ConsistencyOptions, consistency_terms, tangent_direction
from stepfold.prompts.reading import PromptFile, shuffled_index
from stepfold.randomness import normal, uniform
from stepfold.spaces.generation import brightness_filter, pairs_from, walk
from stepfold.spaces.pairs import Pairs
from stepfold.teachers.contract import Student, Teacher
from stepfold.training.optimisers import learning_rate, make_optimiser
from stepfold.training.runs import append_metrics, checkpoints, load_checkpoint, rewind_metrics, save_checkpoint


@dataclass(frozen=True)
class Draw:
    """What one optimiser step starts from; a function of (seed, step) alone.

    Attributes:
        prompts: B strings.
        noise: [B, ...], of standard deviation sigma_data.
        route: [B, N].
        guidance: [B], float32.
        uniform: [B], for the brightness filter.
    """

    prompts: list[str]
    noise: Tensor
    route: Tensor
    guidance: Tensor
    uniform: Tensor


def draw(step: int, prompts: PromptFile, teacher: Teacher, config: Config, device: torch.device) -> Draw:
    """Prompts, noise, routes and guidance scales of a step, each from its own stream, per global sample number."""
    seed, count = config.seed, config.training.prompts_per_step
    samples = range(step * count, (step + 1) * count)
    scales = torch.tensor(config.space.guidance)
    picks: Tensor = torch.cat([uniform((1,), seed, "guidance", i) for i in samples]) * len(scales)
    return Draw(
        prompts=[prompts.prompt(shuffled_index(i, len(prompts), seed)) for i in samples],
        noise=torch.stack([normal(teacher.latent_shape, seed, "noise", i) for i in samples]).to(device)
        * teacher.sigma_data,
        route=torch.stack([draw_route(config.space, seed, step, i, teacher.sigma_data) for i in samples]).to(device),
        guidance=scales[picks.long()].to(device),
        uniform=torch.cat([uniform((1,), seed, "filter", i) for i in samples]).to(device),
    )


def draw_route(space: SpaceSettings, seed: int, step: int, sample: int, sigma_data: float) -> Tensor:
    """One route [N]; shared by the prompts of a step unless `route_per` is `prompt`."""
    key = ("route", step) if space.route_per == "step" else ("route of sample", sample)
    if space.route == "logit_normal":
        return logit_normal_route(
            normal((1, space.route_steps), seed, *key), sigma_data, space.logit_mean, space.logit_std
        )[0]
    numbers = uniform((1, space.route_steps), seed, *key)
    if space.route == "random":
        return random_route(numbers)[0]
    return reference_route(numbers, space.route_shift)[0]


def update(
    student: Student, pairs: Pairs, config: Config, step: int, sigma_data: float, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Adds the gradient of the mean loss over the pairs, in micro-batches; returns per-pair figures [M]."""
    c = config.consistency
    options = ConsistencyOptions(c.prior_weight, c.adaptive_weight, c.normalise, c.normalise_constant)
    r = tangent_warmup(
        step,
        warmup=c.r_warmup,
        final=c.r_final,
        cooldown_start=c.r_cooldown_start,
        cooldown_steps=c.r_cooldown_steps,
        schedule=c.r_schedule,
    )
    denominator = len(pairs) if config.space.filter_denominator == "kept" else pairs.num_walked
    size = config.training.micro_batch or len(pairs)
    figures = defaultdict(list)
    for start in range(0, len(pairs), size):
        part = pairs.rows(slice(start, start + size))

        def network(x_unit: Tensor, t: Tensor, part: Pairs = part) -> Tensor:
            return student(x_unit, t, part.condition, part.guidance)

        dx, dt = tangent_direction(part.x, part.t, part.dxdt, sigma_data)
        with accelerator.autocast():
            tangent = total_derivative(network, part.x / sigma_data, part.t, dx, dt, config.training.tangent)
            log_variance = student.log_variance(part.t, part.guidance)
        terms = consistency_terms(
            tangent.F,
            tangent.dF,
            part.x,
            part.t,
            part.dxdt,
            log_variance.float(),
            r=r,
            sigma_data=sigma_data,
            options=options,
        )
        accelerator.backward(terms.loss.sum() / denominator)
        figures["loss"].append(terms.loss.detach())
        figures["squared_error"].append(terms.squared_error)
        figures["tangent_norm"].append(terms.tangent_norm)
        figures["w_phi"].append(-log_variance.detach())
    return {name: torch.cat(values) for name, values in figures.items()}


@dataclass
class Stages:
    """Seconds spent in each stage of the step."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time that the block takes to stage `name`."""
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began


@dataclass(frozen=True)
class Progress:
    """What `distill` tells its caller after every step."""

    step: int
    row: dict[str, Any]
    stages: dict[str, float]


def distill(
    config: Config,
    folder: Path,
    teacher: Teacher,
    student: Student,
    prompts: PromptFile,
    black: Tensor,
    accelerator: Accelerator,
    *,
    report: Callable[[Progress], None] = lambda progress: None,
    preview: Callable[[Student, int], None] = lambda student, step: None,
) -> Student:
    """Distils `teacher` into `student` and returns the student's exponential moving average.

    Args:
        config: the settings.
        folder: an open run folder; a checkpoint in it is continued from.
        teacher: see `contract.Teacher`.
        student: starts as the teacher; trained in place.
        prompts: the training prompts.
        black: unit-variance latent of a black picture, for the brightness filter.
        accelerator: device, precision.
        report: called after every step.
        preview: called with the average every `preview_every` steps.

    Raises:
        NonFiniteError: a loss or gradient is not finite; the checkpoints are intact.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    training, device = config.training, accelerator.device
    average = copy.deepcopy(student).requires_grad_(False)
    optimiser = make_optimiser(student.parameters(), config.optimiser)
    modules: dict[str, nn.Module] = {"student": student, "average": average}
    saved = checkpoints(folder)
    start = load_checkpoint(saved[-1], modules, optimiser) if saved else 0
    rewind_metrics(folder, start)
    if start == 0:
        preview(average, 0)
    stages = Stages()

    with stop_requests() as stop:
        for step in range(start, training.steps):
            began = time.perf_counter()
            with stages("text"):
                batch = draw(step, prompts, teacher, config, device)
                condition = teacher.encode(batch.prompts)
            with stages("teacher"), rollout_precision(training.rollout_precision, device):
                trajectory = walk(teacher, batch.noise, batch.route, condition, batch.guidance)
            space = config.space
            keep = brightness_filter(
                trajectory.x0,
                black,
                teacher.sigma_data,
                batch.uniform,
                threshold=space.filter_threshold,
                rule=space.filter_rule,
            )
            pairs = pairs_from(trajectory, condition, batch.guidance, keep_first=space.keep_first, keep=keep)

            row: dict[str, Any] = {"step": step, "kept": len(pairs) / pairs.num_walked}
            if len(pairs):
                with stages("student"):
                    figures = update(student, pairs, config, step, teacher.sigma_data, accelerator)
                    norm = accelerator.clip_grad_norm_(student.parameters(), config.optimiser.clip)
                check_finite(figures, norm, step, batch.prompts, pairs)
                with stages("optimiser"):
                    rate = learning_rate(step, training.steps, config.optimiser)
                    for group in optimiser.param_groups:
                        group["lr"] = rate
                    optimiser.step()
                    optimiser.zero_grad(set_to_none=True)
                    move_average(average, student, min(training.ema, (1 + step) / (10 + step)))
                row |= {name: values.mean().item() for name, values in figures.items()}
                row |= {"grad_norm": float(torch.as_tensor(norm)), "lr": rate} | tangent_by_time(
                    pairs.t, figures["tangent_norm"]
                )
            append_metrics(folder, row)
            report(
                Progress(
                    step + 1, row | {"sec": time.perf_counter() - began, "pairs": len(pairs)}, dict(stages.seconds)
                )
            )

            last = step + 1 == training.steps
            if last or stop.requested or (step + 1) % training.checkpoint_every == 0:
                save_checkpoint(folder, step + 1, modules, optimiser, training.keep_checkpoints)
            if stop.requested and not last:
                raise KeyboardInterrupt
            if last or (step + 1) % training.preview_every == 0:
                with stages("preview"):
                    preview(average, step + 1)
    return average


def rollout_precision(precision: str, device: torch.device) -> torch.autocast:
    """Autocast for the teacher's walks; its states stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def move_average(average: Student, student: Student, decay: float) -> None:
    """average <- decay average + (1 - decay) student."""
    torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - decay)


def tangent_by_time(t: Tensor, norm: Tensor, bins: int = 4) -> dict[str, float]:
    """Mean tangent norm in equal bins of t over [0, pi/2]; it falls as the student becomes consistent."""
    index = (t / (torch.pi / 2) * bins).long().clamp(max=bins - 1)
    return {f"tangent_norm_{b}": norm[index == b].mean().item() for b in range(bins) if (index == b).any()}


def check_finite(figures: dict[str, Tensor], grad_norm: Any, step: int, prompts: list[str], pairs: Pairs) -> None:
    """Stops the run with everything one needs to look into it.

    Raises:
        NonFiniteError: naming the step, the prompts, t and the norms.
    """
    bad = ~torch.isfinite(figures["loss"])
    if torch.isfinite(torch.as_tensor(grad_norm)) and not bad.any():
        return
    rows = bad.nonzero().squeeze(1)[:4] if bad.any() else torch.arange(min(4, len(pairs)))
    where = "; ".join(
        f"prompt {prompts[int(pairs.prompt[i])]!r} t={pairs.t[i]:.4f} |x|={pairs.x[i].norm():.3g} "
        f"|dxdt|={pairs.dxdt[i].norm():.3g} tangent={figures['tangent_norm'][i]:.3g}"
        for i in rows.tolist()
    )
    what = f"loss of {int(bad.sum())} of {len(pairs)} pairs" if bad.any() else "gradient"
    raise NonFiniteError(
        f"step {step}: {what} is not finite (gradient norm {float(grad_norm):.3g}): {where}. "
        "The last checkpoint is intact; a lower optimiser.lr, a longer consistency.r_warmup or "
        "training.precision=no usually helps."
    )


@dataclass
class StopRequest:
    """Whether somebody asked the run to stop."""

    requested: bool = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Ctrl-C and SIGTERM set a flag that is read between steps, so that no step stays half done; a second one kills."""
    stop = StopRequest()

    def ask(number: int, frame: Any) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    try:
        old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: its owner handles signals
        old = {}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def make_accelerator(precision: str) -> Accelerator:
    """The device and precision of this run.

    Raises:
        UserError: launched with several processes, which this version does not support.
    """
    accelerator = Accelerator(mixed_precision=precision)
    if accelerator.num_processes > 1:
        raise UserError(
            f"started on {accelerator.num_processes} processes, but this version trains on one; "
            "start it without a launcher"
        )
    return accelerator
