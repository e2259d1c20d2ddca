"""A distillation from settings to files: checked, loaded, trained, measured, reported."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepfold import assets
from stepfold.errors import UserError
from stepfold.jobs.finishing import Run, evaluators_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from stepfold.bank import Bank
    from stepfold.config import Config
    from stepfold.display import Display
    from stepfold.images.reading import ImageFolder
    from stepfold.prompts.cache import ConditionCache
    from stepfold.prompts.reading import PromptFile
    from stepfold.teachers.contract import PictureScore, Student
    from stepfold.teachers.pipeline import PipelineTeacher
    from stepfold.training.course import Course
    from stepfold.training.looks import Progress
    from stepfold.training.tracking import Trackers


def run_distill(
    config: "Config", folder: Path, *, resume: bool, display: "Display", command: str, device: str = "auto"
) -> dict[str, Any]:
    """Distils, exports, measures and reports.

    Args:
        config: the settings.
        folder: of the run.
        resume: continue the run that is there.
        display: where progress is shown.
        command: that the report says made it.
        device: cpu, cuda, cuda:1 or auto; see `make_accelerator`. A run may go on on another one.

    Returns:
        What is in report.json; nothing in all processes but the first.

    Raises:
        UserError: something in the settings, the prompts, the teacher or the folder is wrong.
        NonFiniteError: the training diverged.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    from stepfold.jobs.finishing import finish
    from stepfold.training.course import Course, cycle_of
    from stepfold.training.processes import lost_process
    from stepfold.training.stages import Stages
    from stepfold.training.tracking import Trackers, check_trackers

    check_trackers(config.training.trackers)
    with lost_process():
        began = time.perf_counter()
        run, student = load(config, folder, resume, display, device)
        there = run.accelerator.device
        course = Course(there, Stages(there if run.config.training.time_stages else None), cycle_of(run.config))
        names = run.config.training.trackers if run.processes.first else ()
        trackers = Trackers(names, folder, run.config.model_dump(mode="json"))
        try:
            average = train(run, student, course, display, began, trackers)
            del student  # its memory is for what comes now
            run.processes.wait()  # nobody leaves while another one still sends
            run.accelerator.end_training()  # the others have nothing left to do
            if not run.processes.first:
                return {}
            result = finish(run, average, course, display, command)
            trackers.add_scores(result)
            return result
        finally:
            trackers.end()


