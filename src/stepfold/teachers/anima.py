"""Anima: flow prediction of a Cosmos network whose time is in [0, 1]; a modular pipeline, guided by a guider."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from diffusers.utils import is_torchvision_available
from torch import Tensor, nn
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.maths.formulations import flow_prediction
from stepfold.teachers.anima_pipeline import AnimaModularPipeline
from stepfold.teachers.contract import Condition
from stepfold.teachers.family import Predict
from stepfold.teachers.guiders import GuiderTeacher
from stepfold.teachers.qwen_image import QwenAutoencoder

USUAL_SIDE = 128
"""Latents along a side, where the call says nothing."""


def anima_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, tokens: int
) -> Tensor:
    """F [B, C, H, W] of a CosmosTransformer3DModel, whose time is in [0, 1]; it embeds no guidance.

    It attends to padding, which is zero up to `tokens` positions. Latents are a video's of one frame to it.
    """
    real = condition.embeds * condition.mask[..., None].to(condition.embeds.dtype)
    text = nn.functional.pad(real, (0, 0, 0, tokens - real.shape[1]))

    def velocity(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        return transformer(
            hidden_states=x_flow.unsqueeze(2),
            timestep=t_flow,
            encoder_hidden_states=text,
            padding_mask=x_flow.new_zeros(1, 1, *x_flow.shape[-2:]),
            return_dict=False,
        )[0].squeeze(2)

    return flow_prediction(x_unit, t, velocity)


class AnimaTeacher(GuiderTeacher, QwenAutoencoder):
    """AnimaModularPipeline; the student is one too, with a guider at scale 1."""

    pipelines = (AnimaModularPipeline,)
    even_ladder = True
    prompt_argument = "prompt"
    fields: ClassVar[Any] = {
        "img_context_dim_in": ((None, 0), "it reads an image beside the text"),
        "patch_size": (([1, 2, 2], (1, 2, 2)), "the pipeline's sizes are of patches of two by two"),
    }

    @override
    def check_index(self) -> None:
        """Refuses parts that the pipeline does not read, and one too few."""
        AnimaModularPipeline.check(self.source, self.index)

    @classmethod
    @override
    def time_scale_of(cls, network: Any, schedule: Any) -> float:
        """The pipeline divides by what its scheduler counts to."""
        return 1.0

    @override
    def predictor(self) -> Predict:
        return partial(anima_network, tokens=self.pipe.text_conditioner.config.min_sequence_length)

    @override
    def check_network(self, latent_channels: int) -> None:
        super().check_network(latent_channels)
        self.check_tokens(self.pipe.text_conditioner.config.min_sequence_length)
        if self.transformer.config.concat_padding_mask and not is_torchvision_available():
            raise UserError("this CosmosTransformer3DModel needs torchvision for its padding mask; install torchvision")

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        side = USUAL_SIDE * factor
        return self.transformer.config.in_channels, 2 * factor, side, side

    @override
    def shape_at(self, height: int, width: int) -> tuple[int, ...]:
        """No larger than the network's positions reach."""
        shape = super().shape_at(height, width)
        if any(side > most for side, most in zip(shape[-2:], self.transformer.config.max_size[1:], strict=True)):
            rows, columns = (self.factor * most for most in self.transformer.config.max_size[1:])
            raise UserError(
                f"{height} x {width} pixels are more than this network's {rows} x {columns}; give a smaller"
            )
        return shape

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        embeds, mask = self.pipe.read(prompts, self.max_tokens, self.device)
        return Condition(embeds.to(self.work_dtype), mask.long())

    @classmethod
    @override
    def after_loading(cls, lora: bool) -> list[str]:
        """A teacher's guider is not that of a student."""
        return ["pipe.load_components(dtype={dtype})", *["pipe.guider = pipe.guider.new(guidance_scale=1.0)"] * lora]

    @override
    def pack(self, latents: Tensor) -> Tensor:
        return latents.unsqueeze(2)

    @override
    def unpack(self, latents: Tensor) -> Tensor:
        return latents.squeeze(2)
