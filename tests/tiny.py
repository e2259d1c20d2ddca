"""Whole pipelines of the real classes at tiny size, with random weights that let everything they are given matter."""

import inspect
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from stepfold.sampling.recipe import Recipe, times_of
from stepfold.teachers.contract import SamplerName

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
CHARACTERS = string.ascii_lowercase + string.digits + ",.'-:"
T5_PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in CHARACTERS)]


DIT_CLASSES = (
    "dog on blue background", "rocket", "pizza on a white plate", "ghost", "snowman on teal background", "green apple",
    "moon", "yellow star on black background", "house",
)  # fmt: skip


@torch.no_grad()
def enliven(module: nn.Module) -> None:
    """Weights of unit gain instead of the near-zero default: every input of the network reaches its output."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and "scale_shift_table" not in name and "embed_tokens" not in name:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def clip_tokenizer() -> CLIPTokenizer:
    words = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def clip_encoder(kind: type, width: int) -> Any:
    tokenizer = clip_tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
            num_hidden_layers=2, num_attention_heads=2, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def t5_tokenizer() -> T5Tokenizer:
    return T5Tokenizer(vocab=T5_PIECES, extra_ids=0)


def t5_encoder(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2)
    )


def kl_autoencoder(channels: int, shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16), latent_channels=channels, norm_num_groups=4, layers_per_block=1, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=1.5, shift_factor=shift, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def sana_tokenizer(pipeline: type = SanaPipeline) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows the words of the prompts and of the pipeline's default instruction."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
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


def gemma_encoder(vocab_size: int) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, max_position_embeddings=2048,
            sliding_window=2048, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        )
    )  # fmt: skip


def dc_autoencoder() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=8, scaling_factor=0.7,
        encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 16), decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
    )  # fmt: skip


def sana_transformer(**changes: Any) -> SanaTransformer2DModel:
    settings: dict[str, Any] = dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=32,
        mlp_ratio=2.0, sample_size=8, patch_size=1, qk_norm="rms_norm_across_heads", timestep_scale=0.001,
    )  # fmt: skip
    return SanaTransformer2DModel(**(settings | changes))


def make_sana(**changes: Any) -> SanaPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = sana_tokenizer()
        text_encoder, vae, transformer = gemma_encoder(len(tokenizer)), dc_autoencoder(), sana_transformer(**changes)
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


def make_sprint() -> SanaSprintPipeline:
    """As the published ones: TrigFlow, guidance embedded."""
    sana = make_sana(guidance_embeds=True, timestep_scale=1.0)
    parts: Any = sana.components | {"scheduler": SCMScheduler(prediction_type="trigflow", sigma_data=0.5)}
    return SanaSprintPipeline(**parts)


def make_sd3(num_layers: int = 2) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=num_layers, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=28,
        pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip
    parts: Any = dict(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_autoencoder(4, shift=0.06),
        text_encoder=clip_encoder(CLIPTextModelWithProjection, 16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection, 12),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(32),
        tokenizer_3=t5_tokenizer(),
    )
    return StableDiffusion3Pipeline(**parts)


def make_auraflow() -> AuraFlowPipeline:
    """A family that the package does not have: docs/add-a-family.md adds it."""
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
        pos_embed_max_size=64,
    )  # fmt: skip
    parts: Any = dict(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=kl_autoencoder(4),
        text_encoder=t5_encoder(32),
        tokenizer=t5_tokenizer(),
    )
    return AuraFlowPipeline(**parts)


def make_flux(guidance_embeds: bool = True, num_layers: int = 1) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=num_layers, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    parts: Any = dict(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=kl_autoencoder(4, shift=0.06),
        text_encoder=clip_encoder(CLIPTextModel, 16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(32),
        tokenizer_2=t5_tokenizer(),
    )
    return FluxPipeline(**parts)


QWEN_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false -%}
<think>

</think>

{% endif -%}
{%- endif -%}"""
MISTRAL_TEMPLATE = """<s>{%- for message in messages -%}
{%- if message.role == "system" -%}[SYSTEM_PROMPT]{{ message.content[0].text }}[/SYSTEM_PROMPT]
{%- else -%}[INST]{{ message.content[0].text }}[/INST]{%- endif -%}
{%- endfor -%}"""


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Of bytes; and the words of the chat template as a whole."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.add_tokens(
        ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "user", "assistant"], special_tokens=True
    )
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def qwen3_encoder(width: int, layers: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(qwen_tokenizer()), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=1, head_dim=4, tie_word_embeddings=True,
        )
    )  # fmt: skip


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Characters; and one token that is the pipeline's system message as a whole. Pads before the text.

    In the place of a PixtralProcessor, which needs torchvision and for texts calls such a one.
    """
    words = ["<pad>", "<s>", "</s>", "<unk>", *CHARACTERS, " "]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_tokens(["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", SYSTEM_MESSAGE])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
        chat_template=MISTRAL_TEMPLATE,
    )  # fmt: skip


def mistral3_encoder(width: int, layers: int) -> Mistral3ForConditionalGeneration:
    text = dict(
        model_type="mistral", vocab_size=len(mistral_tokenizer()), hidden_size=width,
        intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    vision = dict(
        model_type="pixtral", hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        image_size=28, patch_size=14,
    )  # fmt: skip
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision, image_token_index=0))


def flux2_autoencoder() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.bn.running_mean.copy_(torch.linspace(-0.6, 0.9, 16))
    vae.bn.running_var.copy_(torch.linspace(0.4, 2.5, 16))
    return vae


def flux2_transformer(width: int, **changes: Any) -> Flux2Transformer2DModel:
    settings: dict[str, Any] = dict(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=width, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return Flux2Transformer2DModel(**(settings | changes))


def make_flux2_klein(is_distilled: bool = False, num_layers: int = 2) -> Flux2KleinPipeline:
    return Flux2KleinPipeline(
        transformer=flux2_transformer(24, num_layers=num_layers, guidance_embeds=False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_autoencoder(),
        text_encoder=qwen3_encoder(8, 28),
        tokenizer=qwen_tokenizer(),
        is_distilled=is_distilled,
    )


def make_flux2(num_layers: int = 2) -> Flux2Pipeline:
    return Flux2Pipeline(
        transformer=flux2_transformer(48, num_layers=num_layers),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_autoencoder(),
        text_encoder=mistral3_encoder(16, 31),
        tokenizer=mistral_tokenizer(),
    )


def make_pixart(num_layers: int = 2) -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=num_layers, attention_head_dim=8,
        num_attention_heads=4, cross_attention_dim=32, caption_channels=24, use_additional_conditions=False,
    )  # fmt: skip
    parts: Any = dict(
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
        vae=kl_autoencoder(4),
        text_encoder=t5_encoder(24),
        tokenizer=t5_tokenizer(),
    )
    return PixArtSigmaPipeline(**parts)


def make_dit(num_layers: int = 2) -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=8, num_layers=num_layers, attention_head_dim=8,
        num_attention_heads=4, attention_bias=True,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    labels = {207: "red heart, love", 3: "a cat, Cat", 4: "a fish, please"} | dict(enumerate(DIT_CLASSES, start=20))
    parts: Any = dict(transformer=transformer, scheduler=scheduler, vae=kl_autoencoder(4), id2label=labels)
    pipe = DiTPipeline(**parts)
    pipe.register_to_config(id2label={str(number): label for number, label in labels.items()})  # as the published one
    return pipe


def unet(width: int, **changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width, attention_head_dim=8, norm_num_groups=4, **changes,
    )  # fmt: skip


def make_sd1(**schedule: Any) -> StableDiffusionPipeline:
    parts: Any = dict(
        unet=unet(16),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
            **schedule,
        ),
        vae=kl_autoencoder(4),
        text_encoder=clip_encoder(CLIPTextModel, 16),
        tokenizer=clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
    )  # fmt: skip
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def make_sd2() -> StableDiffusionPipeline:
    return make_sd1(prediction_type="v_prediction")


def make_sd2_zero() -> StableDiffusionPipeline:
    """One whose schedule ends in pure noise, as a v prediction may."""
    pipe = make_sd2()
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return pipe


def make_sdxl(**schedule: Any) -> StableDiffusionXLPipeline:
    parts: Any = dict(
        unet=unet(
            28, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=12 + 6 * 4,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **schedule
        ),
        vae=kl_autoencoder(4),
        text_encoder=clip_encoder(CLIPTextModel, 16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection, 12),
        tokenizer_2=clip_tokenizer(),
    )  # fmt: skip
    return StableDiffusionXLPipeline(**parts)


def lumina2_tokenizer() -> PreTrainedTokenizerFast:
    """Characters; and one token that is the pipeline's system prompt as a whole."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *CHARACTERS, *" <>", *string.ascii_uppercase]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    system = inspect.getsource(Lumina2Pipeline.__init__).split('self.system_prompt = "')[1].split('"')[0]
    tokenizer.add_tokens([system])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="right"
    )


