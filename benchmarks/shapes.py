"""The networks of the four-step presets at their published sizes, without weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from models import DC_AE_F32C32, GEMMA_2B, TRANSFORMERS


@dataclass(frozen=True)
class Shape:
    """A preset's teacher.

    Attributes:
        pipeline: its class.
        network: its network's class.
        config: of the network.
        vae: the autoencoder's class and config.
        text: tokens and width of a prompt's condition.
        pooled: width of its pooled text, if it has one.
        stacks: fields of the config that count blocks -> how many the published network has; empty: counted whole.
        noise: whether it predicts noise.
    """

    pipeline: str
    network: str
    config: dict[str, Any]
    vae: tuple[Any, dict[str, Any]]
    text: tuple[int, int]
    pooled: int | None = None
    stacks: dict[str, int] = field(default_factory=dict)
    noise: bool = False

    @property
    def network_part(self) -> str:
        """The network's part in the pipeline."""
        return "unet" if self.network == "UNet2DConditionModel" else "transformer"

    def make_network(self, **changes: Any) -> Any:
        """The network, on whatever device is the default."""
        return getattr(diffusers, self.network)(**(self.config | self.stacks | changes))

    def scheduler(self) -> Any:
        """Its usual one."""
        if self.noise:
            return DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        return FlowMatchEulerDiscreteScheduler(shift=3.0)


KL = dict(
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
)  # fmt: skip
KL16 = (AutoencoderKL, KL | dict(latent_channels=16))
SHAPES: dict[str, Shape] = {
    "sd1": Shape(
        "StableDiffusionPipeline", "UNet2DConditionModel", dict(cross_attention_dim=768, sample_size=64),
        (AutoencoderKL, KL | dict(latent_channels=4)), (77, 768), noise=True,
    ),
    "sdxl": Shape(
        "StableDiffusionXLPipeline", "UNet2DConditionModel",
        dict(
            block_out_channels=(320, 640, 1280), cross_attention_dim=2048, transformer_layers_per_block=(1, 2, 10),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
            attention_head_dim=[5, 10, 20], sample_size=128,
        ),
        (AutoencoderKL, KL | dict(latent_channels=4)), (77, 2048), pooled=1280, noise=True,
    ),
    "sd3": Shape(
        "StableDiffusion3Pipeline", "SD3Transformer2DModel",
        dict(
            qk_norm="rms_norm", dual_attention_layers=tuple(range(13)), num_layers=24, num_attention_heads=24,
            caption_projection_dim=1536, sample_size=128, pos_embed_max_size=384,
        ),
        KL16, (333, 4096), pooled=2048,
    ),
    "sana": Shape(
        "SanaPipeline", "SanaTransformer2DModel", TRANSFORMERS["sana-1.6b"] | dict(timestep_scale=1.0, qk_norm=None),
        (AutoencoderDC, DC_AE_F32C32), (300, 2304), stacks=dict(num_layers=20),
    ),
    "lumina2": Shape(
        "Lumina2Pipeline", "Lumina2Transformer2DModel", {}, KL16, (256, 2304), stacks=dict(num_layers=26),
    ),
    "flux": Shape(
        "FluxPipeline", "FluxTransformer2DModel", dict(guidance_embeds=True), KL16, (512, 4096), pooled=768,
        stacks=dict(num_layers=19, num_single_layers=38),
    ),
    "flux2-klein": Shape(
        "Flux2KleinPipeline", "Flux2Transformer2DModel",
        dict(num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False),
        (AutoencoderKLFlux2, {}), (512, 7680), stacks=dict(num_layers=5, num_single_layers=20),
    ),
    "z-image": Shape(
        "ZImagePipeline", "ZImageTransformer2DModel", {}, KL16, (512, 2560), stacks=dict(n_layers=30),
    ),
    "chroma": Shape(
        "ChromaPipeline", "ChromaTransformer2DModel", {}, KL16, (512, 4097),
        stacks=dict(num_layers=19, num_single_layers=38),
    ),
    "qwen-image": Shape(
        "QwenImagePipeline", "QwenImageTransformer2DModel", {}, (AutoencoderKLQwenImage, {}), (512, 3584),
        stacks=dict(num_layers=60),
    ),
    "wan": Shape(
        "WanPipeline", "WanTransformer3DModel", dict(num_attention_heads=12, ffn_dim=8960), (AutoencoderKLWan, {}),
        (512, 4096), stacks=dict(num_layers=30),
    ),
    "wan22-ti2v": Shape(
        "WanPipeline", "WanTransformer3DModel",
        dict(in_channels=48, out_channels=48, num_attention_heads=24, ffn_dim=14336),
        (AutoencoderKLWan, dict(z_dim=48, scale_factor_spatial=16)), (512, 4096), stacks=dict(num_layers=30),
    ),
}  # fmt: skip
"""Family of a preset FAMILY-lora-4step -> its teacher; texts at the longest that is read by default."""

T5_XXL: dict[str, Any] = dict(
    d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu"
)
QWEN_7B: dict[str, Any] = dict(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
    vocab_size=152064,
)  # fmt: skip
ENCODERS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "Qwen3 4B": (
        transformers.Qwen3Model,
        lambda: transformers.Qwen3Config(
            hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, vocab_size=151936,
        ),
    ),
    "Gemma 2 2B": (transformers.Gemma2Model, lambda: transformers.Gemma2Config(**GEMMA_2B)),
    "T5 XXL": (transformers.T5EncoderModel, lambda: transformers.T5Config(vocab_size=32128, **T5_XXL)),
    "UMT5 XXL": (transformers.UMT5EncoderModel, lambda: transformers.UMT5Config(vocab_size=256384, **T5_XXL)),
    "Qwen2.5-VL 7B": (
        transformers.Qwen2_5_VLForConditionalGeneration,
        lambda: transformers.Qwen2_5_VLConfig(
            text_config=QWEN_7B, vision_config=dict(hidden_size=1280, intermediate_size=3420, out_hidden_size=3584)
        ),
    ),
    "Mistral Small 3 24B": (
        transformers.Mistral3ForConditionalGeneration,
        lambda: transformers.Mistral3Config(tie_word_embeddings=False),
    ),
}  # fmt: skip
"""Text encoder -> its class and what makes its config, of the published size."""
