"""Distribution matching on Gaussians, where divergences and fixed points are known in closed form."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast, get_args

import pytest
import torch
from forms import cases
from gaussians import SIGMA_DATA, Guided, Law, Perfect, Score, TwoScores, batch_of, gaussian, nothing
from scores import NUM, alternate, networks_of, quadrature, settings, states_of
from torch import Tensor

from stepfold.config import load_config
from stepfold.errors import UserError
from stepfold.maths.closed_form import GaussianTeacher
from stepfold.maths.formulations import (
    data_prediction,
    epsilon_from_F,
    flow_input,
    flow_time,
    flow_velocity,
    interpolate,
    interpolate_velocity,
    noise_prediction,
)
from stepfold.objectives import matching
from stepfold.objectives.consistency import continuous_loss
from stepfold.objectives.denoising import denoising_error
from stepfold.objectives.matching import along, matching_direction, matching_loss, matching_weight
from stepfold.scores import Weighting
from stepfold.spaces.records import Pairs
from stepfold.training.critics import fake_loss
from stepfold.training.step_log import Metrics, means, spread_of
from stepfold.training.terms import terms_of

Direction = Callable[..., Tensor]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
TIMES = [0.1, 0.5, 1.0, 1.4]


# The gradient of a divergence.


def divergence(mean: Tensor, std: Tensor, teacher: GaussianTeacher, t: float) -> Tensor:
    """KL of N(mean, std^2) from the teacher's law, both noised to t."""
    variance, theirs = (
        (math.cos(t) * s) ** 2 + (math.sin(t) * SIGMA_DATA) ** 2 for s in (std, teacher.std)
    )  # fmt: skip
    distance = (math.cos(t) * (mean - teacher.mean)) ** 2
    return (variance / theirs - 1 - torch.log(variance / theirs) + distance / theirs) / 2


def gradient_error(direction: Direction, t: float) -> float:
    """How far the gradient that a direction makes is from that of the divergence, in mean and std, relative."""
    teacher, (z0, z, weight) = gaussian(0.4, 0.2), quadrature()
    law = torch.tensor([-0.1, 0.35], dtype=torch.float64, requires_grad=True)
    exact = torch.autograd.grad(divergence(law[0], law[1], teacher, t), law)[0]
    x0, times = law[0] + law[1] * z0, torch.full((len(z0),), t, dtype=torch.float64)
    x = interpolate(x0.detach(), SIGMA_DATA * z, times)
    fake = GaussianTeacher(law[0].detach(), law[1].detach(), SIGMA_DATA)
    x_real, x_fake = (data_prediction(x, times, law.velocity(x, times)) for law in (teacher, fake))
    loss = along(direction(x0.detach(), x_real, x_fake, times, "kl", SIGMA_DATA), x0, SIGMA_DATA, "sum")
    ours = torch.autograd.grad((weight * loss).sum(), law)[0]
    return float((ours - exact).norm() / exact.norm())


@pytest.mark.parametrize("t", TIMES)
def test_the_direction_is_the_gradient_of_the_divergence(t: float) -> None:
    assert gradient_error(matching_direction, t) < 1e-12


