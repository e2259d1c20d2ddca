"""What the commands do: `distill`, `sample`, `evaluate`. Each is one function from settings to files."""

import hashlib
import json
import math
import platform
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepfold import __version__, assets
from stepfold.config import Config, StudentSettings, TeacherSettings, load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.evaluation import mjhq
from stepfold.evaluation.judge import Judge, load_judge
from stepfold.evaluation.measure import Sampler, measure, student_sampler, teacher_sampler
from stepfold.evaluation.pipelines import Drawer, claim, geneval_prompts, measure_pipeline, write_geneval
from stepfold.evaluation.preview import sample_rows, save_grid, thinned, to_image
from stepfold.evaluation.protocol import EMOJI, Protocol, Scores, teacher_at
from stepfold.evaluation.report import curves_from_rows, write_report
from stepfold.export.onnx import export_onnx
from stepfold.export.pipeline import export_lora, export_pipeline, model_card, save_student
from stepfold.export.single_file import export_single_file
from stepfold.images.reading import ImageFolder, open_images
from stepfold.objectives.consistency import STEEPEST, derivative_size
from stepfold.prompts.cache import ConditionCache, encode_prompts, open_conditions
from stepfold.prompts.reading import PromptFile, Prompts, open_prompts
from stepfold.randomness import normal
from stepfold.spaces.pairs import Pairs
from stepfold.teachers.contract import Condition, Student
from stepfold.teachers.licences import in_words, licences_of
from stepfold.teachers.loading import (
    CARD,
    choose_objective,
    counts_to_thousand,
    encoder_fingerprint,
    files_fingerprint,
    load_any_pipeline,
    load_student,
    load_teacher,
    lora_rank,
    place_of,
    read_card,
    student_folder,
)
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.training.choices import choose_precision
from stepfold.training.distill import Progress, collect, distill, make_accelerator, processes_of
from stepfold.training.draws import draw, guidance_scales, send
from stepfold.training.processes import is_sharded, lost_process
from stepfold.training.runs import (
    check_run,
    checkpoints,
    open_run,
    read_metrics,
    remember_prompts,
    remove_old_checkpoints,
    set_aside_damaged,
    writing,
)
from stepfold.training.stages import Stages

NUM_PREVIEWS = 8
NUM_VIDEO_PREVIEWS, NUM_FRAMES = 2, 6


