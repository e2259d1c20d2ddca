"""A whole PRX at tiny size, told the size of its pictures."""

import string
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, PRXPipeline, PRXTransformer2DModel
from tiny import CHARACTERS, kl_autoencoder
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder


def t5gemma_tokenizer() -> PreTrainedTokenizerFast:
    """Characters behind a token that begins each prompt."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *CHARACTERS, " ", *string.ascii_uppercase]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="right",
        model_max_length=64,
    )  # fmt: skip


def t5gemma_encoder(vocab_size: int, width: int) -> T5GemmaEncoder:
    config: Any = T5GemmaModuleConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=12, query_pre_attn_scalar=12, sliding_window=512,
        max_position_embeddings=512,
    )  # fmt: skip
    config.dropout_rate = 0.0
    encoder = T5GemmaEncoder(config)
    encoder.config.encoder = config.to_dict()  # where diffusers reads it, as in the config of the whole T5Gemma
    return encoder


def make_prx(num_layers: int = 2, **changes: Any) -> PRXPipeline:
    settings: dict[str, Any] = dict(
        in_channels=4, patch_size=2, context_in_dim=24, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=num_layers,
        axes_dim=[8, 8], resolution_embeds=True,
    )  # fmt: skip
    tokenizer = t5gemma_tokenizer()
    parts: Any = dict(
        transformer=PRXTransformer2DModel(**(settings | changes)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_autoencoder(4, shift=0.06),
        text_encoder=t5gemma_encoder(len(tokenizer), 24),
        tokenizer=tokenizer,
    )
    return PRXPipeline(**parts, default_sample_size=64)