MISTAKES: dict[str, Direction] = {
    "sign": lambda *a: -matching_direction(*a),
    "no sigma_data": lambda *a: SIGMA_DATA * matching_direction(*a),
    "another weight": lambda *a: matching_direction(*a[:4], "uniform", a[5]),
    "level for time": lambda x0, real, fake, t, *rest: matching_direction(x0, real, fake, flow_time(t), *rest),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_direction_is_another_gradient(mistake: str) -> None:
    assert all(gradient_error(MISTAKES[mistake], t) > 0.01 for t in TIMES)


@pytest.mark.parametrize("t", TIMES)
def test_flow_matching_has_the_same_direction(t: float) -> None:
    """On unit latents D / sigma_data = s (v_real - v_fake), and KL's weight is ((1 - s) / s)^2."""
    x, times = torch.randn(8, 3).double(), torch.full((8,), t, dtype=torch.float64)
    velocities = [gaussian(*law).velocity(x, times) for law in ((0.4, 0.2), (-0.1, 0.35))]
    real, fake = (data_prediction(x, times, v) for v in velocities)
    s = flow_time(times)
    in_flow = flow_input(x, times, SIGMA_DATA)
    v_real, v_fake = (flow_velocity(in_flow, s, v / SIGMA_DATA) for v in velocities)
    ours = matching_direction(x, real, fake, times, "kl", SIGMA_DATA)
    torch.testing.assert_close(ours, (((1 - s) / s) ** 2 * s)[:, None] * (v_real - v_fake), rtol=1e-10, atol=1e-12)


def test_the_mean_has_the_gradient_of_the_square_to_a_moved_target() -> None:
    x0, g = torch.randn(4, 3, 2).double().requires_grad_(True), torch.randn(4, 3, 2).double()
    (ours,) = torch.autograd.grad(along(g, x0, SIGMA_DATA, "mean").mean(), x0)
    y = x0 / SIGMA_DATA
    (theirs,) = torch.autograd.grad((y - (y - g).detach()).square().mean() / 2, x0)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_swiftbrushs_weight_is_that_of_noise_predictions() -> None:
    """sin^2 t (eps_real - eps_fake) = sin t cos t D / sigma_data."""
    x, t = torch.randn(8, 3).double(), torch.rand(8).double() * 1.4 + 0.1
    velocities = [gaussian(*law).velocity(x, t) for law in ((0.4, 0.2), (-0.1, 0.35))]
    real, fake = (data_prediction(x, t, v) for v in velocities)
    eps_real, eps_fake = (noise_prediction(x, t, v) / SIGMA_DATA for v in velocities)
    ours = matching_direction(x, real, fake, t, "vsd", SIGMA_DATA)
    torch.testing.assert_close(ours, t.sin().square()[:, None] * (eps_real - eps_fake), rtol=1e-10, atol=1e-12)
    plain = matching_direction(x, real, fake, t, "uniform", SIGMA_DATA)
    torch.testing.assert_close(ours, (t.sin() * t.cos())[:, None] * plain, rtol=1e-12, atol=0)
    assert (ours - plain).abs().max() > 0.01


def test_four_losses_of_the_fake_score_differ_by_known_weights() -> None:
    """The loss of F against those of the picture, of flow matching's velocity and of the noise, at any F."""
    x0, z, t = torch.randn(9, 3).double(), torch.randn(9, 3).double(), torch.rand(9).double() * 1.4 + 0.1
    F, x, sin, cos = torch.randn(9, 3).double(), interpolate(x0, z, t), t.sin(), t.cos()
    asked: list[Any] = []
    ours = denoising_error(lambda *a: asked.append(a) or F, x0, z, t, nothing(9), torch.ones(9), SIGMA_DATA)
    assert torch.equal(asked[0][0], x / SIGMA_DATA) and torch.equal(asked[0][1], t)

    def square(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean(1)

    picture = square(data_prediction(x, t, SIGMA_DATA * F), x0) / (SIGMA_DATA * sin) ** 2
    true = interpolate_velocity(x0, z, t) / SIGMA_DATA
    flow = square(*(flow_velocity(flow_input(x, t, SIGMA_DATA), flow_time(t), v) for v in (F, true)))
    noise = square(epsilon_from_F(x / SIGMA_DATA, t, F), z / SIGMA_DATA)
    for theirs in (picture, flow / (sin + cos) ** 2, noise / cos**2):
        torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=0)


def test_velocitys_weight_is_the_difference_of_velocities() -> None:
    """FreeFlow's: D / sin t = v_real - v_fake."""
    x, t = torch.randn(8, 3).double(), torch.rand(8).double() * 1.4 + 0.1
    v_real, v_fake = (gaussian(*law).velocity(x, t) for law in ((0.4, 0.2), (-0.1, 0.35)))
    real, fake = (data_prediction(x, t, v) for v in (v_real, v_fake))
    ours = matching_direction(x, real, fake, t, "velocity", SIGMA_DATA)
    torch.testing.assert_close(ours, (v_real - v_fake) / SIGMA_DATA, rtol=1e-10, atol=1e-12)


def test_dmds_weight_is_one_over_the_mean_distance_in_float32_at_least() -> None:
    x0, real = torch.randn(5, 3, 2).bfloat16(), torch.randn(5, 3, 2).bfloat16()
    t = torch.full((5,), 0.8)
    found = matching_direction(x0, real, 0 * real, t, "dmd", SIGMA_DATA)
    assert found.dtype == torch.float32
    exact = -real.double() / (x0.double() - real.double()).abs().mean((1, 2), keepdim=True)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)  # sigma_data cancels
    assert matching_weight("dmd", t, x0, x0, SIGMA_DATA).isfinite().all()


