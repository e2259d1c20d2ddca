"""Lumina Image 2: flow prediction towards the data, classifier-free guidance that keeps the prediction's size."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import Lumina2Pipeline
from torch import Tensor, nn
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.maths.formulations import flow_prediction
from stepfold.teachers.contract import Condition
from stepfold.teachers.family import Predict
from stepfold.teachers.guidance import guided_at_length, row_length
from stepfold.teachers.pipeline import PipelineTeacher


def lumina2_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None
) -> Tensor:
    """F [B, C, H, W] of a Lumina2Transformer2DModel; it embeds no guidance.

    Its time runs from noise at 0 to data at 1, and its velocity with it.
    """

    def velocity(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        return -transformer(
            hidden_states=x_flow,
            timestep=1 - t_flow,
            encoder_hidden_states=condition.embeds,
            encoder_attention_mask=condition.mask,
            return_dict=False,
        )[0]

    return flow_prediction(x_unit, t, velocity)


class Lumina2Teacher(PipelineTeacher):
    """Lumina2Pipeline; the student is one too, without guidance."""

    pipelines = (Lumina2Pipeline,)
    even_ladder = True
    lora_blocks = ("layers.", "refiner.")
    rises_to = "data"

    @classmethod
    @override
    def time_scale_of(cls, network: Mapping[str, Any], schedule: Mapping[str, Any]) -> float:
        return 1.0

    @override
    def block_stacks(self) -> dict[str, str]:
        return {"layers": "num_layers"}

    @override
    def predictor(self) -> Predict:
        return lumina2_network

    @override
    def time_part(self, network: Any) -> str | None:
        return "time_caption_embed.timestep_embedder"

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        """The pipeline insists on multiples of 16."""
        config = self.transformer.config
        side = config.sample_size * factor
        return config.in_channels, math.lcm(factor * config.patch_size, 16), side, side

    @override
    def guided(self, x_unit: Tensor, t: Tensor, without: Tensor, with_prompt: Tensor, weight: Tensor) -> Tensor:
        """Each row of the flow velocity keeps the length that it has with the prompt."""
        return guided_at_length(x_unit, t, without, with_prompt, weight, row_length)

    @override
    def tokens_for_shift(self) -> int:
        """Number of channels, which this pipeline takes for the number of tokens."""
        return self.latent_shape[0]

    @classmethod
    @override
    def before_prompts(cls, pipe: Any) -> tuple[str, int]:
        return f"{pipe.system_prompt} <Prompt Start> ", 0

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """Encodes behind the pipeline's system prompt, which counts towards the prompt's length."""
        before = len(self.pipe.tokenizer(self.before_prompts(self.pipe)[0]).input_ids)
        longest = self.transformer.config.axes_lens[0]
        if not before < self.max_tokens < longest:
            raise UserError(
                f"max_tokens is {self.max_tokens}, but this pipeline puts {before} tokens before each prompt and "
                f"counts to {longest - 1}; choose one between, or leave it out"
            )
        embeds, mask, *_ = self.pipe.encode_prompt(
            list(prompts), False, device=self.device, max_sequence_length=self.max_tokens
        )
        return Condition(embeds.to(self.work_dtype), mask)

    @override
    def encode_nothing(self) -> Condition:
        """Encodes the empty prompt, without the system prompt."""
        *_, embeds, mask = self.pipe.encode_prompt([""], True, device=self.device, max_sequence_length=self.max_tokens)
        return Condition(embeds.to(self.work_dtype), mask)

    @override
    def feature_parts(self) -> list[tuple[nn.Module, int]]:
        """Blocks of the main stack; their outputs hold the prompt's tokens too."""
        return [(block, self.transformer.config.hidden_size) for block in self.transformer.layers]
