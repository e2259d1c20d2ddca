"""Student -> a folder that plain diffusers loads, with a card that says how to use it and where it comes from."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from stepfold import __version__, assets
from stepfold.config import Config
from stepfold.errors import UserError
from stepfold.evaluation.protocol import counted, teachers_of
from stepfold.evaluation.report import columns_of, title
from stepfold.evaluation.verdict import METRICS, noisy_note, number
from stepfold.export.casting import Half, rounded_parts
from stepfold.export.files import FILES, README, listing
from stepfold.export.losses import loading_of, quantised_section
from stepfold.export.method import method_of, several, source_of, step_of
from stepfold.export.policy_words import of_policy
from stepfold.sampling.recipe import Recipe, times_of
from stepfold.sampling.samplers import in_diffusers
from stepfold.students.card import ANYFLOW, CARD, Card, read_card, write_card
from stepfold.students.loading import load_merged, load_student
from stepfold.students.lora import lora_files, save_lora
from stepfold.students.policy import save_policy
from stepfold.students.policy_scheduler import PolicyScheduler
from stepfold.students.saving import loses_guidance, save_whole
from stepfold.students.two_times import save_embedder
from stepfold.teachers.calls import set_parts
from stepfold.teachers.contract import SamplerName, Student
from stepfold.teachers.conventions import conventions
from stepfold.teachers.fingerprints import network_fingerprint
from stepfold.teachers.folders import check_folder
from stepfold.teachers.licences import in_words, is_hub_id, licences_of
from stepfold.teachers.live import is_live
from stepfold.teachers.loading import FAMILIES
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

MADE_FOR: dict[SamplerName, str] = {"flow": " It is sampled in Euler steps.", "flow_map": " It is a flow map."}
"""Sampler -> what the README says of it; of a consistency model nothing."""
OF_SEGMENTS = " It takes Euler steps from edge to edge of its segments, as many as steps."
CALLED_STEPS: dict[SamplerName, tuple[int, ...]] = {"consistency": (1, 2, 4), "flow": (1, 2, 4, 8)}
"""Sampler in plain diffusers -> numbers of steps that a card says the call of."""
EXAMPLES: dict[SamplerName, tuple[int, int]] = {"consistency": (1, 2), "flow": (8, 4)}
"""Sampler in plain diffusers -> numbers of steps of the README's example, and of the change to it."""
JUMPS = """

Plain diffusers tells the network one time, and so samples it as a consistency model. `stepfold sample` tells it where
to jump to as well, which `target_embedder.safetensors` is for."""
JUMPS_FOLDED = """

For plain diffusers and ComfyUI its jumps are folded for one number of steps, which are Euler steps then:

```
stepfold export {name} {options}
```"""
OF_EDGES = """Plain diffusers tells the network one time, and this student has to be told the edge that it jumps to as
well. `stepfold sample {name}` does so, in {steps} steps. For plain diffusers its jumps are folded into a folder of its
own:

```
stepfold export {name} --to pipeline --steps {steps}
```"""
WITH_IMAGE = """

Each prompt has an image, of the same height and width: `image=PIL.Image.open("image.png")`."""
OF_OBJECT = """

The teacher was a {pipeline} object in Python. `TEACHER` is where its weights come from, or a folder that
`save_pretrained` wrote of it."""
FOLDED = """

The network is for these steps alone: other noise levels, or another number of steps, make wrong images."""
TOLD_BOTH = """

The network is told both times. It takes {fewest} to {most} steps at its scheduler's own noise levels; others, or more
steps, make wrong images."""
OTHER_TOOLS = """Tools count guidance, time and noise levels in different ways. The noise levels are the student's.
A tool that shifts them needs those before the shift. A student that embeds no guidance is called with it off."""
WORDS = {1: "one", 2: "two", 4: "four"}

RESULTS = {"images": "image", "image": "image", "frames": "video"}
"""Where a pipeline's result has what it made -> what that is."""

LOAD = "pipe = {pipeline}.from_pretrained({name}{dtype}){parts}"

SCHEDULER_LINE = 'pipe.scheduler = {scheduler}.from_pretrained({name}, subfolder="scheduler")'
LOAD_LORA = f"""pipe = {{pipeline}}.from_pretrained({{teacher}}{{options}}{{dtype}}){{parts}}
{{merge}}{SCHEDULER_LINE}
"""
LORA_LINE = "pipe.load_lora_weights({name})"
PEFT_LINE = "pipe.{part} = PeftModel.from_pretrained(pipe.{part}, {name}).merge_and_unload()"
LOAD_SECOND = """
pipe.load_lora_weights({name}, weight_name="{file}", load_into_{part}=True)"""

