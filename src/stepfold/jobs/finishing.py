"""The end of a run: its student, its scores, its report and its card."""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepfold import assets
from stepfold.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from filelock import BaseFileLock
    from torch import Tensor

    from stepfold.bank import Bank
    from stepfold.config import Config
    from stepfold.display import Display
    from stepfold.evaluation.latents import Chosen, LatentProtocol
    from stepfold.evaluation.measure import Sampler
    from stepfold.evaluation.mjhq import ClipScorer
    from stepfold.evaluation.protocol import Protocol
    from stepfold.images.reading import ImageFolder
    from stepfold.prompts.reading import PromptFile, Prompts
    from stepfold.sampling.recipe import Recipe
    from stepfold.teachers.contract import Condition, PictureScore, Student
    from stepfold.teachers.pipeline import PipelineTeacher
    from stepfold.training.course import Course
    from stepfold.training.processes import Processes


@dataclass(frozen=True)
class Run:
    """What a run has in memory when its first step begins. The student is apart: it is let go of before the rest.

    Attributes:
        config: the settings, with `auto` resolved.
        folder: of the run.
        accelerator: device and precision.
        processes: that share every step.
        prompts: the training prompts; an image folder's captions.
        teacher: the network to distil.
        usual: guidance scale that the teacher is measured at.
        recipe: how the student is sampled.
        conditions: numbers of B prompts -> their conditions; `cached` where they come from disk.
        blacks: unit-variance latents of a black picture, one for each latent shape.
        latents: numbers of B images -> clean latents [B, ...]; None where no images are used.
        bank: of couplings; None where the teacher is sampled.
        lock: on the run folder, held by the first process.
        score: that the student raises; None for none.
    """

    config: "Config"
    folder: Path
    accelerator: "Accelerator"
    processes: "Processes"
    prompts: "PromptFile | ImageFolder"
    teacher: "PipelineTeacher"
    usual: float
    recipe: "Recipe"
    conditions: "Callable[[Sequence[int]], Condition]"
    cached: bool
    blacks: "list[Tensor]"
    latents: "Callable[[list[int]], Tensor] | None"
    bank: "Bank | None"
    lock: "BaseFileLock | None"
    score: "PictureScore | None" = None


def finish(run: Run, average: "Student", course: "Course", display: "Display", command: str) -> dict[str, Any]:
    """Writes the student, its scores, the report and the card; returns what is in report.json."""
    from stepfold.evaluation.report import write_report
    from stepfold.export.files import listing
    from stepfold.export.pipeline import model_card, save_student
    from stepfold.teachers.loading import load_teacher
    from stepfold.training.processes import is_sharded
    from stepfold.training.runs import writing

    config, teacher, student = run.config, run.teacher, run.folder / "student"
    if is_sharded(teacher.network):
        teacher = load_teacher(config.teacher, run.accelerator.device)  # whole again, to be measured
    card = save_student(teacher, average, student, config, run.recipe, run.prompts.prompt(0))
    with course.stages("evaluation"):
        scores = evaluated(run, teacher, average, display)
    teacher.release_decoder()
    result = report_of(run, course, scores, command, card.usual_steps)
    write_report(run.folder, result)
    with writing(student / "README.md") as part:
        part.write_text(model_card(card, result, files=listing(student)), encoding="utf-8")
    if run.lock:
        run.lock.release()
    return result


def evaluated(run: Run, teacher: "PipelineTeacher", student: "Student", display: "Display") -> dict[str, Any]:
    """The protocol, and scores of teacher and student under it, as report.json has them; none where `n` is 0."""
    from stepfold.evaluation.protocol import emoji_protocol, protocol_record

    n, emoji = run.config.evaluation.n, run.config.teacher.source == "emoji"
    if n and not emoji:
        return measure_own(run, teacher, student, display)
    protocol = emoji_protocol([run.recipe], run.config.evaluation.steps, n or 2, run.usual)
    scores = measure_student(protocol, teacher, student, run.recipe, display) if n else {"teacher": {}, "student": {}}
    return {"protocol": protocol_record(protocol)} | scores


