"""Diffusion space over a teacher whose velocity is known."""

import math

import pytest
import torch
from torch import Tensor

from stepfold.maths.closed_form import GaussianTeacher
from stepfold.spaces.diffusion import noised_pairs
from stepfold.teachers.contract import Condition

SHAPE = (2, 3, 3)


def velocity(x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
    """A Gaussian's, whose mean is guidance times the condition, so that a mixed-up row shows."""
    mean = (guidance * condition.embeds[:, 0, 0]).reshape(-1, 1, 1, 1)
    return GaussianTeacher(mean, torch.tensor(0.3, dtype=torch.float64), 0.5).velocity(x, t)


def batch(num: int = 3, count: int = 4) -> tuple[Tensor, Tensor, Tensor, Condition, Tensor]:
    x0, noise = torch.randn(num, *SHAPE).double(), torch.randn(num, count, *SHAPE).double()
    times = torch.rand(num, count).double() * math.pi / 2
    condition = Condition(torch.arange(1.0, num + 1).double()[:, None, None], torch.ones(num, 1).long())
    return x0, times, noise, condition, torch.linspace(2, 5, num).double()


def test_every_pair_is_its_latent_noised_with_its_own_noise() -> None:
    x0, times, noise, condition, guidance = batch()
    pairs = noised_pairs(velocity, x0, times, noise, condition, guidance, torch.tensor([True, False, True]))
    assert pairs.prompt.tolist() == [0, 0, 0, 0, 2, 2, 2, 2]
    assert (len(pairs), pairs.num_drawn) == (8, 12)
    for row, (i, j) in enumerate([(0, 0), (0, 1), (0, 2), (0, 3), (2, 0), (2, 1), (2, 2), (2, 3)]):
        t = times[i, j]
        assert pairs.t[row] == t
        assert torch.equal(pairs.x[row], torch.cos(t) * x0[i] + torch.sin(t) * noise[i, j])
        one = slice(i, i + 1)
        exact = velocity(pairs.x[row][None], t[None], condition.rows(one), guidance[one])[0]
        torch.testing.assert_close(pairs.dxdt[row], exact, rtol=1e-12, atol=1e-12)
        assert pairs.guidance[row] == guidance[i]
        assert torch.equal(pairs.condition.embeds[row], condition.embeds[i])


def test_no_latent_kept_means_no_teacher_call() -> None:
    def never(*args: Tensor) -> Tensor:
        pytest.fail("the teacher was called")

    x0, times, noise, condition, guidance = batch()
    pairs = noised_pairs(never, x0, times, noise, condition, guidance, torch.zeros(3, dtype=torch.bool))  # type: ignore[arg-type]
    assert (len(pairs), pairs.num_drawn, pairs.dxdt.shape) == (0, 12, (0, *SHAPE))
