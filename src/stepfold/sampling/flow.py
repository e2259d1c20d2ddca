"""Flow sampling: Euler steps with the student's own velocity."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from stepfold.maths.formulations import euler_step
from stepfold.teachers.contract import Condition, Student


@torch.no_grad()
def sample_flow(
    student: Student,
    noise: Tensor,
    condition: Condition,
    guidance: Tensor,
    times: Sequence[float],
    fresh_noise: Callable[[int], Tensor],
    sigma_data: float,
) -> Tensor:
    """Euler's method on dx/dt = sigma_data F(x / sigma_data, t), from the first time to 0.

    Over the same two times, Euler's step in flow matching, in TrigFlow and DDIM's are one operation, so this one
    serves flow-matching and variance-preserving students alike.

    Args:
        student: gives F, a velocity.
        noise: [B, ...], of standard deviation sigma_data.
        condition: B rows.
        guidance: scales [B].
        times: falling from pi/2, without the final 0; one network call each.
        fresh_noise: not called; the sampler is deterministic.
        sigma_data: standard deviation of the data.

    Returns:
        x_0 [B, ...].

    Reference: arXiv:2209.03003, Sec. 2; arXiv:2010.02502, Eq. 12 with sigma = 0.
    """
    x = noise
    for pair in pairwise([*times, 0.0]):
        t, t_next = (torch.full((len(noise),), time, dtype=noise.dtype, device=noise.device) for time in pair)
        F = student(x / sigma_data, t, condition, guidance)
        x = euler_step(x, t, t_next, sigma_data * F.to(x.dtype))
    return x
