"""Wan 2.1, text to video: flow prediction, classifier-free guidance; latents [B, C, F, H, W]."""

import inspect
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor, nn
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.maths.formulations import flow_prediction, flow_time, trigflow_time
from stepfold.teachers.calls import OwnLevels
from stepfold.teachers.contract import Condition
from stepfold.teachers.family import Predict
from stepfold.teachers.pipeline import PipelineTeacher

LAST_LEVEL = 2 / 3
"""Noise level of a student's last step, of two or more."""


def wan_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, tokens: int
) -> Tensor:
    """F [B, C, F, H, W] of a WanTransformer3DModel, whose time counts to 1000; it embeds no guidance.

    It attends to padding, which is zero up to `tokens` positions.
    """
    real = condition.embeds * condition.mask[..., None].to(condition.embeds.dtype)

    def velocity(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        return transformer(
            hidden_states=x_flow,
            timestep=1000 * t_flow,
            encoder_hidden_states=nn.functional.pad(real, (0, 0, 0, tokens - real.shape[1])),
            return_dict=False,
        )[0]

    return flow_prediction(x_unit, t, velocity)


def filmstrip(videos: Tensor) -> Tensor:
    """[B, C, F, H, W] -> the frames side by side, [B, C, H, F W]."""
    return videos.transpose(2, 3).flatten(3)


def channel_scale(vae: Any, device: torch.device, dimensions: int) -> tuple[Tensor, Tensor]:
    """`latent_scale` of an autoencoder with a mean and a deviation for each channel.

    Args:
        vae: the autoencoder.
        device: of the latents.
        dimensions: of one sample's latents, the channels first.
    """
    shape = (-1,) + (1,) * (dimensions - 1)
    mean, std = (
        torch.tensor(values, device=device).view(shape) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return 1 / std, mean


def scheduler_times(scheduler: Any, num_steps: int) -> list[float]:
    """The times at which a scheduler of flow matching takes so many steps of its own, without the final 0."""
    scheduler.set_timesteps(num_steps)
    return trigflow_time(scheduler.sigmas[:-1].double()).tolist()


def timesteps(t: Tensor) -> Tensor:
    """What the network is told of times t [B], as it counts them: to 1000."""
    return 1000 * flow_time(t)


def anyflow_classes() -> tuple[Any, Any, Any]:
    """Pipeline, network and scheduler of diffusers for networks of Wan's kind that are told both times."""
    from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler

    return AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler


class WanTeacher(OwnLevels, PipelineTeacher):
    """WanPipeline of Wan 2.1; the student is one too, without guidance. Pictures of it are filmstrips."""

    pipelines = (WanPipeline,)
    output = "frames"
    fields: ClassVar[Any] = {
        "image_dim": ((None,), "it reads an image beside the text"),
        "added_kv_proj_dim": ((None,), "it reads an image beside the text"),
    }

    @override
    def check_index(self) -> None:
        """Refuses Wan 2.2, which has a second network, or a time for each token."""
        second, _ = self.index.get("transformer_2") or (None, None)
        if second or self.index.get("boundary_ratio") is not None or self.index.get("expand_timesteps"):
            raise UserError(
                f"teacher {self.source!r} is a Wan 2.2 (transformer_2, boundary_ratio or expand_timesteps is set); "
                "give a Wan 2.1 text-to-video pipeline, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
            )

    @override
    def predictor(self) -> Predict:
        return partial(wan_network, tokens=self.max_tokens)

    @override
    def time_part(self, network: Any) -> str | None:
        return "condition_embedder.time_embedder"

    @override
    def pixels_a_latent(self, vae: dict[str, Any]) -> int:
        return vae.get("scale_factor_spatial", 8)

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        """The pipeline insists on multiples of 16, and its call has a default size."""
        config, call = self.transformer.config, inspect.signature(self.pipe.__call__).parameters
        multiple = math.lcm(factor * config.patch_size[1], 16)
        return config.in_channels, multiple, call["height"].default, call["width"].default

    @override
    def time_axis(self, frames: int | None, vae: dict[str, Any]) -> tuple[int, tuple[int, ...]]:
        frames = frames or inspect.signature(self.pipe.__call__).parameters["num_frames"].default
        assert frames is not None
        each = vae.get("scale_factor_temporal", 4)
        if frames % each != 1:
            near = round((frames - 1) / each) * each + 1
            raise UserError(
                f"teacher.frames is {frames}, but this pipeline needs a multiple of {each} and one more; {near} is near"
            )
        return frames, ((frames - 1) // each + 1,)

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """Keeps a prompt's own tokens; past its end there are zeros."""
        embeds, _ = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device, max_sequence_length=self.max_tokens
        )
        return Condition(embeds.to(self.work_dtype), embeds.abs().amax(-1).gt(0).long())

    @override
    def call_options(self) -> dict[str, Any]:
        return {"num_frames": self.frames}

    @override
    def block_stacks(self) -> dict[str, str]:
        return {"blocks": "num_layers"}

    @override
    def feature_parts(self) -> list[tuple[nn.Module, int]]:
        config = self.transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        return [(block, width) for block in self.transformer.blocks]

    @override
    def latent_scale(self, vae: Any) -> tuple[Any, Any]:
        return channel_scale(vae, self.device, 4)

    @override
    def decode(self, x0: Tensor, batch: int = 1) -> Tensor:
        """Returns filmstrips [B, 3, H, F W]."""
        return filmstrip(super().decode(x0, batch))

    @override
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Takes filmstrips [B, 3, H, F W]."""
        return super().encode_pictures(pictures.unflatten(3, (self.frames, -1)).transpose(2, 3))

    @override
    def fresh_scheduler(self) -> Any:
        """Levels fall from 1 to LAST_LEVEL by equal factors; its lowest one is 1 in 1000, and it shifts that twice."""
        shift = (999 * LAST_LEVEL / (1 - LAST_LEVEL)) ** 0.5
        return FlowMatchEulerDiscreteScheduler(shift=shift, use_exponential_sigmas=True, stochastic_sampling=True)
