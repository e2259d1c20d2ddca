"""Noise schedules of networks of one's own, x = alpha(t) x_0 + sigma(t) n, and what such networks predict.

Symbols: `time` [B] is the network's own, `t` [B] TrigFlow's at the same signal-to-noise ratio. A schedule is inverted
once; a network of any of the five outputs then gives F. Coefficients are computed in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from stepfold.errors import UserError, first_line
from stepfold.maths.formulations import unsqueeze_like, vp_time, vp_times

Output = Literal["velocity", "noise", "score", "v", "data"]

CELLS = 4096  # of the table over TrigFlow time; Newton's method starts within one
LEAST_SIGNAL = 1e-3  # cos t, below which a noise prediction says too little about the data
CLEAREST, NOISIEST = 0.2, 5.0  # sigma / alpha that a schedule reaches at its two ends, at most and at least


@dataclass(frozen=True)
class NoiseSchedule:
    """The noised sample x = alpha(t) x_0 + sigma(t) n, with n ~ N(0, I), over a network's own time t.

    Attributes:
        alpha: times (float64) -> coefficients >= 0, elementwise; of torch functions, or a constant.
        sigma: the same. sigma / alpha rises, or falls, throughout the range.
        first, last: the range of t that the network knows, in either order.

    Examples:
        >>> schedule = NoiseSchedule(lambda t: torch.exp(-t / 2), lambda t: torch.sqrt(1 - torch.exp(-t)), 0.0, 10.0)
        >>> round(invert(schedule).highest, 3)  # TrigFlow time of the noisiest end
        1.564
    """

    alpha: Callable[[Tensor], Tensor | float]
    sigma: Callable[[Tensor], Tensor | float]
    first: float
    last: float


FLOW = NoiseSchedule(lambda t: 1 - t, lambda t: t, 0.0, 1.0)
"""Flow matching's (rectified flow's): x = (1 - t) x_0 + t n."""
TRIGFLOW = NoiseSchedule(torch.cos, torch.sin, 0.0, math.pi / 2)
"""TrigFlow's: x = cos t x_0 + sin t n."""


def exploding(sigma_max: float) -> NoiseSchedule:
    """EDM's and the variance-exploding SDE's, told the noise level: x = x_0 + sigma n, the time is sigma.

    Args:
        sigma_max: the largest noise level that the network knows, finite.

    Reference: arXiv:2206.00364.
    """
    return NoiseSchedule(lambda t: 1.0, lambda t: t, 0.0, sigma_max)


def vp_sde(beta_min: float = 0.1, beta_max: float = 20.0) -> NoiseSchedule:
    """The variance-preserving SDE's on [0, 1]: beta(t) rises linearly, alpha = exp(-integral of beta / 2).

    Args:
        beta_min, beta_max: beta at 0 and 1.

    Reference: arXiv:2011.13456, Appendix B.
    """

    def integral(t: Tensor) -> Tensor:
        return beta_min * t + (beta_max - beta_min) * t**2 / 2

    return NoiseSchedule(
        lambda t: torch.exp(-integral(t) / 2), lambda t: torch.sqrt(-torch.expm1(-integral(t))), 0.0, 1.0
    )


def vp_steps(alphas_cumprod: Tensor) -> NoiseSchedule:
    """DDPM's: time is a training step, with a fraction between two, where the TrigFlow time is linear.

    Args:
        alphas_cumprod: [T], falling: alpha^2 at each training step; a tensor, an array or a list.

    Raises:
        UserError: they do not fall, or are not in (0, 1].

    Reference: arXiv:2006.11239.
    """
    given = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
    falls = given.ndim == 1 and len(given) > 1 and bool((given.diff() < 0).all())
    if not (falls and given[0] <= 1 and given[-1] > 0):
        raise UserError(
            "alphas_cumprod does not fall within (0, 1]; give alpha^2 at each training step, the cleanest first"
        )
    times = vp_times(given)

    def angle(step: Tensor) -> Tensor:
        own = times.to(step.device)
        below = step.detach().floor().clamp(0, len(own) - 2).long()
        return own[below] + (own[below + 1] - own[below]) * (step - below)

    return NoiseSchedule(lambda t: torch.cos(angle(t)), lambda t: torch.sin(angle(t)), 0.0, len(times) - 1.0)


@dataclass(frozen=True, eq=False)
class Inverted:
    """A schedule, and its network's own time at any TrigFlow time.

    Attributes:
        schedule: over data of unit variance.
        data_std: of the network's own data; `schedule.alpha` holds this factor.
        lowest, highest: TrigFlow times of its ends; the network knows no others.
        table: float64 [CELLS + 1], own times at even TrigFlow times from lowest to highest.
    """

    schedule: NoiseSchedule
    data_std: float
    lowest: float
    highest: float
    table: Tensor


