"""Decoupled matching: its fixed point on Gaussians of equal variance, and what each half does alone."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gaussians import SIGMA_DATA, Guided, Perfect, Score, gaussian
from scores import networks_of, settings, states_of
from torch import Tensor

from stepfold.errors import UserError
from stepfold.maths.formulations import flow_time, interpolate
from stepfold.objectives import decoupled
from stepfold.objectives.decoupled import decoupled_loss, guidance_direction, statistics_loss, times_below
from stepfold.objectives.matching import matching_direction

W = 4.5


@dataclass(frozen=True)
class Branched(Guided):
    """A guided Gaussian with both branches of its guidance."""

    def branches(self, x: Tensor, t: Tensor, condition: Any) -> tuple[Tensor, Tensor]:
        return gaussian(self.mean_without, self.std_without).velocity(x, t), gaussian(self.mean, self.std).velocity(
            x, t
        )


TEACHER = Branched(0.4, 0.2, mean_without=-0.1, std_without=0.2)


def gain(t: Tensor, std: float = 0.2) -> Tensor:
    """g(t), by which a shift of the mean comes through to the prediction."""
    return (t.sin() * SIGMA_DATA) ** 2 / ((t.cos() * std) ** 2 + (t.sin() * SIGMA_DATA) ** 2)


@pytest.mark.parametrize("times", ["below", "all"])
def test_the_fixed_point_has_guidance_by_the_ratio_of_both_halves(monkeypatch: pytest.MonkeyPatch, times: str) -> None:
    """m* = mu_c + (w - 1) rho (mu_c - mu_u) with rho = E_guidance[omega g] / E_matching[omega g]."""
    seen: dict[str, Tensor] = {}
    right = decoupled.noised

    def noting(*args: Any) -> Any:
        at = right(*args)
        seen["guidance" if "guidance" in args else "matching"] = at.t
        return at

    monkeypatch.setattr(decoupled, "noised", noting)
    config = settings("objective=decoupled", f"decoupled.guidance_times={times}", "matching.weighting=uniform")
    states, draws = states_of(guidance=W)
    if times == "below":
        states = type(states)(**{**vars(states), "t": torch.full_like(states.t, 0.8)})

    def push(mean: float) -> Tensor:
        student = Perfect(mean, 0.2)
        networks = networks_of(student, TEACHER, Score(mean, 0.2))
        decoupled_loss(networks, states, draws, config, 0).value.mean().backward()
        assert student.mean.grad is not None
        return student.mean.grad

    push(0.4)
    rho = gain(seen["guidance"]).mean() / gain(seen["matching"]).mean()
    assert (rho < 0.9) if times == "below" else abs(rho - 1) < 0.2
    fixed = 0.4 + (W - 1) * float(rho) * 0.5
    assert abs(push(fixed)) < 1e-9 and push(fixed - 0.1) < -1e-3 and push(fixed + 0.1) > 1e-3
    assert abs(push(0.4 + W * float(rho) * 0.5)) > 1e-3  # a mistake: w in the place of w - 1
    assert not torch.equal(seen["guidance"], seen["matching"])


@pytest.mark.parametrize("weighting", ["uniform", "kl", "vsd"])
def test_both_halves_at_one_time_are_the_coupled_direction(weighting: Any) -> None:
    x0, z, t = torch.randn(6, 3).double(), torch.randn(6, 3).double(), torch.rand(6).double() + 0.2
    x, w = interpolate(x0, z, t), torch.full((6,), W).double()
    without, with_prompt, fake = (torch.randn_like(x) for _ in range(3))
    halves = matching_direction(x0, with_prompt, fake, t, weighting, SIGMA_DATA)
    halves = halves + guidance_direction(x0, without, with_prompt, t, w, weighting, SIGMA_DATA)
    whole = matching_direction(x0, without + W * (with_prompt - without), fake, t, weighting, SIGMA_DATA)
    torch.testing.assert_close(halves, whole)


def test_dmds_weight_of_guidance_is_by_the_distance_to_the_guided_prediction() -> None:
    x0, without, with_prompt = torch.randn(3, 6, 4).double()
    t, w = torch.rand(6).double() + 0.2, torch.full((6,), W).double()
    found = guidance_direction(x0, without, with_prompt, t, w, "dmd", SIGMA_DATA)
    apart = (x0 - without - W * (with_prompt - without)).abs().mean(1, keepdim=True)
    torch.testing.assert_close(found, (1 - W) * (with_prompt - without) / apart)  # sigma_data cancels


def test_guidance_alone_pushes_the_same_wherever_the_student_is() -> None:
    t, w = torch.rand(6).double() + 0.2, torch.full((6,), W).double()
    found = []
    for mean in (0.0, 5.0):
        x0 = mean + torch.zeros(6, 3).double()
        x = interpolate(x0, torch.zeros_like(x0), t)
        velocities = TEACHER.branches(x, t, None)
        predictions = [t.cos()[:, None] * x - t.sin()[:, None] * v for v in velocities]
        found.append(guidance_direction(x0, *predictions, t, w, "uniform", SIGMA_DATA))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], ((1 - W) * gain(t) * 0.5 / SIGMA_DATA)[:, None].expand(6, 3))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_of_guidance_are_even_levels_below_the_students_own(shift: float) -> None:
    uniform = (torch.arange(1000).double() + 0.5) / 1000
    own = torch.full((1000,), 0.7).double()
    level = flow_time(times_below(own, uniform, shift, 0.02, 0.98))
    assert level.min() >= 0.02 - 1e-9 and abs(level.max() - flow_time(own[:1])) < 1e-3
    plain = level / (shift - (shift - 1) * level)  # without the shift they are even
    assert abs(plain[500] / plain[-1] - 0.5) < 0.01


def test_a_guided_fake_score_is_refused() -> None:
    with pytest.raises(UserError, match=r"matching\.fake_guidance=1"):
        settings("objective=decoupled", "matching.fake_guidance=3", "fake.unprompted=0.1")


def divergence(mean: Tensor, std: Tensor, to: tuple[float, float]) -> Tensor:
    """KL(N(mean, std^2) || N(to)) by torch's own rule."""
    law, theirs = torch.distributions.Normal(mean, std), torch.distributions.Normal(*(torch.tensor(v) for v in to))
    return torch.distributions.kl_divergence(law, theirs)


