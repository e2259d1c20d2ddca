"""LongCat-Image: flow prediction on latents packed two by two, guidance that never lengthens a token."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import LongCatImagePipeline
from torch import Tensor
from typing_extensions import override

from stepfold.teachers.contract import Condition
from stepfold.teachers.family import Predict
from stepfold.teachers.flux import PackedTeacher, keep_precision, packed_prediction, places
from stepfold.teachers.guidance import guided_at_length, token_length


def longcat_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, time_scale: float
) -> Tensor:
    """F [B, C, H, W] of a LongCatImageTransformer2DModel, whose time counts to `time_scale`; it embeds no guidance.

    It multiplies the time that it is given by 1000 itself. The text's tokens stand on a diagonal, and the picture's
    begin at its end.
    """
    embeds = condition.embeds
    diagonal = torch.arange(embeds.shape[1], device=embeds.device).to(embeds)
    start = embeds.new_tensor([1, embeds.shape[1], embeds.shape[1]])

    def velocity(tokens: Tensor, t_flow: Tensor) -> Tensor:
        return transformer(
            hidden_states=tokens,
            timestep=time_scale / 1000 * t_flow,
            encoder_hidden_states=embeds,
            txt_ids=torch.stack([torch.zeros_like(diagonal), diagonal, diagonal], -1),
            img_ids=places(x_unit, embeds) + start,
            return_dict=False,
        )[0]

    return packed_prediction(x_unit, t, velocity)


class LongCatImageTeacher(PackedTeacher):
    """LongCatImagePipeline; the student is one too, without guidance."""

    pipelines = (LongCatImagePipeline,)
    time_module = "time_embed"
    loads_lora = False
    fixed_options: ClassVar[Any] = {"enable_prompt_rewrite": False}  # by default its text encoder writes prompts itself
    negative_prompt = ""  # by default one for all, which does not fit several
    fields: ClassVar[Any] = {"patch_size": ((1,), "the pipeline packs four latents into a token itself")}

    @override
    def check_network(self, latent_channels: int) -> None:
        self.check_tokens(self.usual_tokens())
        super().check_network(latent_channels)

    @override
    def predictor(self) -> Predict:
        self.transformer.x_embedder.register_forward_hook(keep_precision)  # a student's copy has it too
        return partial(longcat_network, time_scale=self.time_scale)

    @override
    def guided(self, x_unit: Tensor, t: Tensor, without: Tensor, with_prompt: Tensor, weight: Tensor) -> Tensor:
        """A token of the flow velocity that is longer than with the prompt gets the length that it has with it."""
        return guided_at_length(x_unit, t, without, with_prompt, weight, token_length, most=1.0)

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """Always as long as the pipeline reads; padding is attended to as in use."""
        return Condition.whole(self.pipe.encode_prompt(list(prompts))[0].to(self.work_dtype))

    @override
    def block_stacks(self) -> dict[str, str]:
        return super().block_stacks() | {"single_transformer_blocks": "num_single_layers"}
