"""Videos that go on from an image: its clean latents are the first frame, and the network finds the others."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.maths.formulations import unsqueeze_like
from stepfold.teachers.calls import parts_of
from stepfold.teachers.contract import Condition
from stepfold.teachers.video import VideoTeacher

LEAST_LEVEL = 1e-6
"""Noise level below which a velocity to a first frame is not divided further."""


def after_first_frame(
    velocity: Callable[[Tensor, Tensor], Tensor], frame: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """Flow velocity of states [B, C, F, H, W] at times [B], whose first frame is known.

    Its clean latents take the place of the state's, at time 0, and the velocity there leads to them.

    Args:
        velocity: of states at a time for each patch of two by two, [B, patches].
        frame: see `encode_images`.
    """

    def of_all(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        frames, height, width = x_flow.shape[2:]
        first = frame.to(x_flow.dtype).mT.unflatten(2, (1, height, width))
        later = torch.arange(frames, device=t_flow.device).clamp(max=1).repeat_interleave(height * width // 4)
        made = velocity(torch.cat([first, x_flow[:, :, 1:]], 2), t_flow[:, None] * later)
        to_first = (x_flow[:, :, :1] - first) / unsqueeze_like(t_flow, x_flow).clamp(min=LEAST_LEVEL)
        return torch.cat([to_first, made[:, :, 1:]], 2)

    return of_all


class FirstFrameTeacher(VideoTeacher):
    """Abstract: videos from a text, and from a first frame where each token is told its time.

    Attributes:
        with_first_frames: the pipeline that is shown them.
    """

    with_first_frames: ClassVar[Any]

    @override
    def check_index(self) -> None:
        """Refuses images in more channels."""
        name = self.with_first_frames.__name__
        if self.index.get("_class_name") == name and not self.index.get("expand_timesteps"):
            raise UserError(
                f"teacher {self.source!r} is a {name} whose network reads images in channels of their own; give a "
                "WanPipeline, or Wan 2.2 TI2V-5B"
            )

    @property
    @override
    def reads_images(self) -> bool:
        return isinstance(self.pipe, self.with_first_frames)

    @override
    def take_images(self) -> bool:
        """Puts the parts of a pipeline that tells each token its time into the class that is shown first frames.

        Raises:
            UserError: it is trained at other sizes than theirs.
        """
        if not (self.reads_images or self.index.get("expand_timesteps")):
            return False
        if other := [shape for shape in self.latent_shapes if shape != self.latent_shape]:
            height, width = (self.factor * side for side in other[0][-2:])
            raise UserError(
                f"first frames are {self.height} x {self.width}, and teacher.sizes has {height} x {width}; leave out "
                "teacher.sizes"
            )
        if not self.reads_images:
            self.pipe = self.with_first_frames(**parts_of(self.pipe))
            self.pipe.set_progress_bar_config(disable=True)
        return True

    @override
    def encode_images(self, images: Tensor) -> Condition:
        """Tokens [B, H W, C] of the clean latents of a video of one frame."""
        latents = super(VideoTeacher, self).encode_pictures(images.unsqueeze(2)) / self.sigma_data
        return Condition.whole(latents.flatten(2).mT)