@lost_process()
def run_distill(config: Config, folder: Path, *, resume: bool, display: Display, command: str) -> dict[str, Any]:
    """Distils, exports, measures and reports. Returns what is in report.json; nothing in all processes but the first.

    Raises:
        UserError: something in the settings, the prompts, the teacher or the folder is wrong.
        NonFiniteError: the training diverged.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    if config.space.kind == "images" and config.space.images is None:
        raise UserError("space.kind=images needs a folder of images; add --set space.images=FOLDER")
    began = time.perf_counter()
    config = choose_objective(choose_precision(config))
    accelerator = make_accelerator(config.training.precision, several=True)
    device, processes = accelerator.device, processes_of(accelerator)
    if config.training.prompts_per_step < processes.count:
        raise UserError(
            f"training.prompts_per_step is {config.training.prompts_per_step}, but there are {processes.count} "
            "processes; it counts the prompts of all of them, so give at least one to each"
        )
    images = open_images(config.space.images) if config.space.images else None
    prompts = images or open_prompts(config.prompts or assets.PROMPTS)
    check_run(folder, config, resume)
    display.note(
        f"{len(prompts)} prompts ({prompts.num_blank} blank and {prompts.num_duplicate} repeated lines left out), "
        f"device {device.type}{f', {processes.count} processes' if processes.count > 1 else ''}, run folder {folder}"
    )
    torch.manual_seed(config.seed)  # the guidance embedder's and the weight head's initial values
    cache = cache_of(config, prompts)
    teacher = load_teacher(config.teacher, device, network_only=cache is not None, null=cache.null if cache else None)
    teacher.check_prompts(prompts.prompt(i) for i in range(len(prompts)))
    if images and teacher.frames > 1:
        raise UserError(
            f"space.kind=images takes pictures, but this teacher makes {teacher.frames} frames; "
            "set teacher.frames=1, or space.kind to generation or endpoints"
        )
    licences = ", ".join(f"{part} {in_words(licence)}" for part, licence in licences_of(config.teacher.source).items())
    display.note(f"licences: {licences}")
    student = make_student(teacher, config.student, display)
    scales = guidance_scales(config, teacher)
    usual = teacher.default_guidance if config.evaluation.guidance is None else config.evaluation.guidance
    taught = usual if len(set(scales)) > 1 else scales[0]
    lock = None
    if processes.first:
        lock = open_run(folder, config, resume)  # only now: a teacher that does not load leaves no run behind
        remember_prompts(folder, prompts.source, len(prompts), prompts.sha256)
        for finding in set_aside_damaged(folder):
            display.note(finding)
        remove_old_checkpoints(folder, config.training.keep_checkpoints)  # a kill may have come before that
    processes.wait()
    if resume and not checkpoints(folder):
        display.note(f"{folder} holds no checkpoint yet: starting from the teacher")
    with accelerator.main_process_first():  # the first one makes the files, the others read them
        blacks = [cache.black.to(device)] if cache and not config.teacher.sizes else cached_blacks(folder, teacher)
        latents = image_latents(folder, teacher, images, config.space.cache_latents, display) if images else None
    if images is None or config.space.cache_latents:
        teacher.release_decoder()

    conditions = conditions_from(cache, teacher, prompts)
    if config.objective == "continuous" and processes.first and counts_to_thousand(config):
        display.note(steepness(teacher, student, prompts, conditions, config))
    preview = make_preview(folder, teacher, conditions, len(prompts), config, taught, display, writes=processes.first)

    tracker = Tracker(folder) if processes.first else None
    stages = Stages(device if config.training.time_stages else None)
    stages.seconds["load"] = time.perf_counter() - began
    tangent = ""
    step_sec: list[float] = []

    def note_tangent(text: str) -> None:
        nonlocal tangent
        tangent = text
        display.note(f"tangent: {text}")

    def report(progress: Progress) -> None:
        step_sec.append(progress.row["sec"])
        display.step(progress)
        if "skipped" in progress.row:
            display.note(f"step {progress.row['step']} skipped: {progress.row['nonfinite']}")
        if tracker:
            tracker.add(progress.row, progress.step)

    of_steps, of_previews = [0.0], [0.0]

    def preview_apart(average: Student, step: int) -> None:
        """A preview, whose memory is not that of the steps."""
        of_steps.append(peak_memory_gib(device))
        reset_peak_memory(device)
        preview(average, step)
        of_previews.append(peak_memory_gib(device))
        reset_peak_memory(device)

    reset_peak_memory(device)
    with display.training(config.training.steps):
        average = distill(
            config, folder, teacher, student, prompts, blacks, accelerator, processes=processes,
            latents=latents, conditions=conditions if cache else None,
            stages=stages, note_tangent=note_tangent, report=report, preview=preview_apart,
        )  # fmt: skip
    del student  # its memory is for what comes now
    processes.wait()  # nobody leaves while another one still sends
    accelerator.end_training()  # the others have nothing left to do
    if not processes.first or not tracker or not lock:
        return {}
    tracker.close()
    if is_sharded(teacher.network):
        teacher = load_teacher(config.teacher, device)  # whole again, to be measured
    of_steps.append(peak_memory_gib(device))

    save_student(teacher, average, folder / "student", config, scales, taught, prompts.prompt(0))
    result: dict[str, Any] = {"teacher": {}, "student": {}}
    protocol = replace(EMOJI, n=config.evaluation.n or 2, guidance=usual)
    if config.evaluation.n and config.teacher.source == "emoji":
        judge = load_judge(assets.JUDGE, device)
        with stages("evaluation"):
            groups = protocol_samplers(teacher, {"student": (average, taught)}, protocol)
            scores = measure_groups(judge, protocol, teacher, groups, display)
        teacher.release_decoder()
        result |= {"reals": {"diversity": judge.diversity}} | rows_by_steps(scores)
    result = {
        "title": f"{folder.name}: one-step student of {config.teacher.source}",
        "command": command,
        "versions": versions(),
        "config": config.model_dump(mode="json"),
        "protocol": protocol_record(protocol),
        **result,
        "prompts": {
            "file": config.space.images or config.prompts or "bundled",
            "count": len(prompts),
            "sha256": prompts.sha256,
        },
        "stages_sec": dict(stages.seconds),  # of this process: a resumed run's earlier steps are not in it
        "timed_steps": len(step_sec),
        "step_sec": {"first": step_sec[0], "median": statistics.median(step_sec)} if step_sec else None,
        "tangent": tangent,
        "processes": processes.count,
        "skipped_steps": sum("skipped" in row for row in read_metrics(folder)),
        "peak_memory_gib": max(of_steps + of_previews),  # while training: neither loading before nor measuring after
        "peak_memory_steps_gib": max(of_steps),  # without the previews
        "curves": curves_from_rows(read_metrics(folder)),
        "images": {
            p.stem.replace("_", " "): str(p.relative_to(folder))
            for p in first_and_last(sorted((folder / "previews").glob("*.png")))
        },
    }
    write_report(folder, result)
    card = json.loads((folder / "student" / CARD).read_text(encoding="utf-8"))
    with writing(folder / "student" / "README.md") as part:
        part.write_text(model_card(card, result), encoding="utf-8")
    lock.release()
    return result


def steepness(
    teacher: PipelineTeacher,
    student: Student,
    prompts: Prompts,
    conditions: Callable[[Sequence[int]], Condition],
    config: Config,
) -> str:
    """How large dF/dt is on one walk, of a teacher whose time counts to 1000, and what to do about it."""
    space = config.space.model_copy(update={"kind": "generation", "filter_rule": "off"})
    training = config.training.model_copy(update={"prompts_per_step": 1})
    config = config.model_copy(update={"space": space, "training": training})
    batch = draw(0, prompts, teacher, config, teacher.device)
    pairs = collect(batch, conditions(batch.index), teacher.velocity, torch.zeros(()), teacher.sigma_data, space)
    sizes = []
    for row in range(len(pairs)):  # one at a time: a step may have just as much memory
        one = pairs.rows(slice(row, row + 1))
        F = partial(of_pairs, student, one)
        sizes.append(derivative_size(F, one.x, one.t, one.dxdt, teacher.sigma_data))
    size = math.hypot(*sizes) / math.sqrt(len(sizes))
    said = f"this teacher's time counts to 1000, and its dF/dt is {size:.3g} (root mean square over one walk)"
    if size <= STEEPEST:
        return f"{said}; up to {STEEPEST:g} objective=continuous is fine"
    return (
        f"{said}; above {STEEPEST:g} take objective=discrete, which does without it, or `stepfold retime` first "
        "(Sana, SD3, FLUX)"
    )


def of_pairs(student: Student, pairs: Pairs, x_unit: Tensor, t: Tensor) -> Tensor:
    """F at other states and times of the pairs' prompts and scales."""
    return student(x_unit, t, pairs.condition, pairs.guidance)


