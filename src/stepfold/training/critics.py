"""Critics: networks that a run trains beside the student and throws away; their updates are part of its steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepfold.config import Config
from stepfold.errors import UserError
from stepfold.maths.formulations import trigflow_time
from stepfold.objectives import adversarial
from stepfold.objectives.adversarial import Discriminator
from stepfold.objectives.contract import Loss, Networks
from stepfold.objectives.denoising import denoising_error
from stepfold.sampling.consistency import predict_data
from stepfold.spaces.rollout import exit_step
from stepfold.teachers.contract import Condition, Student, Teacher
from stepfold.training.draws import Batch
from stepfold.training.states import rollout

FAKE = "fake"
"""Of the fake score among `Networks.critics`."""
Own = Callable[[Networks, Batch, Condition, Config, int], Loss]
"""(networks, batch with the draws of an update, conditions, settings, number of the update in the run) -> its loss."""


@dataclass(frozen=True)
class Critic:
    """How a critic is trained in a phase of a run.

    Attributes:
        module: its network.
        updates: optimiser steps of its own before each of the student's; 0 where it learns on the student's passes.
        head_start: first steps of the phase, in which it learns and the student does not.
        lr_factor: learning rate, in units of the student's.
        loss: of an update of its own; None where `updates` is 0.
    """

    module: nn.Module
    updates: int = 0
    head_start: int = 0
    lr_factor: float = 1.0
    loss: Own | None = None


def new_critics(
    configs: Sequence[Config], teacher: Teacher, device: torch.device, make_fake: Callable[[], Student] | None
) -> dict[str, nn.Module]:
    """The networks of the critics that the phases of a run ask for, by name; what they start as depends on the seed.

    Raises:
        UserError: a fake score is asked for, and nobody can make one.
    """
    found: dict[str, nn.Module] = {}
    if any(config.adversarial.weight for config in configs):
        found[adversarial.NAME] = new_discriminator(teacher, configs[0].seed).to(device)
    if any(config.fake.updates for config in configs):
        if make_fake is None:
            raise UserError("fake.updates needs a teacher that is a pipeline; leave fake.updates at 0")
        found[FAKE] = new_fake(make_fake, configs[0].seed).to(device)
    return found


def critics_of(config: Config, modules: Mapping[str, nn.Module]) -> dict[str, Critic]:
    """The critics that learn in a phase of these settings, by name."""
    found: dict[str, Critic] = {}
    if config.adversarial.weight:
        found[adversarial.NAME] = Critic(modules[adversarial.NAME], lr_factor=config.adversarial.lr_factor)
    if (part := config.fake).updates:
        found[FAKE] = Critic(modules[FAKE], part.updates, part.head_start, part.lr_factor, fake_loss)
    return found


def critic_betas(name: str, config: Config) -> tuple[float, float] | None:
    """AdamW's betas of a critic's group; None for the student's."""
    return config.fake.betas if name == FAKE else None


def new_discriminator(teacher: Teacher, seed: int) -> Discriminator:
    """Its first weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Discriminator(teacher.feature_widths)


def new_fake(make_fake: Callable[[], Student], seed: int) -> Student:
    """A fake score; its first weights depend on the seed alone. It keeps no weight of a consistency loss."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fake = make_fake()
    for name, parameter in fake.named_parameters():
        if name.startswith("variance_head."):
            parameter.requires_grad_(False)
    return fake


def fake_loss(networks: Networks, batch: Batch, condition: Condition, config: Config, number: int) -> Loss:
    """The fake score's loss [B] on pictures of the student's own, noised afresh; see `Own`.

    The pictures are those of the rollout's steps in turn, as `number` counts.
    """
    part, teacher, steps = config.fake, networks.teacher, config.rollout.steps
    score = networks.critics[FAKE]
    assert isinstance(score, Student)
    states = rollout(batch, condition, networks, steps, exit_step(number, steps))
    with torch.no_grad(), networks.precision():
        x0 = predict_data(networks.student, states.x, states.t, condition, batch.guidance, teacher.sigma_data)
    uniform = batch.draws.uniform("renoise time", (1,)).squeeze(1)
    t = noised_times(uniform, teacher.shift, part.lowest_level, part.highest_level)
    with networks.precision():
        error = denoising_error(
            score, x0, batch.noise("renoise noise"), t, condition, batch.guidance, teacher.sigma_data
        )  # fmt: skip
    return Loss(error, {"loss": error.detach()})


def noised_times(uniform: Tensor, shift: float, lowest: float, highest: float) -> Tensor:
    """U[0, 1) [M] -> times [M] whose flow-matching levels are uniform, shifted towards noise, and clamped.

    Reference: arXiv:2506.08009 (Self-Forcing), whose levels are shifted and clamped to 2 ... 98%.
    """
    level = shift * uniform / (1 + (shift - 1) * uniform)
    return trigflow_time(level.clamp(lowest, highest))
