"""Continuous-time consistency: the student's own tangent, corrected by the teacher's velocity, is the target."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stepfold.config import Config
from stepfold.maths.formulations import in_float32, unsqueeze_like
from stepfold.maths.schedules import tangent_warmup
from stepfold.maths.tangent import Network, total_derivative
from stepfold.objectives.contract import Loss, Networks
from stepfold.randomness import Draws
from stepfold.settings import Normalisation, PriorWeight
from stepfold.spaces.records import Pairs

STEEPEST = 50.0
"""`derivative_size` above which this objective is not advised."""


@dataclass(frozen=True)
class ConsistencyOptions:
    """Where the paper and its public code differ, and what else is a choice.

    Attributes:
        prior_weight: `inverse_tangent` = 1 / (sigma_data tan t), the public code's; `none`, the paper's Algorithm 1.
        adaptive_weight: learn w_phi.
        normalise: `l2` = g / (||g|| + c), the public code's; `l2_per_element` divides the norm by sqrt(D); `none`.
        normalise_constant: c.
    """

    prior_weight: PriorWeight = "inverse_tangent"
    adaptive_weight: bool = True
    normalise: Normalisation = "l2"
    normalise_constant: float = 0.1


@dataclass(frozen=True)
class ConsistencyTerms:
    """Per pair: the weighted loss, and what is worth looking at.

    Attributes:
        loss: [M], with gradient.
        squared_error: [M], ||F - F^- - g||^2 / D; with F = F^- it is ||g||^2 / D, so nearly constant by design.
        tangent_norm: [M], ||g||_2 before normalisation, divided by sqrt(D): how far the student is from consistent.
    """

    loss: Tensor
    squared_error: Tensor
    tangent_norm: Tensor


def tangent_direction(x: Tensor, t: Tensor, dxdt: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """The direction of `total_derivative`, premultiplied by cos t sin t: what F's own inputs do along the trajectory.

    Returns:
        (cos t sin t dxdt / sigma_data [M, ...], cos t sin t [M]).

    Reference: arXiv:2511.20410, Algorithm 1.
    """
    scale = t.cos() * t.sin()
    return unsqueeze_like(scale, x) * dxdt / sigma_data, scale


@torch.no_grad()
def derivative_size(network: Network, x: Tensor, t: Tensor, dxdt: Tensor, sigma_data: float) -> float:
    """Root mean square of dF/dt along the trajectory; arguments as of `tangent_direction`.

    Networks whose time counts to 1000 may turn a thousand times as fast as those that read [0, 1].
    """
    dF = total_derivative(network, x / sigma_data, t, dxdt / sigma_data, torch.ones_like(t), "two_pass").dF
    return float(dF.square().mean().sqrt())


def prior_weight(t: Tensor, sigma_data: float, kind: PriorWeight) -> Tensor:
    """weight(t) [M]: 1 / (sigma_data tan t), or 1."""
    return t.cos() / (sigma_data * t.sin()) if kind == "inverse_tangent" else torch.ones_like(t)


def consistency_tangent(
    F: Tensor, dF: Tensor, x: Tensor, t: Tensor, dxdt: Tensor, r: float | Tensor, sigma_data: float
) -> Tensor:
    """g = cos t df/dt, with r on what involves the student's own derivative.

    g = -cos^2 t (sigma_data F - dxdt) - r (cos t sin t x + sigma_data dF), where dF already holds cos t sin t.

    Args:
        F: stop-gradient copy of the student's output [M, ...].
        dF: its derivative along `tangent_direction` [M, ...].
        x: [M, ...].
        t: [M].
        dxdt: [M, ...].
        r: tangent warm-up, in [0, 1].
        sigma_data: standard deviation of the data.

    Returns:
        g [M, ...], detached.

    Reference: arXiv:2511.20410, Algorithm 1; arXiv:2410.11081, Eq. 6.
    """
    cos, sin = unsqueeze_like(t.cos(), x), unsqueeze_like(t.sin(), x)
    g = -(cos**2) * (sigma_data * F - dxdt) - r * (cos * sin * x + sigma_data * dF)
    return g.detach()


def normalise_tangent(g: Tensor, kind: Normalisation, constant: float) -> Tensor:
    """g / (||g||_2 + c) per sample, over all dimensions but the first.

    `l2_per_element` divides the norm by sqrt(D), so that the result does not shrink with the number of elements.
    """
    if kind == "none":
        return g
    norm = g.flatten(1).norm(dim=1)
    if kind == "l2_per_element":
        norm = norm / g[0].numel() ** 0.5
    return g / unsqueeze_like(norm + constant, g)


def consistency_terms(
    F: Tensor,
    dF: Tensor,
    x: Tensor,
    t: Tensor,
    dxdt: Tensor,
    log_variance: Tensor,
    *,
    r: float,
    sigma_data: float,
    options: ConsistencyOptions,
) -> ConsistencyTerms:
    """weight(t) e^{w_phi} / D ||F - F^- - g||^2 - w_phi, per pair.

    Args:
        F: student output [M, ...], with gradient.
        dF: cos t sin t dF/dt [M, ...], without.
        x: states [M, ...].
        t: times [M].
        dxdt: teacher velocity [M, ...].
        log_variance: -w_phi [M], with gradient; ignored unless `options.adaptive_weight`.
        r: tangent warm-up, in [0, 1].
        sigma_data: standard deviation of the data.
        options: see `ConsistencyOptions`.

    Returns:
        See `ConsistencyTerms`.

    Reference: arXiv:2511.20410, Algorithm 1.
    """
    F, dF = in_float32(F), dF.to(x.dtype)
    F_minus = F.detach()
    g = consistency_tangent(F_minus, dF, x, t, dxdt, r, sigma_data)
    target = normalise_tangent(g, options.normalise, options.normalise_constant)
    squared_error = (F - F_minus - target).square().flatten(1).mean(1)
    loss = prior_weight(t, sigma_data, options.prior_weight) * squared_error
    if options.adaptive_weight:
        loss = loss * torch.exp(-log_variance) + log_variance
    return ConsistencyTerms(loss, squared_error.detach(), g.square().flatten(1).mean(1).sqrt())


def continuous_loss(networks: Networks, pairs: Pairs, draws: Draws, config: Config, step: int) -> Loss:
    """Continuous-time consistency of each pair; see `Objective`."""
    c, student, sigma_data = config.consistency, networks.student, networks.teacher.sigma_data
    r = tangent_warmup(
        step,
        warmup=c.r_warmup,
        final=c.r_final,
        cooldown_start=c.r_cooldown_start,
        cooldown_steps=c.r_cooldown_steps,
        schedule=c.r_schedule,
    )

    def network(x_unit: Tensor, t: Tensor) -> Tensor:
        return student(x_unit, t, pairs.condition, pairs.guidance)

    dx, dt = tangent_direction(pairs.x, pairs.t, pairs.dxdt, sigma_data)
    with networks.precision():
        tangent = total_derivative(network, pairs.x / sigma_data, pairs.t, dx, dt, networks.tangent)
        log_variance = student.log_variance(pairs.t, pairs.guidance)
    terms = consistency_terms(
        tangent.F,
        tangent.dF,
        pairs.x,
        pairs.t,
        pairs.dxdt,
        log_variance.float(),
        r=r,
        sigma_data=sigma_data,
        options=ConsistencyOptions(c.prior_weight, c.adaptive_weight, c.normalise, c.normalise_constant),
    )
    metrics = {
        "|F|": tangent.F.detach().flatten(1).norm(dim=1),
        "tangent_norm": terms.tangent_norm,
        "squared_error": terms.squared_error,
        "w_phi": -log_variance.detach(),
        "r": torch.full_like(pairs.t, r),
    }
    return Loss(terms.loss, metrics)
