import itertools
import math

import pytest
import torch

from stepfold.maths import formulations as fm
from stepfold.maths.closed_form import GaussianTeacher, MixtureTeacher

SIGMA_DATA = 0.5
HALF_PI = math.pi / 2


def states(num: int = 9, low: float = 0.0, high: float = HALF_PI) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, num, 3, 4, 5, generator=generator, dtype=torch.float64)
    return x, y, torch.linspace(low, high, num, dtype=torch.float64)


def assert_same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_unsqueeze_like_shapes():
    assert fm.unsqueeze_like(torch.zeros(2), torch.zeros(2, 3, 4)).shape == (2, 1, 1)
    assert fm.unsqueeze_like(torch.tensor(0.3), torch.zeros(2, 3)).shape == (1, 1)


def test_interpolation_and_predictions_are_a_rotation():
    x0, z, t = states()
    x, dxdt = fm.interpolate(x0, z, t), fm.interpolate_velocity(x0, z, t)
    assert_same(fm.data_prediction(x, t, dxdt), x0)
    assert_same(fm.noise_prediction(x, t, dxdt), z)
    derivative = torch.func.jvp(lambda s: fm.interpolate(x0, z, s), (t,), (torch.ones_like(t),))[1]
    assert_same(derivative, dxdt)


def test_equivalent_noise_is_what_noised_the_picture():
    x0, z, t = states(low=0.05)
    assert_same(fm.equivalent_noise(fm.interpolate(x0, z, t), t, x0), z)


def test_flow_matching_round_trips_over_the_closed_interval():
    x, F, t = states()
    t_flow = fm.flow_time(t)
    assert t_flow[[0, -1]].tolist() == [0, 1]
    assert_same(fm.trigflow_time(t_flow), t)
    x_flow = fm.flow_input(x, t, SIGMA_DATA)
    assert_same(fm.trigflow_input(x_flow, t_flow, SIGMA_DATA), x)
    assert_same(fm.trigflow_output(x_flow, t_flow, fm.flow_velocity(x_flow, t_flow, F)), F)
    assert_same(fm.flow_velocity(x_flow, t_flow, fm.trigflow_output(x_flow, t_flow, F)), F)


def test_trigflow_time_and_its_gradient_are_finite_at_one():
    t_flow = torch.ones(1, dtype=torch.float64, requires_grad=True)
    t = fm.trigflow_time(t_flow)
    (gradient,) = torch.autograd.grad(t.sum(), t_flow)
    assert t.item() == HALF_PI
    assert gradient.item() == pytest.approx(1.0)


def test_flow_conversion_follows_its_definition_for_known_data_and_noise():
    """Unit-variance x_0 and n in flow matching's own terms become TrigFlow's x and F."""
    x0, n, t = states()
    t_flow = fm.flow_time(t)
    s = fm.unsqueeze_like(t_flow, x0)
    x_flow, velocity = (1 - s) * x0 + s * n, n - x0
    x = fm.interpolate(SIGMA_DATA * x0, SIGMA_DATA * n, t)
    dxdt = fm.interpolate_velocity(SIGMA_DATA * x0, SIGMA_DATA * n, t)
    assert_same(fm.flow_input(x, t, SIGMA_DATA), x_flow)
    assert_same(SIGMA_DATA * fm.trigflow_output(x_flow, t_flow, velocity), dxdt)


def mixture_flow_velocity(
    teacher: MixtureTeacher, x: torch.Tensor, s: torch.Tensor, label: torch.Tensor
) -> torch.Tensor:
    """E[n - x_0 | x] of a mixture derived in flow matching's own coordinates (unit data), component by component."""
    logits, velocities = [], []
    for means, stds, weights in zip(teacher.means, teacher.stds, teacher.weights, strict=True):
        mean, std = means[label] / teacher.sigma_data, stds[label][:, None] / teacher.sigma_data
        marginal = torch.distributions.Normal((1 - s) * mean, torch.sqrt(((1 - s) * std) ** 2 + s**2))
        logits.append(weights[label].log() + marginal.log_prob(x).sum(dim=1))
        deviation = (x - (1 - s) * mean) / marginal.variance
        velocities.append(s * deviation - mean - (1 - s) * std**2 * deviation)
    posterior = torch.softmax(torch.stack(logits), dim=0)
    return (posterior[..., None] * torch.stack(velocities)).sum(dim=0)