def run_encode(
    settings: TeacherSettings, prompts: Path | str | None, folder: Path, *, batch: int, display: Display, device: str
) -> None:
    """Encodes a file of prompts into a folder that `conditions=FOLDER` trains from.

    Raises:
        UserError: see `encode_prompts`.
    """
    file = open_prompts(prompts or assets.PROMPTS)
    teacher = load_teacher(settings, device)
    key = conditions_key(settings, file.sha256)
    black = teacher.black_latent(teacher.latent_shape)
    with display.measuring({"prompts": len(file)}) as tick:
        encode_prompts(
            folder, key, file, teacher.encode, teacher.null_condition, black, batch=batch,
            note=display.note, tick=partial(tick, "prompts"),
        )  # fmt: skip


def make_student(teacher: PipelineTeacher, settings: StudentSettings, display: Display) -> Student:
    """The student of a run, as it starts."""
    if settings.lora:
        return teacher.lora_student(settings.lora)
    if settings.depth < 1:
        display.note(
            f"the student keeps {settings.depth:.0%} of the teacher's blocks: it starts far from the teacher, "
            "and needs many more steps than a whole one"
        )
    return teacher.new_student(settings.depth)


def cache_of(config: Config, prompts: PromptFile | ImageFolder) -> ConditionCache | None:
    """The encoded prompts that the settings name; None where they name none.

    Raises:
        UserError: they are those of another teacher or other prompts, or damaged.
    """
    if not config.conditions:
        return None
    return open_conditions(Path(config.conditions), conditions_key(config.teacher, prompts.sha256), len(prompts))


