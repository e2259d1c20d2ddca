"""Makes the bundled teacher, its judge and its prompts from nothing but a font: `python recipes/emoji_teacher/make.py`.

Two CPU cores take about two hours; an accelerator is used when there is one. Every stage leaves its result in the work
folder, so a stopped run goes on where it was.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import AutoencoderDC, SanaPipeline
from safetensors.torch import load_file, save_file

from autoencoder import train_autoencoder
from fit import device
from judge import save_judge, train_judge
from render import COLOURS, NAMES, Renders, prompt_for, render_all
from stepfold.config import TeacherSettings
from stepfold.evaluation.judge import load_judge
from stepfold.evaluation.measure import measure, teacher_sampler
from stepfold.evaluation.protocol import EMOJI, rows_by_steps
from stepfold.teachers.loading import load_teacher
from teacher import encode_renders, train_teacher

ASSETS = Path(__file__).parents[2] / "src" / "stepfold" / "assets" / "emoji"
PROMPTS_PER_NAME = 12


def renders(work: Path, name: str, per_name: int, seed: int) -> Renders:
    """A cached pool of renders."""
    path = work / f"{name}.npz"
    if not path.exists():
        render_all(per_name, seed).save(path)
    return Renders.load(path)


def autoencoder(work: Path, pool: Renders, steps: int) -> AutoencoderDC:
    """Trains or loads the autoencoder, its latents scaled to unit standard deviation, and caches the pool's latents."""
    folder = work / "vae"
    if not (folder / "config.json").exists():
        vae = train_autoencoder(pool, work / "autoencoder", steps)
        latents, factor = encode_renders(vae, pool)
        save_file({"latents": latents.contiguous()}, work / "latents.safetensors")
        vae.register_to_config(scaling_factor=round(factor, 5))
        vae.save_pretrained(folder)
    return AutoencoderDC.from_pretrained(folder).to(device())


def judge(work: Path, pool: Renders, fresh: Renders, steps: int) -> dict[str, float]:
    """Trains or loads the judge; returns what it says of renders that it has not seen."""
    folder, note = work / "judge", work / "judge.json"
    if not note.exists():
        folder.mkdir(exist_ok=True)
        clip = train_judge(pool, work / "judge_training", steps)
        note.write_text(json.dumps(save_judge(clip, fresh, folder)))
    return json.loads(note.read_text())


def teacher(work: Path, pool: Renders, vae: AutoencoderDC, steps: int) -> Path:
    """Trains or finds the pipeline."""
    folder = work / "pipeline"
    if not folder.exists():
        latents = load_file(work / "latents.safetensors")["latents"]
        pipe = train_teacher(latents, pool, vae, work / "teacher", steps, batch=128)
        pipe.save_pretrained(folder)
    return folder


def prompts() -> list[str]:
    """The bundled prompts: every name in a dozen phrasings and colours."""
    rng = np.random.default_rng(4)
    colours = list(COLOURS)
    drawn = (
        prompt_for(name, colours[(i + j) % len(colours)], rng, p_colour=0.85)
        for j in range(PROMPTS_PER_NAME)
        for i, name in enumerate(NAMES)
    )
    return list(dict.fromkeys(drawn))


def bundle(work: Path, pipeline: Path) -> None:
    """Copies everything into the package; the two large networks in half precision, which they load from as float32."""
    shutil.rmtree(ASSETS, ignore_errors=True)
    pipe = SanaPipeline.from_pretrained(pipeline)
    pipe.transformer.half()
    pipe.vae.half()
    pipe.save_pretrained(ASSETS / "pipeline", safe_serialization=True)
    for path in (ASSETS / "pipeline").rglob("*.json"):  # the folder that it was made in is nobody's business
        if "_name_or_path" in (values := json.loads(path.read_text())):
            del values["_name_or_path"]
            path.write_text(json.dumps(values, indent=2) + "\n")
    shutil.copytree(work / "judge", ASSETS / "judge")
    (ASSETS / "prompts.txt").write_text("\n".join(prompts()) + "\n")


