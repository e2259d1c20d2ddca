"""One step of the student: its critics' updates, the terms of the loss, clipping, the optimiser, the average."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stepfold.config import Config
from stepfold.objectives.contract import Loss, Networks
from stepfold.spaces.records import States
from stepfold.teachers.contract import Condition, Student
from stepfold.training.critics import Critic
from stepfold.training.draws import Batch
from stepfold.training.optimisers import learning_rate
from stepfold.training.precision import student_attention
from stepfold.training.processes import Processes, local, whole
from stepfold.training.stages import Stages
from stepfold.training.states import states_per_prompt
from stepfold.training.step_log import Metrics, StepRecord, metrics_of
from stepfold.training.terms import Shares, Term, add_gradients, put_back


@dataclass(frozen=True)
class Phase:
    """A part of a run with settings of its own.

    Attributes:
        first: its first step.
        config: its settings.
        terms: of its loss.
        critics: that learn in it, by name.
        networks: as its terms call them.
    """

    first: int
    config: Config
    terms: list[Term]
    critics: Mapping[str, Critic]
    networks: Networks

    @property
    def head_start(self) -> int:
        """First steps of the phase, in which only critics learn."""
        return max((critic.head_start for critic in self.critics.values()), default=0)

    def terms_at(self, step: int) -> list[Term]:
        """The terms of a step of the run."""
        return [term for term in self.terms if term.first <= step]

    def changes_at(self, step: int) -> bool:
        """Whether a step of the run needs states of other spaces than the one before."""
        return step in (self.first, self.first + self.head_start, *(term.first for term in self.terms))


@dataclass(frozen=True)
class Run:
    """What stays the same in all steps of a run.

    Attributes:
        config: the settings.
        student: trained in place.
        average: its exponential moving average.
        optimiser: of the student and of all critics; its groups are named.
        accelerator: device, precision.
        processes: that share every step.
        phases: in order, one at least.
        stages: notes the time of every stage.
    """

    config: Config
    student: Student
    average: Student
    optimiser: torch.optim.Optimizer
    accelerator: Accelerator
    processes: Processes
    phases: list[Phase]
    stages: Stages

    def phase(self, step: int) -> Phase:
        """The phase that a step is in."""
        return next(phase for phase in reversed(self.phases) if phase.first <= step)


def train_step(run: Run, step: int, batch: Batch, condition: Condition, states: Mapping[str, States]) -> StepRecord:
    """One step of the student, with its critics' own updates before. No host-device sync, except to count kept states.

    Args:
        run: changed in place: weights, optimiser, average.
        step: its number.
        batch: prompts and draws.
        condition: of the prompts, B rows.
        states: space -> states, of every space that the phase's terms name.
    """
    phase, record = run.phase(step), StepRecord(step, batch.prompts)
    for name, critic in phase.critics.items():
        if critic.updates:
            with run.stages(name):
                record = update_critic(run, name, critic, record, batch, condition, states)
    if step - phase.first < phase.head_start:
        return replace(record, head_start=True)
    if record.skipped:  # a critic's update was left out, so the student waits too
        return record
    counts = {name: count_states(run, phase.config, name, part) for name, part in states.items()}
    spaces = {name: metrics_of(part, {}, *counts[name]) for name, part in states.items()}
    if not any(count.kept for count in counts.values()):
        return replace(record, spaces={name: replace(part, values={}) for name, part in spaces.items()})
    found = add_gradients(
        phase.terms_at(step), phase.networks, states, batch.draws, phase.config, step - phase.first, run.accelerator,
        shares={name: shares_of(run, phase.config, name, count) for name, count in counts.items()}, stages=run.stages,
    )  # fmt: skip
    spaces = {name: replace(part, values=part.values | found[name]) for name, part in spaces.items()}
    with run.stages("optimiser"):
        return finish_step(run, phase, replace(record, spaces=spaces))


def finish_step(run: Run, phase: Phase, record: StepRecord) -> StepRecord:
    """Sums the gradients over the processes, clips them, and moves the weights and the average."""
    norms = {"student": clipped_norm(run, run.student.parameters(), phase.config)}
    for name, critic in phase.critics.items():
        if not critic.updates:  # it learns on the student's passes
            norms[name] = clipped_norm(run, critic.module.parameters(), phase.config)
    record = replace(record, norms=record.norms | norms)
    if run.config.training.skip_nonfinite and not all(bool(norm.isfinite()) for norm in norms.values()):  # a sync
        run.optimiser.zero_grad(set_to_none=True)
        return replace(record, skipped=True)
    rate = set_learning_rates(run, phase, record.step)
    run.optimiser.step()
    run.optimiser.zero_grad(set_to_none=True)
    move_average(run.average, run.student, min(run.config.training.ema, (1 + record.step) / (10 + record.step)))
    return replace(record, rate=rate)


def update_critic(
    run: Run,
    name: str,
    critic: Critic,
    record: StepRecord,
    batch: Batch,
    condition: Condition,
    states: Mapping[str, States],
) -> StepRecord:
    """A critic's own updates within a step, each with draws of its own; the record with their metrics and norm.

    An update whose gradient is not finite is left out with the rest of the step, where `training.skip_nonfinite` is on.
    """
    phase = run.phase(record.step)
    config = phase.config
    set_learning_rates(run, phase, record.step)
    found, norm = [], torch.zeros(())
    for update in range(critic.updates):
        number = record.step % config.space.reuse * critic.updates + update
        own = replace(batch, draws=batch.draws.of_update(number))
        count = record.step * critic.updates + update
        found += critic_gradient(run, phase, critic, own, condition, states, count)
        norm = clipped_norm(run, critic.module.parameters(), config)
        if run.config.training.skip_nonfinite and not bool(norm.isfinite()):  # a sync
            run.optimiser.zero_grad(set_to_none=True)
            record = replace(record, skipped=True)
            break
        run.optimiser.step()  # of this critic alone: nothing else has a gradient
        run.optimiser.zero_grad(set_to_none=True)
    prompts, losses = zip(*found, strict=True)
    values = {key: torch.cat([loss.metrics[key] for loss in losses]) for key in losses[0].metrics}
    drawn = critic.updates * config.training.prompts_per_step
    metrics = Metrics(torch.cat(prompts), values, drawn, drawn)
    return replace(record, critics=record.critics | {name: metrics}, norms=record.norms | {name: norm})


def critic_gradient(
    run: Run,
    phase: Phase,
    critic: Critic,
    batch: Batch,
    condition: Condition,
    states: Mapping[str, States],
    count: int,
) -> list[tuple[Tensor, Loss]]:
    """Adds the gradient of one update of a critic, in micro-batches; their prompts and losses."""
    assert critic.loss is not None and critic.states is not None
    own = critic.states(phase.networks, batch, condition, phase.config, count, states)
    found, size = [], phase.config.training.micro_batch or len(batch.index)
    began = [(buffer, buffer.clone()) for buffer in critic.module.buffers()]
    trained = [parameter for parameter in critic.module.parameters() if parameter.requires_grad]
    for start in range(0, len(batch.index), size):
        put_back(began)
        rows = slice(start, start + size)
        part = replace(own.rows(rows), number=own.number[rows] - start, num_drawn=len(own.number[rows]))
        loss = critic.loss(phase.networks, batch.rows(rows), part, phase.config)
        with student_attention(phase.config.training.precision, loss.value.device):
            run.accelerator.backward(loss.value.sum() / phase.config.training.prompts_per_step, inputs=trained)
        prompt = torch.arange(start, start + len(loss.value), device=loss.value.device)
        found.append((prompt, loss._replace(value=loss.value.detach())))
    return found


def clipped_norm(run: Run, parameters: Iterable[nn.Parameter], config: Config) -> Tensor:
    """Sums gradients over the processes and clips them; their norm before that."""
    parameters = list(parameters)
    run.processes.sum_gradients(parameters)
    norm = run.accelerator.clip_grad_norm_(parameters, config.optimiser.clip)
    return whole(torch.as_tensor(norm))


def set_learning_rates(run: Run, phase: Phase, step: int) -> float:
    """Sets the learning rate of every group of the optimiser; returns the student's."""
    rate = learning_rate(step, run.config.training.steps, phase.config.optimiser)
    for group in run.optimiser.param_groups:
        critic = phase.critics.get(group["name"])
        group["lr"] = rate * critic.lr_factor if critic else rate
    return rate


