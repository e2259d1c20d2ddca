"""A whole Z-Image at tiny size: texts on both sides of 32 tokens, refiners, and two kinds of padding."""

import string
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tiny import CHARACTERS, kl_autoencoder
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Characters, and the marks of a chat."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*marks, "<unk>", *CHARACTERS, *" \n<>/", *string.ascii_uppercase]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="right",
        chat_template=CHAT,
    )  # fmt: skip


def qwen_encoder(vocab_size: int, width: int) -> Qwen3Model:
    return Qwen3Model(
        Qwen3Config(
            vocab_size=vocab_size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=1, head_dim=12, max_position_embeddings=512,
        )
    )  # fmt: skip


def make_z_image(num_layers: int = 2, **changes: Any) -> ZImagePipeline:
    tokenizer = qwen_tokenizer()
    settings: dict[str, Any] = dict(
        in_channels=4, dim=32, n_layers=num_layers, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
        axes_dims=[8, 4, 4], axes_lens=[300, 32, 32],
    )  # fmt: skip
    parts: Any = dict(
        transformer=ZImageTransformer2DModel(**(settings | changes)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=kl_autoencoder(4, shift=0.06),
        text_encoder=qwen_encoder(len(tokenizer), 24),
        tokenizer=tokenizer,
    )
    return ZImagePipeline(**parts)
