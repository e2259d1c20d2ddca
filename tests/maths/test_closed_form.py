import math

import pytest
import torch

from stepfold.errors import UserError
from stepfold.maths.closed_form import GaussianTeacher, MixtureTeacher
from stepfold.maths.formulations import data_prediction, euler_step, noise_prediction, unsqueeze_like

HALF_PI = math.pi / 2
SIGMA_DATA = 0.5


def gaussian() -> GaussianTeacher:
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.rand(2, 3, 2, 2, generator=generator, dtype=torch.float64)
    return GaussianTeacher(mean + 0.5, std + 0.2, SIGMA_DATA)


def mixture(weights: tuple[float, float, float] = (0.2, 0.5, 0.3)) -> MixtureTeacher:
    generator = torch.Generator().manual_seed(1)
    means = 0.6 * torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    stds = 0.1 + 0.3 * torch.rand(3, 2, generator=generator, dtype=torch.float64)
    w = torch.tensor(weights, dtype=torch.float64)[:, None].expand(3, 2) * torch.tensor([1.0, 5.0]).double()
    return MixtureTeacher(means, stds, w, SIGMA_DATA)


def batch(shape: tuple[int, ...], num: int = 41) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States over the closed interval of times, both ends included, and labels."""
    x = torch.randn(num, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x, torch.linspace(0, HALF_PI, num, dtype=torch.float64), torch.arange(num) % 2


def test_gaussian_flow_map_solves_its_ode():
    """d/ds flow_map(x, t, s) = velocity at the state there, for pairs of times over the whole square."""
    teacher = gaussian()
    x, t, _ = batch((3, 2, 2))
    for s in (t, t.flip(0), t.roll(7)):
        state, rate = torch.func.jvp(lambda s: teacher.flow_map(x, t, s), (s,), (torch.ones_like(s),))[:2]
        torch.testing.assert_close(rate, teacher.velocity(state, s), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(teacher.flow_map(x, t, t), x, rtol=1e-12, atol=1e-12)


def test_gaussian_flow_map_composes_and_carries_noise_to_data():
    teacher = gaussian()
    x, t, _ = batch((3, 2, 2))
    middle = t.flip(0)
    direct, via = teacher.consistency(x, t), teacher.consistency(teacher.flow_map(x, t, middle), middle)
    torch.testing.assert_close(direct, via, rtol=1e-11, atol=1e-11)
    z = SIGMA_DATA * torch.randn(20_000, 3, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x0 = teacher.consistency(z, torch.full((len(z),), HALF_PI, dtype=torch.float64))
    torch.testing.assert_close(x0.mean(dim=0), teacher.mean, rtol=0, atol=0.04)
    torch.testing.assert_close(x0.std(dim=0), teacher.std, rtol=0.03, atol=0)


def test_gaussian_consistency_network_gives_the_flow_map_and_is_finite_at_zero():
    teacher = gaussian()
    x, t, _ = batch((3, 2, 2))
    F = teacher.F_of_consistency(x, t)
    torch.testing.assert_close(data_prediction(x, t, SIGMA_DATA * F), teacher.consistency(x, t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(SIGMA_DATA * F[0], teacher.velocity(x, t)[0], rtol=1e-12, atol=1e-12)


def test_gaussian_two_time_network_gives_the_flow_map_and_the_velocity_where_both_times_meet():
    teacher = gaussian()
    x, t, _ = batch((3, 2, 2))
    for s in (torch.zeros_like(t), 0.3 * t, 0.99 * t):
        F = teacher.F_of_flow_map(x, t, s)
        torch.testing.assert_close(
            euler_step(x, t, s, SIGMA_DATA * F), teacher.flow_map(x, t, s), rtol=1e-12, atol=1e-12
        )
    F = teacher.F_of_flow_map(x, t, t)
    torch.testing.assert_close(SIGMA_DATA * F, teacher.velocity(x, t), rtol=1e-12, atol=1e-12)


def test_mixture_of_one_component_is_the_gaussian():
    teacher = mixture((0.0, 1.0, 0.0))
    x, t, label = batch((4,))
    single = GaussianTeacher(teacher.means[1, 0], teacher.stds[1, 0], SIGMA_DATA)
    torch.testing.assert_close(teacher.velocity(x, t, label)[::2], single.velocity(x, t)[::2], rtol=1e-12, atol=1e-12)


def test_mixture_velocity_follows_from_its_score():
    """The noise prediction is -sigma_data^2 sin t times the score of the marginal density, written out on its own."""
    teacher = mixture()
    x, t, label = batch((4,))
    sin, cos = t.sin()[:, None], t.cos()[:, None]
    x = x.requires_grad_()
    density = torch.zeros(len(x), dtype=torch.float64)
    for mean, std, weight in zip(teacher.means, teacher.stds, teacher.weights, strict=True):
        covariance = ((cos * std[label][:, None]) ** 2 + (sin * SIGMA_DATA) ** 2)[..., None] * torch.eye(4).double()
        normal = torch.distributions.MultivariateNormal(cos * mean[label], covariance)
        density = density + weight[label] * normal.log_prob(x).exp()
    (score,) = torch.autograd.grad(density.log().sum(), x)
    velocity = teacher.velocity(x.detach(), t, label)
    noise = noise_prediction(x.detach(), t, velocity)
    torch.testing.assert_close(noise, -(SIGMA_DATA**2) * sin * score, rtol=1e-9, atol=1e-9)


def test_mixture_posterior_mean_is_the_data_prediction():
    teacher = mixture()
    x, t, label = batch((4,))
    expected = data_prediction(x, t, teacher.velocity(x, t, label))
    torch.testing.assert_close(teacher.posterior_mean(x, t, label), expected, rtol=1e-12, atol=1e-12)


def test_mixture_posterior_mean_at_pure_noise_is_the_mean_of_the_label():
    teacher = mixture()
    x, _, label = batch((4,))
    weights = (teacher.weights / teacher.weights.sum(dim=0))[..., None]
    mean = (weights * teacher.means).sum(dim=0)[label]
    t = torch.full((len(x),), HALF_PI, dtype=torch.float64)
    torch.testing.assert_close(teacher.posterior_mean(x, t, label), mean, rtol=1e-12, atol=1e-12)
    assert (mean[0] - mean[1]).abs().max() > 0.1  # the label matters


def test_mixture_is_finite_far_out_and_differentiable():
    teacher = mixture((0.0, 0.5, 0.5))
    x, t, label = batch((4,))
    v, dv = torch.func.jvp(lambda x, t: teacher.velocity(x, t, label), (100 * x, t), (x, torch.ones_like(t)))[:2]
    assert v.isfinite().all()
    assert dv.isfinite().all()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(teacher.velocity(x, t, label).square().sum(), x)
    assert gradient.isfinite().all()


def test_mixture_samples_have_its_moments():
    teacher, num = mixture(), 40_000
    generator = torch.Generator().manual_seed(4)
    uniform = torch.rand(num, generator=generator, dtype=torch.float64)
    x0 = teacher.sample(torch.arange(num) % 2, uniform, torch.randn(num, 4, generator=generator, dtype=torch.float64))
    weights = unsqueeze_like(teacher.weights / teacher.weights.sum(dim=0), teacher.means)
    mean = (weights * teacher.means).sum(dim=0)
    second = (weights * (teacher.means**2 + unsqueeze_like(teacher.stds, teacher.means) ** 2)).sum(dim=0)
    for label in (0, 1):
        torch.testing.assert_close(x0[label::2].mean(dim=0), mean[label], rtol=0, atol=0.02)
        torch.testing.assert_close(x0[label::2].square().mean(dim=0), second[label], rtol=0, atol=0.02)


def test_image_shaped_samples():
    teacher = MixtureTeacher(torch.randn(2, 3, 4, 5, 5), torch.ones(2, 3), torch.ones(2, 3), SIGMA_DATA)
    x, label, t = torch.randn(6, 4, 5, 5), torch.arange(6) % 3, torch.rand(6)
    assert teacher.velocity(x, t, label).shape == x.shape == teacher.sample(label, t, x).shape


def test_impossible_values_are_refused():
    with pytest.raises(UserError):
        GaussianTeacher(torch.zeros(2), torch.zeros(2), SIGMA_DATA)
    with pytest.raises(UserError):
        MixtureTeacher(torch.zeros(1, 1, 2), torch.zeros(1, 1), torch.ones(1, 1), SIGMA_DATA)
