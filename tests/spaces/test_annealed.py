"""SlimFlow's annealed coupling on a Gaussian, in float64: from the teacher's own velocity to the straight one."""

import math

import pytest
import torch
from gaussians import SIGMA_DATA, gaussian
from torch import Tensor

from stepfold.maths.formulations import interpolate_velocity


def mean_velocity(share: float, x: Tensor, t: Tensor, mean: float, std: float) -> Tensor:
    """E[dx/dt | x, t] where the end is that of noise z and what is joined to it sqrt(1 - b^2) z + b e: linear in x.

    Data N(mean, std^2) and noise N(0, sigma_d^2): x_0 = mean + std / sigma_d z, so the joint law is Gaussian.
    """
    cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
    joined = math.sqrt(1 - share**2)
    cov = std * SIGMA_DATA * joined  # of x_0 and what is joined to it
    var = cos**2 * std**2 + sin**2 * SIGMA_DATA**2 + 2 * sin * cos * cov
    with_velocity = sin * cos * (SIGMA_DATA**2 - std**2) + (cos**2 - sin**2) * cov
    return -sin * mean + with_velocity / var * (x - cos * mean)


@pytest.fixture
def states() -> tuple[Tensor, Tensor]:
    return torch.randn(50, 1).double(), (0.1 + 1.3 * torch.rand(50)).double()


def test_fresh_noise_is_the_teachers_own_velocity(states: tuple[Tensor, Tensor]) -> None:
    x, t = states
    torch.testing.assert_close(
        mean_velocity(1.0, x, t, 0.4, 0.2), gaussian(0.4, 0.2).velocity(x, t), rtol=1e-9, atol=1e-9
    )


def test_the_trajectorys_own_noise_is_straight_and_one_step_is_exact(states: tuple[Tensor, Tensor]) -> None:
    x, t = states
    z = (x - torch.cos(t)[:, None] * 0.4) / (torch.cos(t)[:, None] * 0.2 / SIGMA_DATA + torch.sin(t)[:, None])
    line = interpolate_velocity(0.4 + 0.2 / SIGMA_DATA * z, z, t)
    torch.testing.assert_close(mean_velocity(0.0, x, t, 0.4, 0.2), line, rtol=1e-9, atol=1e-9)


def test_the_error_of_one_step_falls_as_the_noise_becomes_its_own() -> None:
    z, t = SIGMA_DATA * torch.randn(200, 1).double(), torch.full((200,), math.pi / 2, dtype=torch.float64)
    exact = 0.4 + 0.2 / SIGMA_DATA * z
    errors = [
        (-mean_velocity(share, z, t, 0.4, 0.2) - exact).abs().mean().item() for share in (1.0, 0.75, 0.5, 0.25, 0.0)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-9 < errors[-2]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_joined_noise_keeps_its_spread(share: float) -> None:
    z, e = torch.randn(2, 200_000).double()
    assert abs((math.sqrt(1 - share**2) * z + share * e).std().item() - 1) < 5e-3
