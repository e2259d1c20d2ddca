"""Semigroup: one jump of the student should end where two legs end, X(x, t, s) = X(X(x, t, m), m, s); no derivative.

Who makes the legs, and where they meet, gives discrete consistency with a target time (CTM, TCD), segments (PCM,
multistep consistency), shortcut models (the student both, at half way), progressive distillation (the teacher both),
alpha-Flow (alpha falls from 1), and BOOT (the teacher the second one, at its end).
"""

import torch
from torch import Tensor

from stepfold.config import Config
from stepfold.jumps import Leg
from stepfold.maths.formulations import euler_step, in_float32, unsqueeze_like
from stepfold.objectives.contract import Loss, Networks
from stepfold.objectives.discrete import discrete_terms
from stepfold.randomness import Draws
from stepfold.spaces.records import Pairs, States
from stepfold.teachers.contract import Student


def meeting_time(t: Tensor, s: Tensor, alpha: float | None, t_next: Tensor | None) -> Tensor:
    """m [M], where the legs meet: t - alpha (t - s), or the next time of the route, not below s."""
    if alpha is not None:
        return t - alpha * (t - s)
    assert t_next is not None
    return torch.maximum(t_next, s)


def composed(F1: Tensor, F2: Tensor, x_unit: Tensor, t: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """F* whose one jump from t to s ends where F1's from t to m and F2's from m to s do.

    F* = [sin(t-m) cos(m-s) F1 + sin(m-s) F2 - sin(t-m) sin(m-s) x / sigma_data] / sin(t-s). At s = t, where no jump has
    a length, it is F1.

    Args:
        F1: [M, ...], of the first leg.
        F2: [M, ...], of the second leg.
        x_unit: x / sigma_data [M, ...], at time t.
        t: [M].
        m: [M], in [s, t].
        s: [M], in [0, t].

    Reference: arXiv:2507.16884 (SplitMeanFlow), whose weighted mean of two mean velocities this is in TrigFlow.
    """
    t, m, s = (unsqueeze_like(time, x_unit) for time in (t, m, s))
    first, second, whole = (t - m).sin(), (m - s).sin(), (t - s).sin()
    stays = whole == 0
    legs = first * (m - s).cos() * F1 + second * F2 - first * second * x_unit
    return torch.where(stays, F1, legs / torch.where(stays, 1, whole))


def teachers_share(t: Tensor, m: Tensor, s: Tensor, first: Leg, second: Leg) -> Tensor:
    """Length [M] of the leg that the teacher makes, in that of the jump; 1 where it makes both or none.

    The error of a student over a short leg of the teacher's is as short: divided by this, it is that of the limit, the
    tangent of `consistency` or of `lagrange`.
    """
    if (first == "teacher") == (second == "teacher"):
        return torch.ones_like(t)
    whole = t - s
    leg = t - m if first == "teacher" else m - s
    return torch.where(whole > 0, leg / torch.where(whole > 0, whole, 1), 1)


def semigroup_loss(networks: Networks, states: States, draws: Draws, config: Config, step: int) -> Loss:
    """Distance of F of each state's jump to that of its two legs; see `Objective`. Without a target time it is 0."""
    options, sigma_data = config.semigroup, networks.teacher.sigma_data
    x, t, pairs = states.x, states.t, states if isinstance(states, Pairs) else None
    s = torch.zeros_like(t) if states.t_target is None else states.t_target
    m = meeting_time(t, s, options.alpha_at(step), pairs.t_next if pairs else None)
    with networks.precision():
        F = networks.student(x / sigma_data, t, states.condition, states.guidance, s)
    with torch.no_grad():
        stays = "diagonal" in config.target.rules
        velocity = states.x
        if options.first == "teacher" or stays:
            velocity = pairs.dxdt if pairs else leg(networks, "teacher", states, x, t, m)
        F1 = velocity / sigma_data
        if options.first != "teacher":
            F1 = leg(networks, options.first, states, x, t, m) / sigma_data
            F1 = torch.where(unsqueeze_like(s == t, x) & stays, velocity / sigma_data, F1)
        x_m = euler_step(x, t, m, sigma_data * F1)
        F2 = leg(networks, options.second, states, x_m, m, s) / sigma_data
        target = composed(F1, F2, x / sigma_data, t, m, s)
    share = teachers_share(t, m, s, options.first, options.second)
    apart = (in_float32(F) - target) / unsqueeze_like(share, x)
    terms = discrete_terms(apart, torch.zeros_like(apart), options.huber_constant)
    metrics = {"|F|": F.detach().flatten(1).norm(dim=1), "squared_error": terms.squared_error}
    return Loss(share * terms.loss, metrics)  # the Huber constant is in the leg's units, the slope is 1 at most


def leg(networks: Networks, maker: Leg, states: States, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """sigma_data F [M, ...] of a jump from (x, t) to s, or the teacher's velocity at (x, t)."""
    if maker == "teacher":
        with networks.walk_precision():
            return networks.teacher.velocity(x, t, states.condition, states.guidance)
    student: Student | None = networks.student if maker == "student" else networks.average
    assert student is not None, "a run has an average"
    with networks.precision():
        F = student(x / networks.teacher.sigma_data, t, states.condition, states.guidance, s)
    return networks.teacher.sigma_data * F.to(x.dtype)
