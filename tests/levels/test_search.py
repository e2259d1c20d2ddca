"""The search for noise levels on a teacher that is known exactly: a mixture in 16 dimensions, float64."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from stepfold.levels.calibrated import CalibratedScheduler, calibrate, calibrated_rollout
from stepfold.levels.search import (
    Found,
    Reference,
    cheapest_path,
    descend,
    error,
    local_start,
    reference,
    rollout_start,
)
from stepfold.levels.solvers import rollout
from stepfold.maths.closed_form import MixtureTeacher
from stepfold.maths.formulations import (
    euler_step,
    flow_input,
    flow_time,
    flow_velocity,
    trigflow_input,
    trigflow_time,
)

SIGMA_DATA = 0.5
DIMENSIONS = 16
EVEN = [1 - i / 48 for i in range(49)]


class Mixture:
    """A teacher's velocity in flow coordinates; counts its calls."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        means = 0.2 * torch.randn(4, 1, DIMENSIONS, generator=draw, dtype=torch.float64)
        ones = torch.ones(4, 1, dtype=torch.float64)
        self.teacher, self.calls = MixtureTeacher(means, 0.3 * ones, ones, SIGMA_DATA), 0

    def __call__(self, x: Tensor, level: float) -> Tensor:
        self.calls += 1
        s = torch.full((len(x),), level, dtype=x.dtype)
        label = torch.zeros(len(x), dtype=torch.long)
        dxdt = self.teacher.velocity(trigflow_input(x, s, SIGMA_DATA), trigflow_time(s), label)
        return flow_velocity(x, s, dxdt / SIGMA_DATA)


