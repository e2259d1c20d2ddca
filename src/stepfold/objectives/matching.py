"""Distribution matching: the student's picture moves from the fake score's prediction to the teacher's.

The picture x_0 of a student's step is noised again to a time t, where both scores predict it: the teacher, guided by w,
and the fake score, guided by kappa. Their difference D = x_fake - x_real, weighted by omega(t), is the gradient of a
divergence between the two laws. DMD, rCM's second term and VSD differ in w, kappa, omega and the times.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from stepfold import randomness
from stepfold.config import Config
from stepfold.maths.formulations import data_prediction, flow_time, guide, in_float32, interpolate, unsqueeze_like
from stepfold.maths.routes import level_times, logit_normal_times, unshifted_level
from stepfold.objectives.contract import Loss, Networks
from stepfold.objectives.denoising import FAKE
from stepfold.randomness import Draws
from stepfold.sampling.consistency import predict_data
from stepfold.scores import RenoisedSettings, Weighting
from stepfold.spaces.records import States
from stepfold.teachers.contract import Condition, Student, Teacher

SMALLEST = 1e-5
"""Of the mean distance that DMD's weight divides by, on latents of unit variance."""
SKETCHES = 8
"""Numbers that stand for a picture where pictures of a step are compared; see `sketches`."""


def matching_weight(kind: Weighting, t: Tensor, x0: Tensor, x_real: Tensor, sigma_data: float) -> Tensor:
    """omega [M], of D / sigma_data; x0, x_real: [M, ...], the picture and the teacher's prediction of it.

    `kl` makes E<omega D / sigma_data, dx_0 / sigma_data> the gradient of KL(student at t || teacher at t).

    Reference: arXiv:2405.14867 (DMD2), dmd; arXiv:2312.05239 (SwiftBrush), vsd; arXiv:2509.25127 (SiD-DiT), sid;
        arXiv:2511.19428 (FreeFlow), velocity.
    """
    if kind == "dmd":
        return sigma_data / (x0 - x_real).abs().flatten(1).mean(1).clamp(min=SMALLEST * sigma_data)
    if kind == "kl":
        return 1 / t.tan().square()
    if kind == "vsd":
        return t.sin() * t.cos()
    if kind == "sid":
        return 1 - flow_time(t)
    if kind == "velocity":
        return 1 / t.sin()
    assert kind == "uniform", kind
    return torch.ones_like(t)


@torch.no_grad()
def matching_direction(
    x0: Tensor, x_real: Tensor, x_fake: Tensor, t: Tensor, weighting: Weighting, sigma_data: float
) -> Tensor:
    """omega D / sigma_data with D = x_fake - x_real [M, ...]: where x_0 / sigma_data should come from.

    Args:
        x0: the student's pictures [M, ...].
        x_real: the teacher's prediction of them from the noised ones [M, ...], guided.
        x_fake: the fake score's [M, ...].
        t: times that they were noised to [M], in (0, pi/2).
        weighting: see `matching_weight`.
        sigma_data: standard deviation of the data.

    Returns:
        [M, ...], detached, of float32 at least.
    """
    x0, x_real, x_fake, t = (in_float32(values) for values in (x0, x_real, x_fake, t))
    omega = matching_weight(weighting, t, x0, x_real, sigma_data)
    return unsqueeze_like(omega, x0) * (x_fake - x_real) / sigma_data


def along(direction: Tensor, x0: Tensor, sigma_data: float, unit: str) -> Tensor:
    """<direction, x_0 / sigma_data> [M], whose gradient in x_0 / sigma_data is the direction; `mean` over the numbers.

    The mean has the gradient of 1/2 ||y - sg(y - direction)||^2 over the numbers of y = x_0 / sigma_data.
    """
    product = (direction.detach() * in_float32(x0) / sigma_data).flatten(1)
    return product.mean(1) if unit == "mean" else product.sum(1)


@dataclass(frozen=True)
class Noised:
    """The student's pictures, noised again.

    Attributes:
        x: [M, ...], without a graph.
        t: times [M].
        condition: M rows.
        told: guidance scales [M] that the fake score is told.
        w: weights [M] of the teacher's guidance; None for 1.
        kappa: weights [M] of the fake score's; None for 1, which costs it one call less.
    """

    x: Tensor
    t: Tensor
    condition: Condition
    told: Tensor
    w: Tensor | None
    kappa: Tensor | None


