"""A tiny pipeline of HunyuanImage 2.1."""

from typing import Any

from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKLHunyuanImage,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
)
from tiny_qwen import qwen_encoder, qwen_tokenizer
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel


def make_hunyuan_image(num_layers: int = 2, **fields: Any) -> HunyuanImagePipeline:
    """With one guider for all prompts, as a student's pipeline has."""
    settings: dict[str, Any] = dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=num_layers,
        num_single_layers=2, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=32, text_embed_2_dim=12,
        rope_axes_dim=(8, 8),
    )  # fmt: skip
    tokenizer, quoted = qwen_tokenizer(), ByT5Tokenizer()
    parts: Any = dict(
        transformer=HunyuanImageTransformer2DModel(**settings | fields),
        vae=AutoencoderKLHunyuanImage(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 32), layers_per_block=1,
            spatial_compression_ratio=4, sample_size=32, scaling_factor=0.7,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder=qwen_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(quoted), d_model=12, d_kv=6, d_ff=12, num_layers=1, num_heads=2)
        ),
        tokenizer_2=quoted,
        guider=AdaptiveProjectedMixGuidance(guidance_scale=3.5, adaptive_projected_guidance_scale=1.0),
    )  # fmt: skip
    return HunyuanImagePipeline(**parts)
