"""Contract of the objectives as a run calls them, on a Gaussian teacher: a new objective adds a row to ROWS."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussians import Law, Map, Perfect, Score, batch_of, nothing
from torch import Tensor

from stepfold.config import Config, load_config
from stepfold.objectives.contract import Loss, Networks
from stepfold.objectives.denoising import FAKE
from stepfold.spaces.records import Pairs
from stepfold.training.states import collect
from stepfold.training.terms import OBJECTIVES

LAW = Law(0.4, 0.2)
ROWS: dict[str, type[Score]] = {
    "continuous": Perfect,
    "discrete": Perfect,
    "velocity": Score,
    "pair": Perfect,
    "semigroup": Perfect,
    "lagrange": Map,
    "matching": Perfect,
    "identity": Perfect,
}
"""Objective -> the network that is perfect for it, given the teacher's own law."""
OWN = ("adversarial", "decoupled", "policy", "reward")
"""Objectives whose states or networks are of another kind; each has the same contract in a file of its own."""
AIMED: dict[str, tuple[str, ...]] = {
    "continuous": ("target.rule={gap: 0.5, zero: 0.25, diagonal: 0.25}",),
    "pair": ("target.rule={later: 0.75, diagonal: 0.25}", "space.route_steps=256"),
    "semigroup": ("target.rule={uniform: 0.75, diagonal: 0.25}", "semigroup.alpha=0.01"),
    "lagrange": ("target.rule={uniform: 0.5, edge: 0.25, diagonal: 0.25}",),
}
"""Objective -> its settings where the student, a flow map, is told where to jump to."""
SCORES = ("matching", "identity")
"""Objectives that compare the teacher with the score of the student's own pictures."""
FINE = "space.route_steps=256"  # what pairs learn are the walk's own states
CASES = [(name, (FINE,) * (name == "pair"), kind) for name, kind in ROWS.items() if name != "lagrange"]
CASES += [(name, ("student.times=two", f"objective={name}", *changes), Map) for name, changes in AIMED.items()]
each_case = pytest.mark.parametrize(
    ("objective", "changes", "perfect"), CASES, ids=[f"{name}{', aimed' * (kind is Map)}" for name, _, kind in CASES]
)
Changes = tuple[str, ...]


def settings(*changes: str) -> Config:
    plain = ("space.filter_rule=off", "space.route_steps=200", "consistency.r_warmup=0", "consistency.r_final=1")
    more = ("consistency.adaptive_weight=false", "consistency.normalise=none", "training.precision=no")
    return load_config("default", [*plain, *more, *changes])


def loss_of(objective: str, student: Score, pairs: Pairs, config: Config, **networks: Any) -> Loss:
    if objective in SCORES:
        networks["critics"] = {FAKE: Score(student.mean.item(), student.log_std.exp().item())}
    return OBJECTIVES[objective](Networks(student, LAW, **networks), pairs, batch_of(4).draws, config, 0)  # type: ignore[arg-type]


def walked(config: Config) -> Pairs:
    networks: Any = Networks(Score(0.4, 0.2), LAW)  # type: ignore[arg-type]
    pairs = collect(["generation"], batch_of(4), nothing(4), networks, config)["generation"]
    assert isinstance(pairs, Pairs)
    return replace(pairs.rows(pairs.t < 1.5), walk_length=0)


def test_every_objective_has_its_contract() -> None:
    assert ROWS.keys() | set(OWN) == OBJECTIVES.keys() and not ROWS.keys() & set(OWN)
    assert all((Path(__file__).parent / f"test_{name}.py").is_file() for name in OWN)


@each_case
def test_the_perfect_network_has_no_gradient_and_a_wrong_one_has_one_that_points_back(
    objective: str, changes: Changes, perfect: type[Score]
) -> None:
    pairs = walked(settings(*changes))
    best, wide, narrow, right, left = (
        gradient(objective, perfect(mean, std), pairs, changes)
        for mean, std in ((0.4, 0.2), (0.4, 0.25), (0.4, 0.16), (0.45, 0.2), (0.35, 0.2))
    )
    scale = max(abs(wide[1]), abs(right[0]))
    assert best.abs().max() < 0.02 * scale  # the walk takes steps of a finite size
    assert wide[1] > 0 > narrow[1] and right[0] > 0 > left[0]