def of_states(states: States, numbers: Tensor) -> Tensor:
    """Draws [B, count, ...] -> those of each state [M, ...]; of a state the same, whatever micro-batch it is in."""
    return numbers.flatten(0, 1)[states.number]


def renoising_times(
    states: States, draws: Draws, config: Config, part: RenoisedSettings, teacher: Teacher, name: str
) -> Tensor:
    """Times [M] that pictures of the states are noised to, as `part` says; `name` is that of their stream.

    Phased rollouts are noised above the time s of the next step alone. What a step hands over to it is cos s x_0 +
    sin s z, and noising that to t > s is noising x_0 to t: matching there is the subinterval objective of
    arXiv:2510.27684 (Phased DMD), for a student that predicts x_0.
    """
    count, above = states.num_drawn // len(draws.samples), states.t_target if config.rollout.phased else None
    if part.times == "logit_normal":
        normal = of_states(states, draws.normal(name, (count,)))
        if above is not None:
            lowest = (torch.log(teacher.sigma_data * above.double().tan()) - part.logit_mean) / part.logit_std
            share = torch.special.ndtr(lowest)
            normal = torch.special.ndtri(share + (1 - share) * torch.special.ndtr(normal.double())).to(normal)
        return logit_normal_times(normal, teacher.sigma_data, part.logit_mean, part.logit_std, teacher.start_time)
    uniform = of_states(states, draws.uniform(name, (count,)))
    if above is not None:
        lowest = unshifted_level(above, teacher.shift)
        uniform = lowest + (1 - lowest) * uniform
    return level_times(uniform, teacher.shift, part.lowest_level, part.highest_level, teacher.start_time)


def renoising_noise(states: States, draws: Draws, teacher: Teacher, name: str) -> Tensor:
    """Noise [M, ...] of standard deviation sigma_data, for pictures of the states."""
    count = states.num_drawn // len(draws.samples)
    return teacher.sigma_data * of_states(states, draws.normal(name, (count, *states.x.shape[1:])))


def weights(states: States, draws: Draws, config: Config, teacher: Teacher) -> tuple[Tensor | None, Tensor | None]:
    """Weights w and kappa [M] of the guidance of teacher and fake score for each state, None for 1."""
    part, w = config.matching, teacher.guidance_weight(states.guidance)
    if part.guidance == 1:
        return None, None if part.fake_guidance in (1, "same") else torch.full_like(w, part.fake_guidance)
    if isinstance(part.guidance, tuple):
        lowest, highest = part.guidance
        count = states.num_drawn // len(draws.samples)
        uniform = of_states(states, draws.uniform("matching guidance", (count,)))
        w = (lowest + (highest - lowest) * uniform).to(w)
    elif part.guidance is not None:
        w = torch.full_like(w, part.guidance)
    if part.fake_guidance == "same":
        return w, w
    return w, None if part.fake_guidance == 1 else torch.full_like(w, part.fake_guidance)


def noised(
    x0: Tensor,
    states: States,
    networks: Networks,
    draws: Draws,
    config: Config,
    name: str = "matching",
    t: Tensor | None = None,
) -> Noised:
    """The pictures of the states, noised to times t [M], drawn where there are none; `name` is that of the streams."""
    if t is None:
        t = renoising_times(states, draws, config, config.matching, networks.teacher, f"{name} time")
    t, noise = t.to(x0.dtype), renoising_noise(states, draws, networks.teacher, f"{name} noise")
    w, kappa = weights(states, draws, config, networks.teacher)
    return Noised(interpolate(x0.detach(), noise, t), t, states.condition, states.guidance, w, kappa)


def real_velocity(networks: Networks, at: Noised, x: Tensor, *, with_gradient: bool = False) -> Tensor:
    """The teacher's velocity at x [M, ...], guided by w."""
    scale = None if at.w is None else networks.teacher.guidance_scale(at.w)
    with networks.walk_precision():
        velocity = networks.teacher.velocity(x, at.t, at.condition, scale, with_gradient=with_gradient)
    networks.teacher.clear_prompt_cache()
    return velocity


