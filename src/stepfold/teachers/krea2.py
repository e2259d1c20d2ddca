"""Krea 2: flow prediction on latents packed two by two; a scale of 0 turns guidance off; texts are stacks of layers."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import Krea2Pipeline
from torch import Tensor
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.teachers.contract import Condition, Scale
from stepfold.teachers.family import Predict
from stepfold.teachers.flux import packed_prediction, places
from stepfold.teachers.qwen_image import QwenLatents

LAYERS = "text_encoder_select_layers"
"""The pipeline's config field of the text encoder's layers that are read."""


def krea2_network(transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None) -> Tensor:
    """F [B, C, H, W] of a Krea2Transformer2DModel; it embeds no guidance.

    It multiplies the time that it is given, which is at most 1, by 1000 itself. A token's embedding is that of several
    layers of the text encoder, one after the other.
    """
    embeds = condition.embeds.unflatten(-1, (transformer.config.num_text_layers, -1))
    image = places(x_unit, embeds)
    ids = torch.cat([image.new_zeros(embeds.shape[1], 3), image])

    def velocity(tokens: Tensor, t_flow: Tensor) -> Tensor:
        return transformer(
            hidden_states=tokens,
            encoder_hidden_states=embeds,
            timestep=t_flow,
            position_ids=ids,
            encoder_attention_mask=condition.mask.bool(),
            return_dict=False,
        )[0]

    return packed_prediction(x_unit, t, velocity)


class Krea2Teacher(QwenLatents):
    """Krea2Pipeline, of Krea 2 Raw; the student is one too, without guidance."""

    pipelines = (Krea2Pipeline,)
    no_guidance = 0.0

    @classmethod
    @override
    def time_scale_of(cls, network: Mapping[str, Any], schedule: Mapping[str, Any]) -> float:
        return 1000.0

    @override
    def guidance_weight(self, scale: Scale) -> Scale:
        return scale + 1

    @override
    def check_index(self) -> None:
        if self.index.get("is_distilled"):
            raise UserError(
                f"teacher {self.source!r} is a Krea 2 that was distilled to few steps already (is_distilled is true); "
                "give Krea 2 Raw"
            )
        if (size := self.index.get("patch_size", 2)) != 2:
            raise UserError(f"teacher {self.source!r} has patch_size={size}, and only 2 is understood; give Krea 2 Raw")

    @override
    def check_network(self, latent_channels: int) -> None:
        if self.max_tokens <= (after := self.pipe.prompt_template_encode_num_suffix_tokens):
            raise UserError(
                f"max_tokens is {self.max_tokens}, but this pipeline puts {after} tokens after each prompt, which "
                "count; give more, or leave it out"
            )
        super().check_network(latent_channels)

    @override
    def predictor(self) -> Predict:
        return krea2_network

    @override
    def time_part(self, network: Any) -> str | None:
        return "time_embed"

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        call = inspect.signature(self.pipe.__call__).parameters
        return self.transformer.config.in_channels // 4, 2 * factor, call["height"].default, call["width"].default

    @classmethod
    @override
    def before_prompts(cls, pipe: Any) -> tuple[str, int]:
        """What comes after a prompt counts towards its length."""
        free = pipe.prompt_template_encode_start_idx - pipe.prompt_template_encode_num_suffix_tokens
        return pipe.prompt_template_encode_prefix, free

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """Moves the padding, which the pipeline has in the middle, to the end: a text's tokens have no places."""
        states, mask = self.pipe.encode_prompt(list(prompts), device=self.device, max_sequence_length=self.max_tokens)
        embeds, mask = states.flatten(2).to(self.work_dtype), mask.long()
        order = mask.argsort(dim=1, descending=True, stable=True)
        return Condition(embeds.gather(1, order[..., None].expand_as(embeds)), mask.gather(1, order))

    @override
    def index_extras(self) -> dict[str, Any]:
        return {LAYERS: self.index[LAYERS]} if LAYERS in self.index else {}