class Count(NamedTuple):
    """States of a space in a step, of all processes: those that are kept, and those before filtering."""

    kept: int
    drawn: int


def count_states(run: Run, config: Config, space: str, states: States) -> Count:
    """See `Count`. With a filter and several processes it waits for all of them."""
    drawn = config.training.prompts_per_step * states_per_prompt(space, config)
    kept = 0 if states.is_padding else len(states)
    if run.processes.count > 1:
        filtered = config.space.filter_rule != "off"
        total = torch.tensor(float(kept), device=states.x.device)
        kept = int(run.processes.sum(total)) if filtered else drawn
    return Count(kept, drawn)


def shares_of(run: Run, config: Config, space: str, count: Count) -> Shares:
    """What the mean of a space's terms is over, and the most states that one process has."""
    own = run.processes.largest_share(config.training.prompts_per_step) * states_per_prompt(space, config)
    denominator = count.kept if config.space.filter_denominator == "kept" else count.drawn
    return Shares(denominator, own if run.processes.count > 1 else 0)


@torch.no_grad()
def move_average(average: Student, student: Student, decay: float) -> None:
    """average <- decay average + (1 - decay) student."""
    pairs = [(a, p) for a, p in zip(average.parameters(), student.parameters(), strict=True) if a is not p]
    torch._foreach_lerp_([local(a) for a, _ in pairs], [local(p) for _, p in pairs], 1 - decay)
