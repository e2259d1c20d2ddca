"""Student -> a folder that plain diffusers loads, with a card that says how to use it and where it comes from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepfold import __version__
from stepfold.config import Config
from stepfold.evaluation.protocol import teachers_of
from stepfold.teachers.contract import Student
from stepfold.teachers.loading import CARD
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.training.runs import writing

USE = """```python
import torch
from diffusers import {classes}

{loading}
{result} = pipe(
    {prompt},
{arguments}
    generator=torch.Generator().manual_seed(0),
).{output}[0]
```"""

RESULTS = {"images": "image", "frames": "video"}
"""Where a pipeline's result has what it made -> what that is."""

LOAD = 'pipe = {pipeline}.from_pretrained("FOLDER")'

LOAD_LORA = """pipe = {pipeline}.from_pretrained({teacher})
{merge}pipe.scheduler = {scheduler}.from_pretrained("FOLDER", subfolder="scheduler")
pipe.load_lora_weights("FOLDER")"""

MERGE = """pipe.load_lora_weights({lora})
pipe.fuse_lora()
pipe.unload_lora_weights()
"""


def save_student(
    teacher: PipelineTeacher,
    student: Student,
    folder: Path,
    config: Config,
    scales: Sequence[float],
    guidance: float,
    example: str,
) -> None:
    """Writes the student's pipeline and its cards, as a whole.

    Args:
        teacher: gives the text encoder and the autoencoder.
        student: the network to export (the average).
        folder: replaced if it exists.
        config: the run's settings.
        scales: guidance scales of its walks.
        guidance: default scale to sample with.
        example: a prompt for the model card.
    """
    times = {str(k): teacher.student_times(k) for k in (1, 2, 4)}
    lora = config.student.lora > 0
    call = teacher.lora_call if lora else teacher.student_call
    card = {
        "stepfold": __version__,
        "teacher": config.teacher.source,
        "height": teacher.height,
        "width": teacher.width,
        "frames": teacher.frames,
        "max_tokens": teacher.max_tokens,
        "guidance": guidance,
        "taught": list(scales),
        "sigma_data": teacher.sigma_data,
        "times": times,
        "output": teacher.output,
        "pipeline": (type(teacher.pipe) if lora else teacher.student_class).__name__,
        "scheduler": type(teacher.lora_scheduler() if lora else teacher.student_parts()["scheduler"]).__name__,
        "calls": {k: call(t, guidance) for k, t in times.items()},
        "config": config.model_dump(mode="json"),
    }
    with writing(folder) as part:
        (teacher.save_lora if lora else teacher.save_student)(student, part)
        (part / CARD).write_text(json.dumps(card, indent=2) + "\n")
        (part / "README.md").write_text(model_card(card, teacher.in_call(example)))


def model_card(card: dict[str, Any], example: Any, metrics: dict[str, Any] | None = None) -> str:
    """The student's README: use, recipe, metrics, licence; `example` is a prompt as its pipeline takes it."""
    arguments = "\n".join(f"    {name}={value!r}," for name, value in card["calls"]["1"].items())
    prompt = json.dumps(example, ensure_ascii=False)
    classes, loading = card["pipeline"], LOAD
    if card["config"]["student"]["lora"]:
        classes, loading = f"{card['pipeline']}, {card['scheduler']}", LOAD_LORA
    loading = loading.format(
        pipeline=card["pipeline"], scheduler=card["scheduler"],
        teacher=json.dumps("TEACHER" if card["teacher"] == "emoji" else card["teacher"]),
        merge=MERGE.format(lora=json.dumps(theirs)) if (theirs := card["config"]["teacher"]["lora"]) else "",
    )  # fmt: skip
    result, output = RESULTS[card["output"]], card["output"]
    use = USE.format(classes=classes, loading=loading, prompt=prompt, arguments=arguments, result=result, output=output)
    changed = {name: value for name, value in card["calls"]["2"].items() if value != card["calls"]["1"][name]}
    two = ", ".join(f"`{name}={value!r}`" for name, value in changed.items())
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
pipeline_tag: text-to-{result}
tags: [few-step, distillation, stepfold]
---

# A few-step student of `{card["teacher"]}`

Distilled from prompts alone by stepfold {card["stepfold"]}, with trajectory-backward consistency (arXiv:2511.20410):
{training["steps"]} optimiser steps of {training["prompts_per_step"]} trajectories, {space["route_steps"]} route steps,
guidance {", ".join(f"{scale:g}" for scale in card["taught"])}. The whole recipe is in `{CARD}`.

## Use

{use}

For two steps: {two}.
{rows}
## Licence

A student is derived from its teacher: the licences of the teacher's transformer, text encoder and autoencoder apply.
"""
