"""The loop: prompts in, one-step student out. A batch is `draw`, `collect`, `update`; read `distill` top to bottom."""

import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepfold.config import Config, SpaceSettings
from stepfold.errors import NonFiniteError, UserError
from stepfold.maths.formulations import euler_step, expand, interpolate
from stepfold.maths.routes import half_pi
from stepfold.maths.schedules import tangent_warmup
from stepfold.maths.tangent import Tangent, total_derivative
from stepfold.objectives.adversarial import Discriminator, discriminator_loss, generator_loss
from stepfold.objectives.consistency import ConsistencyOptions, consistency_terms, tangent_direction
from stepfold.objectives.discrete import discrete_terms
from stepfold.prompts.reading import Prompts
from stepfold.sampling import predict_data
from stepfold.spaces.diffusion import noised_pairs
from stepfold.spaces.generation import Velocity, brightness_filter, pairs_from, walk
from stepfold.spaces.pairs import Pairs, pairs_per_prompt
from stepfold.teachers.contract import Condition, Student, Teacher, sharing_copy
from stepfold.training.choices import choose_tangent, keep_freed_memory
from stepfold.training.draws import Draw, JudgedDraw, draw, guidance_scales, prompt_index, step_samples
from stepfold.training.optimisers import learning_rate, make_optimiser
from stepfold.training.processes import ALONE, Processes, gathered, is_sharded, local, shard, whole
from stepfold.training.runs import (
    append_metrics,
    checkpoints,
    load_checkpoint,
    read_metrics,
    rewind_metrics,
    save_checkpoint,
)


@dataclass(frozen=True)
class Judgement:
    """What the adversarial term needs besides the pairs."""

    teacher: Teacher
    discriminator: Discriminator
    draw: JudgedDraw


def collect(
    batch: Draw,
    condition: Condition,
    velocity: Velocity,
    black: Tensor,
    sigma_data: float,
    space: SpaceSettings,
    x0: Tensor | None = None,
    *,
    stand_in: bool = False,
) -> Pairs:
    """The training pairs of a step; dark pictures are dropped.

    Generation space keeps the states of the teacher's walk. Diffusion space noises clean latents: `x0` [B, ...], of
    standard deviation sigma_data, if given, else the ends of the walks. With `stand_in`, pairs that count for nothing
    where all were dropped.
    """
    trajectory = None
    if x0 is None:
        trajectory = walk(velocity, batch.noise, batch.route, condition, batch.guidance)
        x0 = trajectory.x0
    keep, empty = None, False
    if space.filter_rule != "off":
        keep = brightness_filter(
            x0, black, sigma_data, batch.uniform, threshold=space.filter_threshold, rule=space.filter_rule
        )
        if stand_in and not keep.any():
            keep[0] = empty = True
    if batch.times is None or batch.fresh_noise is None:
        assert trajectory is not None
        pairs = pairs_from(trajectory, condition, batch.guidance, keep_first=space.keep_first, keep=keep)
    else:
        pairs = noised_pairs(velocity, x0, batch.times, batch.fresh_noise, condition, batch.guidance, keep)
    return replace(pairs, stand_in=empty)


BESIDE_STEPS = ("load", "first preview", "preview", "checkpoint", "evaluation")
"""Stages of a run that are no part of its optimiser steps."""


