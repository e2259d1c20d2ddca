"""Stable Diffusion 1, 2 and XL: UNets that predict noise or v, classifier-free guidance."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn
from typing_extensions import override

from stepfold.randomness import send
from stepfold.teachers.contract import Condition
from stepfold.teachers.vp import Raw, VPTeacher


def sd_network(unet: Any, x_unit: Tensor, step: Tensor, condition: Condition) -> Tensor:
    """Noise or v [B, C, H, W] of a UNet2DConditionModel."""
    return unet(x_unit, step, encoder_hidden_states=condition.embeds, return_dict=False)[0]


def sdxl_network(unet: Any, x_unit: Tensor, step: Tensor, condition: Condition, *, factor: int) -> Tensor:
    """Noise or v [B, C, H, W] of SDXL's UNet2DConditionModel, told that the picture was and shall be of its size.

    Args:
        unet, x_unit, step, condition: see `vp.Raw`.
        factor: pixels a latent, along each side.
    """
    height, width = (factor * side for side in x_unit.shape[-2:])
    sizes = torch.cat([condition.embeds.new_full((1,), side) for side in (height, width, 0, 0, height, width)])
    added = {"text_embeds": condition.pooled, "time_ids": sizes.expand(x_unit.shape[0], -1)}
    return unet(x_unit, step, encoder_hidden_states=condition.embeds, added_cond_kwargs=added, return_dict=False)[0]


FIELDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "time_cond_proj_dim": ((None,), "it embeds guidance, as latent consistency models do, which are few-step already"),
    "class_embed_type": ((None,), "it reads classes beside the text"),
    "num_class_embeds": ((None,), "it reads classes beside the text"),
    "class_embeddings_concat": ((False, None), "it reads classes beside the text"),
    "encoder_hid_dim_type": ((None,), "it reads something else than the text encoder's states"),
    "dual_cross_attention": ((False, None), "it reads two texts"),
    "addition_embed_type": ((None,), "it reads more than the text encoder's states"),
}
"""`Family.fields` of a UNet."""


class StableDiffusionTeacher(VPTeacher):
    """StableDiffusionPipeline, of Stable Diffusion 1 and 2; the student is one too."""

    pipelines = (StableDiffusionPipeline,)
    network_part = "unet"
    fields = FIELDS

    @override
    def raw(self) -> Raw:
        return sd_network

    @override
    def time_part(self, network: Any) -> str | None:
        return "time_embedding"

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        config = self.transformer.config
        self.check_tokens(self.usual_tokens())
        side = config.sample_size * factor
        return config.in_channels, math.lcm(factor, 8), side, side

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        embeds, _ = self.pipe.encode_prompt(list(prompts), self.device, 1, False)
        return Condition.whole(embeds.to(self.work_dtype))

    @override
    def block_stacks(self) -> dict[str, str]:
        """None: a UNet's blocks differ."""
        return {}

    @override
    def feature_parts(self) -> list[tuple[nn.Module, int]]:
        """Blocks of the way up."""
        widths = reversed(self.transformer.config.block_out_channels)
        return list(zip(self.transformer.up_blocks, widths, strict=True))


class StableDiffusionXLTeacher(StableDiffusionTeacher):
    """StableDiffusionXLPipeline; the student is one too."""

    pipelines = (StableDiffusionXLPipeline,)
    fields = FIELDS | {
        "addition_embed_type": (
            ("text_time",),
            "SDXL's reads a pooled text and sizes, and no other kind is known here",
        )
    }

    @override
    def raw(self) -> Raw:
        return partial(sdxl_network, factor=self.factor)

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """Both text encoders read the same prompt."""
        embeds, _, pooled, _ = self._encode(prompts, False)
        return Condition.whole(embeds.to(self.work_dtype), pooled.to(self.work_dtype))

    @override
    def encode_nothing(self) -> Condition:
        """Encodes the empty prompt; as zeros where the pipeline's config says so."""
        _, embeds, _, pooled = self._encode([""], True)
        return Condition.whole(embeds.to(self.work_dtype), pooled.to(self.work_dtype))

    @override
    def latent_scale(self, vae: Any) -> tuple[Any, Any]:
        """This pipeline reads a mean and a deviation for each channel, where both are there."""
        scale, offset = super().latent_scale(vae)
        given = [vae.config.get(name) for name in ("latents_mean", "latents_std")]
        if None in given:
            return scale, offset
        mean, std = (send(torch.tensor(values), self.device).view(-1, 1, 1) for values in given)
        return scale / std, mean

    def _encode(self, prompts: Sequence[str], unconditional: bool) -> Any:
        return self.pipe.encode_prompt(list(prompts), device=self.device, do_classifier_free_guidance=unconditional)
