"""The models that are measured: the bundled one, and Sana's shapes with random weights, made without any download."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from stepfold import assets
from stepfold.config import Config, TeacherSettings, load_config
from stepfold.prompts.cache import ConditionCache, encode_prompts, open_conditions
from stepfold.prompts.reading import PromptFile, open_prompts, shuffled_index
from stepfold.teachers.contract import Condition
from stepfold.teachers.loading import load_teacher
from stepfold.teachers.sana import SanaTeacher

Size = Literal["emoji", "tiny", "sana-0.6b", "sana-1.6b", "flux"]
SIZES: tuple[Size, ...] = ("emoji", "tiny", "sana-0.6b", "sana-1.6b")
COUNTED: tuple[Size, ...] = (*SIZES, "flux")
"""Those that can be counted; of FLUX.1 there is no pipeline here with weights."""
MAX_TOKENS = {"emoji": 32, "tiny": 32, "sana-0.6b": 300, "sana-1.6b": 300, "flux": 512}
NUM_PROMPTS = 32
LONG_PROMPT = 1_500  # characters, more than MAX_TOKENS hold
VOCABULARY = 600
CACHE_KEY = {"made by": "benchmarks"}

# As published, with the normalised queries and keys and the time in [0, 1] of the teachers that Sana-Sprint distils.
SANA: dict[str, Any] = dict(
    in_channels=32, out_channels=32, attention_head_dim=32, caption_channels=2304, mlp_ratio=2.5, sample_size=32,
    patch_size=1, qk_norm="rms_norm_across_heads", timestep_scale=0.001, guidance_embeds=False,
)  # fmt: skip
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "sana-0.6b": SANA | dict(
        num_layers=28, num_attention_heads=36, num_cross_attention_heads=16, cross_attention_head_dim=72,
        cross_attention_dim=1152,
    ),
    "sana-1.6b": SANA | dict(
        num_layers=20, num_attention_heads=70, num_cross_attention_heads=20, cross_attention_head_dim=112,
        cross_attention_dim=2240,
    ),
    "tiny": SANA | dict(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, num_cross_attention_heads=2,
        cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=32, sample_size=8,
    ),
}  # fmt: skip
FLUX: dict[str, Any] = dict(  # as FLUX.1-dev has it: 11.9 billion weights
    in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
    joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
)  # fmt: skip
FLUX_VAE: dict[str, Any] = dict(
    latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=1024,
    scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip
FLUX_SCHEDULE: dict[str, Any] = dict(
    shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
)
GEMMA_2B: dict[str, Any] = {}  # transformers' defaults are its shape
GEMMA_TINY: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, max_position_embeddings=2048,
)  # fmt: skip
DC_AE_F32C32: dict[str, Any] = dict(
    latent_channels=32, scaling_factor=0.41407, downsample_block_type="conv", upsample_block_type="interpolate",
    encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    encoder_qkv_multiscales=((),) * 6,
)  # fmt: skip
DC_AE_TINY: dict[str, Any] = dict(
    latent_channels=4, attention_head_dim=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
    encoder_block_out_channels=(8, 8, 16), decoder_block_out_channels=(8, 8, 16), encoder_layers_per_block=(1, 1, 1),
    decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
)  # fmt: skip


def instruction() -> list[str]:
    """What SanaPipeline puts before a prompt."""
    return inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level one that has seen the instruction, so that this is about as long as it is for Gemma's own."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<eos>", "<bos>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(instruction(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="right"
    )


def make_pipeline(size: Size, device: torch.device, folder: Path) -> None:
    """Saves a SanaPipeline of a shape, with random weights."""
    tiny = size == "tiny"
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        transformer = SanaTransformer2DModel(**TRANSFORMERS[size])
        vae: Any = AutoencoderDC(**(DC_AE_TINY if tiny else DC_AE_F32C32))
        text_encoder: Any = Gemma2Model(Gemma2Config(**(GEMMA_TINY if tiny else GEMMA_2B)))
    parts: Any = dict(
        tokenizer=make_tokenizer(), text_encoder=text_encoder.to(torch.bfloat16), vae=vae.to(torch.bfloat16),
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0 if tiny else 3.0),
    )  # fmt: skip
    SanaPipeline(**parts).save_pretrained(folder, safe_serialization=True)


@dataclass(frozen=True)
class Place:
    """A folder with what is measured: the prompts, their conditions, and the pipeline unless it is the bundled one.

    Attributes:
        size: of the model.
        device: where it goes.
        folder: which.
    """

    size: Size
    device: str
    folder: Path

    @property
    def teacher(self) -> TeacherSettings:
        """The teacher's settings."""
        source = "emoji" if self.size == "emoji" else str(self.folder / "pipeline")
        return TeacherSettings(source=source, max_tokens=MAX_TOKENS[self.size])

    @property
    def prompts(self) -> PromptFile:
        """The prompts."""
        return open_prompts(self.folder / "prompts.txt")

    @property
    def cache(self) -> ConditionCache:
        """Their conditions."""
        return open_conditions(self.folder / "conditions", CACHE_KEY)

    def config(self, preset: str, changes: list[str]) -> Config:
        """Settings for this teacher and these prompts."""
        config = load_config(preset, changes, prompts=str(self.folder / "prompts.txt"))
        return config.model_copy(update={"teacher": self.teacher})


def make_place(size: Size, device: str, folder: Path) -> Place:
    """Fills a folder: some of the bundled prompts, many in a line where a prompt is to fill all tokens."""
    place, every = Place(size, device, folder), open_prompts(assets.PROMPTS)
    lines = [every.prompt(shuffled_index(i, len(every), 0)) for i in range(NUM_PROMPTS)]
    if size.startswith("sana"):
        lines = [", ".join(lines[i:] + lines[:i])[:LONG_PROMPT] for i in range(NUM_PROMPTS)]
    (folder / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if size != "emoji":
        make_pipeline(size, torch.device(device), folder / "pipeline")
    teacher = open_teacher(place, with_encoders=True)
    black = torch.zeros(teacher.latent_shape)  # for a filter that is off
    prompts = place.prompts
    encode_prompts(
        folder / "conditions", CACHE_KEY, prompts, lambda index: teacher.encode([prompts.prompt(i) for i in index]),
        teacher.null_condition, black, batch=8,
    )  # fmt: skip
    return place


def open_teacher(place: Place, with_encoders: bool, dtype: torch.dtype = torch.float32) -> SanaTeacher:
    """The teacher, with text encoder and autoencoder on the device, or without either and with cached conditions.

    On a GPU those two are in bfloat16, as users load them.
    """
    device = torch.device(place.device)
    if not with_encoders:
        return load_teacher(place.teacher, device, dtype, network_only=True, null=place.cache.null)
    teacher = load_teacher(place.teacher, device, dtype)
    if device.type != "cpu":
        for part in (teacher.pipe.text_encoder, teacher.pipe.vae):
            part.to(device, torch.bfloat16)
    return teacher


def as_cached(condition: Condition) -> Condition:
    """Rounded to what the cache holds, so that those who encode for themselves see equal numbers."""
    return condition.to(condition.embeds.device, torch.bfloat16).to(condition.embeds.device, condition.embeds.dtype)
