"""Policy sampling: each call of the student gives N velocities, and a policy takes many steps with them."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from stepfold.maths.formulations import euler_step
from stepfold.maths.policy import combined
from stepfold.teachers.contract import Condition, Student


@torch.no_grad()
def sample_policy(
    student: Student,
    noise: Tensor,
    condition: Condition,
    guidance: Tensor,
    times: Sequence[float],
    fresh_noise: Callable[[int], Tensor],
    sigma_data: float,
) -> Tensor:
    """The policy's Euler steps from each time to the next, the last ones to 0; a network call for each time.

    They come to one Euler step with a weighted mean of the velocities; see `maths.policy`.

    Args:
        student: gives N F, and says the form of its policy.
        noise: [B, ...], of standard deviation sigma_data.
        condition: B rows.
        guidance: scales [B].
        times: falling from pi/2, without the final 0, as the student was trained.
        fresh_noise: not called; the sampler is deterministic.
        sigma_data: standard deviation of the data.

    Returns:
        x_0 [B, ...].

    Reference: arXiv:2510.14974 (pi-Flow), Algorithm 1 with its DX policy.
    """
    assert student.policy is not None, "the caller checks the card"
    x = noise
    for pair in pairwise([*times, 0.0]):
        t, t_next = (torch.full((len(noise),), time, dtype=noise.dtype, device=noise.device) for time in pair)
        F = student(x / sigma_data, t, condition, guidance).to(x.dtype)
        x = euler_step(x, t, t_next, sigma_data * combined(F, student.policy.path(*pair).means[-1]))
    return x