def measure_own(run: Run, teacher: "PipelineTeacher", student: "Student", display: "Display") -> dict[str, Any]:
    """The latent errors of a student whose teacher has no evaluator, on prompts that the run did not train on."""
    from stepfold.evaluation.latents import NUM_PROMPTS, LatentProtocol, held_out, known_steps

    config, prompts = run.config, run.prompts
    n = min(NUM_PROMPTS, config.evaluation.n)
    rows = len(run.bank) if run.bank else None
    chosen = held_out(len(prompts), trained_samples(config), config.seed, n, rows)
    protocol = LatentProtocol(
        n=len(chosen.index),
        steps=known_steps(run.recipe, [k for k in config.evaluation.steps or () if k in run.recipe.times]),
        guidance=run.recipe.guidance,
        prompts_sha256=prompts.sha256,
        index=chosen.index,
    )
    clip = None
    try:
        clip = open_clip(config.evaluation.clip, teacher)
    except UserError as error:  # the student is made, and its other numbers do not depend on it
        display.note(f"no CLIP score: {error}")
    return latent_scores(protocol, chosen, teacher, student, run.recipe, run.conditions, prompts, clip, display)


def open_clip(source: str | None, teacher: "PipelineTeacher") -> "ClipScorer | None":
    """The CLIP of a folder or hub id; None for none.

    Raises:
        UserError: it does not load, or the teacher makes videos.
    """
    from stepfold.evaluation.mjhq import load_clip

    if source is None:
        return None
    if teacher.frames > 1:
        raise UserError("a CLIP scores images, and this teacher makes videos; leave out evaluation.clip and --clip")
    return load_clip(source, str(teacher.device))


def trained_samples(config: "Config") -> int:
    """How many samples of its order a run trains on."""
    return math.ceil(config.training.steps / config.space.reuse) * config.training.prompts_per_step


def latent_scores(
    protocol: "LatentProtocol",
    chosen: "Chosen",
    teacher: "PipelineTeacher",
    student: "Student",
    recipe: "Recipe",
    conditions: "Callable[[Sequence[int]], Condition]",
    prompts: "Prompts",
    clip: "ClipScorer | None",
    display: "Display",
    searched: "Mapping[str, Sampler] | None" = None,
) -> dict[str, Any]:
    """Says what the evaluation costs, does it, and returns what report.json has of it; see `measure_latents`."""
    from stepfold.evaluation.latents import BATCH, cost, measure_latents, samplers_of
    from stepfold.teachers.contract import concatenate

    display.note(f"evaluation on {chosen.said}, {cost(protocol, teacher)}")
    index = chosen.index
    condition = concatenate([conditions(index[i : i + BATCH]) for i in range(0, len(index), BATCH)])
    texts = [prompts.prompt(i) for i in index]
    names = (*samplers_of(teacher, student, recipe, protocol), *(searched or {}))
    with display.measuring(dict.fromkeys(names, protocol.n)) as tick:
        scores = measure_latents(teacher, student, recipe, protocol, condition, texts, clip, tick, searched)
    said = {"unseen": chosen.unseen, "prompts": chosen.said}
    return {"protocol": protocol.record() | said, "fresh_noise": recipe.sampler == "consistency"} | scores


def measure_student(
    protocol: "Protocol", teacher: "PipelineTeacher", student: "Student", recipe: "Recipe", display: "Display"
) -> dict[str, Any]:
    """Scores of teacher and student, as report.json has them."""
    from stepfold.evaluation.judge import load_judge
    from stepfold.evaluation.measure import measure_groups, protocol_samplers
    from stepfold.evaluation.protocol import rows_by_steps

    judge = load_judge(assets.JUDGE, teacher.device)
    groups = protocol_samplers(teacher, {"student": (student, recipe)}, protocol)
    with display.measuring({name: protocol.n for group in groups.values() for name in group}) as tick:
        scores = measure_groups(judge, protocol, teacher, groups, teacher.device, tick)
    return {"reals": {"diversity": judge.diversity}} | rows_by_steps(scores)


