"""Lagrangian flow maps: the landing point moves with the teacher; BOOT's equation on pure noise."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gaussians import SIGMA_DATA, Law, Map, batch_of, gaussian, nothing
from torch import Tensor

from stepfold.config import load_config
from stepfold.maths.formulations import (
    data_prediction,
    euler_step,
    flow_input,
    flow_time,
    flow_velocity,
    unsqueeze_like,
)
from stepfold.maths.tangent import BACKENDS, total_derivative
from stepfold.objectives import lagrange
from stepfold.objectives.contract import Networks
from stepfold.objectives.lagrange import lagrange_loss, landing_tangent, landing_weight
from stepfold.spaces.prior import prior_states
from stepfold.spaces.records import States

from .test_flow_maps import LAWS, F_of_mixture, Network, exact, mixture, smooth, states, times

EXACT: dict[str, Any] = dict(rtol=1e-11, atol=1e-11)
Velocity = Callable[[Tensor, Tensor], Tensor]


def residual(network: Network, x: Tensor, t: Tensor, s: Tensor, velocity: Velocity) -> Tensor:
    """g of a network against a teacher."""
    ds = landing_weight(t, s) * (t - s).sin()
    found = total_derivative(lambda x_unit, s: network(x_unit, t, s), x / SIGMA_DATA, s, torch.zeros_like(x), ds)
    landing = euler_step(x, t, s, SIGMA_DATA * found.F)
    return landing_tangent(found.F, found.dF, x, t, s, velocity(landing, s), SIGMA_DATA)


@pytest.mark.parametrize("law", LAWS)
def test_the_exact_flow_map_is_at_rest_for_every_target(law: tuple[float, float]) -> None:
    x, (t, s) = states(), times()
    assert residual(exact(*law), x, t, s, gaussian(*law).velocity).abs().max() < 1e-11


def test_the_flow_map_of_a_mixture_is_at_rest() -> None:
    x, (t, s) = states(8), times(8)
    label = torch.zeros(8, dtype=torch.long)
    assert residual(F_of_mixture, x, t, s, lambda x, s: mixture().velocity(x, s, label)).abs().max() < 1e-6


def test_of_any_network_it_is_what_the_landing_point_lacks() -> None:
    x, (t, s) = states(), times()
    velocity = gaussian(0.4, 0.2).velocity
    landing = lambda s: euler_step(x, t, s, SIGMA_DATA * smooth(x / SIGMA_DATA, t, s))  # noqa: E731
    at, moved = torch.func.jvp(landing, (s,), (torch.ones_like(s),))[:2]
    wanted = unsqueeze_like(landing_weight(t, s), x) * (velocity(at, s) - moved)
    torch.testing.assert_close(residual(smooth, x, t, s, velocity), wanted, **EXACT)


def test_it_is_the_residual_of_flow_matchings_mean_velocity() -> None:
    """u* - u = v(X, s) + (t - s) du/ds - u, brought to F's units by k_t."""
    x, (t, s) = states(), times()
    velocity = gaussian(0.4, 0.2).velocity
    x_flow, t_flow, s_flow = flow_input(x, t, SIGMA_DATA), flow_time(t), flow_time(s)

    def mean_velocity(s_flow: Tensor) -> Tensor:
        return flow_velocity(x_flow, t_flow, smooth(x / SIGMA_DATA, t, torch.atan2(s_flow, 1 - s_flow)))

    u, du = torch.func.jvp(mean_velocity, (s_flow,), (torch.ones_like(s_flow),))[:2]
    landing = euler_step(x, t, s, SIGMA_DATA * smooth(x / SIGMA_DATA, t, s))
    v = flow_velocity(flow_input(landing, s, SIGMA_DATA), s_flow, velocity(landing, s) / SIGMA_DATA)
    k_t = unsqueeze_like(1 / (t.sin() + t.cos()), x)
    wanted = k_t * (v + unsqueeze_like(t_flow - s_flow, x) * du - u)
    torch.testing.assert_close(residual(smooth, x, t, s, velocity) / SIGMA_DATA, wanted, **EXACT)


def test_on_the_diagonal_it_is_velocity_matching() -> None:
    x, (t, _) = states(), times()
    velocity = gaussian(0.4, 0.2).velocity
    wanted = velocity(x, t) - SIGMA_DATA * smooth(x / SIGMA_DATA, t, t)
    torch.testing.assert_close(residual(smooth, x, t, t, velocity), wanted, **EXACT)


