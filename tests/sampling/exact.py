"""Gaussian data, whose velocity, consistency function and flow map are known: the judges of every sampler."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepfold.maths.closed_form import GaussianTeacher
from stepfold.teachers.contract import Condition

SIGMA_DATA = 0.5
STD = 0.8
SHAPE = (3, 4, 4)
HALF_PI = math.pi / 2
Student = Callable[..., Tensor]


class Gaussian:
    """A teacher whose mean is guidance times the condition, and its perfect students. Counts its calls."""

    sigma_data, ode = SIGMA_DATA, "flow"

    def __init__(self, shift: float = 1.0) -> None:
        self.std, self.shift, self.num_calls = torch.tensor(STD, dtype=torch.float64), shift, 0

    def exact(self, condition: Condition, guidance: Tensor) -> GaussianTeacher:
        return GaussianTeacher((guidance * condition.embeds[:, 0, 0]).reshape(-1, 1, 1, 1), self.std, SIGMA_DATA)

    def shift_at(self, num_steps: int) -> float:
        return self.shift

    def velocity(self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        self.num_calls += 1
        return self.exact(condition, guidance).velocity(x, t)

    def flow_student(self, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        """F is the teacher's velocity."""
        return self.velocity(SIGMA_DATA * x_unit, t, condition, guidance) / SIGMA_DATA

    def two_time_student(
        self, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """F of the flow map to `target`, which is 0 where there is none: then it is a consistency student."""
        self.num_calls += 1
        s = torch.zeros_like(t) if target is None else target
        return self.exact(condition, guidance).F_of_flow_map(SIGMA_DATA * x_unit, t, s)


def wavy(x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor, target: Tensor | None = None) -> Tensor:
    """A student that is far from consistent: its steps do not agree with each other."""
    s = torch.zeros_like(t) if target is None else target
    return torch.sin(3 * x_unit + (t - 2 * s).reshape(-1, 1, 1, 1)) + 0.1 * guidance.reshape(-1, 1, 1, 1)


def start(num: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Condition, Tensor]:
    """Noise, condition and guidance of so many samples."""
    noise = SIGMA_DATA * torch.randn(num, *SHAPE, dtype=dtype)
    condition = Condition(torch.linspace(-1, 1, num, dtype=dtype)[:, None, None], torch.ones(num, 1).long())
    return noise, condition, torch.linspace(1, 5, num, dtype=dtype)


def at(time: float, num: int = 5) -> Tensor:
    """A time for each sample."""
    return torch.full((num,), time, dtype=torch.float64)


def law(sampler: Callable[..., Tensor], student: Student, times: list[float], **options: Any) -> tuple[float, float]:
    """Mean and variance of one element of the samples, exactly: a sampler is affine in its Gaussian noises.

    Row 0 is sampled from no noise at all; each other row has one of the Gaussians at one standard deviation.
    """
    num = len(times) + 1
    condition = Condition(torch.full((num, 1, 1), 0.7, dtype=torch.float64), torch.ones(num, 1).long())

    def noise(i: int) -> Tensor:
        rows = torch.zeros(num, 1, 1, 1, dtype=torch.float64)
        rows[i + 1] = SIGMA_DATA
        return rows

    guidance = torch.full((num,), 2.0, dtype=torch.float64)
    ends = sampler(student, noise(0), condition, guidance, times, noise, SIGMA_DATA, **options).flatten()
    return ends[0].item(), (ends[1:] - ends[0]).square().sum().item()
