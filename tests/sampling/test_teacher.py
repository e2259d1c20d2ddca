"""The teacher's own sampler against diffusers' scheduler, and against a flow map that is known."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from stepfold.maths.formulations import data_prediction, flow_velocity, trigflow_input, trigflow_time
from stepfold.sampling.teacher import sample_teacher, teacher_steps

from .exact import HALF_PI, SIGMA_DATA, Gaussian, at, start


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
    exact = teacher.exact(condition, guidance).consistency(noise, at(HALF_PI))
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
