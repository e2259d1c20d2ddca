"""Few-step sampling against diffusers' schedulers, and against a teacher whose flow map is known."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SCMScheduler
from torch import Tensor

from stepfold.evaluation.measure import student_sampler
from stepfold.maths.closed_form import GaussianTeacher
from stepfold.maths.formulations import data_prediction, flow_velocity, trigflow_input, trigflow_time
from stepfold.maths.routes import few_step_times
from stepfold.sampling import sample_student, sample_teacher, teacher_steps
from stepfold.teachers.contract import Condition

SIGMA_DATA = 0.5
SHAPE = (3, 4, 4)
HALF_PI = math.pi / 2


class Gaussian:
    """A Gaussian teacher, and its perfect student, whose means are guidance times the condition. Counts its calls."""

    sigma_data, ode = SIGMA_DATA, "flow"

    def __init__(self, shift: float = 1.0) -> None:
        self.std, self.shift, self.num_calls = torch.tensor(0.8, dtype=torch.float64), shift, 0

    def exact(self, condition: Condition, guidance: Tensor) -> GaussianTeacher:
        return GaussianTeacher((guidance * condition.embeds[:, 0, 0]).reshape(-1, 1, 1, 1), self.std, SIGMA_DATA)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        self.num_calls += 1
        return self.exact(condition, guidance).velocity(x, t)

    def __call__(self, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        self.num_calls += 1
        return self.exact(condition, guidance).F_of_consistency(SIGMA_DATA * x_unit, t)


def wavy(x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
    """A student that is far from consistent: its steps do not agree with each other."""
    return torch.sin(3 * x_unit + t.reshape(-1, 1, 1, 1)) + 0.1 * guidance.reshape(-1, 1, 1, 1)


def start(num: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Condition, Tensor]:
    noise = SIGMA_DATA * torch.randn(num, *SHAPE, dtype=dtype)
    condition = Condition(torch.linspace(-1, 1, num, dtype=dtype)[:, None, None], torch.ones(num, 1).long())
    return noise, condition, torch.linspace(1, 5, num, dtype=dtype)


def scm_scheduler(num_steps: int) -> Any:
    scheduler: Any = SCMScheduler(sigma_data=SIGMA_DATA)
    scheduler.set_timesteps(num_steps, intermediate_timesteps=1.3 if num_steps == 2 else None)
    return scheduler


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8])
def test_student_steps_equal_diffusers_scm_scheduler(num_steps: int):
    noise, condition, guidance = start(dtype=torch.float32)
    scheduler, generator, x, x0 = scm_scheduler(num_steps), torch.Generator().manual_seed(1), noise, noise
    assert few_step_times(num_steps) == pytest.approx(scheduler.timesteps[:-1].tolist(), abs=1e-7)
    for t in scheduler.timesteps[:-1]:
        F = wavy(x / SIGMA_DATA, t.expand(len(x)), condition, guidance)
        x, x0 = scheduler.step(SIGMA_DATA * F, t, x, generator=generator, return_dict=False)

    again = torch.Generator().manual_seed(1)
    asked = []

    def fresh(i: int) -> Tensor:
        asked.append(i)
        return SIGMA_DATA * torch.randn(noise.shape, generator=again)

    ours = sample_student(wavy, noise, condition, guidance, few_step_times(num_steps), fresh, SIGMA_DATA)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, x0, rtol=0, atol=1e-5)
    assert asked == list(range(1, num_steps))


def test_the_perfect_student_samples_the_flow_map_in_one_step_and_the_data_in_more():
    student, (noise, condition, guidance) = Gaussian(), start(2000)
    exact = student.exact(condition, guidance)

    def fresh(i: int) -> Tensor:
        return SIGMA_DATA * torch.randn_like(noise)

    one = sample_student(student, noise, condition, guidance, few_step_times(1), fresh, SIGMA_DATA)  # type: ignore[arg-type]
    torch.testing.assert_close(
        one, exact.consistency(noise, torch.full((2000,), HALF_PI, dtype=torch.float64)), rtol=0, atol=3e-5
    )  # the start, 1.5708, is 4e-6 above pi/2
    assert student.num_calls == 1
    four = sample_student(student, noise, condition, guidance, few_step_times(4), fresh, SIGMA_DATA)  # type: ignore[arg-type]
    assert student.num_calls == 5
    assert abs((four - exact.mean).mean()) < 0.02 and (four - exact.mean).std() == pytest.approx(0.8, abs=0.01)
    assert (four - one).abs().mean() > 0.1


def test_a_students_sample_does_not_depend_on_its_batch():
    noise, condition, guidance = start(6)
    sampler = student_sampler(wavy, few_step_times(4), 0, SIGMA_DATA)  # type: ignore[arg-type]
    together = sampler(noise, condition, guidance, range(10, 16))
    for i in range(6):
        row = slice(i, i + 1)
        alone = sampler(noise[row], condition.rows(row), guidance[row], range(10 + i, 11 + i))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("num_steps", "shift"), [(1, 1.0), (4, 1.0), (4, 3.0), (20, 3.0)])
def test_teacher_steps_equal_diffusers_flow_euler_scheduler(num_steps: int, shift: float):
    teacher, (noise, condition, guidance) = Gaussian(shift), start()
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    x = noise / SIGMA_DATA
    for timestep in scheduler.timesteps:
        t_flow = (timestep.double() / 1000).expand(len(x))
        t = trigflow_time(t_flow)
        dxdt = teacher.velocity(trigflow_input(x, t_flow, SIGMA_DATA), t, condition, guidance)
        x = scheduler.step(flow_velocity(x, t_flow, dxdt / SIGMA_DATA), timestep, x, return_dict=False)[0].double()
    teacher.num_calls = 0
    ours = sample_teacher(teacher, noise, condition, guidance, num_steps)  # type: ignore[arg-type]
    assert teacher.num_calls == num_steps
    torch.testing.assert_close(ours, SIGMA_DATA * x, rtol=0, atol=1e-5)  # the scheduler's own noise levels are float32


def test_the_teachers_sampler_converges_to_its_flow_map_with_first_order():
    teacher, (noise, condition, guidance) = Gaussian(), start()
    exact = teacher.exact(condition, guidance).consistency(noise, torch.full((5,), HALF_PI, dtype=torch.float64))
    errors = torch.stack(
        [
            (sample_teacher(teacher, noise, condition, guidance, n) - exact).abs().max()  # type: ignore[arg-type]
            for n in (20, 40, 80, 160)
        ]
    )
    assert errors[-1] < 0.03
    assert ((errors[:-1] / errors[1:] - 2).abs() < 0.2).all(), errors


@pytest.mark.parametrize("even", [False, True])
def test_teacher_steps_are_one_way_from_noise_to_its_sample(even: bool):
    """Each step begins where the one before ended, one call each; the last one's own picture is where it ends."""
    noise, condition, guidance = start()
    teacher: Any = Gaussian(shift=1.75)
    steps = list(teacher_steps(teacher, noise, condition, guidance, 6, even=even))
    assert len(steps) == teacher.num_calls == 6
    torch.testing.assert_close(steps[0].x, noise)
    for before, after in pairwise(steps):
        torch.testing.assert_close(after.x, before.x_next, rtol=1e-12, atol=1e-12)
    last = steps[-1]
    torch.testing.assert_close(last.x_next, data_prediction(last.x, last.t, last.dxdt), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last.x_next, sample_teacher(teacher, noise, condition, guidance, 6, even=even))
