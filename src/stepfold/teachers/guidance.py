"""Guidance that keeps the length of the prediction, which several families' pipelines have."""

import math
from collections.abc import Callable

from torch import Tensor

from stepfold.maths.formulations import flow_state, flow_velocity, guide, trigflow_output
from stepfold.teachers.flux import pack, unpack


def row_length(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> length of each row, [B, C, H, 1]."""
    return latents.norm(dim=-1, keepdim=True)


def token_length(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> length of each packed token, at the four places that it has, [B, 1, H, W]."""
    return unpack(pack(latents).norm(dim=-1, keepdim=True).expand(-1, -1, 4), *latents.shape[-2:])


def guided_at_length(
    x_unit: Tensor,
    t: Tensor,
    without: Tensor,
    with_prompt: Tensor,
    weight: Tensor,
    length: Callable[[Tensor], Tensor],
    most: float = math.inf,
) -> Tensor:
    """F under guidance whose flow velocity has the length that it has with the prompt. Arguments of `Family.guided`.

    Args:
        x_unit, t, without, with_prompt, weight: see there.
        length: of parts of a velocity [B, C, H, W], in a shape that multiplies it.
        most: factor by which a part may grow; 1 where it only shrinks.
    """
    x_flow, t_flow = flow_state(x_unit, t)
    prompted = flow_velocity(x_flow, t_flow, with_prompt)
    velocity = guide(flow_velocity(x_flow, t_flow, without), prompted, weight)
    kept = (length(prompted) / length(velocity)).clamp(max=most)
    return trigflow_output(x_flow, t_flow, kept * velocity)