class Noting(Score):
    """Notes the scales that it is told."""

    told: Tensor

    def forward(self, x_unit: Tensor, t: Tensor, condition: Any, guidance: Tensor, *rest: Any) -> Tensor:
        self.told = guidance
        return super().forward(x_unit, t, condition, guidance, *rest)


def test_pictures_are_noised_to_the_time_that_the_scores_are_asked_at() -> None:
    """And the fake score is told the student's scales, here and in its own loss."""
    (states, draws), fake, x0 = states_of(8, guidance=3.0), Noting(0.4, 0.2), torch.randn(8, 3).double()
    networks = networks_of(Perfect(0.4, 0.2), Law(), fake)
    at = matching.noised(x0, states, networks, draws, settings())
    noise = (at.x - at.t.cos()[:, None] * x0) / at.t.sin()[:, None]
    drawn = SIGMA_DATA * draws.normal("matching noise", (1, 3)).flatten(0, 1).double()
    torch.testing.assert_close(noise, drawn, rtol=1e-6, atol=1e-9)
    velocity = matching.fake_velocity(networks, at, at.x)
    torch.testing.assert_close(velocity, gaussian(0.4, 0.2).velocity(at.x, at.t))
    assert torch.equal(fake.told, states.guidance)
    fake.told = torch.zeros(8)
    fake_loss(networks, batch_of(8), states, settings())
    assert torch.equal(fake.told, states.guidance)


def test_figures_are_what_they_are_called() -> None:
    x0, *found = torch.randn(5, 4, 3, 2).double()
    values = matching.figures(x0, matching.Predictions(*found), SIGMA_DATA)
    real, fake, v_real, v_fake = (each.flatten(1) for each in found)
    exact = {
        "gap": (fake - real).norm(dim=1) / (x0.flatten(1) - real).norm(dim=1),
        "cosine": (v_real * v_fake).sum(1) / v_real.norm(dim=1) / v_fake.norm(dim=1),
        "std": x0.flatten(1).std(1) / SIGMA_DATA,
        "apart": ((fake - real) / SIGMA_DATA).square().mean(1),
        "missed": ((x0.flatten(1) - fake) * (fake - real) / SIGMA_DATA**2).mean(1),
    }
    for name, value in exact.items():
        torch.testing.assert_close(values[name], value, msg=name)


# Fixed points, through the real objective.


def push(student: Score, teacher: Law, fake: Score, *changes: str, guidance: float = 1.0) -> tuple[Tensor, Any]:
    """(the gradient in mean and log std, the metrics)."""
    states, draws = states_of(guidance=guidance)
    loss = matching_loss(networks_of(student, teacher, fake), states, draws, settings(*changes), 0)
    loss.value.mean().backward()
    assert student.mean.grad is not None and student.log_std.grad is not None
    return torch.stack([student.mean.grad, student.log_std.grad]), loss.metrics


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_nothing_moves_where_the_students_law_is_the_teachers(weighting: str) -> None:
    found, metrics = push(Perfect(0.4, 0.2), Law(0.4, 0.2), Score(0.4, 0.2), f"matching.weighting={weighting}")
    assert found.abs().max() < 1e-12 and metrics["gap"].max() < 1e-12
    torch.testing.assert_close(metrics["cosine"], torch.ones(NUM).double())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_elsewhere_the_push_is_towards_the_teachers_law(weighting: str) -> None:
    for law, sign in (((0.5, 0.2), (1, 0)), ((0.3, 0.2), (-1, 0)), ((0.4, 0.3), (0, 1)), ((0.4, 0.15), (0, -1))):
        found, metrics = push(Perfect(*law), Law(0.4, 0.2), Score(*law), f"matching.weighting={weighting}")
        for value, wanted in zip(found, sign, strict=True):
            assert not wanted or value * wanted > 0
        assert metrics["gap"].min() > 0 and (metrics["cosine"] < 1).any()


W = 4.5
COUPLED = -0.1 + W * (0.4 - -0.1)  # mu_u + w (mu_c - mu_u)
TEACHER = Guided(0.4, 0.2, mean_without=-0.1, std_without=0.2)


