"""Routes: the times t_0 >= t_1 >= ... > 0 at which the teacher is walked, from its `start_time` down.

`start_time` is where pure noise stands: pi/2, or a little below for a teacher that knows no higher noise level. A route
is a pure function of draws that the caller takes from its own random stream. Dtype and device follow the draws.
"""

import math
from functools import cache

import torch
from torch import Tensor

from stepfold.errors import UserError
from stepfold.maths.formulations import flow_time, trigflow_time

NUM_TRAIN_TIMESTEPS = 1000
"""Length of the training grid that diffusers' flow schedulers build their range of noise levels from."""
SECOND_TIME = 1.3  # of two-step sampling, as in SanaSprintPipeline
START = 1.57080  # SanaSprintPipeline's first time, a hair above pi/2


@cache
def at_most(bound: float, dtype: torch.dtype) -> float:
    """The largest number of a dtype that is not above `bound`."""
    rounded = torch.tensor(bound, dtype=dtype, device="cpu")
    if rounded.item() > bound:
        rounded = torch.nextafter(rounded, torch.zeros_like(rounded))
    return rounded.item()


def half_pi(dtype: torch.dtype) -> float:
    """pi/2, rounded down: plain float32 rounds it up, where its tangent is negative."""
    return at_most(math.pi / 2, dtype)


def random_times(uniform: Tensor, start_time: float = math.pi / 2) -> Tensor:
    """U[0, 1) -> times uniform on (0, start_time], elementwise; never 0, where the loss weight is infinite."""
    return (1 - uniform) * start_time


def u_shaped_times(uniform: Tensor, start_time: float = math.pi / 2) -> Tensor:
    """U[0, 1) -> times with a density of the flow time u as e^{4 u} + e^{4 (1 - u)}, elementwise.

    Half of the draws are mirrored. Both ends are left out by 1e-5. Below pi/2, later times become `start_time`.

    Reference: arXiv:2405.20320 (RF++), whose a is 4.
    """
    rising = torch.log1p((2 * uniform) % 1 * math.expm1(4)) / 4
    u = torch.where(uniform < 0.5, rising, 1 - rising)
    return trigflow_time(1e-5 + (1 - 2e-5) * u).clamp(max=start_time)


def logit_normal_times(
    normal: Tensor, sigma_data: float, mean: float = 0.2, std: float = 1.6, start_time: float = math.pi / 2
) -> Tensor:
    """N(0, 1) -> times with log(sigma_data tan t) of the given mean and standard deviation, elementwise.

    Below pi/2, `start_time` conditions the distribution on times not above it.

    Reference: arXiv:2410.11081 (its proposal distribution).
    """
    if start_time < math.pi / 2:
        highest = torch.tensor((math.log(sigma_data * math.tan(start_time)) - mean) / std, dtype=torch.float64)
        share = torch.special.ndtr(normal.double()) * torch.special.ndtr(highest).item()
        normal = torch.special.ndtri(share).to(normal)
    return torch.atan(torch.exp(mean + std * normal) / sigma_data)


def level_times(
    uniform: Tensor, shift: float, lowest: float, highest: float, start_time: float = math.pi / 2
) -> Tensor:
    """U[0, 1) -> times whose flow-matching levels are uniform, shifted towards noise, and clamped, elementwise.

    Args:
        uniform: draws.
        shift: of the levels, as of a flow-matching teacher's sampler; 1 leaves them.
        lowest, highest: levels in [0, 1].
        start_time: no time is above it.

    Reference: arXiv:2506.08009 (Self-Forcing), whose levels are shifted and clamped to 2 ... 98%.
    """
    times = trigflow_time(_shifted(uniform, shift).clamp(lowest, highest))
    return times.clamp(max=at_most(start_time, times.dtype))


def unshifted_level(t: Tensor, shift: float) -> Tensor:
    """The flow-matching level in [0, 1] that a shift moves to that of t, elementwise."""
    return _shifted(flow_time(t), 1 / shift)


def random_ladder(uniform: Tensor, shift: float, start_time: float = math.pi / 2) -> list[float]:
    """Times of a student's steps without the final 0: the first one's, and below it random levels, shifted, falling.

    Args:
        uniform: draws of U[0, 1) [n - 1].
        shift: of `level_times`.
        start_time: the first time.

    Reference: arXiv:2510.08431 (rCM), whose rollouts have random times.
    """
    below = level_times(1 - uniform, shift, 0.0, 1.0, start_time)
    return [start_time, *below.sort(descending=True).values.tolist()]


def random_route(uniform: Tensor, start_time: float = math.pi / 2) -> Tensor:
    """Times uniform on (0, start_time], sorted down, the first set to start_time.

    Args:
        uniform: draws of U[0, 1) [B, num_steps].
        start_time: in (0, pi/2].

    Returns:
        [B, num_steps].

    Reference: arXiv:2511.20410, Sec. 4.2.
    """
    return _descend_from(start_time, random_times(uniform, start_time))


