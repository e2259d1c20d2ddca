"""Rollout space (backward simulation): the student's own few steps, up to the step that is to be trained."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepfold.maths.formulations import interpolate
from stepfold.spaces.records import States
from stepfold.teachers.contract import Condition

Picture = Callable[[Tensor, Tensor, Condition, Tensor], Tensor]
"""(x [B, ...], t [B], condition, guidance scales [B]) -> x_0 [B, ...]: the student's data prediction."""


def rollout_length(count: int, most: int, *, cycled: bool, first: int = 0) -> tuple[int, int]:
    """(steps of the rollout number `count`, the step that it stops at): all in turn, each as often as the others.

    They are counted and not drawn, so that the load is equal and all processes of a run agree.

    Args:
        count: of rollouts before.
        most: K, steps of the longest.
        cycled: whether the number of steps is 1, 2, ..., K in turn, instead of always K.
        first: the lowest step that it may stop at.

    Examples:
        >>> [rollout_length(count, 2, cycled=False) for count in range(3)]
        [(2, 0), (2, 1), (2, 0)]
        >>> [rollout_length(count, 2, cycled=True) for count in range(4)]
        [(1, 0), (2, 0), (1, 0), (2, 1)]
    """
    num_steps, turn = (count % most + 1, count // most) if cycled else (most, count)
    return num_steps, first + turn % (num_steps - first)


@torch.no_grad()
def rolled_states(
    picture: Picture,
    noise: Tensor,
    times: Sequence[float],
    stop: int,
    fresh_noise: Callable[[int], Tensor],
    condition: Condition,
    guidance: Tensor,
    *,
    phased: bool = False,
) -> States:
    """The input of the student's step number `stop`, after the steps before it; no gradient reaches those.

    Args:
        picture: the student's data prediction.
        noise: [B, ...], of standard deviation sigma_data.
        times: of the student's steps, falling from its first, without the final 0.
        stop: in 0, ..., len(times) - 1.
        fresh_noise: step index (from 1) -> noise [B, ...], of standard deviation sigma_data.
        condition: B rows.
        guidance: scales [B].
        phased: whether the states have the next step's time as their target, 0 for the last one's.

    Returns:
        One state a prompt, at times[stop].

    Reference: arXiv:2405.14867 (DMD2), Sec. 4.5; the steps are those of consistency sampling, arXiv:2303.01469,
        Algorithm 1.
    """
    index, x = torch.arange(len(noise), device=noise.device), noise
    t = torch.full((len(noise),), times[0], dtype=noise.dtype, device=noise.device)
    for i in range(1, stop + 1):
        x0 = picture(x, t, condition, guidance)
        t = torch.full_like(t, times[i])
        x = interpolate(x0, fresh_noise(i), t)
    target = torch.full_like(t, [*times, 0.0][stop + 1]) if phased else None
    return States(
        x=x, t=t, condition=condition, guidance=guidance, prompt=index, number=index, num_drawn=len(noise),
        t_target=target,
    )  # fmt: skip
