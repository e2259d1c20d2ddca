"""Critics: networks that a run trains beside the student and throws away; their updates are part of its steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stepfold.config import Config
from stepfold.errors import UserError
from stepfold.maths.formulations import guide
from stepfold.objectives import adversarial
from stepfold.objectives.adversarial import Discriminator
from stepfold.objectives.contract import Loss, Networks
from stepfold.objectives.denoising import FAKE, Score, denoising_error
from stepfold.objectives.matching import renoising_noise, renoising_times
from stepfold.sampling.consistency import predict_data
from stepfold.scores import picture_spaces
from stepfold.spaces.records import Pairs, States
from stepfold.teachers.contract import Condition, Student, Teacher
from stepfold.training.draws import Batch
from stepfold.training.states import rollout

Own = Callable[[Networks, Batch, States, Config], Loss]
"""(networks, batch with the draws of an update, states of `Critic.states`, settings) -> its loss."""
Pick = Callable[[Networks, Batch, Condition, Config, int, Mapping[str, States]], States]
"""(networks, batch with the draws of an update, conditions, settings, number of the update in the run, the step's
states by space) -> the states of an update, one a prompt."""


@dataclass(frozen=True)
class Critic:
    """How a critic is trained in a phase of a run.

    Attributes:
        module: its network.
        updates: optimiser steps of its own before each of the student's; 0 where it learns on the student's passes.
        head_start: first steps of the phase, in which it learns and the student does not.
        lr_factor: learning rate, in units of the student's.
        loss: of an update of its own; None where `updates` is 0.
        states: that an update learns from; None where `updates` is 0.
    """

    module: nn.Module
    updates: int = 0
    head_start: int = 0
    lr_factor: float = 1.0
    loss: Own | None = None
    states: Pick | None = None


def new_critics(
    configs: Sequence[Config], teacher: Teacher, device: torch.device, make_fake: Callable[[], Student] | None
) -> dict[str, nn.Module]:
    """The networks of the critics that the phases of a run ask for, by name; what they start as depends on the seed.

    Raises:
        UserError: a fake score is asked for, and nobody can make one.
    """
    found: dict[str, nn.Module] = {}
    if any(config.adversarial.weight for config in configs):
        neighbours = configs[0].adversarial.neighbours  # the same in all phases
        found[adversarial.NAME] = new_discriminator(teacher, configs[0].seed, neighbours).to(device)
    if any(config.fake.updates for config in configs):
        if make_fake is None:
            raise UserError("fake.updates needs a teacher that is a pipeline; leave fake.updates at 0")
        found[FAKE] = new_fake(make_fake, configs[0].seed).to(device)
    return found


def critics_of(config: Config, modules: Mapping[str, nn.Module]) -> dict[str, Critic]:
    """The critics that learn in a phase of these settings, by name."""
    found: dict[str, Critic] = {}
    if (heads := config.adversarial).weight:
        own: dict[str, Any] = {"loss": alternating_loss, "states": alternating_states} if heads.updates else {}
        found[adversarial.NAME] = Critic(modules[adversarial.NAME], heads.updates, lr_factor=heads.lr_factor, **own)
    if (part := config.fake).updates:
        found[FAKE] = Critic(modules[FAKE], part.updates, part.head_start, part.lr_factor, fake_loss, fake_states)
    return found


def critic_betas(name: str, config: Config) -> tuple[float, float] | None:
    """AdamW's betas of a critic's group; None for the student's."""
    return config.fake.betas if name == FAKE else None


def new_discriminator(teacher: Teacher, seed: int, neighbours: bool = False) -> Discriminator:
    """Its first weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Discriminator(teacher.feature_widths, neighbours)


def new_fake(make_fake: Callable[[], Student], seed: int) -> Student:
    """A fake score; its first weights depend on the seed alone. It keeps no weight of a consistency loss."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fake = make_fake()
    for name, parameter in fake.named_parameters():
        if name.startswith("variance_head."):
            parameter.requires_grad_(False)
    return fake


def fake_states(
    networks: Networks, batch: Batch, condition: Condition, config: Config, number: int, found: Mapping[str, States]
) -> States:
    """States of which the student makes the fake score's pictures, of each space in turn as `number` counts.

    Rollouts are made for it, and stop at each of their steps in turn. Of other spaces it has one of the step's own
    states a prompt, drawn.
    """
    spaces = picture_spaces(config)
    if (space := spaces[number % len(spaces)]) == "rollout":
        return rollout(batch, condition, networks, config, number // len(spaces))
    return one_each(found[space], batch)


def one_each(states: States, batch: Batch) -> States:
    """One of the states of each prompt, drawn; a prompt has as many as any other."""
    num = len(batch.index)
    count = len(states) // num
    pick = (batch.draws.uniform("state", (1,)).squeeze(1) * count).long().clamp(max=count - 1)
    prompts = torch.arange(num, device=pick.device)
    return replace(states.rows(prompts * count + pick), number=prompts, num_drawn=num)


def fake_loss(networks: Networks, batch: Batch, states: States, config: Config) -> Loss:
    """The fake score's loss [B] on the student's pictures of the states, noised afresh; see `Own`."""
    part, teacher, draws, condition = config.fake, networks.teacher, batch.draws, states.condition
    score = networks.critics[FAKE]
    assert isinstance(score, Student)
    with torch.no_grad(), networks.precision():
        x0 = predict_data(networks.student, states.x, states.t, condition, states.guidance, teacher.sigma_data)
    t = renoising_times(states, draws, config, part, teacher, "renoise time")
    noise = renoising_noise(states, draws, teacher, "renoise noise")
    if part.unprompted:
        gone = draws.uniform("unprompted", (1,)).squeeze(1) < part.unprompted
        condition = condition.where(gone, teacher.null(condition))
    with networks.precision():
        guided = score if part.guidance == 1 else guided_score(score, teacher, part.guidance)
        error = denoising_error(guided, x0, noise, t, condition, states.guidance, teacher.sigma_data)
    return Loss(error, {"loss": error.detach()})


def guided_score(score: Student, teacher: Teacher, scale: float) -> Score:
    """A score that learns to be right when it is guided by `scale`.

    Reference: arXiv:2406.01561 (SiD-LSG).
    """

    def guided(x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        without = score(x_unit, t, teacher.null(condition), guidance)
        return guide(without, score(x_unit, t, condition, guidance), scale)

    return guided


def alternating_states(
    networks: Networks, batch: Batch, condition: Condition, config: Config, number: int, found: Mapping[str, States]
) -> States:
    """The pairs of an update of the discriminator's own: one a prompt, of those that its term is on."""
    return one_each(found[config.space.first], batch)


def alternating_loss(networks: Networks, batch: Batch, states: States, config: Config) -> Loss:
    """See `adversarial.heads_update`."""
    assert isinstance(states, Pairs)
    return adversarial.heads_update(networks, states, batch.draws, config)
