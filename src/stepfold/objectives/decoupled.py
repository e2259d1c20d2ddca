"""Decoupled distribution matching: the fake score's part and guidance's part, each with times and noise of its own.

Matching compares the fake score with the teacher's unguided prediction, over all times. Guidance pushes along
(w - 1)(x_with - x_without), which has no fixed point of its own, at times less noisy than the student's own step.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from stepfold.config import Config
from stepfold.maths.formulations import data_prediction, in_float32, unsqueeze_like
from stepfold.maths.routes import level_times, unshifted_level
from stepfold.objectives.contract import Loss, Networks
from stepfold.objectives.matching import (
    SMALLEST,
    along,
    figures,
    matching_direction,
    matching_weight,
    noised,
    of_states,
    predictions,
    unit_of,
)
from stepfold.randomness import Draws
from stepfold.sampling.consistency import predict_data
from stepfold.scores import Weighting
from stepfold.spaces.records import States


@torch.no_grad()
def guidance_direction(
    x0: Tensor, x_without: Tensor, x_with: Tensor, t: Tensor, w: Tensor, weighting: Weighting, sigma_data: float
) -> Tensor:
    """-omega (w - 1)(x_with - x_without) / sigma_data [M, ...]: guidance's part of D(w, 1).

    Args:
        x0: the student's pictures [M, ...].
        x_without, x_with: the teacher's predictions of them without and with the prompt [M, ...].
        t: times that they were noised to [M], in (0, pi/2).
        w: scales [M].
        weighting: see `matching_weight`; DMD's divides by the distance to the guided prediction.
        sigma_data: standard deviation of the data.

    Reference: arXiv:2511.22677 (Decoupled DMD).
    """
    x0, x_without, x_with, t = (in_float32(values) for values in (x0, x_without, x_with, t))
    w = unsqueeze_like(w.to(x0.dtype), x0)
    omega = matching_weight(weighting, t, x0, x_without + w * (x_with - x_without), sigma_data)
    return unsqueeze_like(omega, x0) * (1 - w) * (x_with - x_without) / sigma_data


def statistics_loss(x0: Tensor, mean: float, std: float, sigma_data: float) -> Tensor:
    """KL(N(m, s^2) || N(mean, std^2)) [M] of the mean m and deviation s of a picture's numbers, in units of sigma_data.

    Args:
        x0: the student's pictures [M, ...], with their graph.
        mean, std: of the teacher's pictures, in units of sigma_data; std > 0.
        sigma_data: standard deviation of the data.

    Reference: arXiv:2511.22677 (Decoupled DMD), Eq. 7.
    """
    y = in_float32(x0).flatten(1) / sigma_data
    variance = y.var(1, correction=0).clamp(min=SMALLEST)
    return (variance + (y.mean(1) - mean).square()) / (2 * std**2) - (variance.log() + 1) / 2 + math.log(std)


def times_below(t: Tensor, uniform: Tensor, shift: float, lowest: float, highest: float) -> Tensor:
    """Times [M] uniform in shifted level as `level_times`, but none above t [M], in (0, pi/2]."""
    own = unshifted_level(t, shift)
    return torch.minimum(level_times(uniform.to(t.dtype) * own, shift, lowest, highest), t)


def decoupled_loss(networks: Networks, states: States, draws: Draws, config: Config, step: int) -> Loss:
    """Matching and guidance of the student's picture of each state; see `Objective`."""
    part, teacher, sigma_data = config.matching, networks.teacher, networks.teacher.sigma_data
    with networks.precision():
        x0 = predict_data(networks.student, states.x, states.t, states.condition, states.guidance, sigma_data)
    plain = noised(x0, states, networks, draws, config)
    w = torch.ones_like(plain.t) if plain.w is None else plain.w
    at = replace(plain, w=None)
    found = predictions(networks, at)
    direction = matching_direction(x0.detach(), found.real, found.fake, at.t, part.weighting, sigma_data)

    t = None
    if config.decoupled.guidance_times == "below":
        count = states.num_drawn // len(draws.samples)
        uniform = of_states(states, draws.uniform("guidance time", (count,)))
        t = times_below(states.t, uniform, teacher.shift, part.lowest_level, part.highest_level)
    beside = noised(x0, states, networks, draws, config, "guidance", t)
    with networks.walk_precision():
        without, with_prompt = teacher.branches(beside.x, beside.t, states.condition)
    teacher.clear_prompt_cache()
    x_without, x_with = (data_prediction(beside.x, beside.t, velocity) for velocity in (without, with_prompt))
    pushed = guidance_direction(x0.detach(), x_without, x_with, beside.t, w, part.weighting, sigma_data)
    seen = {"|x0|": x0.detach().flatten(1).norm(dim=1)} | figures(x0, found, sigma_data)
    share = pushed.flatten(1).norm(dim=1) / direction.flatten(1).norm(dim=1).clamp(min=1e-12)
    loss, seen["guidance_share"] = along(direction + pushed, x0, sigma_data, unit_of(config)), share
    if weight := config.decoupled.statistics_weight:
        held = statistics_loss(x0, *config.decoupled.statistics, sigma_data)
        loss, seen["statistics"] = loss + weight * held, held.detach()
    return Loss(loss, seen)