def logit_normal_route(
    normal: Tensor, sigma_data: float, mean: float = 0.2, std: float = 1.6, start_time: float = math.pi / 2
) -> Tensor:
    """Times with log(sigma_data tan t) normal, sorted down, the first set to start_time.

    Args:
        normal: draws of N(0, 1) [B, num_steps].
        sigma_data: > 0.
        mean: of tau = log(sigma_data tan t).
        std: of tau.
        start_time: in (0, pi/2]; see `logit_normal_times`.

    Returns:
        [B, num_steps].

    Reference: arXiv:2410.11081 (its proposal distribution).
    Deviation: arXiv:2511.20410 prints the rule with the exponent misplaced; this is the rule it cites.
    """
    return _descend_from(start_time, logit_normal_times(normal, sigma_data, mean, std, start_time))


def reference_times(num_steps: int, shift: float = 2.5, start_time: float = math.pi / 2) -> Tensor:
    """The ladder of the flow-Euler sampler mapped to TrigFlow time.

    The shift acts twice, as in diffusers' FlowMatchEulerDiscreteScheduler: once on the range of noise levels, whose
    lower end is shift(1 / 1000), and once on the `num_steps` levels spread evenly over that range. The upper end of the
    range is the level that the shift moves to `start_time`.

    Args:
        num_steps: >= 1.
        shift: > 0; 1 is none.
        start_time: where the ladder begins, in (0, pi/2].

    Returns:
        [num_steps] in float64, strictly falling from start_time, the last one above 0.

    Raises:
        UserError: num_steps, shift or start_time out of range.

    Examples:
        >>> reference_times(4, shift=2.5).round(decimals=3).tolist()
        [1.571, 1.374, 0.9, 0.006]

    Reference: arXiv:2511.20410, Sec. 4.2.
    """
    if num_steps < 1:
        raise UserError(
            f"num_steps is {num_steps}, but a route has at least 1 step; set it to a whole number such as 16"
        )
    if not (math.isfinite(shift) and shift > 0):
        raise UserError(f"shift is {shift}, but it must be a positive number; 1 means no shift, 2.5 is usual")
    lowest = _shifted(torch.tensor(1 / NUM_TRAIN_TIMESTEPS, dtype=torch.float64), shift).item()
    highest = 1.0
    if start_time < math.pi / 2:
        highest = _shifted(flow_time(torch.tensor(start_time, dtype=torch.float64)), 1 / shift).item()
    if not highest > lowest:
        least = trigflow_time(_shifted(torch.tensor(lowest, dtype=torch.float64), shift)).item()
        raise UserError(
            f"the teacher starts at time {start_time:.3g}, but a route with shift {shift:g} ends at {least:.3g}; "
            "give a teacher with a higher sigma_max, or space.route_shift=1"
        )
    levels = torch.linspace(highest, lowest, num_steps, dtype=torch.float64)
    times = trigflow_time(_shifted(levels, shift))
    times[0] = min(start_time, math.pi / 2)
    return times


def reference_route(uniform: Tensor, shift: float = 2.5, start_time: float = math.pi / 2) -> Tensor:
    """One time drawn uniformly from each cell of the reference ladder r: t_0 = r_0, t_{i+1} ~ U(r_{i+1}, r_i).

    Args:
        uniform: draws of U[0, 1) [B, num_steps]; the first column is not used.
        shift: of `reference_times`.
        start_time: of `reference_times`.

    Returns:
        [B, num_steps].

    Reference: arXiv:2511.20410, Sec. 4.2.
    """
    first = at_most(start_time, uniform.dtype)
    ladder = reference_times(uniform.shape[1], shift, start_time).to(uniform)
    ladder = ladder.clamp(max=first).expand_as(uniform)
    inside = torch.lerp(ladder[:, 1:], ladder[:, :-1], uniform[:, 1:])
    return torch.cat([torch.full_like(ladder[:, :1], first), inside], dim=1)


def flow_euler_times(num_steps: int, shift: float) -> Tensor:
    """Times for plain sampling with a flow-matching teacher: the reference ladder, and 0 where its last step ends.

    Args:
        num_steps: network evaluations, >= 1.
        shift: > 0.

    Returns:
        [num_steps + 1] in float64, from pi/2 to 0.
    """
    ladder = reference_times(num_steps, shift)
    return torch.cat([ladder, ladder.new_zeros(1)])


def even_flow_times(num_steps: int, shift: float) -> Tensor:
    """Times for sampling a flow-matching teacher at few steps: noise levels 1, 1 - 1/n, ..., 1/n, 0, then shifted.

    Args:
        num_steps: n >= 1.
        shift: of the noise levels; 1 leaves them.

    Returns:
        float64 [num_steps + 1] in [0, pi/2], falling, the last one 0.
    """
    sigma = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return trigflow_time(_shifted(sigma, shift))


def few_step_times(num_steps: int) -> list[float]:
    """The times of a student's steps without the final 0: pi/2; pi/2 and 1.3; or even, as SCMScheduler has them."""
    if num_steps == 2:
        return [START, SECOND_TIME]
    return torch.linspace(START, 0, num_steps + 1)[:-1].tolist()


def _shifted(sigma: Tensor, shift: float) -> Tensor:
    """Flow-matching noise levels in [0, 1] moved towards 1 by shift > 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def _descend_from(start_time: float, times: Tensor) -> Tensor:
    """Times [B, num_steps] sorted down, none above start_time, the first one replaced by it."""
    first = at_most(start_time, times.dtype)
    descending = times.sort(dim=1, descending=True).values.clamp(max=first)
    descending[:, 0] = first
    return descending