def conditions_from(
    cache: ConditionCache | None, teacher: PipelineTeacher, prompts: Prompts
) -> Callable[[Sequence[int]], Condition]:
    """Numbers of B prompts -> what the teacher encodes them to, from a cache if there is one."""

    def conditions(index: Sequence[int]) -> Condition:
        if cache:
            return cache.rows(index).each(partial(send, device=teacher.device)).to(teacher.device, teacher.work_dtype)
        return teacher.encode([prompts.prompt(i) for i in index])

    return conditions


def conditions_key(settings: TeacherSettings, prompts_sha256: str) -> dict[str, Any]:
    """What encoded prompts depend on."""
    return {
        "teacher": settings.source,
        "lora": settings.lora,
        "encoder": encoder_fingerprint(place_of(settings)),
        "max_tokens": settings.max_tokens,
        "height": settings.height,  # of the black picture
        "width": settings.width,
        "frames": settings.frames,
        "prompts": prompts_sha256,
    }


def cached_blacks(folder: Path, teacher: PipelineTeacher) -> list[torch.Tensor]:
    """The black latents of the brightness filter, one a shape, made once and kept with the run."""
    path = folder / "blacks.safetensors"
    if not path.exists():
        with writing(path) as part:
            made = [teacher.black_latent(shape).cpu().contiguous() for shape in teacher.latent_shapes]
            save_file({str(i): black for i, black in enumerate(made)}, part)
    kept = load_kept(path, {str(i): tuple(shape) for i, shape in enumerate(teacher.latent_shapes)})
    return [kept[str(i)].to(teacher.device) for i in range(len(kept))]


