"""Two legs for one jump: composition, the limits of alpha, segments, and who makes which leg."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from gaussians import SIGMA_DATA, Law, Map, Perfect, Score, batch_of, gaussian, nothing
from torch import Tensor

from stepfold.config import Config, load_config
from stepfold.maths.formulations import euler_step
from stepfold.objectives.contract import Loss, Networks
from stepfold.objectives.discrete import discrete_loss
from stepfold.objectives.semigroup import composed, meeting_time, semigroup_loss, teachers_share
from stepfold.spaces.prior import prior_states
from stepfold.spaces.records import Pairs, States
from stepfold.spaces.targets import edge_below

from .test_flow_maps import exact, residual, smooth, states, times

EXACT: dict[str, Any] = dict(rtol=1e-12, atol=1e-12)


def inside() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, t, m, s with t > m > s."""
    x, (t, s) = states(), times()
    return x, t, s + (t - s) * torch.linspace(0.05, 0.95, len(t)).double(), s


def jump(F: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return euler_step(x, t, s, SIGMA_DATA * F)


def test_the_composed_jump_ends_where_two_jumps_end() -> None:
    x, t, m, s = inside()
    F1 = smooth(x / SIGMA_DATA, t, m)
    x_m = jump(F1, x, t, m)
    F2 = smooth(x_m / SIGMA_DATA, m, s)
    whole = composed(F1, F2, x / SIGMA_DATA, t, m, s)
    torch.testing.assert_close(jump(whole, x, t, s), jump(F2, x_m, m, s), **EXACT)


def two_legs(first: Any, second: Any, m_of: Callable[..., Tensor] | None = None) -> Tensor:
    """F* - F of the exact map of N(0.4, 0.2^2), composed of legs of the given networks."""
    x, t, m, s = inside()
    m = m if m_of is None else m_of(t, m, s)
    F1 = first(x / SIGMA_DATA, t, m)
    x_m = jump(F1, x, t, m)
    target = composed(F1, second(x_m / SIGMA_DATA, m, s), x / SIGMA_DATA, t, m, s)
    return target - exact(0.4, 0.2)(x / SIGMA_DATA, t, s)


def test_the_exact_flow_map_is_two_of_its_legs() -> None:
    assert two_legs(exact(0.4, 0.2), exact(0.4, 0.2)).abs().max() < 1e-11


WRONG: dict[str, tuple[Any, Any]] = {
    "the second leg starts at t": (exact(0.4, 0.2), lambda x, m, s: exact(0.4, 0.2)(x, torch.full_like(m, 1.5), s)),
    "the second leg ends at 0": (exact(0.4, 0.2), lambda x, m, s: exact(0.4, 0.2)(x, m, 0 * s)),
    "the first leg is the whole jump": (lambda x, t, m: exact(0.4, 0.2)(x, t, 0 * m), exact(0.4, 0.2)),
    "the law is another": (exact(0.4, 0.2), exact(0.4, 0.3)),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_seen(mistake: str) -> None:
    assert two_legs(*WRONG[mistake]).abs().max() > 0.05


@pytest.mark.parametrize("kind", [0.0, 1.0])
def test_at_the_ends_one_leg_is_the_jump(kind: float) -> None:
    x, t, _, s = inside()
    m = s + kind * (t - s)
    F1, F2 = torch.randn(2, *x.shape).double()
    torch.testing.assert_close(composed(F1, F2, x / SIGMA_DATA, t, m, s), F2 if kind else F1, **EXACT)
    assert torch.equal(composed(F1, F2, x / SIGMA_DATA, t, t, t), F1)  # no jump has a length: the velocity


class Smooth(Score):
    """A student that is wrong everywhere, with a parameter."""

    def forward(self, x_unit: Tensor, t: Tensor, condition: Any, guidance: Any, target: Tensor | None = None) -> Tensor:
        assert target is not None
        return smooth(x_unit, t, target) + self.mean


def pairs_of(**extra: Any) -> Pairs:
    x, t, m, s = inside()
    num = len(t)
    values: dict[str, Any] = dict(
        x=x, t=t, dxdt=gaussian(0.4, 0.2).velocity(x, t), t_next=m, x0=x, condition=nothing(num),
        guidance=torch.ones(num), prompt=torch.arange(num), number=torch.arange(num), num_drawn=num, t_target=s,
    )  # fmt: skip
    return Pairs(**values | extra)


def loss_of(student: Score, found: States, *changes: str, step: int = 0, average: Any = None) -> tuple[Loss, Config]:
    rules = "target.rule={uniform: 0.75, diagonal: 0.25}"
    settings = ["student.times=two", "objective=semigroup", rules, "semigroup.huber_constant=1e6", *changes]
    config = load_config("default", settings)
    networks: Any = Networks(student, Law(0.4, 0.2), average=average)  # type: ignore[arg-type]
    return semigroup_loss(networks, found, batch_of(4).draws, config, step), config


def test_as_alpha_falls_it_becomes_the_tangent_linearly() -> None:
    """The distance to F* in the teacher's share tends to D / (cos D sin D) of the tangent; the error falls tenfold."""
    x, t, _, s = inside()
    apart = t - s > 0.1
    x, t, s = x[apart], t[apart], s[apart]
    dxdt = gaussian(0.4, 0.2).velocity(x, t)
    limit = residual(smooth, x, t, s, dxdt, "trig") / SIGMA_DATA / (t - s).cos()[:, None]
    errors = []
    for alpha in (1e-2, 1e-3, 1e-4):
        m = meeting_time(t, s, alpha, None)
        F1 = dxdt / SIGMA_DATA
        x_m = jump(F1, x, t, m)
        target = composed(F1, smooth(x_m / SIGMA_DATA, m, s), x / SIGMA_DATA, t, m, s)
        share = teachers_share(t, m, s, "teacher", "student")[:, None]
        ours = (target - smooth(x / SIGMA_DATA, t, s)) / share
        wanted = limit * ((t - s) / (t - s).sin())[:, None]
        errors.append((ours - wanted).norm() / wanted.norm())
    assert errors[-1] < 1e-3 and all(9.5 < a / b < 10.5 for a, b in pairwise(errors)), errors


def test_alpha_one_is_velocity_matching() -> None:
    pairs = pairs_of()
    student = Smooth(0.0, 1.0)
    loss, _ = loss_of(student, pairs, "semigroup.alpha=1")
    assert pairs.t_target is not None
    F = smooth(pairs.x / SIGMA_DATA, pairs.t, pairs.t_target)
    torch.testing.assert_close(
        loss.metrics["squared_error"], (F - pairs.dxdt / SIGMA_DATA).square().mean(1), rtol=1e-6, atol=1e-9
    )


def test_to_zero_over_the_routes_steps_it_is_discrete_consistency() -> None:
    """The distance of F, in the teacher's share, is that of the pictures, which are sin t sigma_data F apart."""
    pairs = replace(pairs_of(), t_target=None)
    student = Map(0.3, 0.3)
    ours, config = loss_of(student, pairs, "target.rule=zero")
    networks: Any = Networks(student, Law(0.4, 0.2))  # type: ignore[arg-type]
    theirs = discrete_loss(networks, pairs, batch_of(4).draws, config, 0)
    m = torch.maximum(pairs.t_next, torch.zeros_like(pairs.t))
    scale = SIGMA_DATA * pairs.t.sin() * teachers_share(pairs.t, m, 0 * m, "teacher", "student")
    torch.testing.assert_close(
        ours.metrics["squared_error"] * scale**2, theirs.metrics["squared_error"], rtol=1e-9, atol=1e-12
    )


def test_the_gradient_is_that_of_the_distance_and_none_reaches_a_leg() -> None:
    pairs, student = pairs_of(), Smooth(0.1, 1.0)
    for makers in (("teacher", "student"), ("student", "student"), ("student", "teacher"), ("teacher", "teacher")):
        changes = ["semigroup.alpha=0.5", f"semigroup.first={makers[0]}", f"semigroup.second={makers[1]}"]
        loss, _ = loss_of(student, pairs, *changes)
        (found,) = torch.autograd.grad(loss.value.sum() * 2e6, student.mean)  # at a large constant half the square
        assert pairs.t_target is not None
        with torch.no_grad():
            x, t, s = pairs.x, pairs.t, pairs.t_target
            m, F = (t + s) / 2, smooth(x / SIGMA_DATA, t, s) + student.mean
            of = {
                "teacher": lambda x, t, s: gaussian(0.4, 0.2).velocity(x, t) / SIGMA_DATA,
                "student": lambda x, t, s: smooth(x / SIGMA_DATA, t, s) + student.mean,
            }
            F1 = of[makers[0]](x, t, m)
            target = composed(F1, of[makers[1]](jump(F1, x, t, m), m, s), x / SIGMA_DATA, t, m, s)
            share = 1.0 if makers[0] == makers[1] else 0.5
        torch.testing.assert_close(found, (2 / 3 * (F - target) / share).sum(), rtol=1e-5, atol=1e-9)


def test_a_short_leg_does_not_outweigh_the_others() -> None:
    """The slope of a far student's loss is at most that of a distance, however short the teacher's leg is."""
    pairs = pairs_of()
    for alpha in (0.5, 1e-2, 1e-4):
        student = Smooth(30.0, 1.0)
        loss, _ = loss_of(student, pairs, f"semigroup.alpha={alpha}", "semigroup.huber_constant=1e-3")
        (slope,) = torch.autograd.grad(loss.value.sum(), student.mean)
        assert 0.01 < abs(slope) / len(pairs.t) <= 1 + 1e-9


def test_the_average_makes_a_leg_where_it_is_asked_to() -> None:
    pairs, student, average = pairs_of(), Smooth(0.1, 1.0), Map(0.4, 0.2)
    changes = ("semigroup.alpha=0.5", "semigroup.first=average", "semigroup.second=average")
    loss, _ = loss_of(student, pairs, *changes, average=average)
    assert pairs.t_target is not None
    wanted = exact(0.4, 0.2)(pairs.x / SIGMA_DATA, pairs.t, pairs.t_target)
    F = smooth(pairs.x / SIGMA_DATA, pairs.t, pairs.t_target) + 0.1
    torch.testing.assert_close(loss.metrics["squared_error"], (F - wanted).square().mean(1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("first", ["teacher", "student"])
def test_states_that_stay_learn_the_teachers_velocity(first: str) -> None:
    pairs = pairs_of()
    pairs = replace(pairs, t_target=pairs.t)
    loss, _ = loss_of(Smooth(0.0, 1.0), pairs, "semigroup.alpha=0.5", f"semigroup.first={first}")
    wanted = (smooth(pairs.x / SIGMA_DATA, pairs.t, pairs.t) - pairs.dxdt / SIGMA_DATA).square().mean(1)
    torch.testing.assert_close(loss.metrics["squared_error"], wanted, rtol=1e-9, atol=1e-9)


def test_alpha_follows_its_course() -> None:
    config = load_config(
        "default", ["semigroup.alpha=1", "semigroup.alpha_final=0.2", "semigroup.alpha_steps=8"]
    ).semigroup
    assert [round(config.alpha_at(step) or 0, 6) for step in (0, 4, 8, 100)] == [1.0, 0.6, 0.2, 0.2]
    assert load_config("default").semigroup.alpha_at(3) is None


def test_one_segment_is_all_and_segments_at_every_state_are_velocity_matching() -> None:
    """A student told one time, whose targets are the ends of segments."""
    t = torch.linspace(0.1, 1.5, 8).double()
    assert torch.equal(edge_below(t, [1.5708]), torch.zeros(8).double())
    route = torch.linspace(math.pi / 2, 0, 33).double()[:-1]
    pairs = pairs_of()
    x, t, t_next = pairs.x, route, torch.cat([route[1:], route.new_zeros(1)])
    s = edge_below(t, route.tolist())
    assert torch.equal(s, t_next)
    pairs = replace(pairs, t=t, t_next=t_next, t_target=s, dxdt=gaussian(0.4, 0.2).velocity(x, t))
    loss, _ = loss_of(Perfect(0.3, 0.3), pairs, "target.rule=edge", "student.times=one")
    F = gaussian(0.3, 0.3).F_of_consistency(x, t)
    torch.testing.assert_close(
        loss.metrics["squared_error"], (F - pairs.dxdt / SIGMA_DATA).square().mean(1), rtol=1e-9, atol=1e-9
    )


def test_boot_is_the_teachers_last_leg_on_the_prior() -> None:
    """From pure noise: the student to m, one step of the teacher's from there; the exact map stays, to second order."""
    noise = SIGMA_DATA * states()
    start = prior_states(noise, math.pi / 2, nothing(len(noise)), torch.ones(len(noise)))
    start = replace(start, t_target=torch.linspace(0, 1.4, len(noise)).double())
    changes = ("space.kind=prior", "semigroup.first=student", "semigroup.second=teacher", "target.rule=uniform")
    errors = [
        loss_of(student, start, *changes, f"semigroup.alpha={alpha}")[0].metrics["squared_error"].mean().sqrt()
        for student, alpha in ((Map(0.4, 0.2), 0.99), (Map(0.4, 0.2), 0.999), (Map(0.4, 0.3), 0.999))
    ]
    assert 8 < errors[0] / errors[1] < 12 and errors[2] > 100 * errors[1]
