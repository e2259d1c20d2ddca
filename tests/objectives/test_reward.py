"""Reward beside matching, on Gaussians: the closed shift of the fixed point, and its sign."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from gaussians import SIGMA_DATA, Law, Perfect, Score
from scores import networks_of, settings, states_of
from torch import Tensor

from stepfold.errors import UserError
from stepfold.objectives.matching import matching_loss
from stepfold.objectives.reward import reward_loss
from stepfold.spaces.records import with_prompts_on_host
from stepfold.training.accelerators import make_accelerator
from stepfold.training.terms import add_gradients, terms_of

BETA, T = 0.05, 0.6


def along_b(x0: Tensor, samples: Sequence[int]) -> Tensor:
    """b^T x_0 / sigma_data in the mean over a picture's numbers, with b = 1."""
    return x0.flatten(1).mean(1) / SIGMA_DATA


def test_the_score_is_raised_and_its_samples_are_those_of_the_states() -> None:
    states, draws = states_of(6, number=3)
    states = replace(states, prompt_on_host=torch.tensor([5, 0, 1, 1, 2, 3]))
    seen: list[Sequence[int]] = []

    def score(x0: Tensor, samples: Sequence[int]) -> Tensor:
        seen.append(list(samples))
        return along_b(x0, samples)

    student = Perfect(0.4, 0.2)
    networks = replace(networks_of(student, Law(0.4, 0.2), Score(0.4, 0.2)), reward=score)
    loss = reward_loss(networks, states, draws, settings(), 0)
    loss.value.mean().backward()
    assert seen == [[draws.samples[i] for i in (5, 0, 1, 1, 2, 3)]]
    assert student.mean.grad is not None
    torch.testing.assert_close(student.mean.grad, torch.tensor(-1 / SIGMA_DATA).double())  # descent raises the mean
    torch.testing.assert_close(loss.value.detach(), -loss.metrics["reward"])


@pytest.mark.parametrize("count", [1, 3])
def test_prompts_are_known_without_the_device_where_no_filter_dropped_any(count: int) -> None:
    """A device without numbers has none to wait for."""
    prompts = torch.arange(4).repeat_interleave(count)
    states = replace(states_of(4 * count)[0], prompt=prompts.to("meta"))
    found = with_prompts_on_host(states, 4).prompt_on_host
    assert found is not None and torch.equal(found, prompts)
    kept = replace(states_of(4 * count)[0], prompt=prompts).rows(slice(count, None))
    found = with_prompts_on_host(kept, 4).prompt_on_host
    assert found is not None and torch.equal(found, prompts[count:])


def test_micro_batches_score_their_own_samples() -> None:
    """Each term sees the states of its part; the other objective on the same space needs no prompts."""
    states, draws = states_of(6, number=3)
    told: list[int] = []
    networks = networks_of(Perfect(0.4, 0.2), Law(0.4, 0.2), Score(0.4, 0.2))
    networks = replace(networks, reward=lambda x0, samples: told.extend(samples) or along_b(x0, samples))
    config = settings("reward.weight=0.1", "training.micro_batch=4")
    add_gradients(terms_of(config), networks, {"rollout": states}, draws, config, 0, make_accelerator("no"))
    assert told == list(draws.samples)


def test_the_fixed_point_shifts_by_the_closed_amount() -> None:
    """KL at one time anchors the mean: it shifts by beta b V_t / cos^2 t, where V_t is the variance at t."""
    anchor = ((math.cos(T) * 0.2) ** 2 + (math.sin(T) * SIGMA_DATA) ** 2) / math.cos(T) ** 2
    config = settings("matching.weighting=kl", "matching.unit=mean")
    states, draws = states_of(4000)
    states = with_prompts_on_host(states, 4000)

    def push(mean: float) -> Tensor:
        student = Perfect(mean, 0.2)
        networks: Any = replace(
            networks_of(student, Law(0.4, 0.2), Score(mean, 0.2)), reward=lambda x0, s: BETA * x0.flatten(1).mean(1)
        )
        total = matching_loss(networks, states, draws, config, 0).value.mean()
        total = total + reward_loss(networks, states, draws, config, 0).value.mean()
        total.backward()
        assert student.mean.grad is not None
        return student.mean.grad

    with pytest.MonkeyPatch.context() as patch:
        from stepfold.objectives import matching

        patch.setattr(matching, "renoising_times", lambda states, *rest: torch.full_like(states.t, T))
        fixed = 0.4 + BETA * anchor
        assert abs(push(fixed)) < 1e-9 and push(fixed - 0.01) < -1e-3 and push(fixed + 0.01) > 1e-3


def test_the_term_begins_at_its_step_on_its_space() -> None:
    (matching_term, reward) = terms_of(settings("reward.weight=0.05", "reward.from_step=30", "reward.space=endpoints"))
    assert (reward.objective, reward.space, reward.weight, reward.first) == ("reward", "endpoints", 0.05, 30)
    assert matching_term.first == 0 and len(terms_of(settings())) == 1


def test_the_evaluators_own_clip_is_no_reward() -> None:
    with pytest.raises(UserError, match=r"reward\.clip=x is the CLIP that evaluates"):
        settings("reward.weight=0.1", "reward.clip=x", "evaluation.clip=x")
    settings("reward.weight=0.1", "reward.clip=x", "evaluation.clip=y")
