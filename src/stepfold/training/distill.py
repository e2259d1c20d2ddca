"""The loop: prompts in, one-step student out. A batch is `draw`, `collect`, `update`; read `distill` top to bottom."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, AutocastKwargs
from torch import Tensor, nn

from stepfold.config import Config, SpaceSettings
from stepfold.errors import NonFiniteError
from stepfold.maths.blocks import compiled_blocks
from stepfold.objectives.adversarial import Discriminator
from stepfold.prompts.reading import Prompts
from stepfold.spaces.diffusion import noised_pairs
from stepfold.spaces.generation import Velocity, brightness_filter, pairs_from, walk
from stepfold.spaces.pairs import Pairs, pairs_per_prompt
from stepfold.teachers.contract import Condition, Student, Teacher, deepcopy_sharing
from stepfold.training.choices import choose_tangent, keep_freed_memory
from stepfold.training.draws import Draw, draw, guidance_scales, prompt_index, step_samples
from stepfold.training.optimisers import learning_rate, make_optimiser
from stepfold.training.processes import ALONE, Processes, blocks_of, gathered, is_sharded, local, shard, whole
from stepfold.training.runs import (
    BackgroundWrites,
    append_metrics,
    checkpoints,
    load_checkpoint,
    read_metrics,
    rewind_metrics,
    save_checkpoint,
)
from stepfold.training.stages import Stages
from stepfold.training.step_log import StepRecord, of_all, record_of, row_of
from stepfold.training.update import Judgement, update


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
    if choice.recompute:  # autocast would keep copies of all weights until a pass is over
        cast(Any, accelerator).autocast_handler = AutocastKwargs(cache_enabled=False)
        if not training.compile:
            student.recompute_blocks()
    if len(set(guidance_scales(config, teacher))) == 1:
        student.freeze_guidance()
    average = deepcopy_sharing(student, [p for p in student.parameters() if not p.requires_grad]).requires_grad_(False)
    modules: dict[str, nn.Module] = {"student": student, "average": average}
    unsharded = deepcopy_sharing(student, ()).cpu() if sharded and processes.first else None
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
        with stages("teacher"), walk_precision(training.walk_precision, device, teacher.network):
            pairs = collect(
                batch, condition, teacher.velocity, blacks[batch.shape_index], teacher.sigma_data, config.space, x0,
                stand_in=processes.count > 1,
            )  # fmt: skip
        teacher.clear_prompt_cache()  # the memory is the student's now
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
            judgement=judgement, stages=stages,
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
            for group in optimiser.param_groups:
                group["lr"] = rate
            if discriminator:  # its group is the last
                optimiser.param_groups[-1]["lr"] *= config.adversarial.lr_factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            move_average(average, student, min(training.ema, (1 + step) / (10 + step)))
        record = record_of(step, batch.prompts, pairs, figures, norm, rate)
        return replace(record, pairs=kept, num_walked=walked)

    records: list[StepRecord] = []
    skipped = sum("skipped" in row for row in read_metrics(folder))
    batch = pairs = None
    look_every = training.look_every or (1 if device.type == "cpu" else 10)
    compiling: AbstractContextManager[None] = nullcontext()
    if training.compile:
        blocks = chain(blocks_of(teacher.network) or [teacher.network], blocks_of(student) or [student])
        compiling = compiled_blocks(blocks, recompute=choice.recompute)
    began = time.perf_counter()
    wanted = training.background_checkpoints
    in_background = processes.first and (device.type != "cpu" if wanted is None else wanted)
    with compiling, stop_requests() as stop, BackgroundWrites() if in_background else nullcontext() as background:
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
                if background:
                    background.look()
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
                        write=processes.first, background=background,
                    )  # fmt: skip
            if stopping:
                raise KeyboardInterrupt
            if shows and previews:
                with stages("preview"):
                    preview(average, step + 1)
            if not records:
                began = time.perf_counter()
        if processes.any(stop.requested):  # since the last step; what is left of the run is made when it goes on
            raise KeyboardInterrupt
    return with_whole_weights(average, unsharded)


def new_discriminator(teacher: Teacher, seed: int) -> Discriminator:
    """Its first weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Discriminator(teacher.feature_widths)


@contextmanager
def walk_precision(precision: str, device: torch.device, network: nn.Module) -> Iterator[None]:
    """Autocast for the teacher's walks, which casts the weights of `network` once; its states stay in float32."""
    if precision != "bf16":
        yield
        return
    casts = nullcontext() if is_sharded(network) else cast_once(network)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16), casts:
        yield


@contextmanager
def cast_once(network: nn.Module) -> Iterator[None]:
    """Within it autocast casts a frozen weight at its first use and keeps it until it ends, as it does trained weights.

    For calls without a gradient, whose values stay the same to the bit.
    """
    frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)  # what autocast goes by
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


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


@dataclass
class StopRequest:
    """Whether somebody asked the run to stop."""

    requested: bool = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Ctrl-C and SIGTERM set a flag that is read between steps, so that no step stays half done; a second Ctrl-C kills.

    Not a second SIGTERM: where all processes of a job get one, a launcher hands its own on.
    """
    stop = StopRequest()

    def ask(number: int, frame: Any) -> None:
        if stop.requested and number == signal.SIGINT:
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