def load_kept(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors that a run has made once and kept, of the names and shapes that they must have.

    Raises:
        UserError: the file is damaged.
    """
    try:
        kept = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, it is made again") from None
    found = {name: tuple(tensor.shape) for name, tensor in kept.items()}
    if found != shapes or not all(t.is_floating_point() and bool(t.isfinite().all()) for t in kept.values()):
        raise UserError(f"{path} is damaged (it holds {found}, not finite {shapes}); delete it, it is made again")
    return kept


def image_latents(
    folder: Path, teacher: PipelineTeacher, images: ImageFolder, cache: bool, display: Display
) -> Callable[[list[int]], torch.Tensor]:
    """A function from numbers of images to their clean latents [B, ...], encoded when asked for, or all at once now."""

    def encode(index: Sequence[int]) -> torch.Tensor:
        return teacher.encode_pictures(torch.stack([images.picture(i, teacher.height, teacher.width) for i in index]))

    if not cache:
        return encode
    path = folder / "latents.safetensors"
    if not path.exists():
        display.note(f"encoding {len(images)} images once")
        with display.measuring({"images": len(images)}) as tick, writing(path) as part:
            parts = []
            for start in range(0, len(images), 50):
                index = range(start, min(start + 50, len(images)))
                parts.append(encode(index).cpu())
                tick("images", len(index))
            save_file({"x0": torch.cat(parts)}, part)
    kept = load_kept(path, {"x0": (len(images), *teacher.latent_shape)})["x0"]
    return lambda index: send(kept[index], teacher.device)


def make_preview(
    folder: Path,
    teacher: PipelineTeacher,
    conditions: Callable[[Sequence[int]], Condition],
    num_prompts: int,
    config: Config,
    guidance: float,
    display: Display,
    *,
    writes: bool = True,
) -> Callable[[Student, int], None]:
    """Draws the teacher at 20 steps and the student at 1, 2 and 4, from the same prompts and noise, into previews/.

    One that is there already is not drawn again. Without `writes` nothing is written: a process that only helps another
    one to draw.
    """
    count = NUM_PREVIEWS if teacher.frames == 1 else NUM_VIDEO_PREVIEWS
    shown = [i * num_prompts // count for i in range(min(count, num_prompts))]
    condition = conditions(shown)
    noise = teacher.sigma_data * torch.stack(
        [normal(teacher.latent_shape, config.seed, "preview noise", i) for i in range(len(shown))]
    ).to(teacher.device)
    reference: dict[str, torch.Tensor] = {}

    def preview(student: Student, step: int) -> None:
        path = folder / "previews" / f"step_{step:06d}.png"
        if path.exists():  # of before the run was stopped
            return
        if not reference:
            samplers: dict[str, Sampler] = {f"teacher {counted(k)}": teacher_sampler(teacher, k) for k in (20, 1)}
            reference.update(sample_rows(samplers, noise, condition, guidance))
        ours = {
            f"student {counted(k)}": student_sampler(student, teacher.student_times(k), config.seed, teacher.sigma_data)
            for k in (1, 2, 4)
        }
        latents = reference | sample_rows(ours, noise, condition, guidance)
        if not writes:
            return
        rows = {name: thinned(teacher.decode(x0), teacher.frames, NUM_FRAMES) for name, x0 in latents.items()}
        save_grid(rows, path)
        teacher.release_decoder()
        error = (latents["student 1 step"] - latents["teacher 20 steps"]).square().mean() / teacher.sigma_data**2
        display.note(f"step {step}: preview written, error of one step against the teacher's 20: {error:.3f}")

    return preview


def first_and_last(paths: list[Path]) -> list[Path]:
    """Both ends of a list, or all of a shorter one."""
    return paths[:1] + paths[1:][-1:]


def counted(steps: int) -> str:
    """`1 step`, `2 steps`."""
    return f"{steps} step{'s' * (steps > 1)}"


def protocol_samplers(
    teacher: PipelineTeacher, students: Mapping[str, tuple[Student, float]], protocol: Protocol
) -> dict[float, dict[str, Sampler]]:
    """Guidance scale -> what is measured at it: the teacher first, then the students (network, scale) taught by it.

    At the protocol's own scale the teacher is measured at all its step counts, at others at its most.
    """
    groups: dict[float, dict[str, Sampler]] = {}
    for scale in dict.fromkeys([protocol.guidance, *(scale for _, scale in students.values())]):
        if scale == protocol.guidance:
            group = {f"teacher {k}": teacher_sampler(teacher, k) for k in protocol.teacher_steps}
        else:
            most = protocol.teacher_steps[0]
            group = {f"{teacher_at(scale)} {most}": teacher_sampler(teacher, most)}
        for name, (student, taught) in students.items():
            for k in protocol.student_steps if taught == scale else ():
                group[f"{name} {k}"] = student_sampler(
                    student, teacher.student_times(k), protocol.seed, teacher.sigma_data
                )
        groups[scale] = group
    return groups


def measure_groups(
    judge: Judge,
    protocol: Protocol,
    teacher: PipelineTeacher,
    groups: Mapping[float, dict[str, Sampler]],
    display: Display,
) -> dict[str, Scores]:
    """Scores of `protocol_samplers`, each beside the teacher at its own guidance scale."""
    scores = {}
    with display.measuring(dict.fromkeys(chain.from_iterable(groups.values()), protocol.n)) as tick:
        for scale, samplers in groups.items():
            scores |= measure(judge, replace(protocol, guidance=scale), teacher, samplers, teacher.device, tick)
    return scores


def rows_by_steps(scores: dict[str, Scores]) -> dict[str, dict[str, Any]]:
    """{"teacher 20": scores} -> {"teacher": {"20": {...}}}."""
    out: dict[str, dict[str, Any]] = {"teacher": {}, "student": {}}
    for name, row in scores.items():
        who, steps = name.rsplit(" ", 1)
        out.setdefault(who, {})[steps] = row.to_json()
    return out


def run_sample(
    folder: Path, prompts: Sequence[str], *, steps: int, seed: int, guidance: float | None, device: str
) -> list[Image.Image]:
    """Pictures of a student, one a prompt; the same as its pipeline's with the same noise.

    Raises:
        UserError: the folder is no student, or it was taught one guidance scale and another one is asked for.
    """
    taught = set(read_card(folder).get("taught") or ())
    if guidance is not None and len(taught) == 1 and guidance not in taught:
        raise UserError(
            f"--guidance is {guidance:g}, but this student was taught at {taught.pop():g} alone and stands for that; "
            "leave --guidance out"
        )
    pipeline, student, card = load_student(folder, device)
    condition = pipeline.encode(prompts)
    shape = pipeline.latent_shape
    noise = torch.stack([normal(shape, seed, "sample", i) for i in range(len(prompts))])
    x0 = student_sampler(student, pipeline.student_times(steps), seed, pipeline.sigma_data)(
        pipeline.sigma_data * noise.to(device),
        condition,
        torch.full((len(prompts),), card["guidance"] if guidance is None else guidance, device=device),
        range(len(prompts)),
    )
    return [to_image(picture) for picture in pipeline.decode(x0)]


EXPORTS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "pipeline": (export_pipeline, "-pipeline"),
    "lora": (export_lora, "-lora.safetensors"),
    "single-file": (export_single_file, "-single-file.safetensors"),
    "onnx": (export_onnx, "-onnx"),
}
"""What a student can become -> the function from its folder to the new file or folder, and the end of its name."""


def run_export(student: Path, to: str, out: Path | None, *, force: bool) -> Path:
    """Writes a student as something else; returns where: `out`, or beside the student.

    Raises:
        UserError: the student cannot become that, or the place is taken.
    """
    if to not in EXPORTS:
        raise UserError(f"--to is {to!r}; a student becomes {', '.join(EXPORTS)}")
    export, ending = EXPORTS[to]
    target = out or student.with_name(student.name + ending)  # of the bundled student: here
    student = student_folder(student).resolve()
    suffix = Path(ending).suffix
    if target.suffix != suffix and suffix:
        raise UserError(f"--out {target} is no {suffix} file; give a name that ends in {suffix}")
    if target.resolve() == student or student in target.resolve().parents:
        raise UserError(f"--out {target} is the student itself, or in it; choose another --out")
    if target.exists() and not (force and replaceable(target, to_file=bool(suffix))):
        raise UserError(f"{target} is there already; choose another --out, or --force to replace an earlier export")
    export(student, target)
    return target


def replaceable(path: Path, to_file: bool) -> bool:
    """Whether `--force` may replace it: any file by a file, and a folder only where stepfold wrote it."""
    return path.is_file() if to_file else (path / CARD).is_file()


def run_evaluate(
    folders: Sequence[Path],
    *,
    steps: Sequence[int] | None,
    n: int,
    guidance: float | None,
    display: Display,
    device: str,
) -> dict[str, Any]:
    """Students and any other diffusers pipelines under the bundled teacher's protocol, beside that teacher.

    Students of the bundled teacher start from its noise, and so have an agreement with it. `steps` are 1, 2 and 4 for
    them if None, and the pipeline's own default for others.

    Raises:
        UserError: a folder is no pipeline; a student's teacher is not the bundled one, so there is no judge for it.
    """
    students: dict[str, tuple[Student, dict[str, Any]]] = {}
    for folder in folders:
        if (student_folder(folder) / CARD).is_file():
            _, student, card = load_student(folder, device)
            if card["teacher"] != "emoji":
                raise UserError(
                    f"{folder} is a student of {card['teacher']!r}, and the judge knows the bundled teacher's pictures "
                    "only; use --protocol mjhq30k"
                )
            students[str(folder)] = student, card
    drawers = {str(folder): open_drawer(folder, device) for folder in folders if str(folder) not in students}
    first = next((card for _, card in students.values()), None)
    settings = TeacherSettings.model_validate(first["config"]["teacher"]) if first else load_config("demo").teacher
    teacher = load_teacher(settings, device)
    usual = first["config"]["evaluation"]["guidance"] if first else None
    scale = next(s for s in (guidance, usual, teacher.default_guidance) if s is not None)
    protocol = replace(EMOJI, n=n, student_steps=tuple(steps or EMOJI.student_steps), guidance=scale)
    judge = load_judge(assets.JUDGE, device)

    told = {
        name: (student, card["guidance"] if guidance is None else guidance)
        for name, (student, card) in students.items()
    }
    scores = measure_groups(judge, protocol, teacher, protocol_samplers(teacher, told, protocol), display)
    jobs = {f"{name} {k}": (drawer, k) for name, drawer in drawers.items() for k in steps or drawer.usual_steps}
    if jobs:
        with display.measuring(dict.fromkeys(jobs, n)) as tick:
            for name, (drawer, k) in jobs.items():
                scores[name] = measure_pipeline(judge, protocol, drawer, k, guidance, partial(tick, name))
    rows = rows_by_steps(scores)
    result = {"versions": versions(), "protocol": protocol_record(protocol), "reals": {"diversity": judge.diversity}}
    if len(folders) == 1 and students:
        rows["student"] = rows.pop(str(folders[0]))
        return result | {"student_folder": str(folders[0])} | rows
    named = {str(folder): rows.pop(str(folder)) for folder in folders}
    return result | {who: row for who, row in rows.items() if row} | {"pipelines": named}


def open_drawer(folder: Path, device: str) -> Drawer:
    """The pipeline of a folder, called as a student's card says where it is a student.

    Raises:
        UserError: the folder is no pipeline, or a student that is none by itself.
    """
    if not (student_folder(folder) / CARD).is_file():
        return Drawer(load_any_pipeline(folder, device))
    card = read_card(folder)
    if lora_rank(card) or card["network_only"]:
        raise UserError(
            f"{folder} holds a student without the rest of its pipeline; make it whole first: "
            f"stepfold export {folder} --to pipeline"
        )
    return Drawer(load_any_pipeline(folder, device), card["calls"])


def run_geneval(
    folder: Path, prompts: Path, out: Path, *, steps: int | None, guidance: float | None, display: Display, device: str
) -> None:
    """A pipeline's pictures for GenEval's scorer; a run that was stopped goes on where it was.

    Raises:
        UserError: the folder is no pipeline, or the prompts are not GenEval's.
    """
    rows = geneval_prompts(prompts)
    drawer = open_drawer(folder, device)
    count = steps or drawer.usual_steps[-1]
    claim(out, {"pipeline": files_fingerprint(folder), "steps": count, "guidance": guidance})
    with display.measuring({"prompts": len(rows)}) as tick:
        write_geneval(drawer, rows, out, count, guidance, partial(tick, "prompts"))


def run_mjhq(
    folders: Sequence[Path],
    images: Path,
    inception: Path,
    clip: str,
    out: Path,
    *,
    steps: Sequence[int] | None,
    n: int,
    guidance: float | None,
    display: Display,
    device: str,
) -> dict[str, Any]:
    """FID and CLIP score of pipelines on MJHQ-30k; pictures go to OUT and are not drawn twice.

    Raises:
        UserError: a folder is no pipeline; the benchmark or the networks that judge are not where they belong.
    """
    data = mjhq.open_mjhq(images, n)
    features, scorer = mjhq.inception_features(inception, device), mjhq.load_clip(clip, device)
    meta, weights = (hashlib.sha256(file.read_bytes()).hexdigest() for file in (images / mjhq.META, inception))
    protocol = mjhq.MjhqProtocol(n=n, seed=0, images_sha256=meta, inception_sha256=weights, clip=clip)
    out.mkdir(parents=True, exist_ok=True)
    with display.measuring({"real pictures": n}) as tick:
        cache = out / f"reals_{protocol.hash()[:12]}.safetensors"
        reals = mjhq.real_moments(data, features, cache, partial(tick, "real pictures"))
    rows: dict[str, Any] = {}
    for folder in folders:
        drawer = open_drawer(folder, device)
        for k in steps or drawer.usual_steps:
            made_by = {"pipeline": files_fingerprint(folder), "steps": k, "guidance": guidance, "prompts": meta}
            key = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:12]
            with display.measuring(dict.fromkeys(("draw", "judge"), n)) as tick:
                pictures = out / key
                claim(pictures, made_by)
                paths = mjhq.draw_all(drawer, data, pictures, k, guidance, protocol.seed, partial(tick, "draw"))
                scores = mjhq.measure(paths, data, reals, features, scorer, partial(tick, "judge"))
            rows.setdefault(str(folder), {})[str(k)] = scores
    record = asdict(protocol) | {"hash": protocol.hash()}
    return {"versions": versions(), "protocol": record, "pipelines": rows}


def protocol_record(protocol: Protocol) -> dict[str, Any]:
    """The protocol and its hash, as every result carries them."""
    return asdict(protocol) | {"hash": protocol.hash()}


def versions() -> dict[str, str]:
    """What a result was made with."""
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")}
    return {"stepfold": __version__, "python": platform.python_version(), "machine": platform.machine()} | libraries


def reset_peak_memory(device: torch.device) -> None:
    """Makes `peak_memory_gib` count from here, where the system can (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process on its device, in GiB: on a CPU all of it, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE):
            return int(found[1]) / 2**20
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class Tracker:
    """Curves for tensorboard, in the run folder."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder / "tensorboard"
        threading.excepthook = quiet_about_disks  # its thread would print what `_written` says
        self.writer = self._written(lambda: SummaryWriter(self.folder))

    def add(self, row: Mapping[str, Any], step: int) -> None:
        """The numbers of a row of the metrics.

        Raises:
            UserError: they cannot be written.
        """
        for name, value in row.items():
            if name != "step" and not isinstance(value, str):
                self._written(lambda name=name, value=value: self.writer.add_scalar(name, value, step))

    def close(self) -> None:
        """Writes what is left.

        Raises:
            UserError: it cannot be written.
        """
        self._written(self.writer.close)

    def _written(self, write: Callable[[], Any]) -> Any:
        try:
            return write()
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder}: {error.strerror or error}; free some space, then continue with --resume"
            ) from None


def quiet_about_disks(problem: threading.ExceptHookArgs) -> None:
    """tensorboard's thread tells whoever asked it to write of an OSError, and needs not print it besides."""
    if not (issubclass(problem.exc_type, OSError) and type(problem.thread).__name__ == "_AsyncWriterThread"):
        threading.__excepthook__(problem)