def noise(count: int, seed: int) -> Tensor:
    """Unit noise [count, D]."""
    return torch.randn(count, DIMENSIONS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def even(k: int, shift: float = 1.0) -> list[float]:
    """Levels 1, 1 - 1/k, ..., 0, shifted."""
    return [shift * s / (1 + (shift - 1) * s) for s in (1 - i / k for i in range(k + 1))]


@pytest.fixture(scope="module")
def sides() -> tuple[Mixture, Reference, Reference]:
    """A teacher, and its long trajectories from 128 noises and from 512 others."""
    mixture = Mixture()
    return mixture, reference(mixture, noise(128, 1), EVEN), reference(mixture, noise(512, 2), EVEN)


def judged(mixture: Mixture, unseen: Reference, levels: Sequence[float], solver: str = "euler") -> float:
    return error(rollout(mixture, unseen.noise, levels, solver)[0], unseen.end)  # type: ignore[arg-type]


def test_eulers_step_is_that_of_trigflow() -> None:
    """Both hold the same data and noise predictions, so levels that are good in one are good in the other."""
    mixture, z = Mixture(), noise(5, 3)
    levels = [1.0, 0.7, 0.2, 0.0]
    x = SIGMA_DATA * z
    label = torch.zeros(5, dtype=torch.long)
    for level, lower in itertools.pairwise(levels):
        t, s = (trigflow_time(torch.full((5,), value, dtype=torch.float64)) for value in (level, lower))
        x = euler_step(x, t, s, mixture.teacher.velocity(x, t, label))
    end, _ = rollout(mixture, z, levels, "euler")
    torch.testing.assert_close(SIGMA_DATA * end, x, rtol=0, atol=1e-12)
    t = trigflow_time(torch.full((5,), 0.3, dtype=torch.float64))
    assert flow_time(t).allclose(torch.full((5,), 0.3, dtype=torch.float64))
    torch.testing.assert_close(flow_input(SIGMA_DATA * z, trigflow_time(torch.ones(5)).double(), SIGMA_DATA), z)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_known_velocities_are_not_asked_for_again(solver: str) -> None:
    mixture, z = Mixture(), noise(7, 3)
    end, found = rollout(mixture, z, [1.0, 0.8, 0.5, 0.3, 0.0], solver)  # type: ignore[arg-type]
    before = mixture.calls
    changed, again = rollout(mixture, z, [1.0, 0.8, 0.4, 0.3, 0.0], solver, found[:2])  # type: ignore[arg-type]
    assert mixture.calls == before + 2 and all(map(torch.equal, again[:2], found[:2]))
    whole, _ = rollout(mixture, z, [1.0, 0.8, 0.4, 0.3, 0.0], solver)  # type: ignore[arg-type]
    assert torch.equal(changed, whole) and not torch.allclose(changed, end, atol=1e-3)


def test_unipc_is_nearer_than_euler(sides: tuple[Mixture, Reference, Reference]) -> None:
    mixture, _, unseen = sides
    for k in (4, 8):
        assert judged(mixture, unseen, even(k), "unipc") < 0.9 * judged(mixture, unseen, even(k))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_cheapest_path_is_that_of_all_paths(k: int) -> None:
    cost = torch.rand(9, 9, generator=torch.Generator().manual_seed(k), dtype=torch.float64)

    def total(path: Sequence[int]) -> float:
        return sum(cost[i, j].item() for i, j in itertools.pairwise(path))

    paths = [(0, *inner, 8) for inner in itertools.combinations(range(1, 8), k - 1)]
    best = cheapest_path(cost, k)
    assert len(best) == k + 1 and total(best) == min(map(total, paths))


def test_the_least_sum_of_local_errors_is_not_the_nearest_end(sides: tuple[Mixture, Reference, Reference]) -> None:
    """Errors at high levels are amplified later, and those at low ones damped: why the descent goes by the end."""
    mixture, searched, unseen = sides
    fine = searched.thinned(24)

    def local(levels: Sequence[float]) -> float:
        landed = [
            (fine.states[i] + (fine.levels[j] - fine.levels[i]) * mixture(fine.states[i], fine.levels[i]), j)
            for i, j in itertools.pairwise(fine.levels.index(level) for level in levels)
        ]
        return sum(error(x, fine.states[j]) for x, j in landed)

    levels = local_start(mixture, fine, 4)
    assert local(levels) < min(local([fine.levels[round(24 * i / 4)] for i in range(5)]), 10)
    assert judged(mixture, unseen, levels) > judged(mixture, unseen, rollout_start(mixture, fine, 4))


@pytest.mark.parametrize("k", [2, 4])
def test_the_table_of_rollouts_reaches_what_it_says(sides: tuple[Mixture, Reference, Reference], k: int) -> None:
    mixture, searched, _ = sides
    levels = rollout_start(mixture, searched.thinned(12), k)
    assert len(levels) == k + 1 and levels[0] == 1 and levels[-1] == 0
    assert all(high > low for high, low in itertools.pairwise(levels))
    if k == 2:  # with one level between, a table of all of them is exact
        ends = {s: judged(mixture, searched, [1.0, s, 0.0]) for s in searched.thinned(12).levels[1:-1]}
        assert levels[1] == min(ends, key=ends.__getitem__)


@pytest.mark.parametrize(("solver", "share"), [("euler", 0.97), ("unipc", 0.6)])
def test_searched_levels_are_nearer_on_unseen_noise(
    sides: tuple[Mixture, Reference, Reference], solver: str, share: float
) -> None:
    mixture, searched, unseen = sides
    *_, last = descend(mixture, searched, even(4), solver, 4)  # type: ignore[arg-type]
    assert last.levels[0] == 1 and last.levels[-1] == 0
    assert all(high > low for high, low in itertools.pairwise(last.levels))
    best = min(judged(mixture, unseen, even(4, shift), solver) for shift in (1.0, 2.0))
    assert judged(mixture, unseen, last.levels, solver) < share * best


def test_a_sweep_is_never_worse_and_the_last_gains_little(sides: tuple[Mixture, Reference, Reference]) -> None:
    mixture, searched, _ = sides
    found = list(descend(mixture, searched, even(3), "euler", 20))
    errors = [each.error for each in found]
    assert errors == sorted(errors, reverse=True) and len(found) < 20
    assert errors[-1] > 0.995 * errors[-2]
    assert found[-1] == Found(found[-1].levels, judged(mixture, searched, found[-1].levels))


def test_calibrated_steps_are_nearer_and_the_ridge_keeps_them_so(sides: tuple[Mixture, Reference, Reference]) -> None:
    mixture, searched, unseen = sides
    levels = even(6)
    weights, end = calibrate(mixture, searched, levels)
    assert [len(step) for step in weights] == [0, 1, 2, 3, 4, 5]
    assert torch.equal(end, calibrated_rollout(mixture, searched.noise, levels, weights))
    plain = judged(mixture, unseen, levels)
    assert error(calibrated_rollout(mixture, unseen.noise, levels, weights), unseen.end) < 0.1 * plain
    few = Reference(searched.levels, searched.states[:, :1])
    held, loose = (calibrate(mixture, few, levels, ridge)[0] for ridge in (1e-3, 1e-12))
    ends = [error(calibrated_rollout(mixture, unseen.noise, levels, found), unseen.end) for found in (held, loose)]
    assert ends[0] < 0.5 * ends[1]


def test_no_weights_are_eulers_steps(sides: tuple[Mixture, Reference, Reference]) -> None:
    mixture, z = sides[0], noise(3, 5)
    zeros = [[0.0] * i for i in range(4)]
    ours = calibrated_rollout(mixture, z, even(4), zeros)
    torch.testing.assert_close(ours, rollout(mixture, z, even(4), "euler")[0], rtol=0, atol=1e-14)


def test_the_scheduler_takes_the_calibrated_steps(sides: tuple[Mixture, Reference, Reference]) -> None:
    """Whatever levels and shift a pipeline gives it; another number of steps is refused."""
    mixture, searched, _ = sides
    weights, end = calibrate(mixture, searched, even(4))
    scheduler = CalibratedScheduler(even(4), weights)
    for given in ({"num_inference_steps": 4}, {"sigmas": [1.0, 0.9, 0.8, 0.7], "mu": 1.2}):
        scheduler.set_timesteps(**given)
        x = searched.noise.float()
        for timestep in scheduler.timesteps:
            velocity = mixture(x.double(), timestep.item() / 1000).float()
            x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        assert error(x, end) < 1e-5
    with pytest.raises(ValueError, match="fitted for 4 steps, not 8; give num_inference_steps=4"):
        scheduler.set_timesteps(8)
