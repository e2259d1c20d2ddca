"""The run: prompts in, few-step student out. Read `distill` top to bottom, then `step.train_step`."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from stepfold.bank import Bank
from stepfold.config import Config, phases_of
from stepfold.errors import UserError
from stepfold.objectives.contract import Reward
from stepfold.prompts.reading import Prompts
from stepfold.teachers.contract import PictureScore, Student, Teacher
from stepfold.training.batches import Batches, Conditions, Latents
from stepfold.training.choices import keep_freed_memory
from stepfold.training.draws import prompt_index
from stepfold.training.looks import Looks, Progress
from stepfold.training.processes import ALONE, Processes, gathered, is_sharded
from stepfold.training.runs import (
    BackgroundWrites,
    checkpoints,
    load_checkpoint,
    read_metrics,
    rewind_metrics,
    save_checkpoint,
)
from stepfold.training.set_up import Made, set_up
from stepfold.training.stages import Stages
from stepfold.training.states import FOLLOW_STUDENT
from stepfold.training.step import Run, train_step
from stepfold.training.stopping import stop_requests


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
    bank: Bank | None = None,
    conditions: Conditions | None = None,
    stages: Stages | None = None,
    note_tangent: Callable[[str], None] = lambda text: None,
    report: Callable[[Progress], None] = lambda progress: None,
    preview: Callable[[Student, int], None] = lambda student, step: None,
    make_fake: Callable[[], Student] | None = None,
    score: PictureScore | None = None,
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
        bank: whose couplings are taken in the place of trajectories.
        conditions: numbers of B prompts -> what the teacher would encode them to; None to have it do so.
        stages: notes the time of every stage.
        note_tangent: called with the tangent's backend and the reason for it.
        report: called for every step, some steps at a time where a device would have to be waited for.
        preview: called with the average every `preview_every` steps, and again for the step that is continued from; in
            the first process, or in all of them where the weights are sharded, since they are whole only where all take
            part.
        make_fake: makes the fake score, which starts as the teacher, where a phase has `fake.updates`.
        score: of pictures and prompts, which the student raises where a phase has `reward.weight`; see `PictureScore`.

    Returns:
        The average; where the weights are sharded, whole in the first process, and in the others of no use.

    Raises:
        NonFiniteError: a loss or gradient is not finite; the checkpoints are intact.
        UserError: `training.compile` is on and compiling fails; another process is gone.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    keep_freed_memory(accelerator.device)
    stages = stages or Stages()
    first = conditions([0]) if conditions else teacher.encode([prompts.prompt(0)])
    reward = reward_of(score, teacher, prompts, config)
    made = set_up(config, teacher, student, first, accelerator, processes, stages, note_tangent, make_fake, reward)
    saved = checkpoints(folder)
    start = load_checkpoint(saved[-1], made.modules, made.run.optimiser, made.shared) if saved else 0
    if processes.first:
        rewind_metrics(folder, start)
    processes.wait()
    batches = Batches(
        config, teacher, prompts, list(blacks), accelerator.device, processes, stages, conditions, latents, bank
    )  # fmt: skip
    looks = Looks(made.run, folder, prompts, report, sum("skipped" in row for row in read_metrics(folder)))
    take_steps(made, batches, looks, start, preview if processes.first or made.sharded else lambda average, step: None)
    return with_whole_weights(made.run.average, made.unsharded)


def reward_of(score: PictureScore | None, teacher: Teacher, prompts: Prompts, config: Config) -> Reward | None:
    """A score of pictures and prompts as one of latents and samples; None where no phase asks for it.

    Raises:
        UserError: a phase has `reward.weight`, and there is no score.
    """
    if not any(each.reward.weight for _, each in phases_of(config)):
        return None
    if score is None:
        raise UserError("reward.weight needs a score; give a CLIP folder as reward.clip, or `score` in the Python API")

    def reward(x0: Tensor, samples: Sequence[int]) -> Tensor:
        texts = [prompts.prompt(i) for i in prompt_index(samples, prompts, config.seed)]
        return score(teacher.decode(x0, with_gradient=True), texts)

    return reward


def take_steps(made: Made, batches: Batches, looks: Looks, start: int, preview: Callable[[Student, int], None]) -> None:
    """Takes the steps from `start` on, and after each what is due: a look, a checkpoint, a preview.

    Raises:
        NonFiniteError, UserError, KeyboardInterrupt: as `distill`.
    """
    run, config, training = made.run, made.run.config, made.run.config.training
    if start % training.preview_every == 0 or start == training.steps:
        with run.stages("first preview"):  # a kill may have come before it was drawn
            preview(run.average, start)
    own = any(term.space in FOLLOW_STUDENT for each in run.phases for term in each.terms)
    kept = config.space.reuse if own else 1  # steps that states are kept for, between which no run can go on
    background = BackgroundWrites() if writes_beside(run) else nullcontext()
    with made.compiling, stop_requests() as stop, background as writes:
        batch = condition = states = None
        for step in range(start, training.steps):
            phase = run.phase(step)
            if batch is None or step % config.space.reuse == 0 or phase.changes_at(step):
                batch, condition, states = batches.walked(phase, step)
            assert condition is not None and states is not None
            looks.records.append(train_step(run, step, batch, condition, states))

            last, ends = step + 1 == training.steps, (step + 1) % kept == 0
            asked = ends and stop.requested  # read once: a request in between waits a step
            saves = last or (ends and (step + 1) % training.checkpoint_every < kept)
            shows = last or (step + 1) % training.preview_every == 0
            due = saves or shows or looks.are_due or (asked and run.processes.count == 1)
            stopping = due and run.processes.any(asked)
            if due:
                if writes:
                    writes.look()
                looks.look()
            if saves or stopping:
                with run.stages("checkpoint"):
                    save_checkpoint(
                        looks.folder, step + 1, made.modules, run.optimiser, training.keep_checkpoints, made.shared,
                        write=run.processes.first, background=writes,
                    )  # fmt: skip
            if stopping:
                raise KeyboardInterrupt
            if shows:
                with run.stages("preview"):
                    preview(run.average, step + 1)
            looks.restart_clock()
        if run.processes.any(stop.requested):  # since the last step; what is left is made when the run goes on
            raise KeyboardInterrupt


def writes_beside(run: Run) -> bool:
    """Whether this process writes checkpoints beside the next steps."""
    wanted = run.config.training.background_checkpoints
    return run.processes.first and (run.accelerator.device.type != "cpu" if wanted is None else wanted)


def with_whole_weights(average: Student, unsharded: Student | None) -> Student:
    """The average; where it is sharded, in `unsharded` if there is one. All processes have to ask for its weights."""
    if not is_sharded(average):
        return average
    state = gathered(average.state_dict(), keep=unsharded is not None)
    if unsharded is None:
        return average
    unsharded.load_state_dict(state)
    return unsharded.requires_grad_(False).to(next(average.parameters()).device)