@dataclass
class Stages:
    """Seconds spent in each stage of the step.

    Attributes:
        device: waited for at the end of each stage; None not to wait, and then a GPU's time falls into later stages.
        seconds: by stage.
    """

    device: torch.device | None = None
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time that the block takes to stage `name`."""
        began = time.perf_counter()
        yield
        if self.device and self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - began


def update(
    student: Student,
    pairs: Pairs,
    config: Config,
    step: int,
    sigma_data: float,
    accelerator: Accelerator,
    backend: str = "two_pass",
    *,
    derivative: Callable[..., Tangent] = total_derivative,
    predict: Callable[..., Tensor] = predict_data,
    judgement: Judgement | None = None,
    stages: Stages | None = None,
    denominator: float | None = None,
    most_pairs: int = 0,
) -> dict[str, Tensor]:
    """Adds the gradient of the mean loss over the pairs, in micro-batches; returns per-pair figures [M].

    `backend` is the tangent's. `derivative` is `total_derivative` and `predict` is `predict_data`, or their compiled
    selves. With a `judgement`, the discriminator gets the gradient of its own loss. `stages` notes what forward and
    backward passes take. Where several processes share a step, the mean is over `denominator` pairs, those of the
    others among them, and this one makes as many passes as one that has `most_pairs`.
    """
    stages = stages or Stages()
    denominator = denominator or (len(pairs) if config.space.filter_denominator == "kept" else pairs.num_walked)
    most = max(most_pairs, len(pairs))
    size = min(config.training.micro_batch or most, most)
    passes = [(slice(start, start + size), not pairs.stand_in) for start in range(0, len(pairs), size)]
    passes += [(slice(1), False)] * (-(-most // size) - len(passes))
    figures = defaultdict(list)
    for rows_of_pass, counts in passes:
        part = pairs.rows(rows_of_pass)
        with stages("student forward"):
            if config.objective == "discrete":
                whole_walks = (
                    config.space.kind == "generation"
                    and size % pairs_per_prompt(config.space.route_steps, config.space.keep_first) == 0
                )
                loss, rows = discrete_loss(student, part, config, sigma_data, accelerator, predict, whole_walks)
            else:
                loss, rows = continuous_loss(student, part, config, step, sigma_data, accelerator, backend, derivative)
        for_heads = None
        if judgement:
            with stages("adversarial"):
                for_student, for_heads = adversarial_losses(student, part, judgement, config, accelerator, predict)
            loss = loss + config.adversarial.weight * for_student
            rows |= {"loss": loss, "generator_loss": for_student, "discriminator_loss": for_heads}
        with stages("student backward"), student_attention(config.training.precision, pairs.x.device):
            inputs = None if is_sharded(student) else [p for p in student.parameters() if p.requires_grad]
            accelerator.backward(counts * (loss.sum() / denominator), inputs=inputs)
        if for_heads is not None:
            with stages("adversarial"):
                accelerator.backward(counts * (for_heads.sum() / denominator))
        for name, values in rows.items():
            figures[name].append(values.detach()[: None if counts else 0])
    return {name: torch.cat(values) for name, values in figures.items()}


def continuous_loss(
    student: Student,
    part: Pairs,
    config: Config,
    step: int,
    sigma_data: float,
    accelerator: Accelerator,
    backend: str,
    derivative: Callable[..., Tangent],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Continuous-time consistency, per pair [M]: the loss, with gradient, and what to log."""
    c = config.consistency
    r = tangent_warmup(
        step,
        warmup=c.r_warmup,
        final=c.r_final,
        cooldown_start=c.r_cooldown_start,
        cooldown_steps=c.r_cooldown_steps,
        schedule=c.r_schedule,
    )

    def network(x_unit: Tensor, t: Tensor) -> Tensor:
        return student(x_unit, t, part.condition, part.guidance)

    dx, dt = tangent_direction(part.x, part.t, part.dxdt, sigma_data)
    with accelerator.autocast(), student_attention(config.training.precision, part.x.device):
        tangent = derivative(network, part.x / sigma_data, part.t, dx, dt, backend)
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
        options=ConsistencyOptions(c.prior_weight, c.adaptive_weight, c.normalise, c.normalise_constant),
    )
    return terms.loss, {
        "loss": terms.loss,
        "squared_error": terms.squared_error,
        "tangent_norm": terms.tangent_norm,
        "w_phi": -log_variance.detach(),
        "|F|": tangent.F.detach().flatten(1).norm(dim=1),
    }


