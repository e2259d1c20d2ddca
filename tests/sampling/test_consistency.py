"""Consistency sampling against diffusers' scheduler, and against data whose law is known."""

from typing import Any

import pytest
import torch
from diffusers import SCMScheduler
from torch import Tensor

from stepfold.evaluation.measure import student_sampler
from stepfold.maths.formulations import interpolate
from stepfold.maths.routes import few_step_times
from stepfold.sampling import consistency
from stepfold.sampling.consistency import sample_consistency
from stepfold.sampling.recipe import Recipe

from .exact import HALF_PI, SIGMA_DATA, STD, Gaussian, at, law, start, wavy

TIMES = [[HALF_PI], [HALF_PI, 1.3], [HALF_PI, 1.2, 0.8, 0.3]]


def scm_scheduler(num_steps: int) -> Any:
    scheduler: Any = SCMScheduler(sigma_data=SIGMA_DATA)
    scheduler.set_timesteps(num_steps, intermediate_timesteps=1.3 if num_steps == 2 else None)
    return scheduler


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8])
def test_equals_diffusers_scm_scheduler(num_steps: int):
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

    ours = sample_consistency(wavy, noise, condition, guidance, few_step_times(num_steps), fresh, SIGMA_DATA)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, x0, rtol=0, atol=1e-5)
    assert asked == list(range(1, num_steps))


def test_the_perfect_student_lands_at_the_end_of_the_trajectory_in_one_step():
    teacher, (noise, condition, guidance) = Gaussian(), start()
    rest = (noise, condition, guidance, [HALF_PI], lambda i: noise, SIGMA_DATA)
    one = sample_consistency(teacher.two_time_student, *rest)  # type: ignore[arg-type]
    exact = teacher.exact(condition, guidance).consistency(noise, at(HALF_PI))
    torch.testing.assert_close(one, exact, rtol=1e-12, atol=1e-12)
    assert teacher.num_calls == 1


@pytest.mark.parametrize("times", TIMES)
def test_the_perfect_student_keeps_the_law_of_the_data(times: list[float]):
    assert law(sample_consistency, Gaussian().two_time_student, times) == pytest.approx((1.4, STD**2), abs=1e-12)


def test_mistakes_change_the_law(monkeypatch: pytest.MonkeyPatch):
    """Noise of another time than the next, noise that is not fresh, a velocity taken for a consistency student."""
    student, times = Gaussian().two_time_student, TIMES[-1]
    with monkeypatch.context() as patch:
        patch.setattr(consistency, "interpolate", lambda x0, z, t: interpolate(x0, z, t / 2))
        assert abs(law(sample_consistency, student, times)[1] - STD**2) > 0.01
    with monkeypatch.context() as patch:
        patch.setattr(consistency, "interpolate", lambda x0, z, t: interpolate(x0, 0 * z, t))
        assert abs(law(sample_consistency, student, times)[1] - STD**2) > 0.1
    assert abs(law(sample_consistency, Gaussian().flow_student, times)[1] - STD**2) > 0.1


def test_a_sample_does_not_depend_on_its_batch():
    noise, condition, guidance = start(6)
    times = {4: tuple(few_step_times(4))}
    recipe = Recipe(sampler="consistency", times=times, taught=(1.0,), guidance=1.0, sigma_data=SIGMA_DATA)
    sampler = student_sampler(wavy, recipe, 4, 0)  # type: ignore[arg-type]
    together = sampler(noise, condition, guidance, range(10, 16))
    for i in range(6):
        row = slice(i, i + 1)
        alone = sampler(noise[row], condition.rows(row), guidance[row], range(10 + i, 11 + i))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-12, atol=1e-12)
