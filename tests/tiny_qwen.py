"""Tiny pipelines with text encoders of Qwen, and with Qwen-Image's autoencoder."""

import json
from collections.abc import Sequence
from typing import Any

import tiny
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3VLConfig,
    Qwen3VLModel,
)

TEMPLATE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:",
    *("system", "user", "assistant", "\n"),
)
"""The words of the pipelines' templates; each is one token, as in the published tokenizer."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ROPE: dict[str, Any] = dict(rope_type="default", mrope_section=[2, 1, 1], rope_theta=10000.0)


def qwen_tokenizer(words: Sequence[str] = TEMPLATE) -> Qwen2Tokenizer:
    """A byte-level BPE to which other words are bytes."""
    own = Qwen2Tokenizer(vocab={SPECIAL[0]: 0}, merges=[])
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = own.backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        words,
        trainers.BpeTrainer(vocab_size=1000, special_tokens=[*SPECIAL], initial_alphabet=alphabet, show_progress=False),
    )
    merges: Any = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    special: Any = {"additional_special_tokens": [*SPECIAL[1:]]}
    return Qwen2Tokenizer(learner.get_vocab(), merges, model_max_length=2048, **special)


def qwen_encoder(vocab_size: int, width: int = 32, num_layers: int = 2) -> Qwen2_5_VLForConditionalGeneration:
    text = dict(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=48, num_hidden_layers=num_layers,
        num_attention_heads=width // 8, num_key_value_heads=2, max_position_embeddings=2048, rope_parameters=ROPE,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    vision = dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=width, fullatt_block_indexes=[0]
    )
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, image_token_id=7, video_token_id=8, vision_start_token_id=9,
            vision_end_token_id=10,
        )
    )  # fmt: skip


def qwen_autoencoder() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[-0.3, 0.1, 0.2, 0.4], latents_std=[0.9, 1.5, 2.0, 1.2],
    )  # fmt: skip


def make_qwen_image(num_layers: int = 2, **schedule: Any) -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=num_layers, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    tokenizer = qwen_tokenizer()
    parts: Any = dict(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02,
            **schedule,
        ),
        vae=qwen_autoencoder(),
        text_encoder=qwen_encoder(len(tokenizer)),
        tokenizer=tokenizer,
    )  # fmt: skip
    return QwenImagePipeline(**parts)


def make_longcat(num_layers: int = 1) -> LongCatImagePipeline:
    """With a tokenizer in the place of the processor, which needs torchvision; it serves to write prompts anew only.

    The pipeline draws noise of 16 channels whatever the network takes.
    """
    transformer = LongCatImageTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=num_layers, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    tokenizer = qwen_tokenizer()
    parts: Any = dict(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny.kl_autoencoder(16, shift=0.06),
        text_encoder=qwen_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        text_processor=tokenizer,
    )
    return LongCatImagePipeline(**parts)


def make_krea2(num_layers: int = 2, **fields: Any) -> Krea2Pipeline:
    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=num_layers, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=48, timestep_embed_dim=16, text_hidden_dim=32, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=48, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    tokenizer = qwen_tokenizer()
    text = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=2048, rope_parameters=ROPE,
    )  # fmt: skip
    vision = dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, num_position_embeddings=16,
        deepstack_visual_indexes=[0],
    )  # fmt: skip
    parts: Any = dict(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.15, max_image_seq_len=6400),
        vae=qwen_autoencoder(),
        text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
    )
    return Krea2Pipeline(**parts, **{"text_encoder_select_layers": (1, 2, 4)} | fields)
