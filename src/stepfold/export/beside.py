"""A file of weights for other programs, with its card and its ComfyUI workflow beside it."""

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stepfold.errors import UserError
from stepfold.export.comfyui import (
    IMAGE,
    SAMPLERS,
    Keys,
    in_text,
    levels_of,
    loader_of,
    no_workflow,
    predicts_v,
    says_levels,
    steps_of,
    usual_steps,
    workflow,
    yours,
)
from stepfold.export.files import README, files_table
from stepfold.export.method import source_of
from stepfold.sampling.samplers import in_diffusers
from stepfold.students.card import Card
from stepfold.teachers.licences import in_words
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.training.runs import writing

NAMES: dict[Keys, str] = {"diffusers": "diffusers'", "comfy": "ComfyUI's", "kohya": "kohya's", "peft": "PEFT's"}
SD_CPP = {
    "StableDiffusionPipeline": ("-m MODEL",),
    "StableDiffusionXLPipeline": ("-m MODEL",),
    "StableDiffusion3Pipeline": ("--vae VAE", "--clip_l clip_l", "--clip_g clip_g", "--t5xxl t5xxl"),
    "FluxPipeline": ("--vae VAE", "--clip_l clip_l", "--t5xxl t5xxl"),
    "Flux2Pipeline": ("--vae VAE", "--llm mistral_3_small"),
    "Flux2KleinPipeline": ("--vae VAE", "--llm qwen_3_4b_or_8b"),
    "ZImagePipeline": ("--vae VAE", "--llm qwen_3_4b"),
}
"""Class of a pipeline -> options of stable-diffusion.cpp for the user's own files, as its sources of May 2026 say."""
SD_CPP_TOKENS = {"StableDiffusion3Pipeline": 77, "FluxPipeline": 256}
"""Class of a pipeline -> the tokens of T5 to which stable-diffusion.cpp pads a prompt; no option changes them."""

CARRIED = """
The file carries the LoRAs that the teacher had: {loras}. Load it on the base model without them. Leave
the lines that load them out of the student's call. Their licences apply too.
"""
BENEATH = """
The file goes on top of the LoRAs that the teacher had: {loras}. Load those too, each at the strength behind its name,
or 1.
"""
IN_COMFYUI = """
## ComfyUI

Put `{file}` into ComfyUI's `models/{place}`, and drop `{workflow}` on ComfyUI's page. Choose your own files in
the nodes whose titles begin with YOURS. Keep {kept} 1: other values make wrong images.
"""
NOT_IN_COMFYUI = """
## ComfyUI

There is no workflow: {reason}.
"""
SETTINGS = """
## Settings

The sampler is `{sampler}`, and CFG is 1, which turns guidance off.{scale}{scheduler} The size is {size}. A program
that takes noise levels gets these; its own scheduler and shift do not count then.

| steps | noise levels |
|---|---|
{levels}
"""
NAMED = " Where a scheduler is chosen by name, it is `sgm_uniform`, which is near the levels below."
PREDICTS_V = " The model predicts v, which a program that loads it is told; in ComfyUI by ModelSamplingDiscrete."
IN_SD_CPP = """
## stable-diffusion.cpp

Replace the names that begin with YOUR by your own files.

```
{command}
```
"""
OTHER_TOKENS = """
It pads a prompt to {theirs} tokens of T5, and this student was trained at {ours}: its images differ from ours. Train
with `teacher.max_tokens={theirs}` for stable-diffusion.cpp.
"""


def workflow_of(file: Path) -> Path:
    """The workflow's place beside a file of weights."""
    return file.with_suffix(".workflow.json")


def card_of(file: Path) -> Path:
    """The card's place beside a file of weights."""
    return file.with_suffix(f".{README}")


IN_DIFFUSERS = "\n## In diffusers\n\n"
"""The heading of a call."""


