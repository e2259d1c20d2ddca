"""A tiny pipeline of HunyuanVideo 1.5."""

from typing import Any

from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from tiny import qwen_tokenizer
from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel

TEMPLATE = """{%- for _ in range(107) -%}<think>{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == "user" -%}<|im_start|>{{ message.content }}<|im_end|>{%- endif -%}
{%- endfor -%}"""
"""As many tokens before a prompt as the pipeline cuts off, with no system message: that is long in bytes."""


def make_hunyuan_video(num_layers: int = 2) -> HunyuanVideo15Pipeline:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = TEMPLATE
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=num_layers,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16, text_embed_2_dim=12, image_embed_dim=8,
        rope_axes_dim=(4, 6, 6), target_size=640, task_type="t2v",
    )  # fmt: skip
    text_encoder = Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]},
        )
    )  # fmt: skip
    glyphs = ByT5Tokenizer()
    parts: Any = dict(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        vae=AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(4, 8, 8), layers_per_block=1, spatial_compression_ratio=4,
            temporal_compression_ratio=4, scaling_factor=1.4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(glyphs), d_model=12, d_kv=6, d_ff=12, num_layers=1, num_heads=2)
        ),
        tokenizer_2=glyphs,
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )  # fmt: skip
    return HunyuanVideo15Pipeline(**parts)