def make_lumina2(num_layers: int = 2, **schedule: Any) -> Lumina2Pipeline:
    transformer = Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=32, num_layers=num_layers, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(8, 4, 4), axes_lens=(300, 32, 32),
        cap_feat_dim=32,
    )  # fmt: skip
    tokenizer = lumina2_tokenizer()
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, max_position_embeddings=512,
            sliding_window=512, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        )
    )  # fmt: skip
    parts: Any = dict(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0, **schedule),
        vae=kl_autoencoder(4, shift=0.06),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )
    return Lumina2Pipeline(**parts)


def make_wan(num_layers: int = 2) -> WanPipeline:
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=24,
        freq_dim=16, ffn_dim=32, num_layers=num_layers, rope_max_seq_len=32,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[-0.3, 0.1, 0.2, 0.4], latents_std=[0.9, 1.5, 2.0, 1.2],
    )  # fmt: skip
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(t5_tokenizer()), d_model=24, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    )
    parts: Any = dict(
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=t5_tokenizer(),
    )
    return WanPipeline(**parts)


def save(make: Callable[[], Any], folder: Path) -> Path:
    """A saved pipeline whose networks are enlivened, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = make()
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module) and name != "vae":
                enliven(part)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def save_text_lora(pipe: Any, encoders: list[str], folder: Path) -> None:
    """A LoRA on these text encoders alone, as trainers write them; it stays active in `pipe`."""
    layers = {}
    for name in encoders:
        encoder = getattr(pipe, name)
        lora = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        inject_adapter_in_model(lora, encoder)  # transformers' add_adapter can want a PEFT newer than the newest
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(encoder)
    type(pipe).save_lora_weights(folder, **layers)


def recipe(teacher: Any, sampler: SamplerName = "consistency", *taught: float) -> Recipe:
    """How a student of a teacher is sampled; the first scale that it was taught is its usual one."""
    scales = taught or (2.0,)
    return Recipe(
        sampler=sampler, times=times_of(teacher, sampler), taught=scales, guidance=scales[0],
        sigma_data=teacher.sigma_data, jumps_anywhere=sampler == "flow_map",
    )  # fmt: skip