def invert(schedule: NoiseSchedule, data_std: float = 1.0) -> Inverted:
    """Finds the network's own time at every TrigFlow time.

    Args:
        schedule: as the network was trained.
        data_std: standard deviation of the data that it was trained on; x_0 in TrigFlow has 1.

    Raises:
        UserError: a range or data_std that is none; alpha or sigma fails, is not finite, or is negative; sigma / alpha
            turns back; or it reaches neither data nor noise.
    """
    first, last = schedule.first, schedule.last
    if not (math.isfinite(first) and math.isfinite(last) and first != last):
        raise UserError(f"the schedule's range is {first:g} to {last:g}; give two finite times, for example 0 and 1")
    if not (math.isfinite(data_std) and data_std > 0):
        raise UserError(f"data_std is {data_std:g}; give the standard deviation of the network's data, above 0")
    unit = replace(schedule, alpha=lambda time: data_std * schedule.alpha(time))
    times = torch.linspace(first, last, CELLS + 1, dtype=torch.float64)
    angles = _checked_angles(unit, times)
    rising = bool(angles[-1] > angles[0])
    if not rising:
        times, angles = times.flip(0), angles.flip(0)
    turned = (angles.diff() <= 0).nonzero()
    if len(turned):
        where = times[int(turned[0])].item()
        raise UserError(
            f"sigma / alpha of the schedule should rise or fall throughout, but turns back or stands still near "
            f"t = {where:g}; give the range in which it does not"
        )
    lowest, highest = angles[0].item(), angles[-1].item()
    clearest, noisiest = math.tan(lowest) * data_std, math.tan(highest) * data_std
    if math.tan(lowest) > CLEAREST or math.tan(highest) < NOISIEST:
        raise UserError(
            f"sigma / alpha of the schedule goes from {clearest:.3g} to {noisiest:.3g}, but a teacher knows states "
            f"from nearly clean (at most {CLEAREST * data_std:g}) to nearly noise (at least {NOISIEST * data_std:g}); "
            "give the whole range of t"
        )
    targets = torch.linspace(lowest, highest, CELLS + 1, dtype=torch.float64)
    low, high = times[0].expand_as(targets), times[-1].expand_as(targets)
    for _ in range(60):
        middle = (low + high) / 2
        above = _angles(unit, middle) > targets
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    table = torch.cat([times[:1], ((low + high) / 2)[1:-1], times[-1:]])
    return Inverted(unit, data_std, lowest, highest, table)


def own_time(inverted: Inverted, t: Tensor) -> tuple[Tensor, Tensor]:
    """The network's own time at TrigFlow time t, differentiable in it.

    Args:
        inverted: of the schedule.
        t: [B], in [0, pi/2].

    Returns:
        t: float64 [B], moved into the schedule's range.
        time: float64 [B].
    """
    low, high = inverted.lowest, inverted.highest
    t = t.to(torch.float64).clamp(low, high)
    fixed, table = t.detach(), inverted.table.to(t.device)
    cell = (fixed - low) / (high - low) * CELLS
    below = cell.floor().clamp(0, CELLS - 1).long()
    ends = table[below], table[below + 1]
    time = torch.lerp(*ends, cell - below)
    for at in (fixed, t):
        moved = time - _newton(inverted.schedule, time, at)
        inside = (moved - ends[0]) * (moved - ends[1]) <= 0  # a root of sigma at clean data can throw it out
        time = torch.where(inside, moved, time)
    return t, time


def own_prediction(
    x_unit: Tensor, t: Tensor, network: Callable[[Tensor, Tensor], Tensor], inverted: Inverted, output: Output
) -> Tensor:
    """F [B, ...] of a network with a schedule of its own.

    With X_0 = data_std x_0, the network's input is x = alpha X_0 + sigma n. It predicts

    - `velocity`: dx/dt = alpha' X_0 + sigma' n, along its own time
    - `noise`: n
    - `score`: -n / sigma
    - `v`: alpha n - sigma X_0
    - `data`: X_0

    Each is linear in F and x_unit: F = a x_unit + b output, with a and b of the time alone.

    Args:
        x_unit: x / sigma_data [B, ...].
        t: [B], in [0, pi/2].
        network: (x [B, ...], time [B]) -> output [B, ...].
        inverted: of its schedule.
        output: which of the five.
    """
    inside, time = own_time(inverted, t)
    alpha, sigma = (_expanded(each, time) for each in (inverted.schedule.alpha, inverted.schedule.sigma))
    norm = torch.sqrt(alpha**2 + sigma**2)
    if output == "velocity":
        of_x, of_output = _of_velocity(inverted.schedule, time, alpha, sigma, norm)
    else:
        of_x, of_output = _of_state(output, inside, norm, inverted.data_std)

    def each(number: Tensor) -> Tensor:
        return unsqueeze_like(number.to(t.dtype), x_unit)

    return each(of_x) * x_unit + each(of_output) * network(each(norm) * x_unit, time.to(t.dtype))


