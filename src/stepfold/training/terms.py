"""The loss of a run as a list of terms: an objective on a sample space, with a weight."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stepfold.config import Config
from stepfold.objectives.adversarial import NAME, adversarial_loss
from stepfold.objectives.consistency import continuous_loss
from stepfold.objectives.contract import Loss, Networks, Objective
from stepfold.objectives.decoupled import decoupled_loss
from stepfold.objectives.discrete import discrete_loss
from stepfold.objectives.identity import identity_loss
from stepfold.objectives.lagrange import lagrange_loss
from stepfold.objectives.matching import matching_loss
from stepfold.objectives.pair import pair_loss
from stepfold.objectives.policy import policy_loss
from stepfold.objectives.reward import reward_loss
from stepfold.objectives.semigroup import semigroup_loss
from stepfold.objectives.velocity import velocity_loss
from stepfold.randomness import Draws
from stepfold.scores import MATCHING
from stepfold.spaces.records import Pairs, States, with_prompts_on_host
from stepfold.teachers.contract import Student
from stepfold.training.precision import student_attention
from stepfold.training.processes import is_sharded
from stepfold.training.stages import Stages

OBJECTIVES: dict[str, Objective] = {
    "continuous": continuous_loss,
    "discrete": discrete_loss,
    "velocity": velocity_loss,
    "pair": pair_loss,
    "semigroup": semigroup_loss,
    "lagrange": lagrange_loss,
    "adversarial": adversarial_loss,
    "matching": matching_loss,
    "decoupled": decoupled_loss,
    "identity": identity_loss,
    "policy": policy_loss,
    "reward": reward_loss,
}
"""All objectives by the names that settings call them."""


@dataclass(frozen=True)
class Term:
    """One part of the loss.

    Attributes:
        objective: a name of OBJECTIVES.
        space: where its states come from.
        weight: > 0.
        micro_batch: states of a backward pass; 0 for all at once.
        stage: of the run, that its forward passes are timed as.
        first: step of the run that it begins at.
    """

    objective: str
    space: str
    weight: float
    micro_batch: int = 0
    stage: str = "student forward"
    first: int = 0


def terms_of(config: Config) -> list[Term]:
    """The terms that the settings ask for: the objective on each of its spaces, then what has a weight of its own."""
    size = config.training.micro_batch
    terms = [Term(config.objective, space, weight, size) for space, weight in config.space.weights.items() if weight]
    if weight := config.adversarial.weight:
        terms.append(Term("adversarial", config.space.first, weight, size, "adversarial"))
    if (weight := config.matching.weight) and config.objective not in MATCHING:
        terms.append(Term(config.matching.form, config.matching.space, weight, size))
    if weight := config.anchor.weight:
        terms.append(Term("pair", "anchor", weight, size))
    if weight := config.reward.weight:
        part = config.reward
        terms.append(Term("reward", part.space, weight, size, "reward", part.from_step))
    return terms


@dataclass(frozen=True)
class Shares:
    """How a process's states stand to those of all processes of a step.

    Attributes:
        denominator: states that the mean is over, those of the other processes among them.
        most: the most states that one process has; all make as many passes as that one. 0 for this one's own.
    """

    denominator: float
    most: int = 0


def add_gradients(
    terms: Sequence[Term],
    networks: Networks,
    states: Mapping[str, States],
    draws: Draws,
    config: Config,
    step: int,
    accelerator: Accelerator,
    *,
    shares: Mapping[str, Shares] | None = None,
    stages: Stages | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Adds the gradient of the mean loss of every term to the student's, and to its critics' that of their own.

    Terms on one space share their backward passes; spaces follow each other, so the memory is that of the largest.

    Args:
        terms: what is minimised.
        networks: its student is trained.
        states: space -> states.
        draws: of the batch that the states are from.
        config: the settings.
        step: the number of the step, within its phase.
        accelerator: takes the backward passes.
        shares: space -> see `Shares`; None where one process has the whole step.
        stages: notes the time of forward and backward passes.

    Returns:
        Space -> metrics [M] of its states: `loss`, the weighted sum over its terms, and those of the objectives.
    """
    stages = stages or Stages()
    scored = {term.space for term in terms if term.objective == "reward"}
    states = {
        space: with_prompts_on_host(part, len(draws.samples)) if space in scored else part
        for space, part in states.items()
    }
    found: dict[str, dict[str, Tensor]] = {}
    for space in dict.fromkeys(term.space for term in terms):
        own = [term for term in terms if term.space == space]
        share = shares[space] if shares else alone(states[space], config)
        metrics = defaultdict(list)
        heads = networks.critics.get(NAME, nn.Module())
        began = [(buffer, buffer.clone()) for buffer in heads.buffers()]
        for part, counts in micro_batches(states[space], own[0].micro_batch, share.most):
            put_back(began)
            losses = [(term, _loss(term, networks, part, draws, config, step, stages)) for term in own]
            value = total(losses)
            with stages("student backward"), student_attention(config.training.precision, part.x.device):
                accelerator.backward(_mean(value, share.denominator, counts), inputs=trained_by_terms(networks.student))
            for term, loss in losses:
                if loss.of_critic is not None:
                    with stages(term.stage):
                        accelerator.backward(_mean(loss.of_critic, share.denominator, counts))
                for name, values in loss.metrics.items():
                    metrics[name].append(values if counts else values[:0])
            metrics["loss"].append(value.detach() if counts else value.detach()[:0])
        found[space] = {name: torch.cat(values) for name, values in metrics.items()}
    return found


def put_back(began: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copies values back into buffers.

    Each call of heads moves their estimates of spectral norms, and every part of a step has to begin as the first.
    """
    for buffer, value in began:
        buffer.copy_(value)


def micro_batches(states: States, size: int, most: int) -> Iterator[tuple[States, bool]]:
    """The states in parts of `size` (0: all at once), and whether each part counts.

    A process with fewer states than `most` adds parts that do not count, so that all processes make equal passes.
    """
    most = max(most, len(states))
    size = min(size or most, most)
    if isinstance(states, Pairs) and size % max(states.walk_length, 1):
        states = replace(states, walk_length=0)
    starts = range(0, len(states), size)
    for start in starts:
        yield states.rows(slice(start, start + size)), not states.is_padding
    for _ in range(-(-most // size) - len(starts)):
        yield states.rows(slice(1)), False


def total(losses: Iterable[tuple[Term, Loss]]) -> Tensor:
    """The weighted sum [M] of the losses of terms on the same states."""
    weighted = (loss.value if term.weight == 1 else term.weight * loss.value for term, loss in losses)
    return reduce(torch.add, weighted)


def trained_by_terms(student: Student) -> list[Tensor] | None:
    """The parameters that a backward pass gives gradients to; None for all, where weights are sharded."""
    return None if is_sharded(student) else [p for p in student.parameters() if p.requires_grad]


def alone(states: States, config: Config) -> Shares:
    """Of a process that has the whole step: the mean over the kept states, or over all as the settings say."""
    kept = config.space.filter_denominator == "kept"
    return Shares(len(states) if kept else states.num_drawn)


def _loss(
    term: Term, networks: Networks, states: States, draws: Draws, config: Config, step: int, stages: Stages
) -> Loss:
    with stages(term.stage):
        return OBJECTIVES[term.objective](networks, states, draws, config, step)


def _mean(values: Tensor, denominator: float, counts: bool) -> Tensor:
    """The sum [M] over `denominator`; without `counts` 0, with the graph that the other processes' passes have."""
    mean = values.sum() / denominator
    return mean if counts else 0 * mean
