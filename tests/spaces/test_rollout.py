"""Rollouts of a perfect student, whose law at every step is known."""

import math

import pytest
import torch
from gaussians import SIGMA_DATA, Perfect, nothing
from torch import Tensor

from stepfold.sampling.consistency import predict_data, sample_consistency
from stepfold.spaces.rollout import rolled_states, rollout_length
from stepfold.teachers.contract import Condition

TIMES = [math.pi / 2, 1.2, 0.8, 0.4]
NUM = 4000


def noise(step: int) -> Tensor:
    return SIGMA_DATA * torch.randn(NUM, 3, generator=torch.Generator().manual_seed(step)).double()


def roll(student: Perfect, stop: int, times: list[float] = TIMES):
    def picture(x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        return predict_data(student, x, t, condition, guidance, SIGMA_DATA)

    return rolled_states(picture, noise(0), times, stop, noise, nothing(NUM), torch.ones(NUM).double())


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_the_input_of_each_step_has_the_students_law_noised_to_that_time(stop: int) -> None:
    states = roll(Perfect(0.4, 0.2), stop)
    t = TIMES[stop]
    assert (states.t == t).all() and states.num_drawn == len(states) == NUM
    std = math.hypot(math.cos(t) * 0.2, math.sin(t) * SIGMA_DATA)
    assert abs(states.x.mean() - math.cos(t) * 0.4) < 4 * std / math.sqrt(3 * NUM)
    assert abs(states.x.std() / std - 1) < 0.03
    if stop:  # the noise of a step is fresh: one that came with the first noise again would be wider
        assert abs(torch.corrcoef(torch.stack([states.x.flatten(), noise(0).flatten()]))[0, 1]) < 0.98


def test_states_of_a_phase_have_the_next_steps_time() -> None:
    noises, student = [noise(i) for i in range(4)], Perfect(0.4, 0.2)
    for stop, target in ((0, 1.2), (2, 0.4), (3, 0.0)):
        states = rolled_states(
            lambda x, *rest: predict_data(student, x, *rest, SIGMA_DATA),
            noises[0], TIMES, stop, lambda i: noises[i], nothing(NUM), torch.ones(NUM).double(), phased=True,
        )  # fmt: skip
        assert states.t_target is not None and (states.t_target == target).all()
    assert roll(Perfect(0.4, 0.2), 1).t_target is None


def test_the_last_step_ends_where_the_sampler_ends() -> None:
    student = Perfect(0.4, 0.2)
    states = roll(student, 3)
    ours = predict_data(student, states.x, states.t, states.condition, states.guidance, SIGMA_DATA)
    theirs = sample_consistency(student, noise(0), nothing(NUM), torch.ones(NUM).double(), TIMES, noise, SIGMA_DATA)
    assert torch.equal(ours, theirs)


def test_one_step_is_the_picture_from_pure_noise() -> None:
    states = roll(Perfect(0.4, 0.2), 0, TIMES[:1])
    assert torch.equal(states.x, noise(0)) and (states.t == math.pi / 2).all()


def test_no_gradient_reaches_the_steps_before_the_exit() -> None:
    student = Perfect(0.4, 0.2)
    states = roll(student, 2)
    assert not states.x.requires_grad
    predict_data(student, states.x, states.t, states.condition, states.guidance, SIGMA_DATA).sum().backward()
    through_the_exit = student.mean.grad
    assert through_the_exit is not None
    x = states.x.clone().requires_grad_(True)
    student.mean.grad = None
    predict_data(student, x, states.t, states.condition, states.guidance, SIGMA_DATA).sum().backward()
    assert student.mean.grad == through_the_exit


@pytest.mark.parametrize("first", [0, 1])
def test_every_step_has_its_turn_once_in_as_many_rollouts(first: int) -> None:
    turns = [rollout_length(count, 3, cycled=False, first=first) for count in range(6)]
    assert turns == [(3, stop) for stop in ([0, 1, 2] * 2 if first == 0 else [1, 2] * 3)]


def test_cycled_rollouts_have_every_length_and_of_each_every_step_equally_often() -> None:
    turns = [rollout_length(count, 3, cycled=True) for count in range(18)]
    assert [num for num, _ in turns] == [1, 2, 3] * 6
    for num in (1, 2, 3):
        assert [stop for length, stop in turns if length == num] == [i % num for i in range(6)]
