"""Kandinsky 5, videos: latents [B, C, F, H, W]."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from diffusers import Kandinsky5T2VPipeline
from torch import Tensor
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.teachers.contract import Condition
from stepfold.teachers.kandinsky5 import Kandinsky5Teacher
from stepfold.teachers.kandinsky5_network import without_image
from stepfold.teachers.video import VideoTeacher

NO_VIDEO = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, "
    "walking backwards"
)
"""The negative prompt of the pipeline of videos, where its call is given none."""


def spread_of_video(height: int, width: int, *, factor: int) -> Sequence[float]:
    """`spread` of videos, as the pipeline has it for sides in pixels, which are `factor` a latent."""
    pipeline: Any = Kandinsky5T2VPipeline
    return pipeline._get_scale_factor(None, factor * height, factor * width)


class Kandinsky5VideoTeacher(Kandinsky5Teacher, VideoTeacher):
    """Kandinsky5T2VPipeline. Pictures of it are filmstrips."""

    pipelines = (Kandinsky5T2VPipeline,)
    stand_ins = ("vae",)

    @override
    def check_network(self, latent_channels: int) -> None:
        """Of sparse attention it is the latents that say who is attended to."""
        if self.transformer.config.attention_type == "nabla":
            raise UserError(
                f"the network of teacher {self.source!r} has attention_type='nabla': sparse attention, as in videos of "
                "10 s; give a Kandinsky 5 of regular attention, such as one for 5 s"
            )
        super().check_network(latent_channels)

    @override
    def spread(self) -> Callable[[int, int], Sequence[float]]:
        return partial(spread_of_video, factor=self.factor)

    @override
    def encode_nothing(self) -> Condition:
        return self.encode_texts([NO_VIDEO])

    @override
    def given(self, noise: Tensor) -> Tensor:
        """Where the network reads an image too, with none."""
        latents = self.pack(noise)
        return without_image(latents) if self.transformer.visual_cond else latents
