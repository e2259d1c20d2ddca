"""Weights and optimiser states of published networks, counted from their configs on torch's meta device.

The table is that of docs/families.md. A run that trains all weights takes 18 bytes a parameter: the teacher in bfloat16
(2), student, average, gradient and CAME's one moment (4 each). A LoRA run takes 2 bytes a parameter, and 20 for each
of the LoRA's: weight, gradient, average, AdamW's two moments.

    python benchmarks/families.py
"""

import sys
from typing import Any

import diffusers
import torch
from common import make_parser, open_record, show, write_record
from torch import nn

from stepfold.teachers.loading import FAMILIES

RANK, ALL, BASE, LORA = 64, 18, 2, 20
SANA: dict[str, Any] = dict(caption_channels=2304, in_channels=32, out_channels=32)
SANA_06: dict[str, Any] = SANA | dict(
    num_layers=28, num_attention_heads=36, num_cross_attention_heads=16, cross_attention_head_dim=72,
    cross_attention_dim=1152,
)  # fmt: skip
SANA_16: dict[str, Any] = SANA | dict(
    num_layers=20, num_attention_heads=70, num_cross_attention_heads=20, cross_attention_head_dim=112,
    cross_attention_dim=2240,
)  # fmt: skip
SD35M: dict[str, Any] = dict(
    sample_size=128, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
    qk_norm="rms_norm", dual_attention_layers=tuple(range(13)),
)  # fmt: skip
SD35L: dict[str, Any] = dict(
    sample_size=128, num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192,
    qk_norm="rms_norm",
)  # fmt: skip
KLEIN: dict[str, Any] = dict(
    num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
)  # fmt: skip
KLEIN_9B = KLEIN | dict(num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288)
SD2: dict[str, Any] = dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
SDXL: dict[str, Any] = dict(
    sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip
WAN: dict[str, Any] = dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)
WAN_5B: dict[str, Any] = dict(in_channels=48, out_channels=48, num_attention_heads=24, ffn_dim=14336, num_layers=30)
KANDINSKY: dict[str, Any] = dict(in_visual_dim=16, out_visual_dim=16)
KANDINSKY_IMAGE = KANDINSKY | dict(model_dim=2560, ff_dim=10240, num_visual_blocks=50, axes_dims=(32, 48, 48))
KANDINSKY_LITE = KANDINSKY | dict(model_dim=1792, ff_dim=7168, visual_cond=True)
KANDINSKY_PRO = KANDINSKY_IMAGE | dict(
    model_dim=4096, ff_dim=16384, time_dim=1024, num_text_blocks=4, num_visual_blocks=60, visual_cond=True
)
Networks = list[tuple[str, dict[str, Any]]]
ROWS: dict[str, tuple[str, str, Networks]] = {
    "Sana 0.6B, 1.6B": ("SanaPipeline", "SanaTransformer2DModel", [("0.6B", SANA_06), ("1.6B", SANA_16)]),
    "Stable Diffusion 3.5 medium, large": (
        "StableDiffusion3Pipeline", "SD3Transformer2DModel", [("medium", SD35M), ("large", SD35L)],
    ),
    "FLUX.1": ("FluxPipeline", "FluxTransformer2DModel", [("dev", dict(guidance_embeds=True))]),
    "FLUX.2 klein 4B, 9B": ("Flux2KleinPipeline", "Flux2Transformer2DModel", [("4B", KLEIN), ("9B", KLEIN_9B)]),
    "FLUX.2 dev": ("Flux2Pipeline", "Flux2Transformer2DModel", [("dev", {})]),
    "PixArt-Sigma": ("PixArtSigmaPipeline", "PixArtTransformer2DModel", [("512", {})]),
    "Stable Diffusion 1, 2": (
        "StableDiffusionPipeline", "UNet2DConditionModel", [("1", dict(cross_attention_dim=768)), ("2", SD2)],
    ),
    "Stable Diffusion XL": ("StableDiffusionXLPipeline", "UNet2DConditionModel", [("base", SDXL)]),
    "Lumina Image 2": ("Lumina2Pipeline", "Lumina2Transformer2DModel", [("2", {})]),
    "Z-Image": ("ZImagePipeline", "ZImageTransformer2DModel", [("base", {})]),
    "Wan 2.1 1.3B": ("WanPipeline", "WanTransformer3DModel", [("1.3B", WAN)]),
    "Wan 2.2 TI2V-5B": ("WanPipeline", "WanTransformer3DModel", [("5B", WAN_5B)]),
    "Wan 2.2 A14B, two networks": ("WanPipeline", "WanTransformer3DModel", [("two of 14B", {})]),
    "HunyuanVideo 1.5": ("HunyuanVideo15Pipeline", "HunyuanVideo15Transformer3DModel", [("480p", {})]),
    "Kandinsky 5 image lite": (
        "Kandinsky5T2IPipeline", "Kandinsky5Transformer3DModel", [("image lite", KANDINSKY_IMAGE)],
    ),
    "Kandinsky 5 video lite, pro": (
        "Kandinsky5T2VPipeline", "Kandinsky5Transformer3DModel", [("lite", KANDINSKY_LITE), ("pro", KANDINSKY_PRO)],
    ),
    "HunyuanImage 2.1": (
        "HunyuanImagePipeline", "HunyuanImageTransformer2DModel", [("2.1", dict(text_embed_2_dim=1472))],
    ),
    "Qwen-Image": ("QwenImagePipeline", "QwenImageTransformer2DModel", [("defaults", {})]),
    "Chroma": ("ChromaPipeline", "ChromaTransformer2DModel", [("defaults", {})]),
    "LongCat-Image": (
        "LongCatImagePipeline", "LongCatImageTransformer2DModel",
        [("10 and 20 blocks", dict(num_layers=10, num_single_layers=20))],
    ),
    "Krea 2": ("Krea2Pipeline", "Krea2Transformer2DModel", [("defaults", {})]),
    "PRX": ("PRXPipeline", "PRXTransformer2DModel", [("defaults", {})]),
    "DiT-XL/2": ("DiTPipeline", "DiTTransformer2DModel", [("256", {})]),
}  # fmt: skip
"""Row of the table -> its pipeline, its network's class, and what differs from that class's defaults."""


