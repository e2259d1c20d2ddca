"""The run: prompts in, few-step student out. Read `distill` top to bottom, then `step.train_step`."""

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator, AutocastKwargs
from torch import Tensor, nn

from stepfold.config import Config, phases_of
from stepfold.errors import NonFiniteError
from stepfold.maths.blocks import compiled_blocks
from stepfold.objectives.contract import Networks
from stepfold.prompts.reading import Prompts
from stepfold.teachers.contract import Condition, Student, Teacher, deepcopy_sharing
from stepfold.training.batches import Batches, Conditions, Latents
from stepfold.training.choices import TangentChoice, choose_tangent, keep_freed_memory
from stepfold.training.critics import critic_betas, critics_of, new_critics
from stepfold.training.draws import guidance_scales, prompt_index, step_samples
from stepfold.training.optimisers import add_group, make_optimiser
from stepfold.training.precision import student_precision, walk_precision
from stepfold.training.processes import ALONE, Processes, blocks_of, gathered, is_sharded, shard
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
from stepfold.training.step import Phase, Run, train_step
from stepfold.training.step_log import StepRecord, of_all, row_of
from stepfold.training.terms import terms_of


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
    latents: Latents | None = None,
    conditions: Conditions | None = None,
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
        student: starts as the teacher, or from an earlier student; trained in place.
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
    training, stages = config.training, stages or Stages()
    keep_freed_memory(accelerator.device)
    first = conditions([0]) if conditions else teacher.encode([prompts.prompt(0)])
    made = set_up(config, teacher, student, first, accelerator, processes, stages, note_tangent)
    run, modules = made.run, made.modules
    saved = checkpoints(folder)
    start = load_checkpoint(saved[-1], modules, run.optimiser, made.shared) if saved else 0
    if processes.first:
        rewind_metrics(folder, start)
    processes.wait()
    draws_previews = processes.first or made.sharded
    if draws_previews and (start % training.preview_every == 0 or start == training.steps):
        with stages("first preview"):  # a kill may have come before it was drawn
            preview(run.average, start)
    batches = Batches(
        config, teacher, prompts, list(blacks), accelerator.device, processes, stages, conditions, latents
    )  # fmt: skip
    looks = Looks(run, folder, prompts, report, skipped=sum("skipped" in row for row in read_metrics(folder)))
    background = BackgroundWrites() if writes_beside(config, run) else nullcontext()
    with made.compiling, stop_requests() as stop, background as writes:
        batch = condition = states = None
        for step in range(start, training.steps):
            phase = run.phase(step)
            if batch is None or step % config.space.reuse == 0 or step == phase.first:
                batch, condition, states = batches.walked(phase, step)
            assert condition is not None and states is not None
            looks.records.append(train_step(run, step, batch, condition, states))

            last, asked = step + 1 == training.steps, stop.requested  # read once: a request in between waits a step
            saves = last or (step + 1) % training.checkpoint_every == 0
            shows = last or (step + 1) % training.preview_every == 0
            due = saves or shows or looks.are_due or (asked and processes.count == 1)
            stopping = due and processes.any(asked)
            if due:
                if writes:
                    writes.look()
                looks.look()
            if saves or stopping:
                with stages("checkpoint"):
                    save_checkpoint(
                        folder, step + 1, modules, run.optimiser, training.keep_checkpoints, made.shared,
                        write=processes.first, background=writes,
                    )  # fmt: skip
            if stopping:
                raise KeyboardInterrupt
            if shows and draws_previews:
                with stages("preview"):
                    preview(run.average, step + 1)
            looks.restart_clock()
        if processes.any(stop.requested):  # since the last step; what is left of the run is made when it goes on
            raise KeyboardInterrupt
    return with_whole_weights(run.average, made.unsharded)


@dataclass(frozen=True)
class Made:
    """What `set_up` makes.

    Attributes:
        run: see `Run`.
        modules: what a checkpoint holds, by name.
        shared: name of a module -> names of its tensors that are another's own: frozen, and not saved.
        compiling: a context in which the blocks of all networks are compiled; one that does nothing without.
        sharded: whether the weights are spread over the processes.
        unsharded: a student whose weights are whole, for the result; None where `run`'s are.
    """

    run: Run
    modules: dict[str, nn.Module]
    shared: dict[str, frozenset[str]]
    compiling: AbstractContextManager[None]
    sharded: bool
    unsharded: Student | None


