"""HunyuanImage 2.1: flow prediction, guidance by a guider, two texts; latents [B, C, H, W]."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

from diffusers import HunyuanImagePipeline
from torch import Tensor, nn
from typing_extensions import override

from stepfold.maths.formulations import flow_prediction
from stepfold.teachers.contract import Condition
from stepfold.teachers.family import Predict
from stepfold.teachers.guiders import GuiderTeacher, QuotedTexts
from stepfold.teachers.tokens import TextReader


@contextmanager
def recomputed(transformer: Any) -> Iterator[None]:
    """Blocks that the backward pass computes again take arguments by name, as this network gives them to diffusers."""
    if not transformer.gradient_checkpointing:
        yield
        return
    own = transformer._gradient_checkpointing_func
    transformer._gradient_checkpointing_func = lambda block, *inputs, **named: own(partial(block, **named), *inputs)
    try:
        yield
    finally:
        transformer._gradient_checkpointing_func = own


def hunyuan_image_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, time_scale: float
) -> Tensor:
    """F [B, C, H, W] of a HunyuanImageTransformer2DModel, whose time counts to `time_scale`; it embeds no guidance."""
    quoted = condition.second
    assert quoted is not None

    def velocity(x_flow: Tensor, t_flow: Tensor) -> Tensor:
        with recomputed(transformer):
            return transformer(
                hidden_states=x_flow,
                timestep=time_scale * t_flow,
                encoder_hidden_states=condition.embeds,
                encoder_attention_mask=condition.mask,
                encoder_hidden_states_2=quoted.embeds,
                encoder_attention_mask_2=quoted.mask,
                return_dict=False,
            )[0]

    return flow_prediction(x_unit, t, velocity)


class HunyuanImageTeacher(QuotedTexts, GuiderTeacher):
    """HunyuanImagePipeline; the student is one too, with one guider, at scale 1."""

    pipelines = (HunyuanImagePipeline,)
    loads_lora = False
    even_ladder = True
    picture_output = 0
    stand_ins = ("vae",)
    guiders = ("guider", "ocr_guider")
    second_tokens = 128
    fields: ClassVar[Any] = {
        "use_meanflow": ((False, None), "it is distilled, and told two times"),
        "guidance_embeds": ((False, None), "it is distilled with its guidance"),
    }

    @override
    def predictor(self) -> Predict:
        return partial(hunyuan_image_network, time_scale=self.time_scale)

    @override
    def time_part(self, network: Any) -> str | None:
        return "time_guidance_embed"

    @override
    def idle_parameters(self) -> tuple[str, ...]:
        """Few prompts have a second text."""
        return (".context_embedder_2.",)

    @override
    def block_stacks(self) -> dict[str, str]:
        return super().block_stacks() | {"single_transformer_blocks": "num_single_layers"}

    @override
    def feature_parts(self) -> list[tuple[nn.Module, int]]:
        """Blocks of both kinds."""
        config = self.transformer.config
        blocks = (*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks)
        return [(block, config.num_attention_heads * config.attention_head_dim) for block in blocks]

    @override
    def pixels_a_latent(self, vae: dict[str, Any]) -> int:
        return vae["spatial_compression_ratio"]

    @override
    def geometry(self, factor: int) -> tuple[int, int, int, int]:
        config, side = self.transformer.config, self.pipe.default_sample_size * factor
        return config.in_channels, factor * math.lcm(*config.patch_size), side, side

    @classmethod
    @override
    def reader_in(cls, pipe: Any, max_tokens: int | None = None) -> TextReader:
        """Tokens of the template before a prompt are cut off; the one behind it counts."""
        before = pipe.prompt_template_encode.split("{}")[0]
        most = (max_tokens or cls.most_tokens) - 1
        return TextReader(pipe.tokenizer, most, before, pipe.prompt_template_encode_start_idx)