def write_file(
    out: Path,
    write: Callable[[Path], object],
    card: Card,
    *,
    keys: Keys | None = None,
    retimed: bool = False,
    per_token: bool = False,
    marked_v: bool = False,
    of_text: bool = False,
    carried: Sequence[str] = (),
    diffusers: str = "",
) -> None:
    """Writes a file of weights with its card, and a workflow where ComfyUI loads it.

    Args:
        out: the file.
        write: writes the weights to a path.
        card: the student's, as it is sampled from this file.
        keys: names in a LoRA; None for a network.
        retimed: whether the network reads times of [0, 1].
        per_token: whether it is told a time for each token.
        marked_v: whether it is a UNet that is marked as one that predicts v.
        of_text: whether a LoRA changes text encoders too.
        carried: LoRAs of the teacher that are in it.
        diffusers: how plain diffusers samples with it, where the student's README does not say.
    """
    reason = no_workflow(card, keys, retimed=retimed, of_text=of_text) or (
        "" if card.calls else "the card is of an early version and has no noise levels"
    )
    lora = keys is not None
    graph = None if reason else workflow(card, out.name, lora=lora, of_text=of_text, per_token=per_token)
    sd_cpp = not (keys or retimed or marked_v)
    text = file_card(out, card, keys, reason, sd_cpp=sd_cpp, carried=carried, diffusers=diffusers)
    with writing(out) as part:
        write(part)
    if graph is None:
        workflow_of(out).unlink(missing_ok=True)  # of an earlier export
    else:
        with writing(workflow_of(out)) as part:
            part.write_text(json.dumps(graph, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with writing(card_of(out)) as part:
        part.write_text(text, encoding="utf-8")


def is_retimed(teacher: PipelineTeacher) -> bool:
    """Whether the network reads times of [0, 1], as `stepfold retime` leaves one; other programs tell it others."""
    return teacher.num_train_timesteps == 1 or (bool(teacher.time_field) and teacher.time_scale < 10)


def check_free(out: Path) -> None:
    """Refuses to overwrite what stands in the places of a file's card and workflow.

    Raises:
        UserError: one of them is taken.
    """
    for path in (workflow_of(out), card_of(out)):
        if path.exists():
            raise UserError(f"{path} is there already; choose another --out, or --force to replace an earlier export")


def file_card(
    out: Path,
    card: Card,
    keys: Keys | None,
    reason: str,
    *,
    sd_cpp: bool,
    carried: Sequence[str] = (),
    diffusers: str = "",
) -> str:
    """The card of a file of weights.

    Args:
        out: the file.
        card: the student's.
        keys: names in a LoRA; None for a network.
        reason: why there is no workflow; empty where there is one.
        sd_cpp: whether stable-diffusion.cpp may load it.
        carried: LoRAs of the teacher that are in it.
        diffusers: as of `write_file`.
    """
    what = "LoRA" if keys else "network"
    use = f"the LoRA, under {NAMES[keys]} names" if keys else "the network, under its original names"
    rows = [(out.name, use), (card_of(out).name, "this card")]
    known = says_levels(card)
    if reason:
        place = NOT_IN_COMFYUI.format(reason=reason)
    else:
        rows.insert(1, (workflow_of(out).name, "a workflow for ComfyUI"))
        folder = "loras" if keys else "diffusion_models"
        kept = "strength 1 and cfg" if keys else "cfg"
        place = IN_COMFYUI.format(file=out.name, place=folder, workflow=workflow_of(out).name, kept=kept)
    command = sd_cpp_command(out.name, card) if sd_cpp and known else ""
    licences = "\n".join(f"| {part} | {in_words(licence)} |" for part, licence in card.licences.items())
    beneath = [str(lora) for lora in card.teacher_settings().lora] if keys else []
    loras = ", ".join(f"`{lora}`" for lora in (*carried, *beneath))
    within = (CARRIED if carried else BENEATH).format(loras=loras) if loras else ""
    said = "its recipe and its scores" if diffusers else "its recipe, its scores and its call in diffusers"
    call = f"{IN_DIFFUSERS}{diffusers}" if diffusers else ""
    return f"""# A few-step student of `{card.teacher}`: its {what}

Distilled from {source_of(card.config)} by stepfold {card.stepfold}. The `{README}` in the student's folder has
{said}.
{call}{within}{files_table(rows)}{place}{settings_of(card, lora=bool(keys)) if known else ""}{command}
## Licence

A student is derived from its teacher: the licences of the teacher's network, text encoders and autoencoder apply.

| part | licence |
|---|---|
{licences}
"""


def settings_of(card: Card, *, lora: bool) -> str:
    """The card's section about sampler and noise levels."""
    levels = "\n".join(f"| {steps} | {in_text(levels_of(card, steps))} |" for steps in steps_of(card))
    told = f" The guidance scale that the network embeds is {scale_of(card):g}." if loader_of(card).scale else ""
    sampler, size = SAMPLERS[in_diffusers(card.recipe.sampler)], f"{card.width} x {card.height}"
    named = NAMED if loader_of(card).variance_preserving and sampler == "lcm" else ""
    named += PREDICTS_V * (lora and predicts_v(card))
    return SETTINGS.format(sampler=sampler, scale=told, scheduler=named, size=size, levels=levels)


def scale_of(card: Card) -> float:
    """The guidance scale that a network which embeds one is told."""
    return float(card.calls[usual_steps(card)]["guidance_scale"])


def sd_cpp_command(file: str, card: Card) -> str:
    """The card's section about stable-diffusion.cpp; empty for families that it does not load."""
    if card.pipeline not in SD_CPP:
        return ""
    steps = usual_steps(card)
    options: list[Any] = []
    for option in SD_CPP[card.pipeline]:
        name, own = option.split()
        options += [name, yours(own)]
    options += ["--diffusion-model", file, "-p", card.example, "-W", card.width, "-H", card.height, "--cfg-scale", 1]
    if loader_of(card).scale:
        options += ["--guidance", f"{scale_of(card):g}"]
    if card.with_images:
        options += ["-r", IMAGE]
    options += ["--sampling-method", SAMPLERS[in_diffusers(card.recipe.sampler)], "--steps", steps]
    options += ["--sigmas", in_text(levels_of(card, steps)).replace(" ", "")]
    tokens = SD_CPP_TOKENS.get(card.pipeline, card.max_tokens)
    other = OTHER_TOKENS.format(theirs=tokens, ours=card.max_tokens) if tokens != card.max_tokens else ""
    return IN_SD_CPP.format(command=shlex.join(["sd-cli", *map(str, options)])) + other