class OneMore(Guided):
    """A mistake: guidance counted from the conditional branch, v_c + w (v_c - v_u)."""

    def velocity(self, x: Tensor, t: Tensor, condition: Any, guidance: Tensor | None, **options: Any) -> Tensor:
        return super().velocity(x, t, condition, None if guidance is None else guidance + 1, **options)


class FromZero(OneMore):
    """A pipeline whose scale s means the weight s + 1, and a family that says so."""

    def guidance_weight(self, scale: Any) -> Any:
        return scale + 1


def test_a_scale_that_counts_from_zero_is_the_weight_that_it_means() -> None:
    """From the prompt's own scale, from the settings, and for a fake score that is guided by the same."""
    law, teacher = (0.4, 0.2), FromZero(0.4, 0.2, mean_without=-0.1, std_without=0.2)
    found, _ = push(Perfect(COUPLED, 0.2), teacher, Score(COUPLED, 0.2), guidance=W - 1)
    assert found.abs().max() < 1e-10
    found, _ = push(Perfect(COUPLED, 0.2), teacher, Score(COUPLED, 0.2), f"matching.guidance={W}")
    assert found.abs().max() < 1e-10
    vsd, fake = ("matching.fake_guidance=same", "fake.unprompted=0.1"), TwoScores(*law, -0.1, 0.2)
    assert push(Perfect(*law), teacher, fake, *vsd, guidance=W - 1)[0].abs().max() < 1e-10
    assert push(Perfect(*law), teacher, Score(*law), "matching.guidance=1")[0].abs().max() < 1e-10  # off


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_with_equal_variances_guidance_moves_the_fixed_point_to_the_guided_mean(weighting: str) -> None:
    law = (COUPLED, 0.2)
    for where in ({"guidance": W}, {}):  # the prompt's own scale, or that of the settings
        changes = (f"matching.weighting={weighting}", *(() if where else (f"matching.guidance={W}",)))
        found, metrics = push(Perfect(*law), TEACHER, Score(*law), *changes, **where)
        assert found.abs().max() < 1e-10 and metrics["gap"].max() < 1e-10
        wrong = OneMore(0.4, 0.2, mean_without=-0.1, std_without=0.2)
        assert push(Perfect(*law), wrong, Score(*law), *changes, **where)[0][0] < -1e-3


def test_a_guided_fake_score_has_the_unguided_law_as_its_fixed_point() -> None:
    """VSD: kappa = w. With kappa = 1 the same networks are pushed on."""
    vsd = ("matching.fake_guidance=same", "fake.unprompted=0.1")
    fake = TwoScores(0.4, 0.2, -0.1, 0.2)
    found, _ = push(Perfect(0.4, 0.2), TEACHER, fake, *vsd, guidance=W)
    assert found.abs().max() < 1e-10
    assert push(Perfect(0.4, 0.2), TEACHER, fake, guidance=W)[0][0] < -1e-3
    half = ("matching.fake_guidance=0.5", "fake.unprompted=0.1", "matching.guidance=0.5")
    assert push(Perfect(0.4, 0.2), TEACHER, fake, *half, guidance=W)[0].abs().max() < 1e-10
    none = ("matching.fake_guidance=0", "fake.unprompted=0.1")  # the fake score without a prompt (Zero-CFG)
    found, _ = push(Perfect(-0.1, 0.2), Guided(-0.1, 0.2), TwoScores(9.0, 0.2, -0.1, 0.2), *none)
    assert found.abs().max() < 1e-10


def test_guidance_is_drawn_between_two_scales_for_each_picture() -> None:
    states, draws = states_of()
    w, kappa = matching.weights(states, draws, settings("matching.guidance=[2, 6]"), TEACHER)
    assert kappa is None and 2 <= w.min() < 2.5 and 5.5 < w.max() <= 6
    assert torch.equal(
        matching.weights(states.rows(slice(3, 5)), draws, settings("matching.guidance=[2, 6]"), TEACHER)[0], w[3:5]
    )
    same = matching.weights(states, draws, settings("matching.fake_guidance=same", "fake.unprompted=0.1"), TEACHER)
    assert same[1] is same[0] is states.guidance


