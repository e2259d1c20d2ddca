"""The Python API: for diffusers pipelines, from folders, hub ids or objects, and for a network of one's own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepfold.config import Config, TeacherSettings, from_yaml, load_config, phases_of
from stepfold.display import Display
from stepfold.errors import NonFiniteError, UserError, first_line
from stepfold.jobs.devices import usable_device
from stepfold.jobs.distilling import run_distill
from stepfold.jobs.exporting import run_export
from stepfold.jobs.sampling import run_sample
from stepfold.levels.calibrated import CalibratedScheduler
from stepfold.maths.noise_schedules import FLOW, TRIGFLOW, NoiseSchedule, exploding, vp_sde, vp_steps
from stepfold.prompts.reading import PromptFile, open_prompts
from stepfold.prompts.syntax import notes_of
from stepfold.randomness import normal
from stepfold.sampling.samplers import SAMPLERS, sampler_of
from stepfold.students.policy_scheduler import PolicyScheduler
from stepfold.students.two_times import EMBEDDER
from stepfold.students.whole import new_student
from stepfold.teachers.contract import Condition, PictureScore, Student
from stepfold.teachers.fingerprints import module_fingerprint
from stepfold.teachers.live import dtype_of, is_live, lent, origin_of_object
from stepfold.teachers.loading import family_of
from stepfold.teachers.module import ModuleTeacher
from stepfold.training.accelerators import make_accelerator
from stepfold.training.choices import choose_precision
from stepfold.training.distill import distill
from stepfold.training.draws import guidance_scales
from stepfold.training.opening import Source, as_begun, check_run, prepare_run
from stepfold.training.processes import gathered
from stepfold.training.runs import CONFIG, writing

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

__all__ = [
    "FLOW", "TRIGFLOW", "CalibratedScheduler", "Condition", "ModuleTeacher", "NoiseSchedule", "NonFiniteError",
    "PolicyScheduler", "UserError", "distill_module", "distill_pipeline", "draw", "exploding", "export",
    "load_module_student", "sample", "vp_sde", "vp_steps",
]  # fmt: skip
WEIGHTS = "student.safetensors"


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
    prompts: Sequence[str],
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
        prompts: B strings.
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
    with _source_of(teacher):
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
        dtype: of the weights (pipeline, single-file).
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
    with _source_of(teacher):
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


def distill_module(
    teacher: ModuleTeacher,
    prompts: str | Path | None,
    folder: str | Path,
    changes: Sequence[str] = (),
    *,
    student: Student | None = None,
    score: PictureScore | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Student:
    """Distils a network of one's own; the same loop, checkpoints and exact resume as `stepfold distill`.

    Args:
        teacher: the network, wrapped.
        prompts: a text file, one prompt a line; or a table, as `open_prompts` takes it. None for a network that takes
            no condition.
        folder: of the run; new, or to be resumed. The student's weights are written into it, in safetensors.
        changes: settings as for `--set`, on top of the preset `default`, such as `objective=discrete`.
        student: what is trained, in place; None for a student that starts as the teacher.
        score: (samples of unit variance [M, ...] with a graph, prompts [M]) -> scores [M], which the student raises
            where `reward.weight` is above 0.
        resume: continue the run that the folder holds.
        quiet: show no progress.

    Returns:
        The student: the average over training.

    Raises:
        UserError: something in settings, prompts or folder is wrong.
        NonFiniteError: the training diverged.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
    """
    folder = Path(folder)
    changes = ["objective=continuous", "space.filter_rule=off", *changes]  # a filter needs a black picture
    source = type(teacher.network).__name__
    _refuse_other_prompts(teacher, prompts)
    config = load_config("default", changes, teacher__source=source, prompts="" if prompts is None else str(prompts))
    config = choose_precision(as_begun(folder, config) if resume else config)
    file = open_prompts(prompts) if prompts is not None else _NoPrompts()
    accelerator, display = make_accelerator(config.training.precision), Display(quiet)
    _refuse_what_modules_lack(config, source)
    check_run(folder, config, resume)
    wrapped: Any = teacher  # it has what the loop asks for, but no pictures
    guidance_scales(config, wrapped)  # before anything is written
    student = student or new_student(teacher, config.student.depth, two_times=config.student.times == "two")
    blacks = [torch.zeros(teacher.latent_shape, device=accelerator.device)]
    teacher.network.to(accelerator.device)
    sources = [Source("teacher", source, module_fingerprint(teacher.network))]
    if isinstance(file, PromptFile):
        sources.insert(0, Source("prompts", str(file.source), file.sha256, len(file)))
        for note in notes_of(file.foreign):
            display.note(note)
    lock = prepare_run(folder, config, resume, sources, display.note)
    student.to(accelerator.device)
    with display.training(config.training.steps):
        average = distill(
            config, folder, wrapped, student, file, blacks, accelerator,
            report=display.step, make_fake=lambda: new_student(teacher), score=score,
        )  # fmt: skip
    average.sampler = sampler_of(config)
    with writing(folder / WEIGHTS) as part:
        save_file(gathered(average.state_dict(), keep=True), part)
    lock.release()
    return average.eval()


class _NoPrompts:
    """Stands for the prompts of a network that takes no condition: a single one, empty."""

    def __len__(self) -> int:
        return 1

    def prompt(self, index: int) -> str:
        """The empty prompt; its samples differ in their noise."""
        return ""


def _refuse_other_prompts(teacher: ModuleTeacher, prompts: object) -> None:
    """Refuses prompts for a network that takes none, and none for one that takes some."""
    if isinstance(prompts, int):
        prompts = None  # a number of samples
    if prompts is None and teacher.takes_prompts:
        raise UserError(
            "this network takes a condition of each prompt, but there are no prompts; give them, or make its teacher "
            "with None for `encode`"
        )
    if prompts is not None and not teacher.takes_prompts:
        raise UserError(
            "this network takes no condition (its `encode` is None); give None instead of prompts to distil it, and a "
            "number of samples to draw"
        )


def _refuse_what_modules_lack(config: Config, source: str) -> None:
    """Refuses settings that ask a network of one's own for what only a pipeline has.

    Raises:
        UserError: naming the first of them.
    """
    phases = [each for _, each in phases_of(config)]
    if config.student.lora:
        raise UserError("a network of one's own trains all its weights; leave student.lora at 0")
    if config.teacher != TeacherSettings(source=source):
        raise UserError("settings of `teacher` are for pipelines; what there is to say is an argument of ModuleTeacher")
    if config.conditions:
        raise UserError("conditions on disk are a pipeline's; leave `conditions` out: ModuleTeacher has its `encode`")
    if config.space.images or any("images" in each.space.weights for each in phases):
        raise UserError("a network of one's own comes without an autoencoder; take space.kind=generation or endpoints")
    if any(each.space.filter_rule != "off" for each in phases):
        raise UserError("a network of one's own has no black picture to filter by; leave space.filter_rule=off")
    if any(each.fake.updates and each.fake.kind == "lora" for each in phases):
        raise UserError("a network of one's own has a whole fake score; give fake.kind=whole and fake.lr_factor=2")
    if config.reward.clip:
        raise UserError("a CLIP scores pictures; leave reward.clip out and give distill_module a `score` of samples")
    if any(each.adversarial.weight for each in phases):
        raise UserError("the discriminator reads features of a pipeline's network; leave adversarial.weight at 0")


def load_module_student(teacher: ModuleTeacher, folder: str | Path, *, student: Student | None = None) -> Student:
    """The student that `distill_module` left in a run folder.

    Args:
        teacher: the network, wrapped.
        folder: of the run.
        student: one built as that which `distill_module` was given, whose weights become the run's; None if it was
            given none.

    Raises:
        UserError: the weights are those of another student.
    """
    weights = load_file(Path(folder) / WEIGHTS)
    if student is None:
        student = new_student(teacher, two_times=any(name.startswith(f"{EMBEDDER}.") for name in weights))
    try:
        student.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{Path(folder) / WEIGHTS} has the weights of another student ({first_line(error)}); give the `student` "
            "that distill_module was given, or the teacher of that run"
        ) from None
    student.sampler = sampler_of(from_yaml(Path(folder) / CONFIG))
    return student.eval()


def draw(
    teacher: ModuleTeacher, student: Student, prompts: Sequence[str] | int, *, seed: int = 0, steps: int = 1
) -> Tensor:
    """The student's samples, one a prompt, of unit variance [B, ...]; equal seeds start from equal noise.

    They are drawn with the student's own sampler, and its teacher's times.

    Args:
        teacher: the network, wrapped.
        student: of it.
        prompts: B strings; of a network that takes no condition, the number B.
        seed: of the noise.
        steps: network calls a sample.

    Raises:
        UserError: prompts for a network that takes none, or none for one that takes some.
    """
    _refuse_other_prompts(teacher, prompts)
    prompts = [""] * prompts if isinstance(prompts, int) else prompts
    device, sigma_data = next(student.parameters()).device, teacher.sigma_data

    def noise(step: int) -> Tensor:
        parts = [normal(teacher.latent_shape, seed, "draw", step, i) for i in range(len(prompts))]
        return sigma_data * torch.stack(parts).to(device)

    guidance = torch.ones(len(prompts), device=device)
    times, condition = teacher.student_times(steps, student.sampler), teacher.encode(prompts)
    condition = condition.to(device, condition.embeds.dtype)
    return SAMPLERS[student.sampler](student, noise(0), condition, guidance, times, noise, sigma_data) / sigma_data