WHOLE = """# Plain diffusers merges the teacher's own LoRA otherwise than its file says, so make a whole pipeline first:
# stepfold export {name} --to pipeline --out WHOLE
pipe = {pipeline}.from_pretrained("WHOLE"{dtype}){parts}"""

MERGE = """pipe.load_lora_weights({lora})
pipe.fuse_lora(components=[*pipe.get_list_adapters()]{scale})  # by itself it leaves some text encoders out
pipe.unload_lora_weights()
"""


def save_student(
    teacher: PipelineTeacher, student: Student, folder: Path, config: Config, recipe: Recipe, example: str
) -> Card:
    """Writes the student's pipeline and its cards, as a whole.

    Args:
        teacher: gives the text encoder and the autoencoder.
        student: the network to export (the average).
        folder: replaced if it exists.
        config: the run's settings.
        recipe: how the student is sampled.
        example: a prompt for the model card.

    Returns:
        The card.
    """
    if loses_guidance(student, recipe):
        recipe = recipe.model_copy(update={"taught": (recipe.guidance,)})
    card = Card(
        stepfold=__version__,
        teacher=config.teacher.source,
        base=network_fingerprint(config.teacher) if config.student.lora else "",
        height=teacher.height,
        width=teacher.width,
        frames=teacher.frames,
        max_tokens=teacher.max_tokens,
        recipe=recipe,
        output=teacher.output,
        **use_of(teacher, recipe, lora=config.student.lora > 0, asked=config.evaluation.steps or ()),
        example=teacher.in_call(example),
        licences=licences_of(config.teacher.source),
        config=config.model_dump(mode="json"),
        loras_in_diffusers=teacher.loras_in_diffusers,
        lora_parts={k: v for k, v in lora_files(teacher).items() if k != teacher.network_part}
        if config.student.lora
        else {},
    )
    with writing(folder) as part:
        if config.student.lora:
            save_lora(teacher, student, part, recipe)
        else:
            save_whole(teacher, student, part, recipe)
        write_cards(part, card)
    return card


def use_of(teacher: PipelineTeacher, recipe: Recipe, *, lora: bool, asked: Sequence[int] = ()) -> dict[str, Any]:
    """The fields of a card that say how plain diffusers samples the student: its classes and their calls.

    Args:
        teacher: whose pipeline it is.
        recipe: how the student is sampled.
        lora: whether it is a LoRA.
        asked: numbers of steps besides the usual ones.
    """
    sampler = in_diffusers(recipe.sampler)
    times = (
        recipe.times
        if recipe.policy or sampler == recipe.sampler
        else recipe.without_target(times_of(teacher, sampler))
    )
    scheduler = teacher.lora_scheduler(sampler) if lora else teacher.student_scheduler(sampler)
    call = teacher.lora_call if lora else teacher.student_call
    said = [k for k in sorted({*CALLED_STEPS[sampler], *asked}) if k in times] or sorted(times)
    levels = {k: times[k] for k in said}
    return {
        "pipeline": (type(teacher.pipe) if lora else teacher.student_class(sampler)).__name__,
        "scheduler": PolicyScheduler.__name__ if recipe.policy else type(scheduler).__name__,
        "calls": {k: call(listed, recipe.guidance, sampler) for k, listed in levels.items()},
        "conventions": conventions(teacher, levels, sampler),
    }


def write_cards(folder: Path, card: Card, metrics: dict[str, Any] | None = None, adapted: str = "") -> None:
    """A student folder's `stepfold.json` and README; arguments as of `model_card`."""
    write_card(folder, card)
    text = model_card(card, metrics, files=listing(folder), adapted=adapted)
    (folder / README).write_text(text, encoding="utf-8")


def metrics_beside(folder: Path) -> dict[str, Any] | None:
    """What a run measured of its own student, if the folder is that; not of another one in the run's folder."""
    report = folder.resolve().parent / "report.json"
    own = report.is_file() and folder.resolve().name == "student"
    return json.loads(report.read_text(encoding="utf-8")) if own else None