@pytest.mark.parametrize("times", ["level", "logit_normal"])
def test_pictures_are_noised_to_the_times_of_the_settings(times: str) -> None:
    states, draws = states_of(400)
    config = settings(f"matching.times={times}", "matching.logit_mean=0.3", "matching.logit_std=0.5")
    part, teacher = config.matching, cast(Any, Law())
    t = matching.renoising_times(states, draws, config, part, teacher, "matching time")
    if times == "level":
        level = flow_time(t)
        assert 0.02 - 1e-6 <= level.min() < 0.04 and 0.96 < level.max() <= 0.98 + 1e-6
        assert abs(level.mean() - 0.5) < 0.05 and abs(level.std() - 0.288) < 0.03
    else:
        logit = torch.log(SIGMA_DATA * t.tan())
        assert abs(logit.mean() - 0.3) < 0.08 and abs(logit.std() - 0.5) < 0.06
    late: Any = replace(Law(), start_time=0.9)
    assert matching.renoising_times(states, draws, config, part, late, "matching time").max() <= 0.9


@pytest.mark.parametrize("times", ["level", "logit_normal"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_pictures_of_a_phase_are_noised_above_the_next_steps_time(times: str, shift: float) -> None:
    """By the same law, given that it is above."""
    config = settings("rollout.steps=4", "rollout.phased=true", f"matching.times={times}")
    teacher: Any = replace(Law(), shift=shift)
    states, draws = states_of(2000)
    whole = matching.renoising_times(states, draws, config, config.matching, teacher, "matching time")
    states = replace(states, t_target=torch.full_like(states.t, 0.8))
    t = matching.renoising_times(states, draws, config, config.matching, teacher, "matching time").double()
    assert (t >= 0.8 - 1e-6).all() and t.min() < 0.82
    for quantile in (0.25, 0.5, 0.75):
        assert abs(t.quantile(quantile) - whole[whole > 0.8].double().quantile(quantile)) < 0.04
    plain = settings("rollout.steps=4", f"matching.times={times}")
    assert torch.equal(matching.renoising_times(states, draws, plain, plain.matching, teacher, "matching time"), whole)
    last = replace(states, t_target=torch.zeros_like(states.t))
    torch.testing.assert_close(
        matching.renoising_times(last, draws, config, config.matching, teacher, "matching time"),
        whole, rtol=1e-5, atol=1e-6, check_dtype=False,
    )  # fmt: skip


@pytest.mark.parametrize("t", [0.9, 1.2, 1.5])
def test_a_phases_direction_is_the_gradient_of_the_divergence_of_what_it_hands_over(t: float) -> None:
    """x_s = cos s x_0 + sin s z rotated to t by u, cos u = cos t / cos s: KL's gradient there is that of x_0's at t."""
    s, (z0, z, weight) = 0.6, quadrature()
    cos_u = math.cos(t) / math.cos(s)
    teacher, law = gaussian(0.4, 0.2), torch.tensor([-0.1, 0.35], dtype=torch.float64, requires_grad=True)
    variances = [(math.cos(s) * std) ** 2 + (math.sin(s) * SIGMA_DATA) ** 2 for std in (law[1], teacher.std)]
    rotated = [cos_u**2 * v + (1 - cos_u**2) * SIGMA_DATA**2 for v in variances]
    gap = (cos_u * math.cos(s) * (law[0] - teacher.mean)) ** 2
    kl = (rotated[0] / rotated[1] - 1 - torch.log(rotated[0] / rotated[1]) + gap / rotated[1]) / 2
    exact = torch.autograd.grad(kl, law)[0]
    x0, times = law[0] + law[1] * z0, torch.full((len(z0),), t, dtype=torch.float64)
    x = interpolate(x0.detach(), SIGMA_DATA * z, times)
    fake = GaussianTeacher(law[0].detach(), law[1].detach(), SIGMA_DATA)
    x_real, x_fake = (data_prediction(x, times, each.velocity(x, times)) for each in (teacher, fake))
    loss = along(matching_direction(x0.detach(), x_real, x_fake, times, "kl", SIGMA_DATA), x0, SIGMA_DATA, "sum")
    ours = torch.autograd.grad((weight * loss).sum(), law)[0]
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-13)


# Beside consistency (rCM).


def tangent_of(student: Score, teacher: Law, guidance: float) -> Tensor:
    """The size of the consistency tangent at exact states of a teacher [M]."""
    num, index = 32, torch.arange(32)
    t, scales = torch.linspace(0.2, 1.4, num).double(), torch.full((num,), guidance).double()
    x = SIGMA_DATA * torch.randn(num, 3, generator=torch.Generator().manual_seed(0)).double()
    dxdt = teacher.velocity(x, t, nothing(num), scales)
    pairs = Pairs(
        x=x, t=t, condition=nothing(num), guidance=scales, prompt=index, number=index, num_drawn=num,
        dxdt=dxdt, t_next=0 * t, x0=x,
    )  # fmt: skip
    config = load_config("default", ["consistency.r_warmup=0", "consistency.r_final=1", "training.precision=no"])
    return continuous_loss(
        networks_of(student, teacher, Score(0, 1)), pairs, batch_of(num).draws, config, 5000
    ).metrics["tangent_norm"]


def test_consistency_and_matching_agree_without_guidance_and_with_it_where_variances_are_equal() -> None:
    """The perfect student has no tangent and no direction. Unequal variances under guidance part the two."""
    assert tangent_of(Perfect(0.4, 0.2), Law(0.4, 0.2), 1.0).max() < 1e-12
    assert tangent_of(Perfect(COUPLED, 0.2), TEACHER, W).max() < 1e-12
    uneven = Guided(0.4, 0.25, mean_without=0.2, std_without=0.3)
    mean, std = guided_end(uneven, W)
    assert (mean, std) == pytest.approx((0.81, 0.132), abs=5e-3)
    found, _ = push(Perfect(mean, std), uneven, Score(mean, std), "matching.weighting=uniform", guidance=W)
    assert found[0] < -1e-3  # on to a mean of 0.95


def guided_end(teacher: Guided, guidance: float, steps: int = 1000) -> tuple[float, float]:
    """(mean, std) of the law where a guided ODE ends: it is linear in x, so that two points tell. Heun's method."""
    x, times = torch.tensor([[0.0], [SIGMA_DATA]]).double(), torch.linspace(math.pi / 2, 0, steps + 1).double()
    w = torch.full((2,), guidance).double()
    for i in range(steps):
        t, s = times[i].expand(2), times[i + 1].expand(2)
        v = teacher.velocity(x, t, nothing(2), w)
        x = x + (s - t)[:, None] * (v + teacher.velocity(x + (s - t)[:, None] * v, s, nothing(2), w)) / 2
    return float(x[0]), float(x[1] - x[0])


def test_a_weight_adds_matching_on_rollouts_in_the_unit_of_the_objective() -> None:
    beside = ("matching.weight=0.02", "fake.updates=4")
    tbcm = load_config("default", [*beside, "objective=continuous"])
    assert [(term.objective, term.space, term.weight) for term in terms_of(tbcm)] == [
        ("continuous", "generation", 1.0), ("matching", "rollout", 0.02),
    ]  # fmt: skip
    assert matching.unit_of(tbcm) == "sum"
    for changes in (["objective=discrete"], ["objective=continuous", "consistency.adaptive_weight=false"]):
        assert matching.unit_of(load_config("default", [*beside, *changes])) == "mean"
    assert matching.unit_of(settings()) == "mean" and matching.unit_of(settings("matching.unit=sum")) == "sum"
    assert [(term.objective, term.space, term.weight) for term in terms_of(settings("matching.weight=0.3"))] == [
        ("matching", "rollout", 1.0)
    ]
    states, draws = states_of(8)
    losses = [
        matching_loss(networks_of(Perfect(0.5, 0.3), Law(0.4, 0.2), Score(0.5, 0.3)), states, draws, config, 0).value
        for config in (settings(), settings("matching.unit=sum"))
    ]
    torch.testing.assert_close(losses[1], 3 * losses[0])


# The alternation, with networks that learn.


@pytest.mark.parametrize(
    ("objective", "steps"),
    cases([("matching", 1), ("matching", 4), ("identity", 1)], [("matching", 1), ("identity", 1)]),
)
def test_the_student_learns_the_teachers_law_from_its_own_pictures(objective: str, steps: int) -> None:
    config = settings(f"objective={objective}", f"rollout.steps={steps}", "fake.updates=3", "fake.highest_level=0.9")
    student = Perfect(-0.3, 0.4)
    alternate(student, Law(0.4, 0.2), Score(-0.3, 0.4), config, 90, 4e-2)
    assert abs(student.mean - 0.4) < 0.04 and abs(student.log_std.exp() - 0.2) < 0.04


def test_a_direction_of_the_wrong_sign_drives_the_student_away(monkeypatch: pytest.MonkeyPatch) -> None:
    right = matching.matching_direction
    monkeypatch.setattr(matching, "matching_direction", lambda *a: -right(*a))
    student = Perfect(-0.3, 0.4)
    alternate(student, Law(0.4, 0.2), Score(-0.3, 0.4), settings("fake.updates=3"), 20, 3e-2)
    assert student.mean < -0.35


# What does not go together.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("objective=matching", "fake.updates=5", "space.kind=coupling"), "give space.kind=rollout"),
        (("objective=matching", "fake.updates=5", "space.filter_rule=hard"), "give space.filter_rule=off"),
        (
            ("matching.weight=1", "fake.updates=5", "space.filter_rule=hard", "matching.space=endpoints"),
            "give space.filter_rule=off",
        ),
        (("space.kind=rollout", "objective=discrete"), "objective=discrete does not take; give objective=matching"),
        (("objective=matching", "space.kind=rollout"), "give fake.updates=5"),
        (("matching.weight=0.02",), "give fake.updates=5"),
        (("fake.updates=1", "student.lora=96"), "give fake.rank=96 or more"),
        (("matching.weight=1", "fake.updates=1", "matching.fake_guidance=3"), "give fake.unprompted=0.1"),
        (("rollout.steps=2", "rollout.first=3"), "give rollout.first=1"),
        (
            ("matching.weight=1", "fake.updates=1", "matching.space=endpoints", "rollout.phased=true"),
            "give rollout.phased=false",
        ),
        (("matching.guidance=[6, 2]",), r"give \[2, 6\]"),
        (("space.kind={rollout: 1, coupling: 1}", "fake.updates=1", "objective=matching"), "give space.kind=rollout"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("demo", list(changes))


# Identities beside the package's own choices.


def f_divergence(kind: str, rho: Tensor) -> Tensor:
    """f(rho) of D_f = E_fake[f(p_real / p_fake)]."""
    return {
        "reverse KL": lambda: -rho.log(),
        "forward KL": lambda: rho * rho.log(),
        "Jensen-Shannon": lambda: (rho * rho.log() - (1 + rho) * ((1 + rho) / 2).log()) / 2,
        "chi square": lambda: (rho - 1).square(),
    }[kind]()


WEIGHT_OF: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse KL": torch.ones_like,
    "forward KL": lambda rho: rho,
    "Jensen-Shannon": lambda rho: rho / (2 * (1 + rho)),
    "chi square": lambda rho: 2 * rho.square(),
}
"""h(rho) = f''(rho) rho^2."""


@pytest.mark.parametrize("kind", WEIGHT_OF)
def test_kls_direction_times_a_function_of_the_density_ratio_is_another_divergences_gradient(kind: str) -> None:
    """With h = 1 it is ours, reverse KL; another kind's weight misses by far."""
    t, teacher, law = 0.8, gaussian(0.4, 0.2), torch.tensor([0.3, 0.23], dtype=torch.float64, requires_grad=True)

    def variance(std: Tensor) -> Tensor:
        return (math.cos(t) * std) ** 2 + (math.sin(t) * SIGMA_DATA) ** 2

    def log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return -((x - math.cos(t) * mean) ** 2) / (2 * variance(std)) - (2 * math.pi * variance(std)).log() / 2

    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    p, q = (log_density(grid, *each) for each in ((teacher.mean, teacher.std), (law[0], law[1])))
    exact = torch.autograd.grad(torch.trapezoid(q.exp() * f_divergence(kind, (p - q).exp()), grid), law)[0]

    z0, z, weight = quadrature(80)
    x0, times = law[0] + law[1] * z0, torch.full((len(z0),), t, dtype=torch.float64)
    x = interpolate(x0.detach(), SIGMA_DATA * z, times)
    fake = GaussianTeacher(law[0].detach(), law[1].detach(), SIGMA_DATA)
    real, theirs = (data_prediction(x, times, each.velocity(x, times)) for each in (teacher, fake))
    along_kl = along(matching_direction(x0.detach(), real, theirs, times, "kl", SIGMA_DATA), x0, SIGMA_DATA, "sum")
    logs = [log_density(x, *each) for each in ((teacher.mean, teacher.std), (fake.mean, fake.std))]
    rho = (logs[0] - logs[1]).exp().squeeze(1)
    for name, h in WEIGHT_OF.items():
        ours = torch.autograd.grad((weight * h(rho) * along_kl).sum(), law, retain_graph=True)[0]
        off = float((ours - exact).norm() / exact.norm())
        assert off < 1e-9 if name == kind else off > 0.05


@pytest.mark.parametrize("s", [0.0, 0.6])
def test_targets_given_what_a_phase_hands_over_have_the_velocity_as_their_regression(s: float) -> None:
    """Phases with a student that predicts x_0 take the ordinary target: its regression is that of the subinterval's.

    x_t = cos u x_s + sin u n with cos u = cos t / cos s, and v* = sin t / (cos s sin u) (cos u n - sin u x_s).
    """
    t, teacher = 1.1, gaussian(0.4, 0.2)
    u, cos, sin = math.acos(math.cos(t) / math.cos(s)), math.cos, math.sin
    # x_0 = mean + std a, x_s = cos s x_0 + sin s sigma_data b, n = sigma_data c with a, b, c of N(0, 1)
    std, mean = float(teacher.std), float(teacher.mean)
    x_s = torch.tensor([cos(s) * std, sin(s) * SIGMA_DATA, 0.0], dtype=torch.float64)
    n = torch.tensor([0.0, 0.0, SIGMA_DATA], dtype=torch.float64)
    x_0 = torch.tensor([std, 0.0, 0.0], dtype=torch.float64)
    x_t = cos(u) * x_s + sin(u) * n
    rate = sin(t) / (cos(s) * sin(u))
    star = rate * (cos(u) * n - sin(u) * x_s)
    noise = (x_t - cos(t) * x_0) / sin(t)  # the z of x_t = cos t x_0 + sin t z
    ordinary = cos(t) * noise - sin(t) * x_0
    for target, at_mean in ((star, -rate * sin(u) * cos(s) * mean), (ordinary, -sin(t) * mean)):
        slope = (target @ x_t) / (x_t @ x_t)
        x, times = torch.randn(5, 1).double(), torch.full((5,), t, dtype=torch.float64)
        regression = at_mean + slope * (x - cos(t) * mean)
        torch.testing.assert_close(regression, teacher.velocity(x, times), rtol=1e-12, atol=1e-12)
    naive = cos(t) * n - sin(t) * x_s  # the ordinary rule with x_s in the place of x_0
    assert s == 0 or abs((naive @ x_t) / (x_t @ x_t) - slope) > 0.1
    if s == 0:
        torch.testing.assert_close(star, ordinary)


@pytest.mark.parametrize(("numel", "within"), [(3, 1e-9), (8, 1e-9), (1000, 0.1)])
def test_the_spread_of_pictures_is_known_from_a_few_numbers_of_each(numel: int, within: float) -> None:
    pictures = torch.randn(400, numel).double() * torch.linspace(0.1, 2, numel) + torch.linspace(-5, 5, numel)
    exact = pictures.var(0).mean().sqrt()
    parts = torch.cat([matching.sketches(some) for some in pictures.split(7)])
    assert parts.shape == (400, matching.SKETCHES)
    values = {f"sketch_{i}": part for i, part in enumerate(parts.unbind(1))}
    found = spread_of(Metrics(torch.arange(400), values, 400, 400))
    assert found == pytest.approx(float(exact), rel=within)
    collapsed = {name: part[:1].expand(400) for name, part in values.items()}
    assert spread_of(Metrics(torch.arange(400), collapsed, 400, 400)) == pytest.approx(0, abs=1e-9)
    alone = {name: part[:1] for name, part in values.items()}
    assert (
        spread_of(Metrics(torch.arange(1), alone, 1, 1)) is None and spread_of(Metrics(parts[:, 0], {}, 1, 1)) is None
    )


@pytest.mark.parametrize("seen", [0.1, 0.7, 0.5])
def test_what_a_late_fake_score_misses_is_how_far_the_pictures_moved_since(seen: float) -> None:
    """Of means alone: (m - m_fake) / (m_fake - m_real), at every time; 0 for a fake score that is exact."""
    m, real = 0.5, 0.4
    states, draws = states_of(4000)
    student, fake = Perfect(m, 0.2), Score(seen, 0.2)
    loss = matching_loss(networks_of(student, Law(real, 0.2), fake), states, draws, settings(), 0)
    metrics = Metrics(states.prompt, loss.metrics | {"t": states.t}, 4000, 4000)
    assert means(metrics)["miss"] == pytest.approx((m - seen) / (seen - real), abs=0.1)
