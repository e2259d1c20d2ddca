"""A whole SanaPipeline of the real classes at tiny size; its random weights let prompts and guidance matter."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from tiny import enliven
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

PROMPTS = (
    "red heart",
    "a cat",
    "dog on blue background",
    "rocket",
    "pizza on a white plate",
    "ghost",
    "snowman on teal background",
    "green apple",
    "moon",
    "yellow star on black background",
    "house",
    "a fish, please",
)


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> None:
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)  # it refuses a second precision in one process


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows the words of the prompts and of the pipeline's default instruction."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    tokenizer.train_from_iterator(
        [*PROMPTS, *instruction],
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<pad>", "<eos>", "<bos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="right"
    )


def make_text_encoder(vocab_size: int) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, max_position_embeddings=2048,
            sliding_window=2048, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        )
    )  # fmt: skip


def make_vae() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=8, scaling_factor=0.7,
        encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 16), decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
    )  # fmt: skip


def make_transformer(**changes: Any) -> SanaTransformer2DModel:
    settings: dict[str, Any] = dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=32,
        mlp_ratio=2.0, sample_size=8, patch_size=1, qk_norm="rms_norm_across_heads", timestep_scale=0.001,
    )  # fmt: skip
    return SanaTransformer2DModel(**(settings | changes))


def make_pipeline(**changes: Any) -> SanaPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        text_encoder, vae, transformer = make_text_encoder(len(tokenizer)), make_vae(), make_transformer(**changes)
        enliven(text_encoder)
        enliven(transformer)
    parts: Any = dict(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
    return SanaPipeline(**parts)


@pytest.fixture(scope="session")
def tiny_sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved SanaPipeline folder, 32 x 32 pixels, latents 4 x 8 x 8. Shared: copy it before changing anything."""
    folder = tmp_path_factory.mktemp("teacher") / "tiny_sana"
    make_pipeline().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def first_sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as the first published ones are: its time counts to 1000, and nothing norms queries and keys."""
    folder = tmp_path_factory.mktemp("teacher") / "first_sana"
    make_pipeline(timestep_scale=1.0, qk_norm=None).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    """A dozen prompts, one a line."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path
