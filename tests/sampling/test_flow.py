"""Flow sampling: the teacher's own steps with the teacher's F, of first order; other students do not converge."""

from typing import Any

import pytest
import torch
from torch import Tensor

from stepfold.maths.formulations import euler_step
from stepfold.maths.routes import even_flow_times
from stepfold.sampling import flow
from stepfold.sampling.flow import sample_flow
from stepfold.sampling.teacher import sample_teacher

from .exact import HALF_PI, SIGMA_DATA, Gaussian, at, start


def unused(i: int) -> Tensor:
    raise AssertionError("the sampler is deterministic")


def ends(student: Any, num_steps: int, shift: float = 1.0) -> Tensor:
    torch.manual_seed(0)
    noise, condition, guidance = start()
    times = even_flow_times(num_steps, shift)[:-1].tolist()
    return sample_flow(student, noise, condition, guidance, times, unused, SIGMA_DATA)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 20])
def test_with_the_teachers_velocity_it_is_the_teachers_sampler(num_steps: int, shift: float):
    """One step in TrigFlow and one in flow matching over the same two times are one operation."""
    teacher: Any = Gaussian(shift)
    torch.manual_seed(0)
    expected = sample_teacher(teacher, *start(), num_steps, even=True)
    teacher.num_calls = 0
    torch.testing.assert_close(ends(teacher.flow_student, num_steps, shift), expected, rtol=1e-12, atol=1e-12)
    assert teacher.num_calls == num_steps


def errors(student: Any) -> Tensor:
    """Largest distances to the exact ends at 20, 40, 80 and 160 steps."""
    teacher = Gaussian()
    torch.manual_seed(0)
    noise, condition, guidance = start()
    exact = teacher.exact(condition, guidance).consistency(noise, at(HALF_PI))
    return torch.stack([(ends(student, n) - exact).abs().max() for n in (20, 40, 80, 160)])


def test_it_converges_to_the_flow_map_with_first_order():
    found = errors(Gaussian().flow_student)
    assert found[-1] < 0.03
    assert ((found[:-1] / found[1:] - 2).abs() < 0.1).all(), found


def test_mistakes_do_not_converge(monkeypatch: pytest.MonkeyPatch):
    """A consistency student taken for a velocity; steps of another length than the time moves."""
    assert errors(Gaussian().two_time_student)[-1] > 0.1
    monkeypatch.setattr(flow, "euler_step", lambda x, t, t_next, dxdt: euler_step(x, t, 0.99 * t_next, dxdt))
    assert errors(Gaussian().flow_student)[-1] > 0.1