def counted(pipeline: str, kind: str, config: dict[str, Any], copies: int) -> dict[str, float | None]:
    """Parameters, and GiB of a run that trains all weights and of a LoRA run; None where the pipeline loads no LoRA."""
    family = FAMILIES[pipeline]
    with torch.device("meta"):
        network: nn.Module = getattr(diffusers, kind)(**config)
    parameters = copies * sum(parameter.numel() for parameter in network.parameters())
    layers = (
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and any(part in name for part in family.lora_blocks)
    )
    lora = copies * sum(RANK * (layer.in_features + layer.out_features) for layer in layers)
    lora_gib = (BASE * parameters + LORA * lora) / 2**30 if family.loads_lora else None
    return {
        "parameters": parameters,
        "lora_parameters": lora,
        "all_gib": ALL * parameters / 2**30,
        "lora_gib": lora_gib,
    }


def main(argv: list[str] | None = None) -> None:
    """Counts every row."""
    given = sys.argv[1:] if argv is None else argv
    options = make_parser(__doc__, "families", device=False).parse_args(given)
    record, found = open_record("families", given, torch.device("cpu")), {}
    for row, (pipeline, kind, networks) in ROWS.items():
        copies = 2 if "two networks" in row else 1
        found[row] = {name: counted(pipeline, kind, config, copies) for name, config in networks}
    rows = [
        [f"{row}: {name}", *("" if value is None else f"{value:,.2f}" for value in each.values())]
        for row, of in found.items()
        for name, each in of.items()
    ]
    show("weights and optimiser states", ["network", "parameters", "LoRA", "all, GiB", "LoRA run, GiB"], rows)
    write_record(options.out, record | {"rank": RANK, "rows": found})


if __name__ == "__main__":
    main()