def test_a_pictures_mean_and_variance_are_held_to_the_teachers() -> None:
    x0 = (torch.randn(4, 3, 5, 5) * torch.tensor([0.2, 0.3, 1.0, 2.0])[:, None, None, None]).double()
    y = (x0 / SIGMA_DATA).flatten(1)
    found = statistics_loss(x0, 0.1, 0.8, SIGMA_DATA)
    torch.testing.assert_close(found, divergence(y.mean(1), y.std(1, correction=0), (0.1, 0.8)).double())
    own = (y - y.mean(1, keepdim=True)) / y.std(1, correction=0, keepdim=True)
    assert statistics_loss(SIGMA_DATA * (0.1 + 0.8 * own), 0.1, 0.8, SIGMA_DATA).abs().max() < 1e-12
    x0.requires_grad_(True)
    (gradient,) = torch.autograd.grad(statistics_loss(x0, 0.0, 1.0, SIGMA_DATA).sum(), x0)
    assert ((gradient * x0).sum((1, 2, 3)) > 0).tolist() == [False, False, True, True]  # saturated ones shrink


def test_the_term_is_added_with_its_weight_and_only_then() -> None:
    states, draws = states_of(guidance=W)

    def loss(*changes: str) -> Any:
        networks = networks_of(Perfect(0.9, 0.2), TEACHER, Score(0.4, 0.2))
        return decoupled_loss(networks, states, draws, settings("objective=decoupled", *changes), 0)

    plain, held = loss(), loss("decoupled.statistics_weight=0.3", "decoupled.statistics=[0.2, 0.9]")
    torch.testing.assert_close(held.value, plain.value + 0.3 * held.metrics["statistics"])
    assert "statistics" not in plain.metrics and held.metrics["statistics"].min() > 0
    with pytest.raises(UserError, match=r"decoupled\.statistics"):
        settings("decoupled.statistics=[0, 0]")
