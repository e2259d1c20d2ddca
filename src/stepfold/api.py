"""The Python API: for diffusers pipelines, from folders, hub ids or objects, and for a network of one's own."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stepfold.config import Config, load_config
from stepfold.display import Display
from stepfold.errors import NonFiniteError, UserError
from stepfold.jobs.devices import usable_device
from stepfold.jobs.distilling import run_distill
from stepfold.jobs.exporting import run_export
from stepfold.jobs.sampling import run_sample
from stepfold.levels.calibrated import CalibratedScheduler
from stepfold.maths.noise_schedules import FLOW, TRIGFLOW, NoiseSchedule, exploding, vp_sde, vp_steps
from stepfold.modules import distill_module, draw, load_module_student
from stepfold.students.card import read_card
from stepfold.students.policy_scheduler import PolicyScheduler
from stepfold.teachers.contract import Condition
from stepfold.teachers.live import PREFIX, dtype_of, is_live, lent, origin_of_object, source_of
from stepfold.teachers.loading import family_of
from stepfold.teachers.module import ModuleTeacher

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

__all__ = [
    "FLOW", "TRIGFLOW", "CalibratedScheduler", "Condition", "ModuleTeacher", "NoiseSchedule", "NonFiniteError",
    "PolicyScheduler", "UserError", "distill_module", "distill_pipeline", "draw", "exploding", "export",
    "load_module_student", "sample", "vp_sde", "vp_steps",
]  # fmt: skip


def distill_pipeline(
    teacher: "DiffusionPipeline | str | Path",
    prompts: str | Path | None,
    folder: str | Path,
    changes: Sequence[str] = (),
    *,
    preset: str = "default",
    resume: bool = False,
    device: str = "auto",
    quiet: bool = False,
) -> Path:
    """Distils a diffusers pipeline; the very run of `stepfold distill`.

    Of a pipeline object no file is read. It is frozen while the run goes on; then it is as before. A run is resumed
    with an object of the same weights.

    Args:
        teacher: a pipeline object; or its folder, a hub id, or `emoji`.
        prompts: as of `distill_module`; None for the bundled teacher's own.
        folder: of the run; new, or to be resumed.
        changes: settings as for `--set`, such as `student.lora=64`.
        preset: name or yaml file of the settings to start from; `default` trains all weights, 20,000 steps.
        resume: continue the run that the folder holds.
        device: cpu, cuda, cuda:1, or auto.
        quiet: show no progress.

    Returns:
        The student's folder, for `sample`, `export` and plain diffusers. The report lies beside it.

    Raises:
        UserError: something in settings, prompts, teacher or folder is wrong.
        NonFiniteError: the training diverged.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.

    Example:
        student = distill_pipeline(pipe, "prompts.txt", "runs/mine", preset="sdxl-lora-4step")
    """
    display = Display(quiet)
    if prompts is not None and not isinstance(prompts, str | Path):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"prompts is a {type(prompts).__name__}; give a text file, one prompt a line")
    if any(change.partition("=")[0].strip() == "teacher.source" for change in changes):
        raise UserError("teacher.source is given twice, in changes and as `teacher`; leave it out of changes")
    with _source_of(teacher) as source:
        given: dict[str, Any] = {"teacher__source": source, "prompts": None if prompts is None else str(prompts)}
        dtype = dtype_of(teacher, family_of(source).network_part) if is_live(source) else None
        if not any(change.partition("=")[0].strip() == "teacher.dtype" for change in changes):
            given["teacher__dtype"] = dtype
        config = load_config(preset, changes, **given)
        if dtype:
            _refuse_what_objects_lack(config, dtype)
            display.note(_unknown_of(teacher))
        command = "stepfold.api.distill_pipeline"
        device = device if device == "auto" else usable_device(device)
        run_distill(config, Path(folder), resume=resume, display=display, command=command, device=device)
    return Path(folder) / "student"


def _unknown_of(pipe: Any) -> str:
    """What a run does not know of a pipeline object, in one line."""
    place = origin_of_object(pipe)
    return (
        f"teacher: a {type(pipe).__name__} object{f' loaded from {place}' if place else ''}; its files are not known, "
        "so a resumed run and a LoRA's sampling need an object of the same weights"
    )


def sample(
    student: str | Path,
    prompts: str | Sequence[str],
    *,
    steps: int | None = None,
    seed: int = 0,
    guidance: float | None = None,
    sampler: str | None = None,
    gamma: float = 0.0,
    image: "str | Path | Image | None" = None,
    first_step: Literal["student", "teacher"] = "student",
    device: str = "auto",
    teacher: "DiffusionPipeline | None" = None,
) -> "list[Image]":
    """Images of a student, one a prompt; the same as those of `stepfold sample`.

    Args:
        student: folder of a student or of a finished run, or `emoji-student`.
        prompts: B strings, or one.
        steps: network calls an image; None for the student's usual number.
        seed: of the noise.
        guidance: scale that the student is told; None for its usual one.
        sampler: its name; None for the student's own.
        gamma: share of fresh noise in a flow map's steps, in [0, 1].
        image: of all prompts, a file or a picture, for a student of images; `first_step`: who takes it.
        device: as of `distill_pipeline`.
        teacher: the pipeline object that a LoRA student was distilled from, if it was one.

    Raises:
        UserError: the folder is no student, it was not trained for this, or its teacher is not there.

    Example:
        images = sample(student, ["a fox in snow"], steps=4, teacher=pipe)
    """
    with _object(student, teacher):
        return run_sample(
            Path(student), prompts, steps=steps, seed=seed, guidance=guidance, device=usable_device(device),
            sampler=sampler, gamma=gamma, image=Path(image) if isinstance(image, str) else image, first_step=first_step,
        )  # fmt: skip


def export(
    student: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    steps: int | None = None,
    keys: Literal["diffusers", "comfy", "kohya", "peft"] | None = None,
    dtype: Literal["bfloat16", "float16"] | None = None,
    runtime: str | Path | None = None,
    with_loras: bool = False,
    force: bool = False,
    teacher: "DiffusionPipeline | None" = None,
) -> Path:
    """Writes a student as something else; as `stepfold export` does.

    Args:
        student: folder of a student or of a finished run, or `emoji-student`.
        to: `pipeline`, `lora`, `single-file`, `onnx`, `openvino`, `web` or `anyflow`.
        out: file or folder to write; None for one beside the student.
        steps: fold a flow map for exactly so many (pipeline, lora).
        keys: names in a LoRA's file.
        dtype: of the weights (pipeline, single-file, lora).
        runtime: folder dist of onnxruntime-web (web).
        with_loras: carry the teacher's LoRAs in a LoRA's file.
        force: replace an earlier export.
        teacher: as of `sample`.

    Returns:
        The file or folder.

    Raises:
        UserError: the student cannot become that, or the place is taken.

    Example:
        file = export(student, "lora", "fox-4step.safetensors", keys="kohya", teacher=pipe)
    """
    with _object(student, teacher):
        place, page = (None if path is None else Path(path) for path in (out, runtime))
        return run_export(
            Path(student), to, place, force=force, steps=steps, keys=keys, runtime=page, dtype=dtype,
            with_loras=with_loras,
        )  # fmt: skip


@contextmanager
def _source_of(teacher: Any) -> Iterator[str]:
    """Around a job; yields what stands for a teacher in settings: its folder or hub id, or a name for the object."""
    named = teacher is None or isinstance(teacher, str | Path)
    with nullcontext(str(teacher)) if named else lent(teacher) as source:
        yield source


def _object(student: str | Path, teacher: Any) -> AbstractContextManager[Any]:
    """Around a job with a student; lends it the pipeline object that it was distilled from.

    Raises:
        UserError: it is a folder or a hub id, which the student knows itself; or no object that this one needs.
    """
    if isinstance(teacher, str | Path):
        raise UserError(
            f"teacher is {str(teacher)!r}, but here it is a pipeline object; leave it out, since a student knows the "
            "folder or hub id that it was distilled from"
        )
    if teacher is None:
        return nullcontext()
    source, kind = read_card(Path(student)).teacher_settings().source, type(teacher).__name__
    if not is_live(source):
        raise UserError(f"this student was distilled from {source}, no pipeline object; leave teacher={kind} out")
    if source != source_of(teacher):
        own = source.removeprefix(PREFIX)
        raise UserError(f"teacher is a {kind}, and this student was distilled from a {own}; give that object")
    return lent(teacher)


def _refuse_what_objects_lack(config: Config, dtype: str) -> None:
    """Refuses settings that ask a pipeline object for what only files have, or what would change its weights.

    Raises:
        UserError: naming the first of them.
    """
    settings = config.teacher
    if settings.dtype != dtype:
        raise UserError(f"teacher.dtype is {settings.dtype}, but this pipeline object is in {dtype}; leave it out")
    if settings.revision or settings.variant:
        raise UserError("teacher.revision and teacher.variant are for hub ids; load the object with them")
    if settings.lora:
        raise UserError("teacher.lora is for folders and hub ids; merge it into the object with pipe.fuse_lora()")
    for name in ("quantise", "quantise_encoders"):
        if getattr(settings, name) != "none":
            raise UserError(f"teacher.{name} would change the object's weights; give the pipeline's folder instead")
    if config.training.shard != "none":
        raise UserError("training.shard would take the object's weights apart; give the pipeline's folder instead")