def discrete_loss(
    student: Student,
    part: Pairs,
    config: Config,
    sigma_data: float,
    accelerator: Accelerator,
    predict: Callable[..., Tensor],
    whole_walks: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Discrete consistency, per pair [M]: the loss, with gradient, and what to log. The student is its own target.

    With `whole_walks`, each pair's step ends in the state of the pair after it, or at t = 0, where f is the identity:
    one forward pass yields pictures and targets.
    """

    def picture(x: Tensor, t: Tensor) -> Tensor:
        with accelerator.autocast(), student_attention(config.training.precision, x.device):
            return predict(student, x, t, part.condition, part.guidance, sigma_data)

    x_next = euler_step(part.x, part.t, part.t_next, part.dxdt)
    x0 = picture(part.x, part.t)
    if whole_walks:
        target = torch.where(expand(part.t_next > 0, x0), x0.roll(-1, 0), x_next)
    else:
        with torch.no_grad():
            target = picture(x_next, part.t_next)
    terms = discrete_terms(x0, target, config.discrete.huber_constant)
    return terms.loss, {"loss": terms.loss, "squared_error": terms.squared_error}


def adversarial_losses(
    student: Student,
    part: Pairs,
    judgement: Judgement,
    config: Config,
    accelerator: Accelerator,
    predict: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    """Sana-Sprint's adversarial term, per pair [M]: what the student minimises, and what the discriminator does.

    The student's picture, made from the pair's state or from pure noise, and the pair's clean latent are re-noised to
    one time, and heads on the frozen teacher's features tell them apart.
    """
    teacher, draw = judgement.teacher, judgement.draw.rows(part.number)
    x = torch.where(expand(draw.at_start, part.x), draw.start, part.x)
    t = torch.where(draw.at_start, min(half_pi(part.t.dtype), teacher.start_time), part.t)

    def features(picture: Tensor, noise: Tensor) -> list[Tensor]:
        return teacher.features(interpolate(picture, noise, draw.t), draw.t, part.condition, part.guidance)

    with accelerator.autocast(), student_attention(config.training.precision, x.device):
        fake = predict(student, x, t, part.condition, part.guidance, teacher.sigma_data)
        fake_features = features(fake, draw.noise[:, 0])
        for_student = generator_loss(judgement.discriminator(fake_features))
        with torch.no_grad():
            real_features = features(part.x0, draw.noise[:, 1])
        real_logits = judgement.discriminator(real_features)
        fake_logits = judgement.discriminator([feature.detach() for feature in fake_features])
    return for_student, discriminator_loss(real_logits, fake_logits)


@dataclass(frozen=True)
class Progress:
    """What `distill` tells its caller after every step."""

    step: int
    row: dict[str, Any]


def distill(
    config: Config,
    folder: Path,
    teacher: Teacher,
    student: Student,
    prompts: Prompts,
    blacks: Sequence[Tensor],
    accelerator: Accelerator,
    *,
    processes: Processes = ALONE,
    latents: Callable[[list[int]], Tensor] | None = None,
    conditions: Callable[[list[int]], Condition] | None = None,
    stages: Stages | None = None,
    note_tangent: Callable[[str], None] = lambda text: None,
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
        blacks: unit-variance latents of a black picture, for the brightness filter: one for each of the teacher's
            latent shapes.
        accelerator: device, precision.
        processes: that share every step. All of them call this function; the first one writes.
        latents: numbers of B prompts -> clean latents [B, ...] of their images, for `space.kind=images`.
        conditions: numbers of B prompts -> what the teacher would encode them to; None to have it do so.
        stages: notes the time of every stage.
        note_tangent: called with the tangent's backend and the reason for it.
        report: called for every step, some steps at a time where a device would have to be waited for.
        preview: called with the average every `preview_every` steps, and again for the step that is continued from; in
            the first process, or in all of them where the weights are sharded, since they are whole only where all take
            part.

    Returns:
        The average; where the weights are sharded, whole in the first process, and in the others of no use.

    Raises:
        NonFiniteError: a loss or gradient is not finite; the checkpoints are intact.
        UserError: `training.compile` is on and compiling fails; another process is gone.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    training, device = config.training, accelerator.device
    per_prompt = pairs_per_prompt(config.space.route_steps, config.space.keep_first)
    share = processes.largest_share(training.prompts_per_step)
    sharded = training.shard != "none" and processes.count > 1
    keep_freed_memory(device)
    first = conditions([0]) if conditions else teacher.encode([prompts.prompt(0)])
    choice = choose_tangent(config, student, first, max(teacher.latent_shapes, key=math.prod), share)
    note_tangent(f"{choice.backend} ({choice.reason})")
    if choice.recompute:
        student.recompute_blocks()
    if len(set(guidance_scales(config, teacher))) == 1:
        student.freeze_guidance()
    average = sharing_copy(student, [p for p in student.parameters() if not p.requires_grad]).requires_grad_(False)
    modules: dict[str, nn.Module] = {"student": student, "average": average}
    unsharded = sharing_copy(student, ()).cpu() if sharded and processes.first else None
    if sharded:
        for network in (student, average):
            shard(network, processes, "log_variance")
        if training.shard == "all":
            shard(teacher.network, processes)
    discriminator = new_discriminator(teacher, config.seed).to(device) if config.adversarial.weight else None
    if discriminator:
        modules["discriminator"] = discriminator
    optimiser = make_optimiser([p for p in student.parameters() if p.requires_grad], config.optimiser)
    if discriminator:
        optimiser.add_param_group({"params": list(discriminator.parameters())})
    saved = checkpoints(folder)
    start = load_checkpoint(saved[-1], modules, optimiser, student.shared) if saved else 0
    if processes.first:
        rewind_metrics(folder, start)
    stages = stages or Stages()
    processes.wait()
    previews = processes.first or sharded
    due = start % training.preview_every == 0 or start == training.steps
    if due and previews:  # a kill may have come before it was drawn
        with stages("first preview"):
            preview(average, start)
    velocity, derivative, predict = teacher.velocity, total_derivative, predict_data
    if training.compile:
        velocity, derivative, predict = compiled(velocity), compiled(derivative), compiled(predict)

    encoded: dict[int, Condition] = {}

    def encode_ahead(number: int) -> Condition:
        """The condition of batch `number`; its group is encoded with it, the same one however a run began."""
        if number not in encoded:
            encoded.clear()
            group = number // training.encode_ahead * training.encode_ahead
            shares = [processes.share(step_samples(n, config)) for n in range(group, group + training.encode_ahead)]
            index = prompt_index(chain.from_iterable(shares), prompts, config.seed)
            together, size = teacher.encode([prompts.prompt(i) for i in index]), len(shares[0])
            encoded.update({group + k: together.rows(slice(k * size, (k + 1) * size)) for k in range(len(shares))})
            if training.encode_ahead > 1:
                teacher.park_text_encoder()
        return encoded[number]

    def walk_teacher(number: int) -> tuple[Draw, Pairs]:
        """Draws batch `number`, and its pairs."""
        with stages("data"):
            batch = draw(number, prompts, teacher, config, device, processes)
        with stages("text"):
            condition = conditions(batch.index) if conditions else encode_ahead(number)
            if training.compile:  # equal shapes: one graph, and a resumed run has the same one
                condition = condition.padded(max(teacher.max_tokens, condition.mask.shape[1]))
        with stages("images"):
            x0 = latents(batch.index).to(device) if latents else None
        with stages("teacher"), rollout_precision(training.rollout_precision, device):
            pairs = collect(
                batch, condition, velocity, blacks[batch.shape_index], teacher.sigma_data, config.space, x0,
                stand_in=processes.count > 1,
            )  # fmt: skip
        teacher.forget_prompts()  # the memory is the student's now
        return batch, pairs

    def finished_row(record: StepRecord) -> dict[str, Any]:
        """See `row_of`; with the pairs of all processes."""
        if processes.count == 1 or record.norm is None:
            return row_of(record)
        samples = step_samples(record.step // config.space.reuse, config)
        texts = [prompts.prompt(i) for i in prompt_index(samples, prompts, config.seed)]
        return row_of(of_all(replace(record, prompts=texts), processes, share))

    def train_on(batch: Draw, pairs: Pairs, step: int) -> StepRecord:
        """One optimiser step. It asks the device for nothing but, where pictures are filtered, how many are left."""
        walked = training.prompts_per_step * per_prompt
        kept = 0 if pairs.stand_in else len(pairs)
        if processes.count > 1:
            filtered = config.space.filter_rule != "off"
            kept = int(processes.sum(torch.tensor(float(kept), device=device))) if filtered else walked
        if not kept:
            return StepRecord(step, [], 0, walked)
        judgement = Judgement(teacher, discriminator, batch.judged) if discriminator and batch.judged else None
        figures = update(
            student, pairs, config, step, teacher.sigma_data, accelerator, choice.backend,
            derivative=derivative, predict=predict, judgement=judgement, stages=stages,
            denominator=kept if config.space.filter_denominator == "kept" else walked,
            most_pairs=share * per_prompt if processes.count > 1 else 0,
        )  # fmt: skip
        with stages("optimiser"):
            processes.sum_gradients(student.parameters())
            norm = whole(torch.as_tensor(accelerator.clip_grad_norm_(student.parameters(), config.optimiser.clip)))
            if discriminator:
                processes.sum_gradients(discriminator.parameters())
                # its gradient counts, too: a norm that is not finite makes the sum so
                heads = accelerator.clip_grad_norm_(discriminator.parameters(), config.optimiser.clip)
                norm = norm + 0 * torch.as_tensor(heads)
            if training.skip_nonfinite and not bool(norm.isfinite()):  # waits for the device
                optimiser.zero_grad(set_to_none=True)
                record = record_of(step, batch.prompts, pairs, figures, norm, 0.0)
                return replace(record, pairs=kept, num_walked=walked, skipped=True)
            rate = learning_rate(step, training.steps, config.optimiser)
            for group, factor in zip(optimiser.param_groups, (1.0, config.adversarial.lr_factor), strict=False):
                group["lr"] = factor * rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            move_average(average, student, min(training.ema, (1 + step) / (10 + step)))
        record = record_of(step, batch.prompts, pairs, figures, norm, rate)
        return replace(record, pairs=kept, num_walked=walked)

    records: list[StepRecord] = []
    skipped = sum("skipped" in row for row in read_metrics(folder))
    batch = pairs = None
    look_every = training.look_every or (1 if device.type == "cpu" else 10)
    began = time.perf_counter()
    with stop_requests() as stop:
        for step in range(start, training.steps):
            if batch is None or pairs is None or step % config.space.reuse == 0:
                batch, pairs = walk_teacher(step // config.space.reuse)
            records.append(train_on(batch, pairs, step))

            last, asked = step + 1 == training.steps, stop.requested  # read once: a request in between waits a step
            saves = last or (step + 1) % training.checkpoint_every == 0
            shows = last or (step + 1) % training.preview_every == 0
            looks = saves or shows or len(records) == look_every or (asked and processes.count == 1)
            stopping = looks and processes.any(asked)
            saves = saves or stopping
            if looks:
                rows = [finished_row(record) for record in records]  # raises if a step went wrong: nothing is kept
                skipped += sum("skipped" in row for row in rows)
                if skipped > training.skip_nonfinite:
                    what = next(row["nonfinite"] for row in reversed(rows) if "nonfinite" in row)
                    raise NonFiniteError(
                        f"step {step}: {what}; that makes {skipped} such steps, and training.skip_nonfinite allows "
                        f"{training.skip_nonfinite} to be skipped. The last checkpoint is intact."
                    )
                seconds = (time.perf_counter() - began) / len(rows)
                for record, row in zip(records, rows, strict=True):
                    if processes.first:
                        append_metrics(folder, row)
                    report(Progress(record.step + 1, row | {"sec": seconds, "pairs": record.pairs}))
                records.clear()
            if saves:
                with stages("checkpoint"):
                    save_checkpoint(
                        folder, step + 1, modules, optimiser, training.keep_checkpoints, student.shared,
                        write=processes.first,
                    )  # fmt: skip
            if stopping and not last:
                raise KeyboardInterrupt
            if shows and previews:
                with stages("preview"):
                    preview(average, step + 1)
            if not records:
                began = time.perf_counter()
    return with_whole_weights(average, unsharded)


@dataclass(frozen=True)
class StepRecord:
    """What a step leaves behind for the log, still on the device.

    Attributes:
        step: its number.
        prompts: its prompts.
        pairs: how many pairs it trained on.
        num_walked: how many there would have been, had none been filtered out.
        prompt: int64 [M], which prompt each pair belongs to.
        numbers: per pair [M]: the time, norms, and the figures of the objective.
        norm: of the gradient.
        rate: the learning rate.
        skipped: the gradient was not finite, and the update was left out as `training.skip_nonfinite` allows.
    """

    step: int
    prompts: list[str]
    pairs: int
    num_walked: int
    prompt: Tensor | None = None
    numbers: dict[str, Tensor] = field(default_factory=dict)
    norm: Tensor | None = None
    rate: float = 0.0
    skipped: bool = False


def record_of(
    step: int, prompts: list[str], pairs: Pairs, figures: dict[str, Tensor], norm: Tensor, rate: float
) -> StepRecord:
    """See `StepRecord`; of no pairs where they only stand in for some."""
    pairs = pairs.rows(slice(0)) if pairs.stand_in else pairs
    sizes = {"t": pairs.t, "|x|": pairs.x.flatten(1).norm(dim=1), "|dxdt|": pairs.dxdt.flatten(1).norm(dim=1)}
    return StepRecord(step, prompts, len(pairs), pairs.num_walked, pairs.prompt, sizes | figures, norm, rate)


def of_all(record: StepRecord, processes: Processes, most_prompts: int) -> StepRecord:
    """The record of a process, with its pairs and all others', in the order that one process would have them.

    Args:
        record: its `prompts` are those of all processes.
        processes: all of them call this.
        most_prompts: the most prompts that one has.
    """
    assert record.prompt is not None
    own = processes.share(range(len(record.prompts)))
    rows = torch.stack([record.prompt + own.start, *(values.float() for values in record.numbers.values())], 1)
    most_pairs = most_prompts * record.num_walked // len(record.prompts)
    prompt, *numbers = processes.gather(rows, most_pairs).unbind(1)
    return replace(record, prompt=prompt.long(), numbers=dict(zip(record.numbers, numbers, strict=True)))


def row_of(record: StepRecord) -> dict[str, Any]:
    """A step's line of the metrics file; the place where the device is waited for.

    Raises:
        NonFiniteError: the loss or the gradient is not finite; it names the step, the prompts, t and the norms.
    """
    row: dict[str, Any] = {"step": record.step, "kept": record.pairs / record.num_walked}
    if record.norm is None or record.prompt is None:
        return row
    numbers = {name: values.cpu() for name, values in record.numbers.items()}
    if record.skipped:
        return row | {"skipped": 1, "nonfinite": f"{nonfinite_place(numbers)[0]} is not finite"}
    check_finite(record.step, record.prompts, record.prompt.tolist(), numbers, float(record.norm))
    row |= {name: values.mean().item() for name, values in numbers.items() if name not in ("t", "|x|", "|dxdt|", "|F|")}
    row |= {"grad_norm": float(record.norm), "lr": record.rate}
    if "tangent_norm" in numbers:
        row |= tangent_by_time(numbers["t"], numbers["tangent_norm"])
    return row


def new_discriminator(teacher: Teacher, seed: int) -> Discriminator:
    """Its first weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Discriminator(teacher.feature_widths)


def rollout_precision(precision: str, device: torch.device) -> torch.autocast:
    """Autocast for the teacher's walks; its states stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled at its first call, once for every set of shapes.

    The returned function raises:
        UserError: the compiler is missing or fails.
    """
    from torch._dynamo.exc import TorchDynamoException  # imported late: it takes a second

    fast = torch.compile(function, dynamic=False)

    def call(*args: Any) -> Any:
        try:
            return fast(*args)
        except TorchDynamoException as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"compiling {function.__name__} failed ({reason}); on a CPU it needs a C++ compiler "
                "and the headers of Python (Debian: g++, python3-dev); or go on without: --set training.compile=false"
            ) from None

    return call


