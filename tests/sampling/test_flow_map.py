"""Flow maps: jumps against the exact map, and gamma-sampling against the exact law."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from stepfold.maths.formulations import (
    euler_step,
    flow_input,
    flow_time,
    flow_velocity,
    trigflow_input,
    unsqueeze_like,
)
from stepfold.maths.routes import even_flow_times
from stepfold.sampling import flow_map
from stepfold.sampling.consistency import sample_consistency
from stepfold.sampling.flow_map import jump, sample_flow_map

from .exact import HALF_PI, SIGMA_DATA, STD, Gaussian, at, law, start, wavy

TIMES = [HALF_PI, 1.2, 0.8, 0.3]


def unused(i: int) -> Tensor:
    raise AssertionError("gamma is 0")


@pytest.mark.parametrize("student", [wavy, Gaussian().two_time_student])
@pytest.mark.parametrize(("t", "s"), [(HALF_PI, 0.9), (1.1, 0.4), (0.7, 0.0)])
def test_a_jump_is_one_flow_matching_euler_step_with_the_average_velocity(student: Any, t: float, s: float):
    x, condition, guidance = start()
    F = student(x / SIGMA_DATA, at(t), condition, guidance, at(s))
    t_flow, s_flow = flow_time(at(t)), flow_time(at(s))
    x_flow = flow_input(x, at(t), SIGMA_DATA)
    ahead = x_flow + unsqueeze_like(s_flow - t_flow, x) * flow_velocity(x_flow, t_flow, F)
    ours = jump(student, x, at(t), at(s), condition, guidance, SIGMA_DATA)
    torch.testing.assert_close(ours, trigflow_input(ahead, s_flow, SIGMA_DATA), rtol=1e-12, atol=1e-12)


def test_a_jump_to_where_it_is_stays_there():
    x, condition, guidance = start()
    assert torch.equal(jump(wavy, x, at(0.8), at(0.8), condition, guidance, SIGMA_DATA), x)  # type: ignore[arg-type]


def far(student: Any, num_steps: int) -> float:
    """Largest distance to the exact ends, from the same noise."""
    teacher, (noise, condition, guidance) = Gaussian(), start()
    exact = teacher.exact(condition, guidance).consistency(noise, at(HALF_PI))
    times = even_flow_times(num_steps, 1.0)[:-1].tolist()
    ours = sample_flow_map(student, noise, condition, guidance, times, unused, SIGMA_DATA)
    return (ours - exact).abs().max().item()


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_the_exact_map_ends_at_the_exact_picture(num_steps: int):
    teacher = Gaussian()
    assert far(teacher.two_time_student, num_steps) < 1e-12
    assert teacher.num_calls == num_steps


def test_mistakes_end_elsewhere(monkeypatch: pytest.MonkeyPatch):
    """A student that is not told the target, one that is a velocity, a jump that goes too far."""
    teacher = Gaussian()
    untold = lambda x, t, condition, guidance, target: teacher.two_time_student(x, t, condition, guidance)  # noqa: E731
    assert far(untold, 4) > 0.05
    velocity = lambda x, t, condition, guidance, target: teacher.flow_student(x, t, condition, guidance)  # noqa: E731
    assert far(velocity, 4) > 0.05
    monkeypatch.setattr(flow_map, "euler_step", lambda x, t, s, dxdt: euler_step(x, t, 0.9 * s, dxdt))
    assert far(teacher.two_time_student, 4) > 0.05


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_gamma_sampling_keeps_the_law_of_the_data(gamma: float):
    found = law(sample_flow_map, Gaussian().two_time_student, TIMES, gamma=gamma)
    assert found == pytest.approx((1.4, STD**2), abs=1e-12)


def test_gamma_with_another_landing_changes_the_law(monkeypatch: pytest.MonkeyPatch):
    """TCD's floor of (1 - gamma) t, say, which is no bookkeeping of the variance."""
    student = Gaussian().two_time_student
    wrong = lambda student, x, t, target, *rest: jump(student, x, t, 0.7 * target, *rest)  # noqa: E731
    monkeypatch.setattr(flow_map, "jump", wrong)
    assert abs(law(sample_flow_map, student, TIMES, gamma=0.3)[1] - STD**2) > 0.01


def test_gamma_one_is_consistency_sampling_and_zero_is_the_jumps():
    noise, condition, guidance = start()
    fresh = {i: SIGMA_DATA * torch.randn_like(noise) for i in range(1, 4)}
    asked: list[int] = []

    def draw(i: int) -> Tensor:
        asked.append(i)
        return fresh[i]

    rest: Any = (wavy, noise, condition, guidance, TIMES, draw, SIGMA_DATA)
    torch.testing.assert_close(sample_flow_map(*rest, gamma=1.0), sample_consistency(*rest), rtol=1e-12, atol=1e-12)
    assert asked == [1, 2, 3] * 2
    x = noise
    for t, s in pairwise([*TIMES, 0.0]):
        x = jump(wavy, x, at(t), at(s), condition, guidance, SIGMA_DATA)  # type: ignore[arg-type]
    assert torch.equal(sample_flow_map(*rest, gamma=0.0), x) and len(asked) == 6
    between = sample_flow_map(*rest, gamma=0.5)
    assert all((between - sample_flow_map(*rest, gamma=end)).abs().max() > 0.01 for end in (0.0, 1.0))