def export_pipeline(folder: Path, out: Path, dtype: Half | None = None) -> None:
    """A student as a whole pipeline folder for plain diffusers; a LoRA student is merged into its teacher's network.

    Args:
        folder: the student's.
        out: the folder to write.
        dtype: that the weights of networks and text encoders are rounded to; None for those of the student's folder, of
            a merged LoRA float32.

    Raises:
        UserError: the bundled student was asked for in half precision, or a weight is too large for float16.
    """
    card = read_card(folder)
    if card.network_only or not (card.lora_rank or card.calls):
        if dtype:
            raise UserError(f"--dtype {dtype} does not go with this small student; leave it out")
        teacher, student, card = load_student(folder, "cpu")  # the bundled one, or one whose card does not say enough
        save_student(teacher, student, out, Config.model_validate(card.config), card.recipe, card.example)
        return
    with writing(out) as part:
        if card.lora_rank:
            teacher, student, card = load_merged(folder, "cpu")
            scheduler = teacher.lora_scheduler(in_diffusers(card.recipe.sampler))
            set_parts(teacher.pipe, {"scheduler": scheduler} | teacher.own_parts(teacher.no_guidance))
            if dtype:
                rounded_parts(teacher.pipe, dtype)
            teacher.pipe.save_pretrained(part, safe_serialization=True)
            save_embedder(student, part)
            save_policy(teacher, student, part, card.recipe, lora=False)
            use = {} if card.calls else use_of(teacher, card.recipe, lora=True, asked=card.asked_steps)
            said = use | {"merged": True, "dtype": dtype or ""}
            write_cards(part, card.model_copy(update=said), metrics_beside(folder))
        else:
            check_folder(folder)
            shutil.copytree(folder, part)
            readme = part / README
            text = readme.read_text(encoding="utf-8") if readme.is_file() else model_card(card, metrics_beside(folder))
            if FILES not in text:  # of an earlier version
                readme.write_text(text + listing(part), encoding="utf-8")
            for name, module in rounded_parts(load_student(folder, "cpu")[0].pipe, dtype).items() if dtype else ():
                for file in (part / name).glob("*.safetensors*"):
                    file.unlink()
                cast(Any, module).save_pretrained(part / name, safe_serialization=True)
            if dtype:  # the README stays, with the scores that only it may have
                write_card(part, card.model_copy(update={"dtype": dtype}))
                text = readme.read_text(encoding="utf-8")
                loaded, rounded = f"dtype=torch.{card.loaded_dtype}", f"dtype=torch.{dtype}"
                readme.write_text(text.replace(loaded, rounded), encoding="utf-8")


def model_card(
    card: Card, metrics: dict[str, Any] | None = None, name: str = "FOLDER", files: str = "", adapted: str = ""
) -> str:
    """The student's README: use, recipe, metrics, licences.

    Args:
        card: what `stepfold.json` says.
        metrics: the run's report.json.
        name: what loads the student: the folder, or a hub id.
        files: the section about the folder's files, as `files.listing` writes it.
        adapted: the pipeline's part that a folder for PEFT is for; empty for others.

    Raises:
        UserError: the card is of a version that did not say how plain diffusers calls a student.
    """
    licences = "\n".join(f"| {part} | {in_words(licence)} |" for part, licence in card.licences.items())
    front = "".join(f"{field}: {json.dumps(value)}\n" for field, value in card.licences["teacher"].items())
    front += f"base_model: {card.teacher}\n" * is_hub_id(card.teacher)
    steps = several(card.config["training"]["steps"], "optimiser step", "optimiser steps")
    return f"""---
library_name: diffusers
pipeline_tag: text-to-{RESULTS[card.output]}
tags: [few-step, distillation, stepfold]
{front}---

# A few-step student of `{card.teacher}`

Distilled from {source_of(card.config)} by stepfold {card.stepfold}, with {method_of(card.config)}.
It took {steps} of {step_of(card.config)}, guidance
{", ".join(f"{scale:g}" for scale in card.recipe.taught)}.{made_for(card)} The whole recipe is in
`{CARD}`.

## Use

{how_to_use(card, name, adapted)}
{files}{in_other_tools(card)}{measured(metrics)}{quantised_section(card)}
## Licence

A student is derived from its teacher: the licences of the teacher's network, text encoders and autoencoder apply.

| part | licence |
|---|---|
{licences}
"""


def made_for(card: Card) -> str:
    """Which sampler the student is for, where that is not the usual one."""
    if card.folded_steps:
        kind = "flow map" if card.config.get("objective") != "policy" else "policy"
        return f" It is a {kind} for exactly {several(card.folded_steps, 'step', 'steps')}."
    if card.recipe.sampler == "flow" and len(card.recipe.times) == 1:
        return OF_SEGMENTS
    return MADE_FOR.get(card.recipe.sampler, "")


