"""Score identity distillation against the divergences whose gradients it is, in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gaussians import SIGMA_DATA, Law, Perfect, Score, gaussian, nothing
from scores import networks_of, quadrature, settings, states_of
from torch import Tensor, nn

from stepfold.maths.closed_form import GaussianTeacher
from stepfold.maths.formulations import data_prediction, interpolate
from stepfold.objectives import identity
from stepfold.objectives.identity import Cotangents, identity_cotangents, identity_loss, identity_value, pulled_back
from stepfold.objectives.matching import along
from stepfold.teachers.contract import Condition, Student

TEACHER = gaussian(0.4, 0.2)
Cut = Callable[[Cotangents], Cotangents]


def prediction(law: GaussianTeacher, x: Tensor, t: Tensor) -> Tensor:
    return data_prediction(x, t, law.velocity(x, t))


def staged_gradient(alpha: float, t: float, law: tuple[float, float], change: Cut = lambda pulls: pulls) -> Tensor:
    """In (mean, std) of a student N(mean, std^2) whose fake score is exact, by quadrature; omega = 1."""
    z0, z, weight = quadrature()
    own = torch.tensor(law, dtype=torch.float64, requires_grad=True)
    x0, times = own[0] + own[1] * z0, torch.full((len(z0),), t, dtype=torch.float64)
    x = interpolate(x0.detach(), SIGMA_DATA * z, times)
    fake = gaussian(*law)
    x_real, x_fake = prediction(TEACHER, x, times), prediction(fake, x, times)
    pulls = change(identity_cotangents(x0, x_real, x_fake, torch.ones_like(times), alpha, SIGMA_DATA))
    real = pulled_back(lambda x: TEACHER.velocity(x, times), x, times, pulls.to_real)
    theirs = pulled_back(lambda x: fake.velocity(x, times), x, times, pulls.to_fake)
    direction = pulls.direct + math.cos(t) * (real + theirs)
    return torch.autograd.grad((weight * along(direction, x0, SIGMA_DATA, "sum")).sum(), own)[0]


def fisher_gradient(t: float, law: tuple[float, float], *, frozen: bool) -> Tensor:
    """Of E ||x_real - x_fake||^2 / sigma_data^2, where the fake score follows the student; the states too, or not."""
    z0, z, weight = quadrature()
    own = torch.tensor(law, dtype=torch.float64, requires_grad=True)
    x0, times = own[0] + own[1] * z0, torch.full((len(z0),), t, dtype=torch.float64)
    x = interpolate(x0.detach() if frozen else x0, SIGMA_DATA * z, times)
    fake = GaussianTeacher(own[0], own[1], SIGMA_DATA)
    gap = (prediction(TEACHER, x, times) - prediction(fake, x, times)) / SIGMA_DATA
    return torch.autograd.grad((weight * gap.square().sum(1)).sum(), own)[0]


@pytest.mark.parametrize("t", [0.1, 0.5, 1.0, 1.4])
def test_twice_the_gradient_is_that_of_a_fisher_divergence(t: float) -> None:
    """Of the divergence itself at alpha = 1/2; at alpha = 1 of that with the states held."""
    law = (-0.1, 0.35)
    for alpha, frozen in ((0.5, False), (1.0, True)):
        torch.testing.assert_close(
            2 * staged_gradient(alpha, t, law), fisher_gradient(t, law, frozen=frozen), rtol=1e-11, atol=1e-12
        )
    assert (staged_gradient(1.0, t, law) / staged_gradient(0.5, t, law) - 1).abs().max() > 1e-4


MISTAKES: dict[str, Cut] = {
    "sign of the fake's": lambda pulls: pulls._replace(to_fake=-pulls.to_fake),
    "nothing through the fake": lambda pulls: pulls._replace(to_fake=0 * pulls.to_fake),
    "nothing through the teacher": lambda pulls: pulls._replace(to_real=0 * pulls.to_real),
    "nothing at the picture": lambda pulls: pulls._replace(direct=0 * pulls.direct),
    "no sigma_data": lambda pulls: Cotangents(*(SIGMA_DATA * pull for pull in pulls)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_gradient_with_a_part_missing_is_another_one(mistake: str) -> None:
    law = (-0.1, 0.35)
    wrong = 2 * staged_gradient(0.5, 0.5, law, MISTAKES[mistake])
    right = fisher_gradient(0.5, law, frozen=False)
    assert ((wrong - right).norm() / right.norm()) > 0.02


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_value_is_a_share_of_the_fisher_divergence(alpha: float) -> None:
    """(1 - alpha) of it where the fake score is exact: 0 at alpha = 1, whatever the student."""
    z0, z, weight = quadrature()
    x0, times = -0.1 + 0.35 * z0, torch.full((len(z0),), 0.5, dtype=torch.float64)
    x = interpolate(x0, SIGMA_DATA * z, times)
    real, fake = prediction(TEACHER, x, times), prediction(gaussian(-0.1, 0.35), x, times)
    fisher = (weight * ((real - fake) / SIGMA_DATA).square().sum(1)).sum()
    value = (weight * identity_value(x0, real, fake, alpha, SIGMA_DATA)).sum()
    torch.testing.assert_close(value, (1 - alpha) * fisher, rtol=1e-11, atol=1e-13)


def std_gradient(std: float, theirs: float, t: float, alpha: float) -> float:
    """In the student's std, with equal means: -2 std c (A - B)(1 - B c - (1 - alpha)(A - B) c) / sigma_data^2."""
    c, noise = math.cos(t), (math.sin(t) * SIGMA_DATA) ** 2
    A, B = (c * s * s / (c * c * s * s + noise) for s in (theirs, std))
    return -2 * std * c * (A - B) * (1 - B * c - (1 - alpha) * (A - B) * c) / SIGMA_DATA**2


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_the_std_is_never_pushed_the_wrong_way_unless_alpha_is_above_1(alpha: float) -> None:
    for std in (0.1, 0.3):
        found = staged_gradient(alpha, 0.3, (0.4, std))
        assert float(found[1]) == pytest.approx(std_gradient(std, 0.2, 0.3, alpha), rel=1e-9)
    grid = [0.05, 0.1, 0.2, 0.4, 0.8]
    wrong = [
        std_gradient(std, theirs, t, alpha) * (std - theirs) < 0
        for std in grid for theirs in grid if std != theirs for t in (0.02, 0.05, 0.1, 0.3, 0.8, 1.4)
    ]  # fmt: skip
    assert any(wrong) == (alpha > 1)


