"""Pipelines of videos: latents [B, C, F, H, W], pictures are filmstrips."""

import inspect
import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.randomness import send
from stepfold.teachers.pipeline import PipelineTeacher


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
        send(torch.tensor(values), device).view(shape) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return 1 / std, mean


class VideoTeacher(PipelineTeacher):
    """Abstract: what families of text to video share.

    Attributes:
        frames_argument: name of the number of frames in the pipeline's call.
        side: what the pipeline insists that height and width are multiples of.
    """

    output = "frames"
    frames_argument: ClassVar[str] = "num_frames"
    side: ClassVar[int] = 16

    @override
    def pixels_a_latent(self, vae: dict[str, Any]) -> int:
        return vae.get("spatial_compression_ratio") or vae.get("scale_factor_spatial", 8)

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        """The pipeline's call has a default size."""
        config, call = self.transformer.config, inspect.signature(self.pipe.__call__).parameters
        multiple = math.lcm(factor * config.patch_size[1], self.side)
        return config.in_channels, multiple, call["height"].default, call["width"].default

    @override
    def time_axis(self, frames: int | None, vae: dict[str, Any]) -> tuple[int, tuple[int, ...]]:
        frames = frames or inspect.signature(self.pipe.__call__).parameters[self.frames_argument].default
        assert frames is not None
        each = vae.get("temporal_compression_ratio") or vae.get("scale_factor_temporal", 4)
        if frames % each != 1:
            near = round((frames - 1) / each) * each + 1
            raise UserError(
                f"teacher.frames is {frames}, but this pipeline needs a multiple of {each} and one more; {near} is near"
            )
        return frames, ((frames - 1) // each + 1,)

    @override
    def call_options(self) -> dict[str, Any]:
        return super().call_options() | {self.frames_argument: self.frames}

    @override
    def latent_scale(self, vae: Any) -> tuple[Any, Any]:
        return channel_scale(vae, self.device, 4)

    @override
    def decode(self, x0: Tensor, batch: int | None = 1, *, with_gradient: bool = False) -> Tensor:
        """Returns filmstrips [B, 3, H, F W]."""
        return filmstrip(super().decode(x0, batch, with_gradient=with_gradient))

    @override
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Takes filmstrips [B, 3, H, F W]."""
        return super().encode_pictures(pictures.unflatten(3, (self.frames, -1)).transpose(2, 3))
