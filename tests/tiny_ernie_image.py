"""A whole ERNIE-Image at tiny size, with the prompt enhancer that teachers leave out."""

from typing import Any

import tiny
from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import Ministral3Config, Ministral3ForCausalLM


def make_ernie_image(num_layers: int = 2, **changes: Any) -> ErnieImagePipeline:
    settings: dict[str, Any] = dict(
        hidden_size=32, num_attention_heads=2, num_layers=num_layers, ffn_hidden_size=48, in_channels=16,
        out_channels=16, text_in_dim=24, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    tokenizer = tiny.mistral_tokenizer()
    enhancer = Ministral3Config(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    parts: Any = dict(
        transformer=ErnieImageTransformer2DModel(**(settings | changes)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny.flux2_autoencoder(),
        text_encoder=tiny.mistral3_encoder(24, 3).model,
        tokenizer=tokenizer,
        pe=Ministral3ForCausalLM(enhancer),
        pe_tokenizer=tokenizer,
    )
    return ErnieImagePipeline(**parts)
