"""Diffusion space (sCM): clean latents, such as the ends of the teacher's walks, noised afresh."""

import torch
from torch import Tensor

from stepfold.maths.formulations import interpolate
from stepfold.spaces.generation import Velocity
from stepfold.spaces.records import Pairs, kept_index, state_numbers
from stepfold.teachers.contract import Condition


@torch.no_grad()
def noised_pairs(
    velocity: Velocity,
    x0: Tensor,
    times: Tensor,
    noise: Tensor,
    condition: Condition,
    guidance: Tensor,
    keep: Tensor | None,
) -> Pairs:
    """Noises every kept latent to M times, each with noise of its own, and asks the teacher for its velocity there.

    Args:
        velocity: the teacher's, guided; one call with all pairs.
        x0: clean latents [B, ...], of standard deviation sigma_data.
        times: [B, M], in [0, pi/2], falling.
        noise: [B, M, ...], of standard deviation sigma_data.
        condition: B rows.
        guidance: scales [B].
        keep: bool [B], from the brightness filter; None for all.

    Returns:
        Pairs of the kept latents, latent by latent.

    Reference: arXiv:2410.11081, Sec. 2 and Algorithm 1.
    """
    index, count = kept_index(keep, x0), times.shape[1]
    t = times[index].flatten()
    clean = x0[index].repeat_interleave(count, 0)
    x = interpolate(clean, noise[index].flatten(0, 1), t)
    repeated, scales = condition.rows(index).repeat_interleave(count), guidance[index].repeat_interleave(count)
    return Pairs(
        x=x,
        t=t,
        t_next=torch.cat([times[index, 1:], torch.zeros_like(times[index, :1])], dim=1).flatten(),
        dxdt=velocity(x, t, repeated, scales) if len(index) else torch.zeros_like(x),
        condition=repeated,
        guidance=scales,
        x0=clean,
        prompt=index.repeat_interleave(count),
        number=state_numbers(index, count),
        num_drawn=count * len(x0),
    )
