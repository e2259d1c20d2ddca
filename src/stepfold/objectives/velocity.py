"""Velocity matching: the student's own velocity is that of the pairs (reflow on couplings, guidance on walks)."""

import torch
from torch import Tensor

from stepfold.config import Config
from stepfold.maths.formulations import in_float32
from stepfold.objectives.contract import Loss, Networks
from stepfold.randomness import Draws
from stepfold.spaces.records import Pairs


def velocity_error(F: Tensor, dxdt: Tensor, sigma_data: float) -> Tensor:
    """||F - dxdt / sigma_data||^2 / D per sample [M]; its minimiser is the mean of dxdt given (x, t).

    Args:
        F: the student's output [M, ...].
        dxdt: velocities [M, ...], no gradient reaches them.
        sigma_data: standard deviation of the data.

    Reference: arXiv:2209.03003, Eq. 1 (on couplings).
    """
    return (in_float32(F) - in_float32(dxdt.detach()) / sigma_data).square().flatten(1).mean(1)


def velocity_loss(networks: Networks, pairs: Pairs, draws: Draws, config: Config, step: int) -> Loss:
    """Velocity matching of each pair, by the square or a pseudo-Huber distance; see `Objective`.

    Reference: arXiv:2405.20320 (RF++), for the distance.
    Deviation: of F, in latent units, without the factor 1 - t_FM and without LPIPS.
    """
    sigma_data = networks.teacher.sigma_data
    with networks.precision():
        F = networks.student(pairs.x / sigma_data, pairs.t, pairs.condition, pairs.guidance)
    error, constant = velocity_error(F, pairs.dxdt, sigma_data), config.velocity.huber_constant
    distance = torch.sqrt(error + constant**2) - constant if constant else error
    return Loss(distance, {"|F|": F.detach().flatten(1).norm(dim=1), "squared_error": error.detach()})