def load(
    config: "Config", folder: Path, resume: bool, display: "Display", device_name: str = "auto"
) -> "tuple[Run, Student]":
    """Checks what was given, then loads the networks, and opens the run folder only when all of it is right."""
    import torch

    from stepfold.prompts.conditions import cache_of, conditions_from, notes_on
    from stepfold.sampling.recipe import make_recipe, policy_of
    from stepfold.sampling.samplers import in_diffusers
    from stepfold.students.starting import make_student
    from stepfold.teachers.fingerprints import teacher_fingerprint
    from stepfold.teachers.licences import in_words, licences_of
    from stepfold.teachers.loading import choose_objective, load_teacher
    from stepfold.training.accelerators import make_accelerator, processes_of
    from stepfold.training.choices import choose_precision
    from stepfold.training.draws import guidance_scales
    from stepfold.training.opening import Source, as_begun, as_started, check_run, prepare_run

    if "images" in config.space.weights and config.space.images is None:
        raise UserError("space.kind=images needs a folder of images; add --set space.images=FOLDER")
    config = as_begun(folder, config) if resume else config
    config = choose_objective(choose_precision(config, device_name))
    accelerator = make_accelerator(config.training.precision, several=True, device=device_name)
    device, processes = accelerator.device, processes_of(accelerator)
    if config.training.prompts_per_step < processes.count:
        raise UserError(
            f"training.prompts_per_step is {config.training.prompts_per_step}, but there are {processes.count} "
            "processes; it counts the prompts of all of them, so give at least one to each"
        )
    prompts, images = open_texts(config)
    processes.agree(lambda: check_run(folder, config, resume))
    display.note(
        f"{len(prompts)} prompts ({prompts.num_blank} blank and {prompts.num_duplicate} repeated lines left out), "
        f"device {device.type}{f', {processes.count} processes' if processes.count > 1 else ''}, run folder {folder}"
    )
    cache = cache_of(config, prompts)
    teacher = load_teacher(config.teacher, device, network_only=cache is not None, null=cache.null if cache else None)
    teacher.check_prompts(prompts.prompt(i) for i in range(len(prompts)))
    if processes.first:
        for note in notes_on(prompts, teacher):
            display.note(note)
    if images and teacher.frames > 1:
        raise UserError(
            f"space.kind=images takes pictures, but this teacher makes {teacher.frames} frames; "
            "set teacher.frames=1, or space.kind to generation or endpoints"
        )
    licences = ", ".join(f"{part} {in_words(licence)}" for part, licence in licences_of(config.teacher.source).items())
    display.note(f"teacher {config.teacher.source} ({type(teacher.pipe).__name__}); licences: {licences}")
    if config.student.depth < 1:
        display.note(
            f"the student keeps {config.student.depth:.0%} of the teacher's blocks: it starts far from the teacher, "
            "and needs many more steps than a whole one"
        )
    bank, score = bank_of(config, teacher, prompts), open_score(config, teacher)
    torch.manual_seed(config.seed)  # its new layers' first values, however the teacher was loaded
    starting = as_started(folder, config, resume).student
    student = make_student(teacher, starting, config.teacher, policy_of(config, teacher))
    asked = config.evaluation.guidance
    usual = teacher.default_guidance if asked is None else asked
    recipe = make_recipe(config, teacher, guidance_scales(config, teacher), usual)
    if config.student.lora:
        teacher.lora_scheduler(in_diffusers(recipe.sampler))  # refused now, not when the student is saved
    lock = None
    if processes.first:  # only now: a teacher that does not load leaves no run behind
        weights = teacher_fingerprint(config.teacher, network_only=cache is not None)
        sources = [
            Source("prompts", str(prompts.source), prompts.sha256, len(prompts)),
            Source("teacher", config.teacher.source, weights),
            *([Source("bank", str(bank.folder), bank.fingerprint(), len(bank))] if bank else ()),
            *([Source("images", str(images.path), images.fingerprint())] if images else ()),
        ]
        lock = prepare_run(folder, config, resume, sources, display.note)
    processes.wait()
    blacks, latents = kept_latents(folder, config, accelerator, teacher, cache, images, display)
    run = Run(
        config, folder, accelerator, processes, prompts, teacher, recipe.guidance if asked is None else asked, recipe,
        conditions=conditions_from(cache, teacher, prompts), cached=cache is not None,
        blacks=blacks, latents=latents, bank=bank, lock=lock, score=score,
    )  # fmt: skip
    return run, student


def open_score(config: "Config", teacher: "PipelineTeacher") -> "PictureScore | None":
    """What the student's pictures are scored by, where a phase has a reward.

    Raises:
        UserError: it does not load, is what evaluates, or the teacher makes videos.
    """
    from stepfold.config import phases_of
    from stepfold.evaluation.reward import clip_reward, refuse_own_evaluator

    if not any(each.reward.weight for _, each in phases_of(config)):
        return None
    if (clip := config.reward.clip) is None:
        raise UserError("reward.weight needs a score; give the folder of a CLIP as reward.clip")
    if teacher.frames > 1:
        raise UserError("reward.clip scores images, and this teacher makes videos; set reward.weight=0")
    refuse_own_evaluator(clip, evaluators_of(config))
    return clip_reward(clip, teacher.device)


ENDS_DEPEND_ON = ("max_tokens", "null_mask", "guidance", "guidance_interval")
"""Settings of a teacher that its images depend on and its fingerprint does not have."""


def bank_of(config: "Config", teacher: "PipelineTeacher", prompts: "PromptFile | ImageFolder") -> "Bank | None":
    """The bank that the settings name; None where they name none.

    Raises:
        UserError: it is of another teacher, prompts, size or guidance scale.
    """
    from stepfold.bank import open_bank
    from stepfold.teachers.fingerprints import teacher_fingerprint
    from stepfold.training.draws import guidance_scales

    if not config.space.bank:
        return None
    shape, *others = teacher.latent_shapes
    if others:
        raise UserError("space.bank holds images of one size; leave out teacher.sizes")
    wanted = {
        "fingerprint": teacher_fingerprint(config.teacher, network_only=False), "prompts_sha256": prompts.sha256,
        "latent_shape": list(shape),
    }  # fmt: skip
    bank = open_bank(Path(config.space.bank), wanted)
    now, then = config.teacher.model_dump(mode="json"), bank.index.get("settings", {})
    for name in ENDS_DEPEND_ON:
        if name in then and then[name] != now[name]:
            value = json.dumps(then[name])
            raise UserError(
                f"{bank.folder} was sampled with teacher.{name}={value}, not {json.dumps(now[name])}; add "
                f"--set 'teacher.{name}={value}', or make a bank with this run's --preset and --set"
            )
    scale = float(bank.index["guidance"])
    if set(guidance_scales(config, teacher)) != {scale}:
        raise UserError(
            f"{bank.folder} was sampled at guidance scale {scale:g}; add --set 'space.guidance=[{scale:g}]', which the "
            "student then stands for"
        )
    return bank


