"""Routes: the times pi/2 = t_0 >= t_1 >= ... > 0 at which the teacher is walked.

A route is a pure function of draws that the caller takes from its own random stream. Dtype and device follow the draws.
"""

import math
from functools import cache

import torch
from torch import Tensor

from stepfold.errors import UserError
from stepfold.maths.formulations import trigflow_time

NUM_TRAIN_TIMESTEPS = 1000
"""Length of the training grid that diffusers' flow schedulers build their range of noise levels from."""
SECOND_TIME = 1.3  # of two-step sampling, as in SanaSprintPipeline
START = 1.57080  # SanaSprintPipeline's first time, a hair above pi/2


@cache
def half_pi(dtype: torch.dtype) -> float:
    """The largest number of a dtype that is not above pi/2 (plain float32 rounds pi/2 up: its tangent is negative)."""
    rounded = torch.tensor(math.pi / 2, dtype=dtype, device="cpu")
    if rounded.item() > math.pi / 2:
        rounded = torch.nextafter(rounded, torch.zeros_like(rounded))
    return rounded.item()


def random_times(uniform: Tensor) -> Tensor:
    """U[0, 1) -> times uniform on (0, pi/2], elementwise; never 0, where the loss weight is infinite."""
    return (1 - uniform) * (math.pi / 2)


def logit_normal_times(normal: Tensor, sigma_data: float, mean: float = 0.2, std: float = 1.6) -> Tensor:
    """N(0, 1) -> times with log(sigma_data tan t) of the given mean and standard deviation, elementwise.

    Reference: arXiv:2410.11081 (its proposal distribution).
    """
    return torch.atan(torch.exp(mean + std * normal) / sigma_data)


def random_route(uniform: Tensor) -> Tensor:
    """Times uniform on (0, pi/2], sorted down, the first set to pi/2.

    Args:
        uniform: draws of U[0, 1) [B, num_steps].

    Returns:
        [B, num_steps].

    Reference: arXiv:2511.20410, Sec. 4.2.
    """
    return _descend_from_half_pi(random_times(uniform))


def logit_normal_route(normal: Tensor, sigma_data: float, mean: float = 0.2, std: float = 1.6) -> Tensor:
    """Times with log(sigma_data tan t) normal, sorted down, the first set to pi/2.

    Args:
        normal: draws of N(0, 1) [B, num_steps].
        sigma_data: > 0.
        mean: of tau = log(sigma_data tan t).
        std: of tau.

    Returns:
        [B, num_steps].

    Reference: arXiv:2410.11081 (its proposal distribution).
    Deviation: arXiv:2511.20410 prints the rule with the exponent misplaced; this is the rule it cites.
    """
    return _descend_from_half_pi(logit_normal_times(normal, sigma_data, mean, std))


def reference_times(num_steps: int, shift: float = 2.5) -> Tensor:
    """The ladder of the flow-Euler sampler mapped to TrigFlow time.

    The shift acts twice, as in diffusers' FlowMatchEulerDiscreteScheduler: once on the range of noise levels, whose
    lower end is shift(1 / 1000), and once on the `num_steps` levels spread evenly over that range.

    Args:
        num_steps: >= 1.
        shift: > 0; 1 is none.

    Returns:
        [num_steps] in float64, falling from pi/2, the last one above 0.

    Raises:
        UserError: num_steps or shift out of range.

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
    levels = torch.linspace(1.0, lowest, num_steps, dtype=torch.float64)
    return trigflow_time(_shifted(levels, shift))


def reference_route(uniform: Tensor, shift: float = 2.5) -> Tensor:
    """One time drawn uniformly from each cell of the reference ladder r: t_0 = r_0, t_{i+1} ~ U(r_{i+1}, r_i).

    Args:
        uniform: draws of U[0, 1) [B, num_steps]; the first column is not used.
        shift: of `reference_times`.

    Returns:
        [B, num_steps].

    Reference: arXiv:2511.20410, Sec. 4.2.
    """
    ladder = reference_times(uniform.shape[1], shift).to(uniform)
    ladder = ladder.clamp(max=half_pi(uniform.dtype)).expand_as(uniform)
    return torch.cat([ladder[:, :1], torch.lerp(ladder[:, 1:], ladder[:, :-1], uniform[:, 1:])], dim=1)


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


def _descend_from_half_pi(times: Tensor) -> Tensor:
    """Times [B, num_steps] sorted down, none above pi/2, the first one replaced by pi/2."""
    top = half_pi(times.dtype)
    descending = times.sort(dim=1, descending=True).values.clamp(max=top)
    descending[:, 0] = top
    return descending
