"""Calls of FLUX.2's network, with a reference image or without."""

from typing import Any

import torch
from torch import Tensor

from stepfold.maths.formulations import flow_prediction
from stepfold.teachers.contract import Condition

REFERENCE_FRAME = 10
"""Where the frame of a reference image stands among the positions."""


def places(*sides: int, device: torch.device, first: int = 0) -> Tensor:
    """Position ids [product of the sides, 4] of frame, row, column and token of the text; frames begin at `first`."""
    ids = torch.cartesian_prod(*(torch.arange(side, device=device) for side in sides))
    return ids + torch.tensor([first, 0, 0, 0], device=device)


def flux2_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *,
    time_scale: float, reference: tuple[int, int],
) -> Tensor:  # fmt: skip
    """F [B, C, H, W] of a Flux2Transformer2DModel, whose time counts to `time_scale`; it multiplies it by 1000.

    The condition's second text is a reference image: clean latents of height and width `reference` behind the noisy
    ones.
    """
    height, width = x_unit.shape[-2:]
    ids, image = places(1, height, width, 1, device=x_unit.device), condition.second
    if image is not None:
        ids = torch.cat([ids, places(1, *reference, 1, device=x_unit.device, first=REFERENCE_FRAME)])

    def velocity(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        noisy = x_flow.flatten(2).mT
        tokens = transformer(
            hidden_states=noisy if image is None else torch.cat([noisy, image.embeds.to(noisy.dtype)], 1),
            timestep=time_scale / 1000 * t_flow,
            guidance=guidance,
            encoder_hidden_states=condition.embeds,
            txt_ids=places(1, 1, 1, condition.embeds.shape[1], device=x_flow.device),
            img_ids=ids,
            return_dict=False,
        )[0]
        return tokens[:, : height * width].mT.unflatten(2, (height, width))

    return flow_prediction(x_unit, t, velocity)