def report_of(run: Run, course: "Course", scores: dict[str, Any], command: str, usual_steps: int) -> dict[str, Any]:
    """What report.json holds; `usual_steps` is the student's usual number of sampling steps."""
    from stepfold.evaluation.curves import curves_from_rows
    from stepfold.evaluation.latents import calls_per_step
    from stepfold.evaluation.preview import errors_over_steps
    from stepfold.evaluation.report import versions
    from stepfold.training.runs import read_metrics

    config, logged, numbers = run.config, read_metrics(run.folder), course.numbers()
    student, errors = run.folder / "student", errors_over_steps(run.folder)
    preset, changed = nearest_preset(config)
    return {
        "title": f"{run.folder.name}: few-step student of {config.teacher.source}",
        "facts": facts_of(config, numbers),
        "command": command,
        "next_command": None if scores["student"] else f"stepfold evaluate {shlex.quote(str(student))}",
        "usual_steps": usual_steps,
        "use": how_to_use(student, run.prompts.prompt(0), usual_steps),
        "versions": versions(),
        "preset": preset,
        "changed": changed,
        "config": config.model_dump(mode="json"),
        "teacher_calls_per_step": calls_per_step(run.teacher),
        **scores,
        "prompts": {
            "file": config.space.images or config.prompts or "bundled",
            "count": len(run.prompts),
            "sha256": run.prompts.sha256,
        },
        **numbers,
        "processes": run.processes.count,
        "skipped_steps": sum("skipped" in row for row in logged),
        "curves": ({"latent_error": errors} if errors else {}) | curves_from_rows(logged),
        "images": captioned(run.folder),
    }


def facts_of(config: "Config", numbers: dict[str, Any]) -> list[str]:
    """The line below a report's title: when, where, how long, how much."""
    from stepfold.evaluation.report import duration

    student = f"LoRA of rank {config.student.lora}" if config.student.lora else "all weights"
    return [
        f"{datetime.now().astimezone():%Y-%m-%d}",
        f"device {numbers['device']}",
        f"{duration(sum(numbers['stages_sec'].values()))} in all",
        f"{config.training.steps:,} steps",
        f"{config.objective}, {student}",
        raised_score(config),
    ]


def evaluators_of(config: "Config") -> list[str]:
    """Folders or hub ids of the CLIPs that a run is measured by."""
    if config.teacher.source == "emoji" and config.evaluation.n:
        return [str(assets.JUDGE)]
    return [config.evaluation.clip] if config.evaluation.clip else []


def raised_score(config: "Config") -> str:
    """Which score a run raised and which it is measured by; empty without a reward."""
    from stepfold.config import phases_of

    if not any(each.reward.weight for _, each in phases_of(config)):
        return ""
    bundled = config.teacher.source == "emoji" and config.evaluation.n
    measured = "the bundled evaluator" if bundled else config.evaluation.clip or "the latent error"
    return f"trained to raise the score of {config.reward.clip or 'a function'}, measured by {measured}"


def how_to_use(student: Path, prompt: str, steps: int) -> list[tuple[str, str]]:
    """What one does with a student that is usually sampled in so many steps, and the command for it."""
    folder = shlex.quote(str(student))
    sample = f"stepfold sample {folder} {shlex.quote(prompt)}"
    return [
        ("Student", str(student)),
        ("Sample", f"{sample} --steps {steps}"),
        ("Race", f"{sample} --race race.gif"),
        ("Page", f"stepfold demo {folder}"),
        ("Export", f"stepfold export {folder} --help"),
        ("diffusers", f"the code is in {student / 'README.md'}"),
    ]


def nearest_preset(config: "Config") -> tuple[str, dict[str, Any]]:
    """The preset with the fewest other settings, and the settings of the run that differ from it."""
    from stepfold.config import load_config, preset_names
    from stepfold.training.opening import differences

    found = {name: differences(load_config(name), config) for name in preset_names()}
    name = min(found, key=lambda name: len(found[name]))
    return name, {key: ours for key, (_, ours) in found[name].items()}


def captioned(folder: Path) -> dict[str, str]:
    """Caption -> path in the run's folder of its preview grids, in order; the report leads with the last one."""
    found = {
        f"Step {int(path.stem.removeprefix('step_')):,}": str(path.relative_to(folder))
        for path in sorted((folder / "previews").glob("step_*.png"))
    }
    *earlier, last = found or [""]
    captions = {caption: found[caption] for caption in earlier}
    return captions | ({f"{last}: teacher and student from the same noise": found[last]} if last else {})
