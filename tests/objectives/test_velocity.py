"""Velocity matching, and the fake score's loss, on Gaussians."""

import math
from typing import Any

import pytest
import torch
from gaussians import SIGMA_DATA, Law, Score, batch_of, gaussian, nothing
from torch import Tensor

from stepfold.config import load_config
from stepfold.maths.formulations import guide, interpolate
from stepfold.objectives.contract import Networks
from stepfold.objectives.denoising import denoising_error
from stepfold.objectives.velocity import velocity_error, velocity_loss
from stepfold.spaces.coupling import coupled_pairs
from stepfold.spaces.records import Pairs


def test_the_teachers_own_F_has_no_error_and_another_has_its_distance() -> None:
    x, t = torch.randn(5, 3).double(), torch.rand(5).double() * math.pi / 2
    dxdt = gaussian(0.4, 0.2).velocity(x, t)
    F = dxdt / SIGMA_DATA
    assert torch.equal(velocity_error(F, dxdt, SIGMA_DATA), torch.zeros(5).double())
    torch.testing.assert_close(
        velocity_error(F + 0.3, dxdt, SIGMA_DATA), torch.tensor([0.09] * 5, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_the_distance_is_the_square_or_pseudo_huber() -> None:
    """sqrt(e + c^2) - c of the squared error e; a large c is the square over 2 c, a small one the norm."""
    x, t = torch.randn(5, 3).double(), torch.rand(5).double() * math.pi / 2
    dxdt, zero = gaussian(0.4, 0.2).velocity(x, t), torch.zeros(5)
    pairs = Pairs(
        x=x, t=t, condition=nothing(5), guidance=zero, prompt=zero, number=zero, num_drawn=5, dxdt=dxdt, t_next=t, x0=x
    )
    networks: Any = Networks(Score(0.5, 0.3), Law(0.4, 0.2))  # type: ignore[arg-type]

    def value(constant: float) -> Tensor:
        config = load_config("reflow", [f"velocity.huber_constant={constant}"])
        return velocity_loss(networks, pairs, batch_of(5).draws, config, 0).value.detach()

    square = value(0)
    torch.testing.assert_close(value(0.3), torch.sqrt(square + 0.09) - 0.3, rtol=1e-12, atol=0)
    torch.testing.assert_close(2e3 * value(1e3), square, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(value(1e-9), square.sqrt(), rtol=1e-6, atol=1e-8)


def test_regression_of_an_end_on_its_noise_is_velocity_matching_there() -> None:
    """At pi/2 the line's velocity is -x_0: the perfect one-step student has no error, on other noise it has."""
    law, noise = gaussian(0.4, 0.2), SIGMA_DATA * torch.randn(6, 3).double()
    t = torch.full((6,), math.pi / 2, dtype=torch.float64)
    x0 = law.consistency(noise, t)
    for z, wrong in ((noise, False), (noise.roll(1, 0), True)):
        found = coupled_pairs(x0, z, t[:, None], nothing(6), torch.ones(6).double(), None)
        error = velocity_error(law.F_of_consistency(found.x, found.t), found.dxdt, SIGMA_DATA)
        assert (error > 1e-3).any() if wrong else error.max() < 1e-24


def test_no_gradient_reaches_the_velocity() -> None:
    F, dxdt = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    velocity_error(F, dxdt, SIGMA_DATA).sum().backward()
    assert F.grad is not None and dxdt.grad is None
    torch.testing.assert_close(F.grad, 2 / 3 * (F - dxdt / SIGMA_DATA).detach())


def gradient_at(score: Score, mean: float, std: float, sign: float = 1.0) -> Tensor:
    """Of the denoising loss in the score's (mean, log std), over pictures N(mean, std^2) and all times; quadrature."""
    nodes, weights = hermite(24)
    x0, z = (grid.flatten()[:, None] for grid in torch.meshgrid(mean + std * nodes, SIGMA_DATA * nodes, indexing="ij"))
    weight = (weights[:, None] * weights).flatten()
    total = torch.zeros(2).double()
    for time in (0.1, 0.5, 1.0, 1.4):
        t = torch.full((len(x0),), time).double()
        error = denoising_error(score, x0, sign * z, t, nothing(len(x0)), torch.ones(len(x0)).double(), SIGMA_DATA)
        if sign < 0:  # the mistake: the noise of the state and that of the target have opposite signs
            F = score(interpolate(x0, z, t) / SIGMA_DATA, t, nothing(len(x0)), torch.ones(len(x0)).double())
            wrong = (-torch.cos(t)[:, None] * z - torch.sin(t)[:, None] * x0) / SIGMA_DATA
            error = (F - wrong).square().mean(1)
        grads = torch.autograd.grad((weight * error.double()).sum(), [score.mean, score.log_std])
        total += torch.stack(grads)
    return total


def hermite(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights for the mean over N(0, 1)."""
    off = torch.arange(1, count).double().sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, vectors[0] ** 2


def test_the_score_of_the_pictures_own_law_is_the_only_one_at_rest() -> None:
    """The minimiser of the denoising loss is the law's velocity; any other Gaussian is pushed towards it."""
    assert gradient_at(Score(0.4, 0.2), 0.4, 0.2).abs().max() < 1e-13
    assert gradient_at(Score(0.3, 0.2), 0.4, 0.2)[0] < -1e-2 and gradient_at(Score(0.5, 0.2), 0.4, 0.2)[0] > 1e-2
    assert gradient_at(Score(0.4, 0.15), 0.4, 0.2)[1] < -1e-3 and gradient_at(Score(0.4, 0.3), 0.4, 0.2)[1] > 1e-3


def test_a_noise_of_the_wrong_sign_is_seen() -> None:
    assert gradient_at(Score(0.4, 0.2), 0.4, 0.2, sign=-1.0).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32(dtype: torch.dtype) -> None:
    F, dxdt = torch.randn(2, 3), torch.randn(2, 3)
    assert velocity_error(F.to(dtype), dxdt, SIGMA_DATA).dtype == torch.float32


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_a_student_that_starts_as_its_teacher_lacks_the_guidance_alone(weight: float) -> None:
    """The loss at step 0 is (w - 1)^2 of the distance of the two branches, and 0 with no gradient at w = 1."""
    x, t = torch.randn(7, 3).double(), torch.rand(7).double() * math.pi / 2
    without, with_prompt = gaussian(0.1, 0.3).velocity(x, t), gaussian(0.6, 0.3).velocity(x, t)
    F = (with_prompt / SIGMA_DATA).requires_grad_()
    error = velocity_error(F, guide(without, with_prompt, weight), SIGMA_DATA)
    wanted = (weight - 1) ** 2 * ((with_prompt - without) / SIGMA_DATA).square().mean(1)
    torch.testing.assert_close(error, wanted, rtol=1e-12, atol=1e-30)
    (gradient,) = torch.autograd.grad(error.sum(), F)
    assert (gradient.abs().max() < 1e-15) == (weight == 1)


def test_an_added_shift_is_enough_for_gaussian_classes_of_one_spread() -> None:
    """Their branches differ by no function of x, so that the guided law is a Gaussian with a mean further out."""
    x, t = torch.randn(7, 3).double(), torch.rand(7).double() * math.pi / 2
    guided = guide(gaussian(0.1, 0.3).velocity(x, t), gaussian(0.6, 0.3).velocity(x, t), 3.0)
    further = gaussian(0.1 + 3 * 0.5, 0.3).velocity(x, t)
    torch.testing.assert_close(guided, further, rtol=1e-12, atol=1e-12)