def set_up(
    config: Config,
    teacher: Teacher,
    student: Student,
    condition: Condition,
    accelerator: Accelerator,
    processes: Processes,
    stages: Stages,
    note_tangent: Callable[[str], None],
) -> Made:
    """All networks of a run, its optimiser and its phases; arguments as of `distill`, `condition` of any prompt."""
    training, phases = config.training, phases_of(config)
    sharded = training.shard != "none" and processes.count > 1
    critics = new_critics([each for _, each in phases], teacher, accelerator.device)
    choices = choose_tangents([each for _, each in phases], teacher, student, condition, processes, critics.values())
    recompute = any(choice.recompute for choice in choices)
    note_tangent("; then ".join(dict.fromkeys(f"{choice.backend} ({choice.reason})" for choice in choices)))
    networks = [student, *(module for module in critics.values() if isinstance(module, Student))]
    if recompute:  # autocast would keep copies of all weights until a pass is over
        cast(Any, accelerator).autocast_handler = AutocastKwargs(cache_enabled=False)
        if not training.compile:
            for network in networks:
                network.recompute_blocks()
    if len(set(guidance_scales(config, teacher))) == 1:
        for network in networks:
            network.freeze_guidance()
    average = deepcopy_sharing(student, [p for p in student.parameters() if not p.requires_grad]).requires_grad_(False)
    unsharded = deepcopy_sharing(student, ()).cpu() if sharded and processes.first else None
    if sharded:
        for network in (student, average):
            shard(network, processes, "log_variance")
        if training.shard == "all":
            shard(teacher.network, processes)
    optimiser = make_optimiser([p for p in student.parameters() if p.requires_grad], config.optimiser)
    for name, module in critics.items():
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        add_group(optimiser, name, trained, critic_betas(name, config))
    calls = Networks(
        student,
        teacher,
        critics,
        precision=partial(student_precision, accelerator, training.precision),
        walk_precision=partial(walk_precision, training.walk_precision, accelerator.device, teacher.network),
    )
    made_phases = [
        Phase(first, each, terms_of(each), critics_of(each, critics), replace(calls, tangent=choice.backend))
        for (first, each), choice in zip(phases, choices, strict=True)
    ]
    run = Run(config, student, average, optimiser, accelerator, processes, made_phases, stages)
    compiling: AbstractContextManager[None] = nullcontext()
    if training.compile:
        blocks = [block for each in (teacher.network, *networks) for block in blocks_of(each) or [each]]
        compiling = compiled_blocks(blocks, recompute=recompute)
    modules: dict[str, nn.Module] = {"student": student, "average": average, **critics}
    shared = {name: module.shared for name, module in modules.items() if isinstance(module, Student)}
    return Made(run, modules, shared, compiling, sharded, unsharded)


def choose_tangents(
    configs: Sequence[Config],
    teacher: Teacher,
    student: Student,
    condition: Condition,
    processes: Processes,
    critics: Iterable[nn.Module],
) -> list[TangentChoice]:
    """The tangent's backend in each phase; equal settings are tried once."""
    largest = max(teacher.latent_shapes, key=math.prod)
    found: dict[tuple[Any, ...], TangentChoice] = {}
    keys = [(config.objective, config.training) for config in configs]
    for key, config in zip(keys, configs, strict=True):
        if key not in found:
            share = processes.largest_share(config.training.prompts_per_step)
            found[key] = choose_tangent(config, student, condition, largest, share, critics)
    return [found[key] for key in keys]


def writes_beside(config: Config, run: Run) -> bool:
    """Whether this process writes checkpoints beside the next steps."""
    wanted = config.training.background_checkpoints
    return run.processes.first and (run.accelerator.device.type != "cpu" if wanted is None else wanted)


@dataclass
class Looks:
    """Looks at what steps leave behind, some steps at a time: logs them, and stops the run where one went wrong.

    Attributes:
        run: see `Run`.
        folder: of the run.
        prompts: of the run.
        report: called for every step.
        skipped: steps of the run that were skipped so far.
        records: of the steps since the last look.
    """

    run: Run
    folder: Path
    prompts: Prompts
    report: Callable[[Progress], None]
    skipped: int = 0
    records: list[StepRecord] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    @property
    def are_due(self) -> bool:
        """Whether as many steps have gone by as `training.look_every` says."""
        on_cpu = self.run.accelerator.device.type == "cpu"
        return len(self.records) == (self.run.config.training.look_every or (1 if on_cpu else 10))

    def restart_clock(self) -> None:
        """Begins to time the next steps, unless some are still to be looked at."""
        if not self.records:
            self.began = time.perf_counter()

    def look(self) -> None:
        """Writes and reports the rows of the steps since the last look.

        Raises:
            NonFiniteError: a step went wrong; nothing of them is kept.
        """
        rows = [self.row(record) for record in self.records]
        allowed = self.run.config.training.skip_nonfinite
        self.skipped += sum("skipped" in row for row in rows)
        if self.skipped > allowed:
            what = next(row["nonfinite"] for row in reversed(rows) if "nonfinite" in row)
            raise NonFiniteError(
                f"step {self.records[-1].step}: {what}; that makes {self.skipped} such steps, and "
                f"training.skip_nonfinite allows {allowed} to be skipped. The last checkpoint is intact."
            )
        seconds = (time.perf_counter() - self.began) / len(rows)
        for record, row in zip(self.records, rows, strict=True):
            if self.run.processes.first:
                append_metrics(self.folder, row)
            pairs = sum(metrics.kept for metrics in record.spaces.values())
            self.report(Progress(record.step + 1, row | {"sec": seconds, "pairs": pairs}))
        self.records.clear()

    def row(self, record: StepRecord) -> dict[str, Any]:
        """See `row_of`; with the states of all processes."""
        config, processes = self.run.config, self.run.processes
        if processes.count == 1 or not record.norms:
            return row_of(record)
        samples = step_samples(record.step // config.space.reuse, config)
        texts = [self.prompts.prompt(i) for i in prompt_index(samples, self.prompts, config.seed)]
        share = processes.largest_share(config.training.prompts_per_step)
        return row_of(of_all(replace(record, prompts=texts), processes, share))


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
