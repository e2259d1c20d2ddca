"""Flow-map sampling: jumps between listed times, deterministic or with a share of fresh noise."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from stepfold.maths.formulations import euler_step
from stepfold.teachers.contract import Condition, Student


def jump(
    student: Student,
    x: Tensor,
    t: Tensor,
    target: Tensor,
    condition: Condition,
    guidance: Tensor,
    sigma_data: float,
) -> Tensor:
    """The flow map X(x, t, s) = cos D x - sin D sigma_data F(x / sigma_data, t, s), with D = t - s.

    Args:
        student: gives F; it is told both times.
        x: [M, ...], at time t.
        t: [M], in [0, pi/2].
        target: s [M], in [0, t].
        condition: M rows.
        guidance: scales [M].
        sigma_data: standard deviation of the data.

    Returns:
        The state at time s [M, ...], of x's dtype under autocast too; x itself where s = t.

    Reference: arXiv:2506.14603, where it is one flow-matching Euler step with the average velocity.
    """
    F = student(x / sigma_data, t, condition, guidance, target)
    return euler_step(x, t, target, sigma_data * F.to(x.dtype))


@torch.no_grad()
def sample_flow_map(
    student: Student,
    noise: Tensor,
    condition: Condition,
    guidance: Tensor,
    times: Sequence[float],
    fresh_noise: Callable[[int], Tensor],
    sigma_data: float,
    *,
    gamma: float = 0.0,
) -> Tensor:
    """Jumps of the student's flow map from each time to the next, the last one to 0.

    With gamma > 0 each jump but the last goes further down, to s with tan s = sqrt(1 - gamma^2) tan t_next, and fresh
    noise takes the state back up: x = cos t_next / cos s X + gamma sin t_next z. The marginals stay the same for
    every gamma.

    Args:
        student: gives F; it is told both times.
        noise: [B, ...], of standard deviation sigma_data.
        condition: B rows.
        guidance: scales [B].
        times: falling from pi/2, without the final 0; one network call each.
        fresh_noise: step index (from 1) -> noise like `noise`, of standard deviation sigma_data; not called if gamma
            is 0.
        sigma_data: standard deviation of the data.
        gamma: in [0, 1]; 0 is deterministic, 1 is consistency sampling.

    Returns:
        x_0 [B, ...].

    Reference: arXiv:2310.02279 (gamma-sampling), in TrigFlow.
    """
    x = noise
    for i, (time, time_next) in enumerate(pairwise([*times, 0.0]), 1):
        s = math.atan2(math.sqrt(1 - gamma**2) * math.sin(time_next), math.cos(time_next)) if gamma else time_next
        t, target = (torch.full((len(noise),), value, dtype=noise.dtype, device=noise.device) for value in (time, s))
        x = jump(student, x, t, target, condition, guidance, sigma_data)
        if s < time_next:
            x = math.cos(time_next) / math.cos(s) * x + gamma * math.sin(time_next) * fresh_noise(i)
    return x
