"""Student -> a folder that plain diffusers loads, with a card that says how to use it and where it comes from."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepfold import __version__
from stepfold.config import Config
from stepfold.errors import UserError
from stepfold.evaluation.protocol import teachers_of
from stepfold.students.loading import load_merged, load_student
from stepfold.students.lora import LORA_WEIGHTS, save_lora
from stepfold.students.saving import save_whole
from stepfold.teachers.contract import Student
from stepfold.teachers.folders import check_folder
from stepfold.teachers.licences import in_words, is_hub_id, licences_of
from stepfold.teachers.loading import CARD, lora_rank, read_card
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

LOAD = "pipe = {pipeline}.from_pretrained({name})"

LOAD_LORA = """pipe = {pipeline}.from_pretrained({teacher}{options})
{merge}pipe.scheduler = {scheduler}.from_pretrained({name}, subfolder="scheduler")
pipe.load_lora_weights({name})"""

MERGE = """pipe.load_lora_weights({lora})
pipe.fuse_lora(components=[*pipe.get_list_adapters()])  # by itself it leaves some text encoders out
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
        "example": teacher.in_call(example),
        "licences": licences_of(config.teacher.source),
        "config": config.model_dump(mode="json"),
    }
    with writing(folder) as part:
        (save_lora if lora else save_whole)(teacher, student, part)
        write_cards(part, card)


def write_cards(folder: Path, card: dict[str, Any], metrics: dict[str, Any] | None = None) -> None:
    """A student folder's `stepfold.json` and README."""
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(card, metrics), encoding="utf-8")


def metrics_beside(folder: Path) -> dict[str, Any] | None:
    """What the run that a student folder lies in measured, if it lies in one."""
    report = folder.resolve().parent / "report.json"
    return json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None


def export_pipeline(folder: Path, out: Path) -> None:
    """A student as a whole pipeline folder for plain diffusers; a LoRA student is merged into its teacher's network."""
    card = read_card(folder)
    if card["network_only"]:  # the bundled one, which has no second copy of its teacher's other parts
        teacher, student, _ = load_student(folder, "cpu")
        config, guidance = Config.model_validate(card["config"]), card["guidance"]
        save_student(teacher, student, out, config, card.get("taught", [guidance]), guidance, card["example"])
        return
    with writing(out) as part:
        if lora_rank(card):
            teacher, _, _ = load_merged(folder, "cpu")
            teacher.pipe.scheduler = teacher.lora_scheduler()
            teacher.pipe.save_pretrained(part, safe_serialization=True)
            write_cards(part, card | {"merged": True}, metrics_beside(folder))
        else:
            check_folder(folder)
            shutil.copytree(folder, part)


def export_lora(folder: Path, out: Path) -> None:
    """A LoRA student as the one file that its teacher's pipeline loads with `load_lora_weights`.

    Raises:
        UserError: the student has all weights of its own.
    """
    if not lora_rank(read_card(folder)):
        raise UserError(
            f"{folder} has all weights of its own and no LoRA; train with --set student.lora=64, or use --to pipeline"
        )
    with writing(out) as part:
        shutil.copyfile(folder / LORA_WEIGHTS, part)


def model_card(card: dict[str, Any], metrics: dict[str, Any] | None = None, name: str = "FOLDER") -> str:
    """The student's README: use, recipe, metrics, licences.

    Args:
        card: what `stepfold.json` says.
        metrics: the run's report.json.
        name: what loads the student: the folder, or a hub id.
    """
    arguments = "\n".join(f"    {name}={value!r}," for name, value in card["calls"]["1"].items())
    prompt = json.dumps(card["example"], ensure_ascii=False)
    classes, loading = card["pipeline"], LOAD
    if lora_rank(card):
        classes, loading = f"{card['pipeline']}, {card['scheduler']}", LOAD_LORA
    theirs = card["config"]["teacher"]
    chosen = {name: theirs[name] for name in ("revision", "variant") if theirs.get(name)}
    loading = loading.format(
        pipeline=card["pipeline"], scheduler=card["scheduler"],
        teacher=json.dumps("TEACHER" if card["teacher"] == "emoji" else card["teacher"]),
        options="".join(f", {name}={json.dumps(value)}" for name, value in chosen.items()),
        merge=MERGE.format(lora=json.dumps(theirs["lora"])) if theirs["lora"] else "",
        name=json.dumps(name),
    )  # fmt: skip
    output = card["output"]
    use = USE.format(
        classes=classes, loading=loading, prompt=prompt, arguments=arguments, result=RESULTS[output], output=output
    )
    changed = {name: value for name, value in card["calls"]["2"].items() if value != card["calls"]["1"][name]}
    two = ", ".join(f"`{name}={value!r}`" for name, value in changed.items())
    training, space = card["config"]["training"], card["config"]["space"]
    rows = ""
    if metrics and metrics["student"]:
        protocol = metrics["protocol"]
        rows = f"\n## Measured\n\nProtocol {protocol['hash'][:12]}: {protocol['n']} pictures a row.\n\n"
        rows += "| sampler | accuracy | CLIP score | FD | diversity |\n|---|---|---|---|---|\n"
        for who in (*teachers_of(metrics), "student"):
            for steps, s in metrics.get(who, {}).items():
                cells = f"{s['accuracy']:.3f} | {s['clip_score']:.1f} | {s['fd']:.4f} | {s['diversity']:.3f}"
                rows += f"| {who}, {steps} steps | {cells} |\n"
    licences = "\n".join(f"| {part} | {in_words(licence)} |" for part, licence in card["licences"].items())
    front = "".join(f"{field}: {json.dumps(value)}\n" for field, value in card["licences"]["teacher"].items())
    front += f"base_model: {card['teacher']}\n" * is_hub_id(card["teacher"])
    return f"""---
library_name: diffusers
pipeline_tag: text-to-{RESULTS[output]}
tags: [few-step, distillation, stepfold]
{front}---

# A few-step student of `{card["teacher"]}`

Distilled from prompts alone by stepfold {card["stepfold"]}, with trajectory-backward consistency (arXiv:2511.20410):
{training["steps"]} optimiser steps of {training["prompts_per_step"]} trajectories, {space["route_steps"]} route steps,
guidance {", ".join(f"{scale:g}" for scale in card["taught"])}. The whole recipe is in `{CARD}`.

## Use

{use}

For two steps: {two}.
{rows}
## Licence

A student is derived from its teacher: the licences of the teacher's network, text encoders and autoencoder apply.

| part | licence |
|---|---|
{licences}
"""
