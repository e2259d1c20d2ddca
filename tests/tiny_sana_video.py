"""A tiny pipeline of SANA-Video: Sana's texts, Wan's autoencoder."""

from typing import Any

from diffusers import DPMSolverMultistepScheduler, SanaVideoPipeline, SanaVideoTransformer3DModel
from tiny import gemma_encoder, make_wan, sana_tokenizer


def make_sana_video(num_layers: int = 2) -> SanaVideoPipeline:
    transformer = SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=num_layers,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=32,
        mlp_ratio=2.0, sample_size=30, patch_size=(1, 2, 2), rope_max_seq_len=32,
    )  # fmt: skip
    tokenizer = sana_tokenizer(SanaVideoPipeline)
    parts: Any = dict(
        tokenizer=tokenizer,
        text_encoder=gemma_encoder(len(tokenizer)),
        vae=make_wan().vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0, algorithm_type="dpmsolver++"
        ),
    )
    return SanaVideoPipeline(**parts)
