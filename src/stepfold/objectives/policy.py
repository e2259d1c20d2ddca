"""Policy imitation (pi-Flow): along its own path the student's policy has the teacher's velocity."""

import torch
from torch import Tensor

from stepfold.config import Config
from stepfold.maths.formulations import data_prediction, dxdt_from_denoised, in_float32
from stepfold.maths.policy import combined
from stepfold.objectives.contract import Loss, Networks
from stepfold.objectives.velocity import velocity_error
from stepfold.randomness import Draws
from stepfold.spaces.policy import PolicyStates


def policy_error(F: Tensor, states: PolicyStates, sigma_data: float) -> Tensor:
    """||pi(x, t) - dx/dt||^2 / (sigma_data^2 D) at the states within each segment [M, J].

    pi = (cos t x - x_0(t)) / sin t, with x_0(t) that of the velocities at the segment's start. The gradient runs
    through these alone.

    Args:
        F: the student's N outputs at the starts [M, N C, ...].
        states: [M] segments.
        sigma_data: standard deviation of the data.

    Reference: arXiv:2510.14974 (pi-Flow), its imitation loss.
    Deviation: the square is of F, which is that of flow matching's velocity times 1 - 2 s + 2 s^2 at flow time s; the
        velocities are those of a time, not means over some substeps.
    """
    errors = []
    for j in range(states.t_at.shape[1]):
        x0 = data_prediction(states.x, states.t, sigma_data * combined(in_float32(F), states.nodes_at[:, j]))
        velocity = dxdt_from_denoised(states.x_at[:, j], states.t_at[:, j], x0)
        errors.append(velocity_error(velocity / sigma_data, states.dxdt_at[:, j], sigma_data))
    return torch.stack(errors, 1)


def policy_loss(networks: Networks, states: PolicyStates, draws: Draws, config: Config, step: int) -> Loss:
    """Policy imitation of each segment, in proportion to its length; see `Objective`."""
    sigma_data = networks.teacher.sigma_data
    with networks.precision():
        F = networks.student(states.x / sigma_data, states.t, states.condition, states.guidance)
    error = policy_error(F, states, sigma_data).mean(1)
    return Loss(states.share * error, {"|F|": F.detach().flatten(1).norm(dim=1), "squared_error": error.detach()})
