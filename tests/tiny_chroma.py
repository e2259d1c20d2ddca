"""A tiny ChromaPipeline."""

from typing import Any

import tiny
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler


def make_chroma() -> ChromaPipeline:
    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_num_channels=64, approximator_hidden_dim=32,
        approximator_layers=2,
    )  # fmt: skip
    parts: Any = dict(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny.kl_autoencoder(4, shift=0.06),
        text_encoder=tiny.t5_encoder(32),
        tokenizer=tiny.t5_tokenizer(),
    )
    return ChromaPipeline(**parts)