def open_texts(config: "Config") -> "tuple[PromptFile | ImageFolder, ImageFolder | None]":
    """The training prompts, and the image folder that they are the captions of, if they are."""
    from stepfold.images.reading import open_images
    from stepfold.prompts.reading import open_prompts

    if config.space.images:
        if config.teacher.image_column:
            raise UserError("teacher.image_column is for prompts of a table, not for space.images; leave one out")
        images = open_images(config.space.images)
        return images, images
    return open_prompts(config.prompts or assets.PROMPTS, config.teacher.image_column), None


def kept_latents(
    folder: Path,
    config: "Config",
    accelerator: "Accelerator",
    teacher: "PipelineTeacher",
    cache: "ConditionCache | None",
    images: "ImageFolder | None",
    display: "Display",
) -> "tuple[list[Tensor], Callable[[list[int]], Tensor] | None]":
    """Latents of the black pictures, and a function that gives those of the images, if there are any."""
    import torch

    from stepfold.training.latents import cached_blacks, image_latents

    with accelerator.main_process_first():  # the first one makes the files, the others read them
        if config.space.filter_rule == "off":  # nothing looks at them
            blacks = [torch.zeros(shape, device=accelerator.device) for shape in teacher.latent_shapes]
        elif cache and not config.teacher.sizes:
            blacks = [cache.black.to(accelerator.device)]
        else:
            blacks = cached_blacks(folder, teacher)
        latents = image_latents(folder, teacher, images, config.space.cache_latents, display) if images else None
    if images is None or config.space.cache_latents:
        teacher.release_decoder()
    return blacks, latents


def train(
    run: Run, student: "Student", course: "Course", display: "Display", began: float, trackers: "Trackers"
) -> "Student":
    """All steps of the run, with previews, curves and progress; returns the student's average.

    Loading `began` at this time of `time.perf_counter`.
    """
    from stepfold.evaluation.preview import make_preview
    from stepfold.objectives.consistency import short_of_r
    from stepfold.students.starting import make_fake
    from stepfold.teachers.loading import counts_to_thousand
    from stepfold.training.allowed import guidance_apart
    from stepfold.training.distill import distill as distil
    from stepfold.training.draws import unguided
    from stepfold.training.memory import reset_peak_memory
    from stepfold.training.optimisers import long_warmup
    from stepfold.training.steepness import steepness

    config, device, first = run.config, run.accelerator.device, run.processes.first
    if config.objective == "continuous" and first and counts_to_thousand(config):
        retimable = run.teacher.retimable
        display.note(steepness(run.teacher, student, run.prompts, run.conditions, config, device, retimable=retimable))
    short = short_of_r(config), long_warmup(config.training.steps, config.optimiser), unguided(config, run.teacher)
    for note in short if first else ():
        if note:
            display.note(note)
    decoupled = config.objective == "decoupled" or (config.matching.weight and config.matching.form == "decoupled")
    if first and decoupled and not run.teacher.exact_branches:
        display.note(f"guidance at times of its own: {guidance_apart(run.teacher)}")
    preview = make_preview(
        run.folder, run.teacher, run.conditions, run.prompts, run.recipe, config.seed, display.note, writes=first,
        saved=trackers.add_preview,
    )  # fmt: skip
    course.stages.seconds["load"] = time.perf_counter() - began
    course.trainable = sum(number.numel() for number in student.parameters() if number.requires_grad)

    def note_tangent(text: str) -> None:
        course.tangent = text
        display.note(f"tangent: {text}")

    def report(progress: "Progress") -> None:
        course.add(progress)
        display.step(progress)
        if "skipped" in progress.row:
            display.note(f"step {progress.row['step']} skipped: {progress.row['nonfinite']}")
        trackers.add(progress.row, progress.step)

    ready = run.conditions if run.cached or config.teacher.image_column else None
    reset_peak_memory(device)
    with display.training(config.training.steps):
        average = distil(
            config, run.folder, run.teacher, student, run.prompts, run.blacks, run.accelerator,
            processes=run.processes, latents=run.latents, bank=run.bank, conditions=ready, stages=course.stages,
            note_tangent=note_tangent, report=report, preview=course.apart(preview),
            make_fake=lambda: make_fake(run.teacher, config.fake), score=run.score,
        )  # fmt: skip
    course.note_memory()
    return average
