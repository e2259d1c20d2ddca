"""Tiny pipelines of Wan 2.2: one network that is told a time a token (TI2V-5B), and two with a boundary (A14B)."""

from typing import Any

from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from tiny import make_wan


def make_ti2v(num_layers: int = 2, patch_size: tuple[int, int, int] = (1, 2, 2)) -> WanPipeline:
    """Its autoencoder makes a latent of 16 x 16 pixels, and its sides are multiples of 32."""
    transformer = WanTransformer3DModel(
        patch_size=patch_size, num_attention_heads=2, attention_head_dim=12, in_channels=6, out_channels=6, text_dim=24,
        freq_dim=16, ffn_dim=32, num_layers=num_layers, rope_max_seq_len=32,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4, decoder_base_dim=8, z_dim=6, dim_mult=[1, 1, 2, 2], num_res_blocks=1, is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
        latents_mean=[-0.3, 0.1, 0.2, 0.4, 0.6, -0.5], latents_std=[0.9, 1.5, 2.0, 1.2, 0.7, 1.8],
    )  # fmt: skip
    parts: Any = make_wan().components | {"transformer": transformer, "vae": vae, "expand_timesteps": True}
    return WanPipeline(**parts)


def make_a14b(num_layers: int = 2) -> WanPipeline:
    """The boundary lies between the second and the third of four steps."""
    first, second = make_wan(num_layers), make_wan(num_layers)
    parts: Any = first.components | {"transformer_2": second.transformer, "boundary_ratio": 0.84}
    return WanPipeline(**parts)
