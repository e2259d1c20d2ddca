"""Calls of Kandinsky 5's network: latents with their channels last, and texts without their padding."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5AttnProcessor
from torch import Tensor, nn

from stepfold.maths.formulations import flow_prediction
from stepfold.teachers.contract import Condition


def channels_last(latents: Tensor) -> Tensor:
    """[B, C, F, H, W], or [B, C, H, W] of pictures, which are one frame -> [B, F, H, W, C]."""
    return (latents if latents.ndim == 5 else latents.unsqueeze(2)).movedim(1, -1)


def without_image(latents: Tensor) -> Tensor:
    """Latents [B, F, H, W, C], with those of an image to begin with and their mask: there is none."""
    none = torch.zeros_like(latents)
    return torch.cat([latents, none, none[..., :1]], -1)


def kandinsky5_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *,
    time_scale: float, spread: Callable[[int, int], Sequence[float]],
) -> Tensor:  # fmt: skip
    """F [B, C, ...] of a Kandinsky5Transformer3DModel, whose time counts to `time_scale`; it embeds no guidance.

    Args:
        transformer, x_unit, t, condition, guidance: see `Predict`; padding has the position -1.
        time_scale: see there.
        spread: (height, width) of the latents -> by how much positions are divided, along frames, rows and columns.
    """
    height, width = x_unit.shape[-2:]
    sides = (1 if x_unit.ndim == 4 else x_unit.shape[2], height // 2, width // 2)
    count = torch.arange(condition.mask.shape[1], device=x_unit.device)

    def velocity(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        x = channels_last(x_flow)
        v = transformer(
            hidden_states=without_image(x) if transformer.visual_cond else x,
            encoder_hidden_states=condition.embeds,
            pooled_projections=condition.pooled,
            timestep=time_scale * t_flow,
            visual_rope_pos=[torch.arange(side, device=x.device) for side in sides],
            text_rope_pos=torch.where(condition.mask.bool(), count, -1),
            scale_factor=spread(height, width),
            return_dict=False,
        )
        return v.movedim(-1, 1).reshape(x_flow.shape)

    return flow_prediction(x_unit, t, velocity)


def marked(rotation: Tensor) -> Tensor:
    """Whether a text's token is padding, bool [B or 1, L], of rotations [1, (B), L, 1, D/2, 2, 2] by its position."""
    return rotation[..., 0, 0, 0, 0].isnan().flatten(0, -2)


def mark(block: nn.Module, args: tuple[Tensor, ...], text: Tensor) -> Tensor:
    """A forward hook of the last block that reads the text alone: in its output [B, L, D] padding is no number."""
    return text.masked_fill(marked(args[2])[..., None], math.nan)


def turned(x: Tensor, rotation: Tensor) -> Tensor:
    """Queries or keys [B, L, heads, D] turned by `marked`'s rotations, to the precision of the class: bfloat16."""
    return (rotation * x.float().unflatten(-1, (-1, 1, 2))).sum(-1).to(torch.bfloat16).reshape(x.shape).type_as(x)


class TextAttention(Kandinsky5AttnProcessor):
    """Attention of a text to itself or of latents to it, as the class's own but for padding, which it leaves out."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None, sparse_params: Any = None,
    ) -> Tensor:  # fmt: skip
        """[B, N, D] -> [B, N, D]; arguments of diffusers' processor."""
        if encoder_hidden_states is not None:
            padding = encoder_hidden_states[..., 0].isnan()
            text = encoder_hidden_states.masked_fill(padding[..., None], 0)
        else:
            assert rotary_emb is not None
            text, padding = hidden_states, marked(rotary_emb)
        query, key, value = (
            layer(values).unflatten(-1, (attn.num_heads, -1))
            for layer, values in ((attn.to_query, hidden_states), (attn.to_key, text), (attn.to_value, text))
        )
        query, key = (
            norm(values.float()).type_as(values) for norm, values in ((attn.query_norm, query), (attn.key_norm, key))
        )
        if rotary_emb is not None:
            query, key = (turned(values, rotary_emb.masked_fill(rotary_emb.isnan(), 0)) for values in (query, key))
        query, key, value = (values.transpose(1, 2) for values in (query, key, value))
        found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=~padding[:, None, None])
        return attn.out_layer(found.transpose(1, 2).flatten(2))


def leave_out_padding(transformer: Any) -> None:
    """Has a network attend to no padding, whose position is -1: its class attends to it, and takes no mask.

    The mark goes from position to attention within the network's own values, so that blocks may be computed again.
    """
    positions = transformer.text_rope_embeddings
    positions.args = torch.cat([positions.args, torch.full_like(positions.args[:1], math.nan)])
    for block in transformer.text_transformer_blocks:
        block.self_attention.set_processor(TextAttention())
    for block in transformer.visual_transformer_blocks:
        block.cross_attention.set_processor(TextAttention())
    transformer.text_transformer_blocks[-1].register_forward_hook(mark)
