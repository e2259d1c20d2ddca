"""Coupling space (reflow): a walk's own noise and its end, joined by a straight line; no teacher is asked."""

import torch
from torch import Tensor

from stepfold.maths.formulations import interpolate, interpolate_velocity
from stepfold.spaces.records import Pairs, kept_index, state_numbers
from stepfold.teachers.contract import Condition


def coupled_pairs(
    x0: Tensor, noise: Tensor, times: Tensor, condition: Condition, guidance: Tensor, keep: Tensor | None
) -> Pairs:
    """States between each kept latent and the noise that its walk began with, with the line's own velocity.

    The velocity is d/dt (cos t x_0 + sin t z) = cos t z - sin t x_0. Its mean given (x, t) is that of the rectified
    flow.

    Args:
        x0: ends of the walks [B, ...], of standard deviation sigma_data.
        noise: what the walks began with [B, ...], of standard deviation sigma_data.
        times: [B, M], in [0, pi/2], falling.
        condition: B rows.
        guidance: scales [B] that the walks were guided by.
        keep: bool [B], from the brightness filter; None for all.

    Returns:
        Pairs of the kept walks, walk by walk.

    Reference: arXiv:2209.03003, Sec. 2 (reflow), in TrigFlow.
    """
    index, count = kept_index(keep, x0), times.shape[1]
    t = times[index].flatten()
    clean, start = x0[index].repeat_interleave(count, 0), noise[index].repeat_interleave(count, 0)
    return Pairs(
        x=interpolate(clean, start, t),
        t=t,
        t_next=torch.cat([times[index, 1:], torch.zeros_like(times[index, :1])], dim=1).flatten(),
        dxdt=interpolate_velocity(clean, start, t),
        condition=condition.rows(index).repeat_interleave(count),
        guidance=guidance[index].repeat_interleave(count),
        x0=clean,
        prompt=index.repeat_interleave(count),
        number=state_numbers(index, count),
        num_drawn=count * len(x0),
    )