class Random(Student):
    """A random network of two layers, in float64."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mean = nn.Linear(4, 8).double()
        self.out = nn.Linear(8, 3).double()

    def forward(self, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor, *rest: Any) -> Tensor:
        return self.out(torch.tanh(self.mean(torch.cat([x_unit, t[:, None]], 1))))

    def log_variance(self, t: Tensor, guidance: Tensor, target: Tensor | None = None) -> Tensor:
        return torch.zeros_like(t)


class Behind(Law):
    """A random network as a teacher."""

    def velocity(
        self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor, *, with_gradient: bool = False
    ) -> Tensor:
        with torch.set_grad_enabled(with_gradient):
            return SIGMA_DATA * Random(5)(x / SIGMA_DATA, t, condition, guidance)


def test_passes_one_after_the_other_have_the_gradient_of_the_whole_graph() -> None:
    """Through the objective as a run calls it, on networks that are no Gaussians."""
    config = settings("objective=identity", "matching.weighting=sid", "identity.alpha=0.7")
    student, fake, teacher = Random(1), Random(2), Behind()
    states, draws = states_of(6)
    networks: Any = networks_of(student, teacher, fake)  # type: ignore[arg-type]
    identity_loss(networks, states, draws, config, 0).value.mean().backward()
    staged = [parameter.grad.clone() for parameter in student.parameters() if parameter.grad is not None]
    assert len(staged) == 4 and all(parameter.grad is None for parameter in fake.parameters())

    x0 = data_prediction(
        states.x, states.t, SIGMA_DATA * student(states.x / SIGMA_DATA, states.t, nothing(6), states.t)
    )
    at = identity.noised(x0, states, networks, draws, config)
    noise = (at.x - at.t.cos()[:, None] * x0.detach()) / at.t.sin()[:, None]
    x = interpolate(x0, noise, at.t)
    real, theirs = (
        data_prediction(x, at.t, SIGMA_DATA * net(x / SIGMA_DATA, at.t, nothing(6), at.t)) for net in (Random(5), fake)
    )
    omega = 1 / (1 + at.t.tan())
    loss = (omega * identity_value(x0, real, theirs, 0.7, SIGMA_DATA) / 3).mean()
    whole = torch.autograd.grad(loss, list(student.parameters()))
    for ours, exact in zip(staged, whole, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-13)


def test_the_perfect_student_is_left_alone_and_the_figures_are_there() -> None:
    config, (states, draws) = settings("objective=identity"), states_of()
    student = Perfect(0.4, 0.2)
    loss = identity_loss(networks_of(student, Law(0.4, 0.2), Score(0.4, 0.2)), states, draws, config, 0)
    loss.value.mean().backward()
    assert student.mean.grad is not None and student.log_std.grad is not None
    # the mean over pictures is 0: single pictures are pushed, along x_real - x_0
    assert loss.metrics["fisher"].max() < 1e-20 and loss.metrics["gap"].max() < 1e-10