def test_flow_matching_identities_hold_for_the_mixture_velocity():
    generator = torch.Generator().manual_seed(1)
    means = 0.5 * torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    stds = 0.1 + torch.rand(3, 2, generator=generator, dtype=torch.float64) / 2
    weights = torch.rand(3, 2, generator=generator, dtype=torch.float64)
    teacher = MixtureTeacher(means, stds, weights, SIGMA_DATA)
    t = torch.linspace(0, HALF_PI, 50, dtype=torch.float64)
    x = SIGMA_DATA * torch.randn(50, 4, generator=generator, dtype=torch.float64)
    label = torch.arange(50) % 2
    t_flow, x_flow = fm.flow_time(t), fm.flow_input(x, t, SIGMA_DATA)
    velocity = mixture_flow_velocity(teacher, x_flow, t_flow[:, None], label)
    assert_same(SIGMA_DATA * fm.trigflow_output(x_flow, t_flow, velocity), teacher.velocity(x, t, label), 1e-10)


def test_edm_round_trips_and_shares_its_ode():
    x, denoised, t = states(low=0.01, high=1.56)
    sigma = fm.edm_sigma(t, SIGMA_DATA)
    assert_same(fm.edm_time(sigma, SIGMA_DATA), t)
    x_edm = fm.edm_input(x, t)
    assert_same(fm.trigflow_input_from_edm(x_edm, t), x)
    assert_same(fm.unsqueeze_like(fm.edm_c_in(sigma, SIGMA_DATA), x) * x_edm, x / SIGMA_DATA)
    dxdt = fm.dxdt_from_denoised(x, t, denoised)
    assert_same(fm.data_prediction(x, t, dxdt), denoised)
    # dx/dt of x = cos t x_edm(sigma(t)), with EDM's own dx_edm/dsigma = (x_edm - D) / sigma
    sin, cos, sigma = (fm.unsqueeze_like(v, x) for v in (t.sin(), t.cos(), sigma))
    assert_same(dxdt, -sin * x_edm + cos * (SIGMA_DATA / cos**2) * (x_edm - denoised) / sigma)


def test_edm_noise_levels_at_the_ends():
    ends = torch.tensor([0.0, math.inf], dtype=torch.float64)
    assert fm.edm_time(ends, SIGMA_DATA).tolist() == [0.0, HALF_PI]


def test_variance_preserving_round_trips_and_definitions():
    x0, n, t = states(low=0.0, high=1.56)
    alpha, sigma = t.cos(), t.sin()
    assert_same(fm.vp_time(alpha, sigma), t)
    a, s = fm.unsqueeze_like(alpha, x0), fm.unsqueeze_like(sigma, x0)
    x_unit, F = a * x0 + s * n, fm.interpolate_velocity(x0, n, t)
    assert_same(fm.F_from_epsilon(x_unit, t, n), F)
    assert_same(fm.epsilon_from_F(x_unit, t, F), n)
    assert_same(fm.F_from_v(a * n - s * x0), F)
    assert_same(fm.v_from_F(fm.F_from_v(n)), n)
    assert fm.vp_time(torch.tensor(0.0), torch.tensor(1.0)).item() == pytest.approx(HALF_PI)


def test_guidance_interpolates_and_keeps_the_dtype():
    uncond, cond, _ = states()
    assert_same(fm.guide(uncond, cond, 1.0), cond)
    assert_same(fm.guide(uncond, cond, 0.0), uncond)
    scales = torch.linspace(0, 8, len(cond), dtype=torch.float64)
    guided = fm.guide(uncond, cond, scales)
    assert_same(guided[-1], uncond[-1] + 8 * (cond[-1] - uncond[-1]))
    assert fm.guide(uncond.float(), cond.float(), scales).dtype == torch.float32
    assert fm.guide(uncond.bfloat16(), cond.bfloat16(), 4.5).dtype == torch.bfloat16


def test_euler_step_is_exact_on_a_straight_pair_in_both_directions():
    x0, z, t = states()
    t_next = t.flip(0)
    x, dxdt = fm.interpolate(x0, z, t), fm.interpolate_velocity(x0, z, t)
    assert_same(fm.euler_step(x, t, t_next, dxdt), fm.interpolate(x0, z, t_next))


def test_euler_step_has_order_one():
    teacher = GaussianTeacher(torch.tensor(0.7).double(), torch.tensor(0.3).double(), SIGMA_DATA)
    start = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]
    truth = teacher.consistency(start, torch.full((7,), HALF_PI, dtype=torch.float64))
    counts, errors = [40, 80, 160, 320], []
    for count in counts:
        x, times = start, torch.linspace(HALF_PI, 0, count + 1, dtype=torch.float64)
        for t, t_next in zip(times[:-1].expand(7, -1).T, times[1:].expand(7, -1).T, strict=True):
            x = fm.euler_step(x, t, t_next, teacher.velocity(x, t))
        errors.append((x - truth).abs().max().item())
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(0.9 < slope < 1.1 for slope in slopes), slopes