def how_to_use(card: Card, name: str, adapted: str = "") -> str:
    """The README's code for plain diffusers, and what to change for another number of steps; see `model_card`."""
    if card.recipe.policy:
        return of_policy(card, name, USE, RESULTS[card.output])
    if not card.recipe.jumps_to_zero:
        return OF_EDGES.format(steps=card.asked_steps[0], name=name)
    card.check_calls()
    wished = (*card.asked_steps[:2], *EXAMPLES[in_diffusers(card.recipe.sampler)])
    usual, other = [*dict.fromkeys(k for k in wished if k in card.calls), *[max(card.calls)] * 2][:2]
    call = card.calls[usual]
    changed = {name: value for name, value in card.calls[other].items() if value != call[name]}
    family, theirs = FAMILIES.get(card.pipeline, PipelineTeacher), card.config["teacher"]
    chosen = {name: theirs[name] for name in ("revision", "variant") if theirs.get(name)}
    merging = "".join(
        MERGE.format(
            lora=json.dumps(assets.lora_place(lora.source)),
            scale="" if lora.scale == 1 else f", lora_scale={lora.scale!r}",
        )
        for lora in card.teacher_settings().lora
    )
    dtype, after = f"torch.{card.loaded_dtype}", family.after_loading(card.lora_rank > 0)
    last = PEFT_LINE.replace("{part}", adapted) if adapted else LORA_LINE
    beside = LOAD_LORA + last if card.loras_in_diffusers else WHOLE
    loading = (beside if card.lora_rank else loading_of(card) or LOAD).format(
        pipeline=card.pipeline, scheduler=card.scheduler,
        teacher=json.dumps("TEACHER" if card.teacher == "emoji" or is_live(card.teacher) else card.teacher),
        options="".join(f", {name}={json.dumps(value)}" for name, value in chosen.items()),
        dtype="" if any("{dtype}" in line for line in after) else f", dtype={dtype}",
        parts="".join(f"\n{line.format(dtype=dtype)}" for line in after),
        merge=merging,
        name=json.dumps(name),
    )  # fmt: skip
    named = family.prompt_argument
    if card.lora_rank and card.loras_in_diffusers:
        for part, file in card.lora_parts.items():
            loading += LOAD_SECOND.format(name=json.dumps(name), part=part, file=file)
    classes = f"{card.pipeline}, {card.scheduler}" if card.lora_rank else card.pipeline
    use = USE.format(
        classes=classes + "\nfrom peft import PeftModel" * bool(adapted),
        loading=loading,
        prompt=(f"{named}=" if named else "") + json.dumps(card.example, ensure_ascii=False),
        arguments="\n".join(f"    {name}={value!r}," for name, value in call.items()),
        result=RESULTS[card.output],
        output=card.output,
    )
    if card.lora_rank and is_live(card.teacher):
        use += OF_OBJECT.format(pipeline=card.pipeline)
    if theirs.get("image_column"):
        use += WITH_IMAGE
    if card.folded_steps:
        return use + FOLDED
    if changed:
        words = ", ".join(f"`{name}={value!r}`" for name, value in changed.items())
        on_its_own = card.config.get("space", {}).get("kind") == "rollout" and card.asked_steps == (usual,)
        learned = f" The student was trained for {usual} steps." if on_its_own else ""
        use += f"\n\nFor {WORDS.get(other, other)} step{'s' * (other != 1)}: {words}.{learned}"
    if card.pipeline == ANYFLOW:
        return use + TOLD_BOTH.format(fewest=min(card.calls), most=max(card.calls))
    if card.folding:
        return use + JUMPS + JUMPS_FOLDED.format(name=name, options=card.folding)
    return use + JUMPS if card.recipe.sampler == "flow_map" else use


def in_other_tools(card: Card) -> str:
    """The README's table of what the teacher's pipeline means; empty for cards that do not say it."""
    rows = "".join(f"| {name} | {words} |\n" for name, words in card.conventions.items())
    return f"\n## In other tools\n\n{OTHER_TOOLS}\n\n| of the pipeline | |\n|---|---|\n{rows}" if rows else ""


def measured(metrics: dict[str, Any] | None) -> str:
    """The README's table of scores; empty where nothing was measured."""
    if not metrics or not metrics["student"]:
        return ""
    protocol, keys = metrics["protocol"], columns_of(metrics)
    what = protocol.get("prompts") or f"{protocol['n']} images a row"
    rows = f"\n## Measured\n\nProtocol {protocol['hash'][:12]}: {what}.\n\n"
    rows += f"| sampler | {' | '.join(title(metrics, key) for key in keys)} |\n|---|{'---|' * len(keys)}\n"
    for who in (*teachers_of(metrics), "student"):
        for steps, scores in metrics.get(who, {}).items():
            cells = " | ".join(number(scores.get(key), METRICS[key].digits) for key in keys)
            rows += f"| {who}, {counted(int(steps))} | {cells} |\n"
    note = noisy_note(metrics, keys)
    return rows + f"\n{note}.\n" if note else rows
