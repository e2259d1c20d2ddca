"""The teacher's first step and the student's others, against a flow map that is known."""

from typing import Any

import pytest
import torch
from torch import Tensor

from stepfold.errors import UserError
from stepfold.maths.formulations import euler_step, interpolate
from stepfold.sampling.hybrid import sample_hybrid
from stepfold.sampling.recipe import Recipe

from .exact import HALF_PI, SIGMA_DATA, Gaussian, at, start


def recipe(sampler: Any) -> Recipe:
    times = {1: (HALF_PI,), 2: (HALF_PI, 1.1), 3: (HALF_PI, 1.1, 0.4)}
    return Recipe(sigma_data=SIGMA_DATA, guidance=1.0, taught=(1.0,), times=times, sampler=sampler)


def unused(i: int) -> Tensor:
    raise AssertionError("no noise is drawn before the student's first step")


class Exact(Gaussian):
    """Its step to time 1.1 ends on its flow map, which Euler's from a velocity does not."""

    start_time = HALF_PI

    def velocity(self, x: Tensor, t: Tensor, condition: Any, guidance: Tensor) -> Tensor:
        ends = self.exact(condition, guidance).flow_map(x, t, at(1.1))
        delta = (t - 1.1).reshape(-1, 1, 1, 1)
        return (delta.cos() * x - ends) / delta.sin()


@pytest.mark.parametrize("sampler", ["consistency", "flow_map"])
def test_an_exact_step_and_a_perfect_student_are_the_flow_map(sampler: str) -> None:
    teacher, (noise, condition, guidance) = Exact(), start()
    teacher.start_time = HALF_PI
    given: Any = (teacher, teacher.two_time_student, noise, condition, guidance, recipe(sampler))
    exact = teacher.exact(condition, guidance).consistency(noise, at(HALF_PI))
    torch.testing.assert_close(sample_hybrid(*given, 2, unused), exact, rtol=0, atol=1e-12)


def test_noise_is_added_from_the_students_second_step_on() -> None:
    teacher, (noise, condition, guidance) = Exact(), start()
    told: list[int] = []

    def fresh(i: int) -> Tensor:
        told.append(i)
        return 0.1 * noise

    ours = sample_hybrid(teacher, teacher.two_time_student, noise, condition, guidance, recipe("consistency"), 3, fresh)  # type: ignore[arg-type]
    law = teacher.exact(condition, guidance)
    x = euler_step(noise, at(HALF_PI), at(1.1), teacher.velocity(noise, at(HALF_PI), condition, guidance))
    x0 = law.consistency(x, at(1.1))
    wanted = law.consistency(interpolate(x0, 0.1 * noise, at(0.4)), at(0.4))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
    assert told == [2]


def test_one_step_would_be_the_teachers_alone() -> None:
    teacher, (noise, condition, guidance) = Exact(), start()
    given: Any = (teacher, teacher.two_time_student, noise, condition, guidance, recipe("consistency"))
    with pytest.raises(UserError, match="2 steps or more; give --steps 4"):
        sample_hybrid(*given, 1, unused)
