"""Consistency with a target time: exact flow maps are at rest, and s = 0 and s = t are what was there before."""

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from gaussians import SIGMA_DATA, Law, Map, Perfect, batch_of, gaussian, nothing
from torch import Tensor

from stepfold.config import load_config
from stepfold.maths.closed_form import MixtureTeacher
from stepfold.maths.formulations import euler_step, flow_input, flow_time, flow_velocity, unsqueeze_like
from stepfold.maths.tangent import BACKENDS, total_derivative
from stepfold.objectives import consistency
from stepfold.objectives.consistency import (
    ConsistencyOptions,
    consistency_tangent,
    consistency_terms,
    continuous_loss,
    tangent_direction,
    tangent_weight,
)
from stepfold.objectives.contract import Networks
from stepfold.settings import TangentWeight
from stepfold.spaces.records import Pairs

EXACT: dict[str, Any] = dict(rtol=1e-12, atol=1e-12)
KINDS = get_args(TangentWeight)
LAWS = [(0.4, 0.2), (-0.3, 0.5), (0.1, 0.9)]
Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_unit, t, s) -> F."""


def times(num: int = 32) -> tuple[Tensor, Tensor]:
    """t > s, pi/2 and 0 among them."""
    generator = torch.Generator().manual_seed(0)
    pair = math.pi / 2 * torch.rand(2, num, generator=generator, dtype=torch.float64)
    t, s = pair.max(0).values, pair.min(0).values
    t[0], s[0], t[1], s[2] = math.pi / 2, 0, math.pi / 2, 0
    return t, s


def states(num: int = 32) -> Tensor:
    return torch.randn(num, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def smooth(x_unit: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """A flow map that is none: it is wrong everywhere."""
    t, s = unsqueeze_like(t, x_unit), unsqueeze_like(s, x_unit)
    return torch.sin(1.3 * x_unit + 0.7 * t - 1.1 * s) + 0.4 * torch.cos(x_unit.roll(1, 1) * t) + s * t


def exact(mean: float, std: float) -> Network:
    return lambda x_unit, t, s: gaussian(mean, std).F_of_flow_map(SIGMA_DATA * x_unit, t, s)


def residual(network: Network, x: Tensor, t: Tensor, s: Tensor, dxdt: Tensor, kind: TangentWeight) -> Tensor:
    """g at r = 1."""
    weight = tangent_weight(t, s, kind)
    direction = tangent_direction(x, t - s, dxdt, SIGMA_DATA, weight)
    found = total_derivative(lambda x_unit, t: network(x_unit, t, s), x / SIGMA_DATA, t, *direction)
    return consistency_tangent(found.F, found.dF, x, t - s, dxdt, 1.0, SIGMA_DATA, weight)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_flow_map_is_at_rest_for_every_target(kind: TangentWeight, law: tuple[float, float]) -> None:
    x, (t, s) = states(), times()
    assert residual(exact(*law), x, t, s, gaussian(*law).velocity(x, t), kind).abs().max() < 1e-12


def mixture() -> MixtureTeacher:
    return MixtureTeacher(
        torch.tensor([[[-0.7, 0.5, 0.0]], [[0.6, -0.2, 0.3]]]).double(), torch.tensor([[0.2], [0.3]]).double(),
        torch.tensor([[0.4], [0.6]]).double(), SIGMA_DATA,
    )  # fmt: skip


def solved(x: Tensor, t: Tensor, s: Tensor, num: int = 100) -> Tensor:
    """The mixture's flow map by Runge and Kutta's fourth-order steps."""
    label = torch.zeros(len(x), dtype=torch.long)

    def slope(x: Tensor, t: Tensor) -> Tensor:
        return mixture().velocity(x, t, label)

    h = (s - t) / num
    step = unsqueeze_like(h, x)
    for i in range(num):
        now = t + i * h
        a = slope(x, now)
        b = slope(x + step / 2 * a, now + h / 2)
        c = slope(x + step / 2 * b, now + h / 2)
        x = x + step / 6 * (a + 2 * b + 2 * c + slope(x + step * c, now + h))
    return x


def F_of_mixture(x_unit: Tensor, t: Tensor, s: Tensor) -> Tensor:
    x, D = SIGMA_DATA * x_unit, unsqueeze_like(t - s, x_unit)
    return (D.cos() * x - solved(x, t, s)) / (SIGMA_DATA * D.sin())


def test_the_flow_map_of_a_mixture_is_at_rest() -> None:
    x, (t, s) = states(8), times(8)
    dxdt = mixture().velocity(x, t, torch.zeros(8, dtype=torch.long))
    assert residual(F_of_mixture, x, t, s, dxdt, "trig").abs().max() < 1e-6
    assert residual(smooth, x, t, s, dxdt, "trig").abs().max() > 0.1


MISTAKES: dict[str, Callable[..., Tensor]] = {
    "t in place of D": lambda net, x, t, s, v: residual(lambda x, t, _: net(x, t, s), x, t, 0 * s, v, "trig"),
    "a network that is not told": lambda net, x, t, s, v: residual(
        lambda x, t, s: net(x, t, 0 * s), x, t, s, v, "trig"
    ),
    "the target moves too": lambda net, x, t, s, v: residual(lambda x, u, s: net(x, u, s + u - t), x, t, s, v, "trig"),
    "another velocity": lambda net, x, t, s, v: residual(net, x, t, s, 0.9 * v, "trig"),
    "time runs backwards": lambda net, x, t, s, v: residual(lambda x, u, s: net(x, 2 * t - u, s), x, t, s, v, "trig"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str) -> None:
    x, (t, s) = states(), times()
    inside = (t - s > 0.1) & (s > 0.1)
    x, t, s = x[inside], t[inside], s[inside]
    assert MISTAKES[mistake](exact(0.4, 0.2), x, t, s, gaussian(0.4, 0.2).velocity(x, t)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_of_any_network_it_is_the_derivative_of_the_landing_point(kind: TangentWeight) -> None:
    x, (t, s) = states(), times()
    dxdt = gaussian(0.4, 0.2).velocity(x, t)
    landing = lambda x, t: euler_step(x, t, s, SIGMA_DATA * smooth(x / SIGMA_DATA, t, s))  # noqa: E731
    _, moved = torch.func.jvp(landing, (x, t), (dxdt, torch.ones_like(t)))[:2]
    wanted = unsqueeze_like(tangent_weight(t, s, kind), x) * moved
    torch.testing.assert_close(residual(smooth, x, t, s, dxdt, kind), wanted, **EXACT)


def test_meanflow_weighs_it_as_the_residual_of_the_mean_velocity() -> None:
    """u* - u = v - (t - s) du/dt - u in flow matching's coordinates, brought to F's units."""
    x, (t, s) = states(), times()
    dxdt = gaussian(0.4, 0.2).velocity(x, t)
    x_flow, t_flow, s_flow = flow_input(x, t, SIGMA_DATA), flow_time(t), flow_time(s)
    v = flow_velocity(x_flow, t_flow, dxdt / SIGMA_DATA)

    def mean_velocity(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        t = torch.atan2(t_flow, 1 - t_flow)
        x_unit = x_flow * unsqueeze_like(t.sin() + t.cos(), x_flow)
        return flow_velocity(x_flow, t_flow, smooth(x_unit, t, s))

    u, du = torch.func.jvp(mean_velocity, (x_flow, t_flow), (v, torch.ones_like(t_flow)))[:2]
    k_t = unsqueeze_like(1 / (t.sin() + t.cos()), x)
    wanted = k_t * (v - unsqueeze_like(t_flow - s_flow, x) * du - u)
    torch.testing.assert_close(residual(smooth, x, t, s, dxdt, "meanflow") / SIGMA_DATA, wanted, **EXACT)


@pytest.mark.parametrize("kind", ["trig", "meanflow"])
def test_on_the_diagonal_it_is_velocity_matching(kind: TangentWeight) -> None:
    x, (t, _) = states(), times()
    dxdt = gaussian(0.4, 0.2).velocity(x, t)
    wanted = dxdt - SIGMA_DATA * smooth(x / SIGMA_DATA, t, t)
    torch.testing.assert_close(residual(smooth, x, t, t, dxdt, kind), wanted, **EXACT)


def test_the_gradient_is_minus_twice_the_tangent() -> None:
    x, (t, s) = states(), times()
    dxdt, weight = gaussian(0.4, 0.2).velocity(x, t), tangent_weight(t, s, "trig")
    direction = tangent_direction(x, t - s, dxdt, SIGMA_DATA, weight)
    found = total_derivative(lambda x_unit, t: smooth(x_unit, t, s), x / SIGMA_DATA, t, *direction)
    F = found.F.clone().requires_grad_(True)
    options = ConsistencyOptions("none", adaptive_weight=False, normalise="none")
    terms = consistency_terms(
        F, found.dF, x, t, dxdt, t, r=1.0, sigma_data=SIGMA_DATA, options=options, target=s, weight=weight
    )
    (found_gradient,) = torch.autograd.grad(terms.loss.sum(), F)
    torch.testing.assert_close(found_gradient, -2 / 3 * residual(smooth, x, t, s, dxdt, "trig"), **EXACT)


def test_the_prior_weight_is_of_pairs_that_jump_to_zero() -> None:
    x, (t, s) = states(), times()
    F, dF, dxdt = (torch.randn_like(x) for _ in range(3))
    options = ConsistencyOptions(adaptive_weight=False)
    values = dict(r=1.0, sigma_data=SIGMA_DATA, options=options)
    plain = consistency_terms(F, dF, x, t, dxdt, t, **values)  # type: ignore[arg-type]
    aimed = consistency_terms(F, dF, x, t, dxdt, t, **values, target=s)  # type: ignore[arg-type]
    assert torch.equal(aimed.loss[s == 0], plain.loss[s == 0]) and int((s == 0).sum()) == 2
    assert torch.equal(aimed.loss[s > 0], aimed.squared_error[s > 0])


SETTINGS = (
    "student.times=two", "objective=continuous", "consistency.r_warmup=0", "consistency.r_final=0.9",
    "consistency.r_schedule=none",
)  # fmt: skip


def pairs_of(num: int, dtype: torch.dtype, **extra: Any) -> Pairs:
    """States of a Gaussian, its velocity at them."""
    x, (t, _) = states(num).to(dtype), times(num)
    t = t.to(dtype).clamp(max=1.5)
    index = torch.arange(num)
    return Pairs(
        x=x, t=t, dxdt=gaussian(0.4, 0.2).velocity(x, t).to(dtype), t_next=t / 2, x0=x, condition=nothing(num),
        guidance=torch.ones(num), prompt=index, number=index, num_drawn=num, **extra,
    )  # fmt: skip


def loss_and_gradient(student: Any, pairs: Pairs, *changes: str, **networks: Any) -> tuple[Tensor, list[Tensor]]:
    config = load_config("default", [*SETTINGS, *changes])
    loss = continuous_loss(Networks(student, Law(), **networks), pairs, batch_of(4).draws, config, 0)  # type: ignore[arg-type]
    return loss.value.detach(), list(torch.autograd.grad(loss.value.sum(), list(student.parameters())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_target_zero_it_is_the_consistency_loss_to_the_bit(dtype: torch.dtype) -> None:
    """Of a flow map that is told 0, against the same formula as it stood before there were targets."""
    student, config = Map(0.3, 0.3).to(dtype), load_config("default", SETTINGS)
    plain, aimed = pairs_of(16, dtype), pairs_of(16, dtype, t_target=torch.zeros(16, dtype=dtype))
    for ours, theirs in zip(
        loss_and_gradient(student, plain), loss_and_gradient(student, aimed), strict=True
    ):  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(loss_and_gradient(student, plain)[0], loss_and_gradient(Perfect(0.3, 0.3).to(dtype), plain)[0])
    F, dF = (torch.randn_like(plain.x) for _ in range(2))
    cos, sin = unsqueeze_like(plain.t.cos(), F), unsqueeze_like(plain.t.sin(), F)
    r = config.consistency.r_final
    before = -(cos**2) * (SIGMA_DATA * F - plain.dxdt) - r * (cos * sin * plain.x + SIGMA_DATA * dF)
    for weight in (None, tangent_weight(plain.t, torch.zeros_like(plain.t), "trig")):
        assert torch.equal(consistency_tangent(F, dF, plain.x, plain.t, plain.dxdt, r, SIGMA_DATA, weight), before)


def test_states_that_stay_are_not_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their loss and gradient are the same; the derivative is taken of the others alone, and bound to its own row."""
    t = pairs_of(12, torch.float64).t
    stays = torch.arange(12) % 3 == 1
    s = torch.where(stays, t, t * torch.linspace(0, 0.8, 12).double())
    together, apart = pairs_of(12, torch.float64, t_target=s), pairs_of(12, torch.float64, t_target=s, stays=stays)
    rows: list[int] = []

    def noted(network: Any, x: Tensor, *rest: Any, **options: Any) -> Any:
        rows.append(len(x))
        return total_derivative(network, x, *rest, **options)

    monkeypatch.setattr(consistency, "total_derivative", noted)
    student = Map(0.3, 0.3)
    (loss, gradient), (loss_apart, gradient_apart) = (loss_and_gradient(student, p) for p in (together, apart))
    assert rows == [12, 8]
    torch.testing.assert_close(loss_apart, loss, **EXACT)
    torch.testing.assert_close(gradient_apart, gradient, **EXACT)
    loss_and_gradient(student, apart.rows(slice(1, 2)))
    assert rows == [12, 8]  # none but such: no derivative at all
    for together_again in ("training.compile=true", "training.shard=student"):  # passes of equal shapes and number
        loss_and_gradient(student, apart, together_again, "optimiser.name=adamw")
    assert rows == [12, 8, 12, 12]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_holds_the_target(backend: str) -> None:
    t = pairs_of(12, torch.float64).t
    pairs = pairs_of(12, torch.float64, t_target=t * torch.linspace(0, 0.99, 12).double())
    ours, _ = loss_and_gradient(Map(0.3, 0.3), pairs, tangent=backend)
    theirs, _ = loss_and_gradient(Map(0.3, 0.3), pairs, tangent="two_pass")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_finite_differences_stay_above_the_target() -> None:
    """A jump from below its target has no meaning, and no student was ever asked for one."""
    x, t = states(4), torch.tensor([0.3, 0.8, 1.2, math.pi / 2], dtype=torch.float64)
    s = t - torch.tensor([1e-4, 1e-6, 0.3, 0.0], dtype=torch.float64)
    seen: list[Tensor] = []

    def network(x_unit: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return smooth(x_unit, t, s)

    direction = tangent_direction(x, t - s, gaussian(0.4, 0.2).velocity(x, t), SIGMA_DATA)
    found = total_derivative(network, x / SIGMA_DATA, t, *direction, "finite_difference", 1e-3, low=s)
    assert all(bool((at >= s - 1e-15).all() and (at <= math.pi / 2 + 1e-15).all()) for at in seen)
    wanted = total_derivative(network, x / SIGMA_DATA, t, *direction)
    torch.testing.assert_close(found.dF, wanted.dF, rtol=1e-4, atol=1e-9)
