"""Trains a style LoRA of the bundled teacher on Microsoft's Fluent flat emoji.

`python recipes/emoji_teacher/style_lora.py`. Every stage leaves its result in the work folder, so a stopped run goes on
where it was. It needs npm and node, and `pip install '.[recipe,lora]'`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import SanaPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoencoder import save_grid, to_bytes, to_unit
from fit import device, fit
from fluent import ICONS, VERSIONS, fluent_glyphs
from render import COLOURS, NAMES, Renders, render_all
from stepfold import assets
from teacher import PROMPT_TOKENS, TextToLatent, sample_prompt

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point")
FILE = "pytorch_lora_weights.safetensors"
CARD = """---
license: mit
library_name: diffusers
---

# A Fluent style for the emoji teacher

A LoRA of rank {rank} on the bundled teacher's transformer, for the same prompts: {steps} steps of {batch} latents by
`python recipes/emoji_teacher/style_lora.py`.

## Use

`stepfold distill --preset demo --teacher-lora emoji-fluent` takes the one that comes with stepfold. The file goes to
`--teacher-lora` and to diffusers' `load_lora_weights`. docs/four-step-lora.md says what it draws, and what a student
keeps of it.

## Data and licence

Renders of Fluent Emoji, flat: copyright (c) Microsoft Corporation, MIT licence, https://github.com/microsoft/fluentui-emoji;
as SVG in the npm package {package} {version}. The weights are under the same licence.
"""


def fluent_renders(work: Path, name: str, per_name: int, seed: int) -> Renders:
    """A cached pool of renders in the other style."""
    path = work / f"{name}.npz"
    if not path.exists():
        render_all(per_name, seed, drawn=fluent_glyphs(work / "npm")).save(path)
    return Renders.load(path)


def latents_of(work: Path, pool: Renders, pipe: SanaPipeline) -> Tensor:
    """The pool's latents [n, 16, 8, 8], cached; scaled as the pipeline scales them."""
    path = work / "fluent_latents.safetensors"
    if not path.exists():
        with torch.no_grad():
            parts = [pipe.vae.encode(to_unit(pool.images[i : i + 64])).latent for i in range(0, len(pool.images), 64)]
        save_file({"latents": pipe.vae.config.scaling_factor * torch.cat(parts).contiguous()}, path)
    return load_file(path)["latents"]


def train_lora(
    pipe: SanaPipeline, latents: Tensor, renders: Renders, work: Path, *, steps: int, batch: int, rank: int, lr: float
) -> dict[str, Tensor]:
    """Flow matching as in the teacher's own training, of the LoRA's matrices alone; returns their average's weights."""
    torch.manual_seed(0)
    model = TextToLatent(pipe.text_encoder, pipe.transformer).to(device()).float().requires_grad_(False)
    model.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LAYERS)))

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng((5, step))
        generator = torch.Generator().manual_seed(step)
        rows = rng.integers(len(latents), size=batch)
        prompts = [sample_prompt(int(renders.name[i]), int(renders.colour[i]), rng) for i in rows]
        tokens = pipe.tokenizer(
            prompts, padding="max_length", max_length=PROMPT_TOKENS, truncation=True, return_tensors="pt"
        )
        x0 = latents[torch.from_numpy(rows)].to(device()).float()
        z = torch.randn(x0.shape, generator=generator).to(x0)
        t = torch.sigmoid(0.2 + 1.1 * torch.randn(batch, generator=generator)).to(x0)
        t4 = t.view(-1, 1, 1, 1)
        v = model(tokens.input_ids.to(device()), tokens.attention_mask.to(device()), (1 - t4) * x0 + t4 * z, t)
        return (v - (z - x0)).square().mean(), {}

    def preview(average: TextToLatent, step: int) -> None:
        drawn = SanaPipeline(pipe.tokenizer, average.text_encoder, pipe.vae, average.transformer, pipe.scheduler)
        drawn.set_progress_bar_config(disable=True)
        prompts = [f"{NAMES[i]} on {c} background" for i, c in zip(range(3, 320, 27), COLOURS, strict=False)]
        images = drawn(
            prompts, height=64, width=64, use_resolution_binning=False, output_type="pt", guidance_scale=3.0,
            max_sequence_length=PROMPT_TOKENS, generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        save_grid(to_bytes(images * 2 - 1), 6, work / f"grid_{step:06d}.png")

    average = fit(
        model, loss_at, work / "style_lora", steps=steps, lr=lr, warmup=50, cooldown=0.5, ema=0.99, preview=preview,
        every=40,
    )  # fmt: skip
    return get_peft_model_state_dict(average.transformer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/emoji_style"), help="where stages leave their results")
    parser.add_argument("--steps", type=int, default=4500, help="training steps")
    parser.add_argument("--batch", type=int, default=24, help="latents a step")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA's matrices")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of AdamW")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    pool = fluent_renders(args.work, "fluent", 24, seed=1)
    pipe = SanaPipeline.from_pretrained(assets.TEACHER, torch_dtype=torch.float32).to(device())
    latents = latents_of(args.work, pool, pipe)
    weights = train_lora(pipe, latents, pool, args.work, steps=args.steps, batch=args.batch, rank=args.rank, lr=args.lr)
    weights = convert_state_dict_to_diffusers(weights)
    save_file(
        {f"transformer.{name}": value.half().contiguous() for name, value in weights.items()},
        args.work / FILE,
        metadata={"format": "pt"},
    )
    made = {"rank": args.rank, "steps": args.steps, "batch": args.batch}
    (args.work / "README.md").write_text(CARD.format(package=ICONS, version=VERSIONS[ICONS], **made))
    print(args.work / FILE)


if __name__ == "__main__":
    main()
