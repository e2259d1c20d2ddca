"""A tiny modular pipeline: Anima, without the padding mask, for which diffusers needs torchvision."""

from typing import Any

from diffusers import (
    AnimaTextConditioner,
    ClassifierFreeGuidance,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from tiny import t5_tokenizer
from tiny_qwen import qwen_autoencoder, qwen_tokenizer
from tiny_z_image import qwen_encoder

from stepfold.teachers.anima_pipeline import AnimaModularPipeline


def make_anima(num_layers: int = 2, **fields: Any) -> AnimaModularPipeline:
    tokenizer, second = qwen_tokenizer(), t5_tokenizer()
    settings: dict[str, Any] = dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=num_layers,
        mlp_ratio=2.0, text_embed_dim=20, adaln_lora_dim=8, max_size=(4, 32, 32), rope_scale=(1.0, 4.0, 4.0),
        concat_padding_mask=False, extra_pos_embed_type=None,
    )  # fmt: skip
    return AnimaModularPipeline(
        transformer=CosmosTransformer3DModel(**settings | fields),
        text_conditioner=AnimaTextConditioner(
            source_dim=24, target_dim=20, model_dim=16, num_layers=2, num_attention_heads=2, mlp_ratio=2.0,
            target_vocab_size=len(second), min_sequence_length=64,
        ),
        text_encoder=qwen_encoder(len(tokenizer), 24),
        tokenizer=tokenizer,
        t5_tokenizer=second,
        vae=qwen_autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
    )  # fmt: skip