def quality(n: int) -> dict[str, dict]:
    """The bundled teacher under the frozen protocol."""
    wrapped = load_teacher(TeacherSettings(source="emoji", max_tokens=32), device())
    samplers = {f"teacher {k}": teacher_sampler(wrapped, k) for k in EMOJI.teacher_steps}
    rows = measure(load_judge(ASSETS / "judge", device()), replace(EMOJI, n=n), wrapped, samplers, device())
    return rows_by_steps(rows)["teacher"]


def draw_curves(work: Path) -> None:
    """The loss of every stage over its steps, one plot each, into curves.png."""
    logs = [work / stage / "log.jsonl" for stage in ("autoencoder", "judge_training", "teacher")]
    figure, plots = plt.subplots(1, len(logs), figsize=(4 * len(logs), 3), layout="constrained")
    for plot, log in zip(plots, logs, strict=True):
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        losses = {row["step"]: row["loss"] for row in rows}  # a resumed run says some steps twice
        plot.plot(list(losses), list(losses.values()), linewidth=0.7)
        plot.set(title=log.parent.name.replace("_", " "), xlabel="step", ylabel="loss")
    figure.savefig(work / "curves.png", dpi=120)
    plt.close(figure)


def card(made: dict[str, float], rows: dict[str, dict], steps: argparse.Namespace) -> str:
    """The model card."""
    table = "".join(
        f"| {k} | {s['accuracy']:.3f} | {s['clip_score']:.1f} | {s['fd']:.4f} | {s['diversity']:.3f} |\n"
        for k, s in rows.items()
    )
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# Emoji teacher

A tiny SanaPipeline for trying distillation on a laptop: {len(NAMES)} things on {len(COLOURS)} background colours, 64 x 64.
Made by `python recipes/emoji_teacher/make.py`; nothing was downloaded.

| part | class | trained |
|---|---|---|
| autoencoder | AutoencoderDC, f8, 16 channels | {steps.autoencoder} steps of 32 renders |
| transformer | SanaTransformer2DModel, 6 layers of width 192, time on [0, 1] | {steps.teacher} steps of 128 latents |
| text encoder | Gemma2Model, 2 layers of width 128, together with the transformer | |
| tokenizer | byte-level BPE; it folds SanaPipeline's instruction into one token | |
| judge (`../judge`) | CLIPModel, 4 + 2 layers | {steps.judge} steps of 128 renders |

## Use

`SanaPipeline.from_pretrained(FOLDER)("red heart on blue background", height=64, width=64, use_resolution_binning=False)`

diffusers' default size is 1024 x 1024, which no 64 x 64 model can draw; everything else may stay at its default.

## Quality

Judge: {made["accuracy"]:.1%} accurate on {made["renders"]} renders that it was not trained on; their diversity within a prompt is
{made["diversity"]:.3f}. Teacher, guidance {EMOJI.guidance}, Euler steps, protocol `{EMOJI.name}` version {EMOJI.version}:

| steps | accuracy | CLIP score | FD | diversity |
|---|---|---|---|---|
{table}
## Data and licence

Renders of Noto Color Emoji (SIL Open Font License 1.1), names from the PyPI package `emoji`. The weights are Apache-2.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("build/emoji_teacher"), help="where stages leave their results"
    )
    parser.add_argument("--autoencoder", type=int, default=2200, help="training steps")
    parser.add_argument("--judge", type=int, default=1300, help="training steps")
    parser.add_argument("--teacher", type=int, default=4700, help="training steps")
    parser.add_argument("--n", type=int, default=2000, help="pictures per row of the teacher's own quality table")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    pool, fresh = renders(args.work, "renders", 200, seed=1), renders(args.work, "fresh", 24, seed=2)
    made = judge(args.work, pool, fresh, args.judge)
    vae = autoencoder(args.work, pool, args.autoencoder)
    bundle(args.work, teacher(args.work, pool, vae, args.teacher))
    draw_curves(args.work)
    text = card(made, quality(args.n), args)
    (ASSETS / "pipeline" / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
