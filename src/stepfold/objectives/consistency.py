"""Continuous-time consistency: the student's own tangent, corrected by the teacher's velocity, is the target.

With a target time s the student is a flow map X(x, t, s), and D = t - s stands where t stood: one formula for TBCM and
sCM (s = 0), AYF's Eulerian map distillation, and MeanFlow with a teacher. At s = t it is velocity matching.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stepfold.config import Config, phases_of
from stepfold.maths.formulations import in_float32, unsqueeze_like
from stepfold.maths.schedules import tangent_warmup
from stepfold.maths.tangent import Network, Tangent, total_derivative
from stepfold.objectives.apart import Along, derivative
from stepfold.objectives.contract import Loss, Networks
from stepfold.randomness import Draws
from stepfold.settings import Normalisation, PriorWeight, TangentWeight
from stepfold.spaces.records import Pairs

STEEPEST = 50.0
"""`derivative_size` above which this objective is not advised."""


@dataclass(frozen=True)
class ConsistencyOptions:
    """Where the paper and its public code differ, and what else is a choice.

    Attributes:
        prior_weight: `inverse_tangent` = 1 / (sigma_data tan t), the public code's; `none`, the paper's Algorithm 1.
            Of pairs that jump to 0; others have none.
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


def tangent_direction(
    x: Tensor, t: Tensor, dxdt: Tensor, sigma_data: float, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The direction of `total_derivative`, premultiplied by cos t sin t: what F's own inputs do along the trajectory.

    Of a flow map, t is D = t - s, and `weight` [M] may stand for cos D; see `tangent_weight`.

    Returns:
        (cos t sin t dxdt / sigma_data [M, ...], cos t sin t [M]).

    Reference: arXiv:2511.20410, Algorithm 1.
    """
    scale = (t.cos() if weight is None else weight) * t.sin()
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


def tangent_weight(t: Tensor, s: Tensor, kind: TangentWeight) -> Tensor:
    """w(t, s) [M] of a flow map's tangent g = w dX/dt.

    `trig` is cos D, D = t - s. `meanflow` is k_s / k_t with k_a = 1 / (sin a + cos a), which makes g / sigma_data the
    residual of flow matching's mean velocity in F's units. `ayf` is sin D, proportional to the length of the jump.

    Reference: arXiv:2505.13447 (MeanFlow) and arXiv:2506.14603 (AYF), in TrigFlow.
    """
    if kind == "meanflow":
        return (t.sin() + t.cos()) / (s.sin() + s.cos())
    return (t - s).sin() if kind == "ayf" else (t - s).cos()


def consistency_tangent(
    F: Tensor,
    dF: Tensor,
    x: Tensor,
    t: Tensor,
    dxdt: Tensor,
    r: float | Tensor,
    sigma_data: float,
    weight: Tensor | None = None,
) -> Tensor:
    """g = cos t df/dt, with r on what involves the student's own derivative.

    g = -cos^2 t (sigma_data F - dxdt) - r (cos t sin t x + sigma_data dF), where dF already holds cos t sin t.

    Of a flow map it is w dX/dt, with D = t - s in place of t, and the weight w in place of one cos D.

    Args:
        F: stop-gradient copy of the student's output [M, ...].
        dF: its derivative along `tangent_direction` [M, ...].
        x: [M, ...].
        t: [M]; of a flow map D, the length of the jump.
        dxdt: [M, ...].
        r: tangent warm-up, in [0, 1].
        sigma_data: standard deviation of the data.
        weight: w [M], of `tangent_weight`; None for cos t.

    Returns:
        g [M, ...], detached.

    Reference: arXiv:2511.20410, Algorithm 1; arXiv:2410.11081, Eq. 6; arXiv:2506.14603 (AYF).
    """
    cos, sin = unsqueeze_like(t.cos(), x), unsqueeze_like(t.sin(), x)
    w = cos if weight is None else unsqueeze_like(weight, x)
    g = -(w * cos) * (sigma_data * F - dxdt) - r * (w * sin * x + sigma_data * dF)
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
    target: Tensor | None = None,
    weight: Tensor | None = None,
) -> ConsistencyTerms:
    """weight(t) e^{w_phi} / D ||F - F^- - g||^2 - w_phi, per pair.

    Args:
        F: student output [M, ...], with gradient.
        dF: cos t sin t dF/dt [M, ...], without; of a flow map w sin D dF/dt.
        x: states [M, ...].
        t: times [M].
        dxdt: teacher velocity [M, ...].
        log_variance: -w_phi [M], with gradient; ignored unless `options.adaptive_weight`.
        r: tangent warm-up, in [0, 1].
        sigma_data: standard deviation of the data.
        options: see `ConsistencyOptions`.
        target: s [M], in [0, t]; None for 0.
        weight: w [M]; see `consistency_tangent`.

    Returns:
        See `ConsistencyTerms`.

    Reference: arXiv:2511.20410, Algorithm 1.
    """
    F, dF = in_float32(F), dF.to(x.dtype)
    D = t if target is None else t - target
    g = consistency_tangent(F.detach(), dF, x, D, dxdt, r, sigma_data, weight)
    prior = prior_weight(t, sigma_data, options.prior_weight)
    if target is not None:
        prior = torch.where(target == 0, prior, 1)
    return tangent_terms(F, g, prior, log_variance, options)


def tangent_terms(
    F: Tensor, g: Tensor, weight: Tensor, log_variance: Tensor, options: ConsistencyOptions
) -> ConsistencyTerms:
    """The loss that moves F along g [M, ...]; weight: [M], of the squares; the rest as of `consistency_terms`."""
    F_minus = F.detach()
    target = normalise_tangent(g, options.normalise, options.normalise_constant)
    squared_error = (F - F_minus - target).square().flatten(1).mean(1)
    loss = weight * squared_error
    if options.adaptive_weight:
        loss = loss * torch.exp(-log_variance) + log_variance
    return ConsistencyTerms(loss, squared_error.detach(), g.square().flatten(1).mean(1).sqrt())


def options_of(config: Config) -> ConsistencyOptions:
    """As the settings say."""
    c = config.consistency
    return ConsistencyOptions(c.prior_weight, c.adaptive_weight, c.normalise, c.normalise_constant)


def metrics_of(terms: ConsistencyTerms, F: Tensor, log_variance: Tensor) -> dict[str, Tensor]:
    """What is logged of each pair, in order of computation."""
    return {
        "|F|": F.detach().flatten(1).norm(dim=1),
        "tangent_norm": terms.tangent_norm,
        "squared_error": terms.squared_error,
        "w_phi": -log_variance.detach(),
    }


def r_of(config: Config, step: int) -> float:
    """r at a step of a phase, in [0, 1]."""
    c = config.consistency
    return tangent_warmup(
        step,
        warmup=c.r_warmup,
        final=c.r_final,
        cooldown_start=c.r_cooldown_start,
        cooldown_steps=c.r_cooldown_steps,
        schedule=c.r_schedule,
    )


def course_of_r(steps: int) -> dict[str, int]:
    """The course of r over so many steps, as the preset `default` has it over its own; names of `consistency`."""
    shares = {"r_warmup": 0.2, "r_cooldown_start": 0.75, "r_cooldown_steps": 0.1}
    return {name: max(1, round(steps * share)) for name, share in shares.items()}


def short_of_r(config: Config) -> str | None:
    """A note for a run whose steps are too few for the course of r; None where r ends at r_final, or does not count."""
    first, last = phases_of(config)[-1]
    steps, c = config.training.steps - first, last.consistency
    r = r_of(last, steps - 1)
    if last.objective != "continuous" or math.isclose(r, c.r_final, abs_tol=0.01):
        return None
    scaled = " ".join(f"--set consistency.{name}={value}" for name, value in course_of_r(steps).items())
    return (
        f"r ends at {r:.2g} after {steps} steps, not at consistency.r_final={c.r_final:g}: its course is given in "
        f"steps; for this run take {scaled}"
    )


def continuous_loss(networks: Networks, pairs: Pairs, draws: Draws, config: Config, step: int) -> Loss:
    """Continuous-time consistency of each pair; see `Objective`."""
    c, student, sigma_data = config.consistency, networks.student, networks.teacher.sigma_data
    r = r_of(config, step)

    def weight_of(part: Pairs) -> Tensor | None:
        return None if part.t_target is None else tangent_weight(part.t, part.t_target, c.tangent_weight)

    def along(part: Pairs) -> Along:
        s = part.t_target
        told, D = ((), part.t) if s is None else ((s,), part.t - s)

        def network(x_unit: Tensor, t: Tensor) -> Tensor:
            return student(x_unit, t, part.condition, part.guidance, *told)

        dx, dt = tangent_direction(part.x, D, part.dxdt, sigma_data, weight_of(part))
        return Along(network, part.x / sigma_data, part.t, dx, dt, {} if s is None else {"low": s})

    def derive(a: Along) -> Tangent:
        return total_derivative(a.network, a.x, a.t, a.dx, a.dt, networks.tangent, None, **a.bounds)

    with networks.precision():
        tangent = derivative(pairs, along, derive, config)
        log_variance = student.log_variance(pairs.t, pairs.guidance, pairs.t_target)
    terms = consistency_terms(
        tangent.F,
        tangent.dF,
        pairs.x,
        pairs.t,
        pairs.dxdt,
        log_variance.float(),
        r=r,
        sigma_data=sigma_data,
        options=options_of(config),
        target=pairs.t_target,
        weight=weight_of(pairs),
    )
    return Loss(terms.loss, metrics_of(terms, tangent.F, log_variance) | {"r": torch.full_like(pairs.t, r)})
