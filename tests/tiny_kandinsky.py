"""Tiny pipelines of Kandinsky 5."""

import functools
from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from tiny import clip_encoder, clip_tokenizer
from tiny_qwen import qwen_encoder, qwen_tokenizer
from transformers import CLIPTextModel

SIZES = [(32, 32), (32, 16), (48, 16), (48, 32)]
"""Width and height of the pictures that a tiny pipeline makes, beside those of 1024 x 1024 pixels."""

plain_init: Any = Kandinsky5T2IPipeline.__init__


@functools.wraps(plain_init)
def with_small_sizes(self: Any, *args: Any, **kwargs: Any) -> None:
    """The class has a list of sizes of its own, each of a million pixels, which no config and no argument changes."""
    plain_init(self, *args, **kwargs)
    self.resolutions = [*self.resolutions, *SIZES]


Kandinsky5T2IPipeline.__init__ = with_small_sizes


def transformer(num_layers: int, **fields: Any) -> Kandinsky5Transformer3DModel:
    return Kandinsky5Transformer3DModel(
        **dict(
            in_visual_dim=4, out_visual_dim=4, in_text_dim=32, in_text_dim2=16, time_dim=24, model_dim=32, ff_dim=48,
            num_text_blocks=2, num_visual_blocks=num_layers, axes_dims=(4, 6, 6),
        ) | fields
    )  # fmt: skip


def with_texts(pipe: Any) -> Any:
    """The pipeline with text encoders, and a tokenizer in the place of a processor, which needs torchvision.

    The tokenizer knows the template's words, some of them in halves: it has no fewer tokens than the pipeline cuts off.
    """
    words = pipe.prompt_template
    for half in ("dyn", "post", "sc"):
        words = words.replace(f" {half}", f" {half}|")
    tokenizer = qwen_tokenizer([words])
    pipe.register_modules(tokenizer=tokenizer, text_encoder=qwen_encoder(len(tokenizer)))
    return pipe


def parts(network: Kandinsky5Transformer3DModel, vae: Any) -> dict[str, Any]:
    return dict(
        transformer=network,
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=clip_encoder(CLIPTextModel, 16),
        tokenizer_2=clip_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def make_kandinsky_image(num_layers: int = 2, **fields: Any) -> Kandinsky5T2IPipeline:
    """Its autoencoder has a shift, which the pipeline does not read, and the pipeline's 8 pixels a latent."""
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 8, 8), latent_channels=4, norm_num_groups=2, layers_per_block=1, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=1.5,
        shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )  # fmt: skip
    return with_texts(Kandinsky5T2IPipeline(**parts(transformer(num_layers, **fields), vae)))


def make_kandinsky_video(num_layers: int = 2, **fields: Any) -> Kandinsky5T2VPipeline:
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2, scaling_factor=0.48,
    )  # fmt: skip
    network = transformer(num_layers, **{"visual_cond": True} | fields)
    return with_texts(Kandinsky5T2VPipeline(**parts(network, vae)))