def gradient(objective: str, student: Score, pairs: Pairs, changes: Changes) -> Tensor:
    loss_of(objective, student, pairs, settings(*changes)).value.mean().backward()
    assert student.mean.grad is not None and student.log_std.grad is not None
    return torch.stack([student.mean.grad, student.log_std.grad])


@each_case
def test_rows_do_not_know_of_each_other(objective: str, changes: Changes, perfect: type[Score]) -> None:
    pairs, config = walked(settings(*changes)), settings(*changes)
    whole = loss_of(objective, perfect(0.3, 0.3), pairs.rows(slice(0, 6)), config)
    for row in range(6):
        alone = loss_of(objective, perfect(0.3, 0.3), pairs.rows(slice(row, row + 1)), config)
        assert alone.value.shape == (1,)
        for name, values in (whole.metrics | {"loss": whole.value}).items():
            assert values.shape == (6,)
            other = (alone.metrics | {"loss": alone.value})[name]
            torch.testing.assert_close(values[row : row + 1], other, rtol=1e-9, atol=1e-12)
    assert not any(values.requires_grad for values in whole.metrics.values())


@each_case
def test_only_the_student_gets_a_gradient(objective: str, changes: Changes, perfect: type[Score]) -> None:
    pairs = walked(settings(*changes)).rows(slice(0, 4))
    x, dxdt = pairs.x.clone().requires_grad_(True), pairs.dxdt.clone().requires_grad_(True)
    student = perfect(0.3, 0.3)
    loss_of(objective, student, replace(pairs, dxdt=dxdt), settings(*changes)).value.sum().backward()
    assert student.mean.grad is not None and student.mean.grad != 0
    assert x.grad is None and (dxdt.grad is None or not dxdt.grad.any())


def test_the_discrete_target_at_the_end_of_a_route_is_the_state_itself() -> None:
    """f(x, 0) = x, also for a network that is not finite at t = 0, such as a denoiser divided by sin t."""

    class Spoilt(Perfect):
        def forward(self, x_unit: Tensor, t: Tensor, *rest: Any) -> Tensor:
            return super().forward(x_unit, t, *rest) / (t != 0).double()[:, None]

    pairs = walked(settings())
    last = pairs.rows(pairs.t_next == 0)
    assert len(last) == 4
    plain, spoilt = (loss_of("discrete", kind(0.3, 0.3), last, settings()).value for kind in (Perfect, Spoilt))
    assert torch.equal(plain, spoilt) and plain.isfinite().all()


def test_the_warm_up_of_r_is_the_steps_own() -> None:
    config = settings("consistency.r_warmup=10", "consistency.r_schedule=warmup_cooldown")
    networks: Any = Networks(Perfect(0.3, 0.3), LAW)  # type: ignore[arg-type]
    pairs, draws = walked(config).rows(slice(0, 2)), batch_of(4).draws
    found = [OBJECTIVES["continuous"](networks, pairs, draws, config, step) for step in (0, 5, 10)]
    assert [loss.metrics["r"].tolist() for loss in found] == [[0, 0], [0.5, 0.5], [1, 1]]
    assert not torch.equal(found[0].metrics["tangent_norm"], found[2].metrics["tangent_norm"])


@pytest.mark.parametrize("tangent", ["two_pass", "one_pass"])
def test_the_tangent_is_computed_as_networks_say(tangent: str) -> None:
    pairs = walked(settings()).rows(slice(0, 3))
    ours = loss_of("continuous", Perfect(0.3, 0.3), pairs, settings(), tangent=tangent).value
    theirs = loss_of("continuous", Perfect(0.3, 0.3), pairs, settings(), tangent="two_pass").value
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)  # of a small square
