"""FLUX.1: flow prediction on latents packed two by two; dev embeds its guidance scale, schnell has none."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn
from typing_extensions import override

from stepfold.maths.formulations import flow_prediction
from stepfold.teachers.contract import Condition, GuidanceKind
from stepfold.teachers.family import Predict
from stepfold.teachers.pipeline import PipelineTeacher


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> tokens [B, H/2 W/2, 4 C], one for every square of two by two."""
    squares = latents.unfold(2, 2, 2).unfold(3, 2, 2)  # [B, C, H/2, W/2, 2, 2]
    return squares.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for latents of the given sides."""
    squares = tokens.unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2))  # [B, H/2, W/2, C, 2, 2]
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def places(latents: Tensor, like: Tensor) -> Tensor:
    """Position ids [H/2 W/2, 3] of the packed tokens of latents [B, C, H, W]: 0, row, column."""
    sides = (torch.arange(side // 2, device=like.device) for side in latents.shape[-2:])
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(like)


def packed_prediction(x_unit: Tensor, t: Tensor, velocity: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """F [B, C, H, W] of a flow velocity of packed tokens: (tokens [B, H/2 W/2, 4 C], flow times [B]) -> tokens."""

    def unpacked(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        return unpack(velocity(pack(x_flow), t_flow), *x_unit.shape[-2:])

    return flow_prediction(x_unit, t, unpacked)


def flux_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, time_scale: float
) -> Tensor:
    """F [B, C, H, W] of a FluxTransformer2DModel, whose time counts to `time_scale`.

    It multiplies what it is given by 1000 itself, like its guidance, which is 1 where there is none.
    """
    scales = torch.ones_like(t) if guidance is None else guidance

    def velocity(tokens: Tensor, t_flow: Tensor) -> Tensor:
        return transformer(
            hidden_states=tokens,
            timestep=time_scale / 1000 * t_flow,
            guidance=scales if transformer.config.guidance_embeds else None,
            encoder_hidden_states=condition.embeds,
            pooled_projections=condition.pooled,
            txt_ids=condition.embeds.new_zeros(condition.embeds.shape[1], 3),
            img_ids=places(x_unit, condition.embeds),
            return_dict=False,
        )[0]

    return packed_prediction(x_unit, t, velocity)


def keep_precision(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook of the first layer: its output stays in its input's dtype under autocast.

    The network rounds its time to that dtype before it multiplies it by 1000: in bfloat16, to steps of 4.
    """
    return output.to(args[0].dtype)


class PackedTeacher(PipelineTeacher):
    """Abstract: what the families share whose pipelines pack latents two by two."""

    even_ladder = True

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        side = self.pipe.default_sample_size * factor
        return self.transformer.config.in_channels // 4, 2 * factor, side, side

    @override
    def pack(self, latents: Tensor) -> Tensor:
        return pack(latents)

    @override
    def unpack(self, latents: Tensor) -> Tensor:
        return unpack(latents, *self.latent_shape[1:])


class FluxTeacher(PackedTeacher):
    """FluxPipeline; the student is one too, with guidance embedded as in its teacher."""

    pipelines = (FluxPipeline,)
    head = "proj_out"
    time_module = "time_text_embed"
    readers = ("tokenizer_2",)
    fields: ClassVar[Any] = {"patch_size": ((1,), "the pipeline packs four latents into a token itself")}

    @override
    def predictor(self) -> Predict:
        self.transformer.x_embedder.register_forward_hook(keep_precision)  # a student's copy has it too
        return partial(flux_network, time_scale=self.time_scale)

    @classmethod
    @override
    def guidance_kinds(cls, network: Mapping[str, Any], pipeline: Mapping[str, Any]) -> tuple[GuidanceKind, ...]:
        """Classifier-free guidance is for networks that were tuned back to it; they are told 1 where they embed it."""
        return ("embedded" if network["guidance_embeds"] else "none", "classifier_free")

    @override
    def own_guidance(self, guidance: float) -> dict[str, Any]:
        if self.guidance_kind == "classifier_free":
            return {"guidance_scale": 1.0, "true_cfg_scale": guidance, "negative_prompt": ""}
        return super().own_guidance(guidance)

    @override
    def usual_tokens(self) -> int:
        """512, as its call says; schnell was distilled with 256."""
        return super().usual_tokens() if self.transformer.config.guidance_embeds else 256

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """Both text encoders read the same prompt, and padding is attended to as in use."""
        embeds, pooled, _ = self.pipe.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.max_tokens
        )
        return Condition.whole(embeds.to(self.work_dtype), pooled.to(self.work_dtype))

    @override
    def block_stacks(self) -> dict[str, str]:
        return super().block_stacks() | {"single_transformer_blocks": "num_single_layers"}
