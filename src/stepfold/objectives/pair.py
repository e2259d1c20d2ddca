"""Pair regression: any later state of a walk is where the student should land from an earlier one; no derivative."""

import torch
from torch import Tensor

from stepfold.config import Config
from stepfold.maths.formulations import unsqueeze_like
from stepfold.objectives.contract import Loss, Networks
from stepfold.objectives.velocity import velocity_error
from stepfold.randomness import Draws
from stepfold.spaces.records import Pairs

SHORTEST = 1e-3
"""Jumps below it have the velocity as their target: the rounding of two states would outweigh what they differ in."""


def jump_velocity(x: Tensor, t: Tensor, landing: Tensor, s: Tensor, dxdt: Tensor) -> Tensor:
    """sigma_data F of the jump from (x, t) to (landing, s): (cos D x - landing) / sin D with D = t - s.

    At D = 0, and up to `SHORTEST`, it is dxdt. Of neighbours on a walk it is the teacher's velocity, and of a state and
    the walk's end that of the x_0 there.

    Args:
        x: [M, ...], at time t.
        t: [M], in [0, pi/2].
        landing: [M, ...], the state at time s of the same walk.
        s: [M], in [0, t].
        dxdt: [M, ...], the velocity at (x, t).

    Reference: arXiv:2509.24526 (CMT); the mean velocity of arXiv:2505.13447 between two states, in TrigFlow.
    """
    D = unsqueeze_like(t - s, x)
    short = D < SHORTEST
    return torch.where(short, dxdt, (D.cos() * x - landing) / torch.where(short, 1, D.sin()))


def pair_loss(networks: Networks, pairs: Pairs, draws: Draws, config: Config, step: int) -> Loss:
    """The squared error of F of each pair against that of its jump; see `Objective`. Without a target time it is 0."""
    sigma_data, s, landing = networks.teacher.sigma_data, pairs.t_target, pairs.x_target
    if s is None or landing is None:
        s, landing = torch.zeros_like(pairs.t), pairs.x0
    with networks.precision():
        F = networks.student(pairs.x / sigma_data, pairs.t, pairs.condition, pairs.guidance, s)
    error = velocity_error(F, jump_velocity(pairs.x, pairs.t, landing, s, pairs.dxdt), sigma_data)
    return Loss(error, {"|F|": F.detach().flatten(1).norm(dim=1), "squared_error": error.detach()})
