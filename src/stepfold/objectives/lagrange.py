"""Lagrangian flow maps: where the student lands, its landing point moves with the teacher's velocity as s moves.

The start (x, t) is held and the target time s moves, so no walk is needed: pure noise will do (FreeFlow's predictor).
"""

import torch
from torch import Tensor

from stepfold.config import Config
from stepfold.maths.formulations import euler_step, unsqueeze_like
from stepfold.maths.tangent import Tangent, total_derivative
from stepfold.objectives.apart import Along, derivative
from stepfold.objectives.consistency import metrics_of, options_of, tangent_terms
from stepfold.objectives.contract import Loss, Networks
from stepfold.randomness import Draws
from stepfold.spaces.records import States


def landing_weight(t: Tensor, s: Tensor) -> Tensor:
    """k_t / k_s [M] with k_a = 1 / (sin a + cos a): the residual becomes that of flow matching's mean velocity."""
    return (s.sin() + s.cos()) / (t.sin() + t.cos())


def landing_tangent(
    F: Tensor, dF: Tensor, x: Tensor, t: Tensor, s: Tensor, velocity: Tensor, sigma_data: float
) -> Tensor:
    """g = w (velocity - dX/ds), where dX/ds = cos D sigma_data F + sin D x - sin D sigma_data dF/ds and D = t - s.

    It is zero where the landing point X(x, t, s) moves with the teacher; F + g / sigma_data is what
    flow matching's mean velocity should be. At s = t it is velocity - sigma_data F.

    Args:
        F: stop-gradient copy of the student's output [M, ...].
        dF: w sin D dF/ds [M, ...].
        x: [M, ...].
        t: [M].
        s: [M], in [0, t].
        velocity: the teacher's, at the landing points and at s [M, ...].
        sigma_data: standard deviation of the data.

    Returns:
        g [M, ...], detached.

    Reference: arXiv:2506.14603 (AYF), Lagrangian map distillation; arXiv:2511.19428 (FreeFlow), its predictor.
    """
    D, w = unsqueeze_like(t - s, x), unsqueeze_like(landing_weight(t, s), x)
    return (w * (velocity - D.cos() * sigma_data * F - D.sin() * x) + sigma_data * dF).detach()


def lagrange_loss(networks: Networks, states: States, draws: Draws, config: Config, step: int) -> Loss:
    """The Lagrangian residual of each state, normalised and weighted as consistency's tangent; see `Objective`."""
    student, teacher, s = networks.student, networks.teacher, states.t_target
    x, t, sigma_data = states.x, states.t, teacher.sigma_data
    assert s is not None, "the settings see to it"

    def along(part: States) -> Along:
        target, start = part.t_target, part.t
        assert target is not None

        def network(x_unit: Tensor, target: Tensor) -> Tensor:
            return student(x_unit, start, part.condition, part.guidance, target)

        ds = landing_weight(start, target) * (start - target).sin()
        return Along(network, part.x / sigma_data, target, torch.zeros_like(part.x), ds, {"high": start})

    def derive(a: Along) -> Tangent:
        return total_derivative(a.network, a.x, a.t, a.dx, a.dt, networks.tangent, None, **a.bounds)

    with networks.precision():
        tangent = derivative(states, along, derive, config)
        log_variance = student.log_variance(t, states.guidance, s)
    F = tangent.F.to(x.dtype)
    with torch.no_grad(), networks.walk_precision():
        landing = euler_step(x, t, s, sigma_data * F.detach())
        velocity = teacher.velocity(landing, s, states.condition, states.guidance)
    g = landing_tangent(F.detach(), tangent.dF.to(x.dtype), x, t, s, velocity, sigma_data)
    terms = tangent_terms(F, g, torch.ones_like(t), log_variance.float(), options_of(config))
    return Loss(terms.loss, metrics_of(terms, tangent.F, log_variance))
