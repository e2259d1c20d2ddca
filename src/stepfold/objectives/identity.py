"""Score identity distillation (SiD): a Fisher divergence's gradient through both scores, without knowing their gap.

The picture x_0 is noised to t, where teacher and fake score predict it. With d = x_real - x_fake and e = x_real - x_0,

    L = omega [<d, e> - alpha ||d||^2] / sigma_data^2,

and the gradient runs through x_0 and through both predictions. The values come first, without a graph. Then each
network is passed backward by itself, so that never more than one network's activations are in memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stepfold.config import Config
from stepfold.maths.formulations import data_prediction, in_float32, unsqueeze_like
from stepfold.objectives.contract import Loss, Networks
from stepfold.objectives.matching import (
    along,
    fake_velocity,
    figures,
    matching_weight,
    noised,
    predictions,
    real_velocity,
    unit_of,
)
from stepfold.randomness import Draws
from stepfold.sampling.consistency import predict_data
from stepfold.spaces.records import States


class Cotangents(NamedTuple):
    """What L pulls at, [M, ...] each, in units of sigma_data: x_0 itself, and both predictions of it."""

    direct: Tensor
    to_real: Tensor
    to_fake: Tensor


def identity_value(x0: Tensor, x_real: Tensor, x_fake: Tensor, alpha: float, sigma_data: float) -> Tensor:
    """[<d, e> - alpha ||d||^2] / sigma_data^2 [M], summed over the numbers of a picture."""
    d, e = (x_real - x_fake) / sigma_data, (x_real - x0) / sigma_data
    return (d * (e - alpha * d)).flatten(1).sum(1)


@torch.no_grad()
def identity_cotangents(
    x0: Tensor, x_real: Tensor, x_fake: Tensor, weight: Tensor, alpha: float, sigma_data: float
) -> Cotangents:
    """The derivatives of omega `identity_value` in x_0 / sigma_data and in both predictions / sigma_data.

    Args:
        x0: the student's pictures [M, ...].
        x_real: the teacher's prediction of them [M, ...].
        x_fake: the fake score's [M, ...].
        weight: omega [M].
        alpha: see `IdentitySettings`.
        sigma_data: standard deviation of the data.

    Reference: arXiv:2404.04057 (SiD), Eq. 23; arXiv:2505.12674 (few-step SiD).
    """
    x0, x_real, x_fake = (in_float32(values) / sigma_data for values in (x0, x_real, x_fake))
    d, e, omega = x_real - x_fake, x_real - x0, unsqueeze_like(weight, x0)
    return Cotangents(-omega * d, omega * (e + d - 2 * alpha * d), omega * (2 * alpha * d - e))


def pulled_back(velocity: Callable[[Tensor], Tensor], x: Tensor, t: Tensor, cotangent: Tensor) -> Tensor:
    """J^T cotangent [M, ...] of the prediction cos t x - sin t velocity(x) at x [M, ...]; its graph is gone after."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        prediction = data_prediction(x, t, velocity(x))
        (found,) = torch.autograd.grad(prediction, x, cotangent.to(prediction.dtype))
    return found


def identity_loss(networks: Networks, states: States, draws: Draws, config: Config, step: int) -> Loss:
    """SiD of the student's picture of each state; see `Objective`.

    Its value says nothing about the student: at alpha = 1 its mean is 0 for a fake score that is exact. `fisher` is the
    divergence that falls, ||x_real - x_fake||^2 / D in units of sigma_data^2.

    Reference: arXiv:2404.04057 (SiD); arXiv:2406.01561 (SiD-LSG); arXiv:2509.25127 (SiD-DiT).
    """
    sigma_data = networks.teacher.sigma_data
    with networks.precision():
        x0 = predict_data(networks.student, states.x, states.t, states.condition, states.guidance, sigma_data)
    at = noised(x0, states, networks, draws, config)
    found = predictions(networks, at)
    omega = matching_weight(config.matching.weighting, at.t, x0.detach(), found.real, sigma_data)
    pulls = identity_cotangents(x0.detach(), found.real, found.fake, omega, config.identity.alpha, sigma_data)
    real = pulled_back(lambda x: real_velocity(networks, at, x, with_gradient=True), at.x, at.t, pulls.to_real)
    fake = pulled_back(lambda x: fake_velocity(networks, at, x), at.x, at.t, pulls.to_fake)
    direction = pulls.direct + unsqueeze_like(at.t.cos(), x0) * (real + fake)
    seen = {"|x0|": x0.detach().flatten(1).norm(dim=1)} | figures(x0, found, sigma_data)
    fisher = ((found.real - found.fake) / sigma_data).square().flatten(1).mean(1)
    return Loss(along(direction, x0, sigma_data, unit_of(config)), seen | {"fisher": fisher})
