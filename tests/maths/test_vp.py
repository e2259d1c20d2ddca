"""Training steps of a variance-preserving schedule, and the TrigFlow times that they stand at."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from stepfold.maths.formulations import F_from_epsilon, epsilon_from_F, vp_step, vp_times


@pytest.fixture
def schedule() -> DDPMScheduler:
    return DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


def test_a_noised_sample_is_the_interpolation_at_the_steps_time(schedule: DDPMScheduler):
    times = vp_times(schedule.alphas_cumprod)
    assert times.dtype == torch.float64 and (times.diff() > 0).all() and 0 < times[0] < times[-1] < math.pi / 2
    x0, z, steps = torch.randn(5, 3).double(), torch.randn(5, 3).double(), torch.tensor([0, 10, 500, 900, 999])
    t = times[steps, None]
    noised = schedule.add_noise(x0, z, steps)  # type: ignore[arg-type]
    torch.testing.assert_close(noised, t.cos() * x0 + t.sin() * z, rtol=0, atol=1e-6)  # its table is in float32


def test_steps_and_times_are_inverse_and_linear_between(schedule: DDPMScheduler):
    times = vp_times(schedule.alphas_cumprod)
    steps, inside = vp_step(times, times)
    torch.testing.assert_close(steps, torch.arange(1000).double(), rtol=0, atol=1e-9)
    assert torch.equal(inside, times)
    middle, _ = vp_step((times[1:] + times[:-1]) / 2, times)
    torch.testing.assert_close(middle, torch.arange(999).double() + 0.5, rtol=0, atol=1e-9)


def test_times_outside_are_moved_in_and_the_time_has_a_derivative(schedule: DDPMScheduler):
    times = vp_times(schedule.alphas_cumprod)
    steps, inside = vp_step(torch.tensor([0.0, math.pi / 2]), times)
    assert steps.tolist() == [0, 999] and torch.equal(inside, times[[0, -1]].float())
    t = torch.tensor([0.7], dtype=torch.float64)
    slope = torch.func.jvp(lambda t: vp_step(t, times)[0], (t,), (torch.ones_like(t),))[1]
    rise = vp_step(t + 1e-7, times)[0] - vp_step(t - 1e-7, times)[0]
    torch.testing.assert_close(slope, rise / 2e-7, rtol=1e-4, atol=0)


def test_noise_predictions_come_back(schedule: DDPMScheduler):
    t = vp_times(schedule.alphas_cumprod)[[3, 400, 999]]
    x, epsilon = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    torch.testing.assert_close(epsilon_from_F(x, t, F_from_epsilon(x, t, epsilon)), epsilon, rtol=0, atol=1e-10)
