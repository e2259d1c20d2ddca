"""Student -> a folder that plain diffusers loads, with a card that says how to use it and where it comes from."""

import json
from pathlib import Path
from typing import Any

from stepfold import __version__
from stepfold.config import Config
from stepfold.evaluation.protocol import teachers_of
from stepfold.sampling import few_step_times
from stepfold.teachers.contract import Student
from stepfold.teachers.loading import CARD
from stepfold.teachers.sana import SanaTeacher
from stepfold.training.runs import writing

USE = """```python
import torch
from diffusers import SanaSprintPipeline

pipe = SanaSprintPipeline.from_pretrained("{folder}")
image = pipe(
    {prompt},
    num_inference_steps=1,
    intermediate_timesteps=None,  # diffusers accepts it with 2 steps only
    height={height},
    width={width},
    use_resolution_binning=False,
    max_sequence_length={max_tokens},
    guidance_scale={guidance},
    generator=torch.Generator().manual_seed(0),
).images[0]
```"""


def save_student(
    teacher: SanaTeacher, student: Student, folder: Path, config: Config, guidance: float, example: str
) -> None:
    """Writes the student's pipeline and its cards, as a whole.

    Args:
        teacher: gives the text encoder and the autoencoder.
        student: the network to export (the average).
        folder: replaced if it exists.
        config: the run's settings.
        guidance: default scale to sample with.
        example: a prompt for the model card.
    """
    card = {
        "stepfold": __version__,
        "teacher": config.teacher.source,
        "height": teacher.height,
        "width": teacher.width,
        "max_tokens": teacher.max_tokens,
        "guidance": guidance,
        "sigma_data": teacher.sigma_data,
        "times": {str(k): few_step_times(k) for k in (1, 2, 4)},
        "config": config.model_dump(mode="json"),
    }
    with writing(folder) as part:
        teacher.save_student(student, part)
        (part / CARD).write_text(json.dumps(card, indent=2) + "\n")
        (part / "README.md").write_text(model_card(card, example))


def model_card(card: dict[str, Any], example: str, metrics: dict[str, Any] | None = None) -> str:
    """The student's README: use, recipe, metrics, licence."""
    use = USE.format(folder="FOLDER", prompt=json.dumps(example, ensure_ascii=False), **card)
    training, space = card["config"]["training"], card["config"]["space"]
    rows = ""
    if metrics:
        rows = "\n## Measured\n\n| sampler | accuracy | CLIP score | FD | diversity |\n|---|---|---|---|---|\n"
        for who in (*teachers_of(metrics), "student"):
            for steps, s in metrics.get(who, {}).items():
                cells = f"{s['accuracy']:.3f} | {s['clip_score']:.1f} | {s['fd']:.4f} | {s['diversity']:.3f}"
                rows += f"| {who}, {steps} steps | {cells} |\n"
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [few-step, distillation, stepfold]
---

# A few-step student of `{card["teacher"]}`

Distilled from prompts alone by stepfold {card["stepfold"]}, with trajectory-backward consistency (arXiv:2511.20410):
{training["steps"]} optimiser steps of {training["prompts_per_step"]} trajectories, {space["route_steps"]} route steps,
guidance {space["guidance"]}. The whole recipe is in `{CARD}`.

## Use

{use}
{rows}
## Licence

A student is derived from its teacher: the licences of the teacher's transformer, text encoder and autoencoder apply.
"""
