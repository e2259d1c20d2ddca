"""Stable Diffusion 3 and 3.5: flow prediction, classifier-free guidance, two pooled text embeddings and a sequence."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.maths.formulations import flow_prediction
from stepfold.teachers.contract import Condition
from stepfold.teachers.family import Predict
from stepfold.teachers.pipeline import PipelineTeacher


def sd3_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, time_scale: float
) -> Tensor:
    """F [B, C, H, W] of an SD3Transformer2DModel, whose time counts to `time_scale`; it embeds no guidance."""

    def velocity(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        return transformer(
            hidden_states=x_flow,
            timestep=time_scale * t_flow,
            encoder_hidden_states=condition.embeds,
            pooled_projections=condition.pooled,
            return_dict=False,
        )[0]

    return flow_prediction(x_unit, t, velocity)


class SD3Teacher(PipelineTeacher):
    """StableDiffusion3Pipeline; the student is one too, and needs no guidance."""

    pipelines = (StableDiffusion3Pipeline,)
    head = "proj_out"
    time_module = "time_text_embed"
    readers = ("tokenizer_3", "tokenizer")

    @override
    def predictor(self) -> Predict:
        return partial(sd3_network, time_scale=self.time_scale)

    @property
    @override
    def even_ladder(self) -> bool:
        """The scheduler of a re-timed network has no ladder of its own."""
        return self.num_train_timesteps == 1

    @override
    def own_steps(self, num_steps: int) -> dict[str, Any]:
        levels = {"sigmas": [1 - i / num_steps for i in range(num_steps)]} if self.even_ladder else {}
        return super().own_steps(num_steps) | levels

    @override
    def idle_parameters(self) -> tuple[str, ...]:
        """The last block asks nothing on behalf of the text, whose stream ends there."""
        last = f".transformer_blocks.{self.transformer.config.num_layers - 1}.attn."
        return (f"{last}add_q_proj.", f"{last}norm_added_q.")

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        config = self.transformer.config
        side = config.sample_size * factor
        return config.in_channels, factor * config.patch_size, side, side

    @override
    def shape_at(self, height: int, width: int) -> tuple[int, ...]:
        """The network has a table of positions."""
        patch, most = self.transformer.config.patch_size, self.transformer.config.pos_embed_max_size
        if max(height, width) > (side := most * patch * self.factor):
            raise UserError(
                f"the picture is to be {height} x {width} pixels, but this network draws at most {side} a side; "
                "give a smaller height and width"
            )
        return super().shape_at(height, width)

    @override
    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """Every text encoder reads the same prompt, and padding is attended to as in use."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), None, None, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.max_tokens,
        )  # fmt: skip
        return Condition.whole(embeds.to(self.work_dtype), pooled.to(self.work_dtype))