def refuse_pure_noise(inverted: Inverted, output: Output) -> None:
    """Refuses a range that ends where the output says nothing about the data.

    Raises:
        UserError: a noise or score prediction at pure noise.
    """
    if output in ("noise", "score") and math.cos(inverted.highest) < LEAST_SIGNAL:
        end = own_time(inverted, torch.tensor([math.acos(1.01 * LEAST_SIGNAL)]))[1].item()
        raise UserError(
            f"the schedule ends in pure noise, where a {output} prediction says nothing about the data; end its range "
            f"at t = {end:.4g}"
        )


def _of_state(output: Output, t: Tensor, norm: Tensor, data_std: float) -> tuple[Tensor, Tensor]:
    """The two weights [B] of an output that X_0 and n make without their rates."""
    cos, sin = torch.cos(t), torch.sin(t)
    if output == "noise":
        return -sin / cos, 1 / cos
    if output == "score":
        return -sin / cos, -norm * sin / cos
    if output == "data":
        return cos / sin, -1 / (data_std * sin)
    alpha, sigma = norm * cos / data_std, norm * sin
    square = alpha**2 + sigma**2
    return norm * (cos * sigma - sin * alpha / data_std) / square, (cos * alpha + sin * sigma / data_std) / square


def _of_velocity(
    schedule: NoiseSchedule, time: Tensor, alpha: Tensor, sigma: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """The two weights [B] of a velocity: F = (norm velocity - norm' x) / (alpha sigma' - sigma alpha')."""
    alpha_rate, sigma_rate = (
        _expanded(lambda at, each=each: _with_slope(each, at)[1], time) for each in (schedule.alpha, schedule.sigma)
    )
    turn = alpha * sigma_rate - sigma * alpha_rate
    return -(alpha * alpha_rate + sigma * sigma_rate) / turn, norm / turn


def _newton(schedule: NoiseSchedule, time: Tensor, t: Tensor) -> Tensor:
    """What Newton's method takes off the own time [B]; `time` has no derivative, t may have one."""
    (alpha, alpha_rate), (sigma, sigma_rate) = _with_slope(schedule.alpha, time), _with_slope(schedule.sigma, time)
    slope = sigma_rate * torch.cos(t.detach()) - alpha_rate * torch.sin(t.detach())
    return (sigma * torch.cos(t) - alpha * torch.sin(t)) / slope


def _expanded(function: Callable[[Tensor], Tensor | float], time: Tensor) -> Tensor:
    """A function of the own time [B], with the derivative that `time` has but no other graph."""
    value, slope = _with_slope(function, time.detach())
    return value + torch.where(slope.isfinite(), slope, 0.0) * (time - time.detach())


def _with_slope(function: Callable[[Tensor], Tensor | float], time: Tensor) -> tuple[Tensor, Tensor]:
    """A function and its derivative, elementwise, both float64 [B]."""
    found: Any = torch.func.jvp(lambda at: function(at) + 0 * at, (time,), (torch.ones_like(time),))
    return found


def _angles(schedule: NoiseSchedule, times: Tensor) -> Tensor:
    """TrigFlow times [N] of the network's own."""
    return vp_time(schedule.alpha(times) + 0 * times, schedule.sigma(times) + 0 * times)


def _checked_angles(schedule: NoiseSchedule, times: Tensor) -> Tensor:
    """TrigFlow times [N]; an error says what is wrong with alpha or sigma."""
    for name, function in (("alpha", schedule.alpha), ("sigma", schedule.sigma)):
        try:
            values = _with_slope(function, times)[0]
        except Exception as error:  # whatever a function of the caller's raises
            raise UserError(
                f"the schedule's {name}(t) fails on a tensor of times ({type(error).__name__}: {first_line(error)}); "
                "write it elementwise with torch functions, for example torch.exp(-t / 2)"
            ) from None
        wrong = (~(values.isfinite() & (values >= 0))).nonzero()
        if values.shape != times.shape or len(wrong):
            found = f"shape {tuple(values.shape)}" if values.shape != times.shape else f"{values[wrong[0, 0]].item():g}"
            where = "" if values.shape != times.shape else f" at t = {times[wrong[0, 0]].item():g}"
            raise UserError(
                f"the schedule's {name}(t) is {found}{where}; it should be one number >= 0 for each time in its range"
            )
    return _angles(schedule, times)
