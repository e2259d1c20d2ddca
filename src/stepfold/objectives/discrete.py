"""Discrete consistency: the student's picture must not change over one step of the teacher's (LCM-like)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stepfold.config import Config
from stepfold.maths.formulations import euler_step, in_float32, unsqueeze_like
from stepfold.objectives.contract import Loss, Networks
from stepfold.randomness import Draws
from stepfold.sampling.consistency import predict_data
from stepfold.sampling.flow_map import jump
from stepfold.spaces.records import Pairs


@dataclass(frozen=True)
class DiscreteTerms:
    """Per pair.

    Attributes:
        loss: [M], with gradient.
        squared_error: [M], ||f - f_next||^2 / D, without.
    """

    loss: Tensor
    squared_error: Tensor


def discrete_terms(x0: Tensor, target: Tensor, huber_constant: float) -> DiscreteTerms:
    """Pseudo-Huber distance sqrt(||f - target||^2 + C^2) - C with C = huber_constant sqrt(D), divided by sqrt(D).

    Args:
        x0: the student's picture f(x_t, t) [M, ...], with gradient.
        target: f(x_s, s) [M, ...], where the teacher's step from (x_t, t) to s < t ends; no gradient reaches it.
        huber_constant: >= 0; at 0 it is the norm, whose gradient is 0 where the pictures are equal; large it is the
            square.

    Returns:
        See `DiscreteTerms`.

    Reference: arXiv:2303.01469, Eq. 7 (the objective); arXiv:2310.04378 (with guided teachers); arXiv:2310.14189, Eq. 8
        (the distance).
    """
    squared = (in_float32(x0) - in_float32(target.detach())).square().flatten(1).mean(1)
    radicand = (squared + huber_constant**2).clamp(min=torch.finfo(squared.dtype).tiny)  # the root has no slope at 0
    loss = torch.sqrt(radicand) - huber_constant
    return DiscreteTerms(loss, squared.detach())


def discrete_loss(networks: Networks, pairs: Pairs, draws: Draws, config: Config, step: int) -> Loss:
    """Discrete consistency of each pair; see `Objective`. The student is its own target.

    Where the pairs are whole walks, each pair's step ends in the state of the pair after it, or at t = 0, where f is
    the identity: one forward pass yields pictures and targets.
    """
    s = pairs.t_target

    def landing(x: Tensor, t: Tensor) -> Tensor:
        told = (pairs.condition, pairs.guidance, networks.teacher.sigma_data)
        with networks.precision():
            return predict_data(networks.student, x, t, *told) if s is None else jump(networks.student, x, t, s, *told)

    m, end = (pairs.t_next, 0) if s is None else (torch.maximum(pairs.t_next, s), s)
    x_m = euler_step(pairs.x, pairs.t, m, pairs.dxdt)
    x_s = landing(pairs.x, pairs.t)
    if pairs.walk_length and config.target.shared:
        target = x_s.roll(-1, 0)
    else:
        with torch.no_grad():
            target = landing(x_m, m)
    target = torch.where(unsqueeze_like(m > end, x_s), target, x_m)
    if pairs.num_jumps is not None:
        scale = unsqueeze_like(pairs.num_jumps**config.discrete.jump_power, x_s)
        x_s, target = scale * x_s, scale * target
    terms = discrete_terms(x_s, target, config.discrete.huber_constant)
    return Loss(terms.loss, {"squared_error": terms.squared_error})