def test_from_pure_noise_it_is_boots_equation() -> None:
    """With y = -sigma_data F(z, pi/2, s): dy / d(log tan s) = y - f(X, s), f being the teacher's picture."""
    z, s = SIGMA_DATA * states(), torch.linspace(0.1, 1.4, 32).double()
    t, law = torch.full_like(s, math.pi / 2), gaussian(0.4, 0.2)
    for network, rests in ((exact(0.4, 0.2), True), (smooth, False)):
        y, dy = torch.func.jvp(
            lambda s, net=network: -SIGMA_DATA * net(z / SIGMA_DATA, t, s), (s,), (s.sin() * s.cos(),)
        )[:2]
        landing = unsqueeze_like(s.cos(), z) * y + unsqueeze_like(s.sin(), z) * z
        lack = y - data_prediction(landing, s, law.velocity(landing, s)) - dy
        torch.testing.assert_close(
            unsqueeze_like(landing_weight(t, s) / s.sin(), z) * lack, residual(network, z, t, s, law.velocity),
            rtol=1e-9, atol=1e-9,
        )  # fmt: skip
        assert (lack.abs().max() < 1e-11) == rests


law = gaussian(0.4, 0.2)
MISTAKES: dict[str, Callable[[Network, Tensor, Tensor, Tensor], Tensor]] = {
    "the velocity at the start": lambda net, x, t, s: residual(net, x, t, s, lambda _, __: law.velocity(x, t)),
    "the velocity at t": lambda net, x, t, s: residual(net, x, t, s, lambda at, _: law.velocity(at, t)),
    "s runs backwards": lambda net, x, t, s: residual(lambda x, t, u: net(x, t, 2 * s - u), x, t, s, law.velocity),
    "no derivative": lambda net, x, t, s: residual(lambda x, t, u: net(x, t, s), x, t, s, law.velocity),
    "the start moves too": lambda net, x, t, s: residual(lambda x, v, u: net(x, t + u - s, u), x, t, s, law.velocity),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str) -> None:
    x, (t, s) = states(), times()
    inside = (t - s > 0.1) & (s > 0.1) & (t < 1.5)
    assert MISTAKES[mistake](exact(0.4, 0.2), x[inside], t[inside], s[inside]).abs().max() > 1e-2


def start(**extra: Any) -> States:
    """Pure noise with targets, a third of which stay."""
    noise = SIGMA_DATA * states(12)
    found = prior_states(noise, math.pi / 2, nothing(12), torch.ones(12))
    stays = torch.arange(12) % 3 == 1
    s = torch.where(stays, found.t, torch.linspace(0, 1.5, 12).double())
    return replace(found, t_target=s, **extra)


def loss_and_gradient(student: Map, found: States, **networks: Any) -> tuple[Tensor, list[Tensor]]:
    changes = ["student.times=two", "objective=lagrange", "space.kind=prior", "consistency.adaptive_weight=false"]
    changes += ["target.rule={uniform: 0.7, diagonal: 0.3}", "consistency.normalise=none"]
    calls: Any = Networks(student, Law(0.4, 0.2), **networks)  # type: ignore[arg-type]
    loss = lagrange_loss(calls, found, batch_of(4).draws, load_config("default", changes), 0)
    return loss.value.detach(), list(torch.autograd.grad(loss.value.sum(), list(student.parameters())))


def test_the_gradient_is_minus_twice_the_residual_on_pure_noise() -> None:
    student, found = Map(0.3, 0.3), start()
    assert found.t_target is not None
    loss, gradient = loss_and_gradient(student, found)
    g = residual(exact(0.3, 0.3), found.x, found.t, found.t_target, law.velocity)
    torch.testing.assert_close(loss, g.square().mean(1), rtol=1e-9, atol=1e-12)
    F = student(found.x / SIGMA_DATA, found.t, found.condition, found.guidance, found.t_target)
    wanted = torch.autograd.grad((-2 / 3 * g * F).sum(), list(student.parameters()))
    torch.testing.assert_close(gradient, list(wanted), rtol=1e-9, atol=1e-12)


def test_states_that_stay_are_not_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def noted(network: Any, x: Tensor, *rest: Any, **options: Any) -> Any:
        rows.append(len(x))
        return total_derivative(network, x, *rest, **options)

    monkeypatch.setattr(lagrange, "total_derivative", noted)
    student = Map(0.3, 0.3)
    together = loss_and_gradient(student, start())
    apart = loss_and_gradient(student, start(stays=torch.arange(12) % 3 == 1))
    assert rows == [12, 8]
    torch.testing.assert_close(apart, together, **EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_moves_the_target_alone(backend: str) -> None:
    ours, _ = loss_and_gradient(Map(0.3, 0.3), start(), tangent=backend)
    theirs, _ = loss_and_gradient(Map(0.3, 0.3), start(), tangent="two_pass")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