def fake_velocity(networks: Networks, at: Noised, x: Tensor) -> Tensor:
    """The fake score's velocity at x [M, ...], guided by kappa."""
    score, sigma_data = networks.critics[FAKE], networks.teacher.sigma_data
    assert isinstance(score, Student)
    with networks.precision():
        F = score(x / sigma_data, at.t, at.condition, at.told)
        if at.kappa is not None:
            F = guide(score(x / sigma_data, at.t, networks.teacher.null(at.condition), at.told), F, at.kappa)
    return sigma_data * F.to(x.dtype)


class Predictions(NamedTuple):
    """Of the pictures, from the noised ones [M, ...]: the teacher's and the fake score's; and both velocities."""

    real: Tensor
    fake: Tensor
    v_real: Tensor
    v_fake: Tensor


@torch.no_grad()
def predictions(networks: Networks, at: Noised) -> Predictions:
    """See `Predictions`; no gradient."""
    v_real, v_fake = real_velocity(networks, at, at.x), fake_velocity(networks, at, at.x)
    return Predictions(data_prediction(at.x, at.t, v_real), data_prediction(at.x, at.t, v_fake), v_real, v_fake)


@lru_cache(maxsize=8)
def signs(count: int, device: torch.device) -> Tensor:
    """Random signs [count], float32, always the same."""
    return (2.0 * (randomness.uniform((count,), 0, "signs of sketches") < 0.5) - 1).to(device)


def sketches(pictures: Tensor) -> Tensor:
    """[M, N] -> [M, SKETCHES], linear: the sum of their variances over pictures has the mean of the N variances' mean.

    So the spread of all pictures of a step is known from a few numbers of each, whichever micro-batch or process each
    is in. Number i sums the picture's numbers i, i + SKETCHES, ..., with random signs, over the square root of N.
    """
    count = pictures.shape[1]
    signed = pictures * signs(count, pictures.device) / math.sqrt(count)
    return torch.nn.functional.pad(signed, (0, -count % SKETCHES)).unflatten(1, (-1, SKETCHES)).sum(1)


@torch.no_grad()
def figures(x0: Tensor, found: Predictions, sigma_data: float) -> dict[str, Tensor]:
    """What tells a late fake score from too much guidance, of each picture [M].

    `gap` is |D| / |x_0 - x_real|, `cosine` that between both velocities, `std` the deviation of a picture's numbers in
    units of sigma_data; for `sketch_0`, ... see `sketches`. `missed` over `apart` is logged as `miss`. It is 0 for a
    fake score that is exact: x_fake is then the mean of x_0, given the noised picture that D depends on. Where laws
    differ in their means m, m_fake and m_real alone, it is (m - m_fake) / (m_fake - m_real).
    """
    x0, real, fake, v_real, v_fake = (in_float32(values.detach()).flatten(1) for values in (x0, *found))
    return {
        "|v_real|": v_real.norm(dim=1),
        "|v_fake|": v_fake.norm(dim=1),
        "gap": (fake - real).norm(dim=1) / (x0 - real).norm(dim=1),
        "cosine": torch.cosine_similarity(v_real, v_fake),
        "missed": ((x0 - fake) * (fake - real)).mean(1) / sigma_data**2,
        "apart": (fake - real).square().mean(1) / sigma_data**2,
        "std": x0.std(1) / sigma_data,
        **{f"sketch_{i}": part for i, part in enumerate(sketches(x0 / sigma_data).unbind(1))},
    }


def unit_of(config: Config) -> str:
    """`sum` or `mean`, as `matching.unit` says."""
    summed = config.objective == "continuous" and config.consistency.adaptive_weight
    return ("sum" if summed else "mean") if config.matching.unit == "auto" else config.matching.unit


def matching_loss(networks: Networks, states: States, draws: Draws, config: Config, step: int) -> Loss:
    """Distribution matching of the student's picture of each state; see `Objective`.

    Reference: arXiv:2405.14867 (DMD2); arXiv:2510.08431 (rCM), whose lambda is `matching.weight`.
    """
    sigma_data = networks.teacher.sigma_data
    with networks.precision():
        x0 = predict_data(networks.student, states.x, states.t, states.condition, states.guidance, sigma_data)
    at = noised(x0, states, networks, draws, config)
    found = predictions(networks, at)
    direction = matching_direction(x0.detach(), found.real, found.fake, at.t, config.matching.weighting, sigma_data)
    seen = {"|x0|": x0.detach().flatten(1).norm(dim=1)}
    return Loss(along(direction, x0, sigma_data, unit_of(config)), seen | figures(x0, found, sigma_data))