def student_attention(precision: str, device: torch.device) -> AbstractContextManager:
    """Plain attention where fused attention is the slow one: backward in bfloat16 on a CPU (docs/lab-log.md).

    Around the backward pass too: blocks that it computes again have to take the way they took before.
    """
    return sdpa_kernel(SDPBackend.MATH) if precision == "bf16" and device.type == "cpu" else nullcontext()


@torch.no_grad()
def move_average(average: Student, student: Student, decay: float) -> None:
    """average <- decay average + (1 - decay) student."""
    pairs = [(a, p) for a, p in zip(average.parameters(), student.parameters(), strict=True) if a is not p]
    torch._foreach_lerp_([local(a) for a, _ in pairs], [local(p) for _, p in pairs], 1 - decay)


def with_whole_weights(average: Student, unsharded: Student | None) -> Student:
    """The average; where it is sharded, in `unsharded` if there is one. All processes have to ask for its weights."""
    if not is_sharded(average):
        return average
    state = gathered(average.state_dict(), keep=unsharded is not None)
    if unsharded is None:
        return average
    unsharded.load_state_dict(state)
    return unsharded.requires_grad_(False).to(next(average.parameters()).device)


def tangent_by_time(t: Tensor, norm: Tensor, bins: int = 4) -> dict[str, float]:
    """Mean tangent norm in equal bins of t over [0, pi/2]; it falls as the student becomes consistent."""
    index = (t / (torch.pi / 2) * bins).long().clamp(max=bins - 1)
    return {f"tangent_norm_{b}": norm[index == b].mean().item() for b in range(bins) if (index == b).any()}


PLACES = {
    "|x|": "teacher's output", "|dxdt|": "teacher's output", "|F|": "student's output", "tangent_norm": "tangent",
    "loss": "loss",
}  # fmt: skip
"""Figures of a pair, in the order in which they are computed -> what each is a figure of."""


def nonfinite_place(numbers: dict[str, Tensor]) -> tuple[str, Tensor]:
    """Where in a step the first number that is not finite came up, and for which pairs, bool [M].

    The gradient, and no pair, where all of them are finite.
    """
    for name, place in PLACES.items():
        if name in numbers and (bad := ~torch.isfinite(numbers[name])).any():
            return place, bad
    return "gradient", torch.zeros_like(numbers["loss"], dtype=torch.bool)


def check_finite(
    step: int, prompts: list[str], prompt: list[int], numbers: dict[str, Tensor], grad_norm: float
) -> None:
    """Stops the run with everything one needs to look into it.

    Args:
        step: its number.
        prompts: B strings.
        prompt: which of them each pair belongs to, M numbers.
        numbers: per pair [M], `loss` among them.
        grad_norm: of the whole gradient.

    Raises:
        NonFiniteError: naming the step, the prompts, t and the norms.
    """
    if math.isfinite(grad_norm) and bool(torch.isfinite(numbers["loss"]).all()):
        return
    place, bad = nonfinite_place(numbers)
    rows = bad.nonzero().squeeze(1)[:4] if bad.any() else torch.arange(min(4, len(prompt)))
    where = "; ".join(
        f"prompt {prompts[prompt[i]]!r} " + " ".join(f"{k}={v[i]:.4g}" for k, v in numbers.items() if k != "loss")
        for i in rows.tolist()
    )
    what = f"{place} of {int(bad.sum())} of {len(prompt)} pairs" if bad.any() else place
    raise NonFiniteError(
        f"step {step}: {what} is not finite (gradient norm {grad_norm:.3g}): {where}. "
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


def make_accelerator(precision: str, *, several: bool = False) -> Accelerator:
    """The device and precision of this run.

    Args:
        precision: `no` or `bf16`.
        several: whether the caller can share its work between processes.

    Raises:
        UserError: launched with several processes though the caller cannot, or with the launcher's own sharding.
    """
    waits = InitProcessGroupKwargs(timeout=timedelta(hours=1))  # the first one may encode a folder of images
    on_cpu = not torch.accelerator.is_available()  # has to be said, or several processes do not find each other there
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=[waits])
    if accelerator.num_processes > 1 and not several:
        raise UserError(
            f"started on {accelerator.num_processes} processes, but this command works in one; "
            "start it without a launcher"
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"started with the launcher's {accelerator.distributed_type.value}; launch plainly, and spread the weights "
            "with --set training.shard=student (or all: the teacher's too)"
        )
    return accelerator


def processes_of(accelerator: Accelerator) -> Processes:
    """The processes that this one was launched with."""
    return Processes(accelerator.num_processes, accelerator.process_index, accelerator.device)
