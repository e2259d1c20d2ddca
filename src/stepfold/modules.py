"""Runs and samples of a network of one's own; `stepfold.api` has them for users."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stepfold.config import Config, TeacherSettings, from_yaml, load_config, phases_of
from stepfold.display import Display
from stepfold.errors import NonFiniteError, UserError, first_line
from stepfold.jobs.sampling import as_texts
from stepfold.objectives.consistency import course_of_r, short_of_r
from stepfold.prompts.reading import PromptFile, open_prompts
from stepfold.prompts.syntax import notes_of
from stepfold.randomness import normal
from stepfold.sampling.samplers import SAMPLERS, sampler_of
from stepfold.sampling.teacher import sample_teacher
from stepfold.students.intact import read_weights
from stepfold.students.networks import ModuleStudent
from stepfold.students.two_times import EMBEDDER
from stepfold.students.whole import new_student
from stepfold.teachers.contract import PictureScore, Student
from stepfold.teachers.fingerprints import module_fingerprint
from stepfold.teachers.module import ModuleTeacher
from stepfold.training.accelerators import make_accelerator
from stepfold.training.choices import choose_precision
from stepfold.training.distill import distill
from stepfold.training.draws import guidance_scales, unguided
from stepfold.training.opening import Source, as_begun, check_run, prepare_run, remember
from stepfold.training.optimisers import long_warmup
from stepfold.training.processes import gathered
from stepfold.training.runs import CONFIG, writing

WEIGHTS = "student.safetensors"
TEACHER_STEPS = 20


def distill_module(
    teacher: ModuleTeacher,
    prompts: str | Path | None,
    folder: str | Path,
    changes: Sequence[str] = (),
    *,
    student: nn.Module | None = None,
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
        changes: settings as for `--set`, on top of the preset `default`, such as `objective=discrete`. Optimiser and
            rate are chosen by the network's size, unless they are given; see `usual_optimiser`.
        student: another network, such as a smaller one, which is called as the teacher's and predicts what that does;
            a copy of it is the student at the start. A student of an earlier run goes on in place. None for a copy of
            the teacher's network.
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
    own = [changes] if isinstance(changes, str) else list(changes)
    usual = usual_optimiser(student if isinstance(student, nn.Module) else teacher.network, own)
    changes = ["objective=continuous", "space.filter_rule=off", *usual, *own]  # a filter needs a black picture
    source = type(teacher.network).__name__
    _refuse_other_prompts(teacher, prompts)
    if prompts is not None and not isinstance(prompts, str | Path):
        raise UserError(f"prompts is a {type(prompts).__name__}; give a text file, one prompt a line")
    config = load_config("default", changes, teacher__source=source, prompts="" if prompts is None else str(prompts))
    config = with_course_of_r(choose_precision(as_begun(folder, config) if resume else config), own, folder, resume)
    file = open_prompts(prompts) if prompts is not None else _NoPrompts()
    accelerator, display = make_accelerator(config.training.precision), Display(quiet)
    _refuse_what_modules_lack(config, source)
    _refuse_what_does_not_fit(config, teacher)
    check_run(folder, config, resume)
    wrapped: Any = teacher  # it has what the loop asks for, but no pictures
    guidance_scales(config, wrapped)  # before anything is written
    student = _student_of(teacher, student, config.student.depth, two_times=config.student.times == "two")
    blacks = [torch.zeros(teacher.latent_shape, device=accelerator.device)]
    teacher.network.to(accelerator.device)
    student.to(accelerator.device)
    teacher.check([file.prompt(0)] * 2)
    if isinstance(student, ModuleStudent):
        teacher.with_network(student.transformer).check([file.prompt(0)] * 2, "student")
    sources = [Source("teacher", source, module_fingerprint(teacher.network)), reading_of(teacher)]
    if isinstance(file, PromptFile):
        sources.insert(0, Source("prompts", str(file.source), file.sha256, len(file)))
        for note in notes_of(file.foreign):
            display.note(note)
    lock = prepare_run(folder, config, resume, sources, display.note)
    for note in _notes(config, teacher):
        display.note(note)
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


def usual_optimiser(network: nn.Module, own: Sequence[str]) -> list[str]:
    """Optimiser and rate as settings, unless the user's own name another optimiser; a rate of theirs stays.

    Small networks learn next to nothing at the rate of `default`, which is CAME's for 0.6 billion weights. Measured are
    1e-3 for 17 thousand weights and 4e-4 for 4.9 million; 1e-4 is what LoRAs have.
    """
    given = {key.strip(): value.strip() for key, _, value in (change.partition("=") for change in own)}
    size = sum(weight.numel() for weight in network.parameters())
    if size > 300e6 or given.get("optimiser.name", "adamw") != "adamw":
        return []
    rate = 1e-3 if size < 1e6 else 4e-4 if size < 20e6 else 1e-4
    return ["optimiser.name=adamw", *([] if "optimiser.lr" in given else [f"optimiser.lr={rate}"])]


def _notes(config: Config, teacher: ModuleTeacher) -> list[str]:
    """What a run says of its settings before its first step."""
    notes = [f"optimiser: {config.optimiser.name} at {config.optimiser.lr:g} (optimiser.name, optimiser.lr)"]
    short = short_of_r(config), long_warmup(config.training.steps, config.optimiser), unguided(config, teacher)
    notes += [note for note in short if note]
    if config.objective == "decoupled" and teacher.guidance_kind == "none":
        notes.append("no guidance: objective=decoupled is plain matching; give ModuleTeacher nothing= and guidance=")
    return notes


def with_course_of_r(config: Config, own: Sequence[str], folder: Path, resume: bool) -> Config:
    """The settings with the course of r over this run's steps, as `default` has it over its own.

    A user's own course stays, and that of a run which goes on.
    """
    given = any(change.strip().startswith("consistency.r_") for change in own)
    if given or config.objective != "continuous" or config.training.phases:
        return config
    if resume and (folder / CONFIG).is_file():
        return config.model_copy(update={"consistency": from_yaml(folder / CONFIG).consistency})
    course = course_of_r(config.training.steps)
    return config.model_copy(update={"consistency": config.consistency.model_copy(update=course)})


def _student_of(teacher: ModuleTeacher, given: nn.Module | None, depth: float = 1.0, *, two_times: bool) -> Student:
    """A student that is at hand, or a new one: a copy of the given network, else of the teacher's.

    Raises:
        UserError: it is neither, or cannot be a student; see `new_student`.
    """
    if isinstance(given, Student):
        for name, weight in given.named_parameters():
            weight.requires_grad_(name not in given.shared)  # a run's average has none
        return given
    if given is not None and not isinstance(given, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"student is a {type(given).__name__}; give a torch.nn.Module that is called as the teacher's")
    return new_student(teacher if given is None else teacher.with_network(given), depth, two_times=two_times)


def reading_of(teacher: ModuleTeacher) -> Source:
    """What the network is said to predict, and on which schedule; noted beside its weights' fingerprint."""
    return Source("reading", teacher.reading, hashlib.sha256(teacher.reading.encode()).hexdigest())


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


def _refuse_what_does_not_fit(config: Config, teacher: ModuleTeacher) -> None:
    """Refuses a network in float16, one in bfloat16 under calls in float32, and guidance that is none."""
    if teacher.half == torch.float16:
        raise UserError("the network is in float16, which overflows; give network.float(), or network.bfloat16()")
    if teacher.half and "no" in (config.training.precision, config.training.walk_precision):
        raise UserError(
            "the network is in bfloat16, and this run would call it in float32; give network.float(), or set "
            "training.precision=bf16 and training.walk_precision=bf16"
        )
    if teacher.nothing is not None and teacher.default_guidance == 1 and config.space.guidance is None:
        raise UserError(
            "`nothing` is given, but the guidance is 1, which is none at twice the calls; give guidance=4, say, or "
            "leave nothing out"
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


def load_module_student(teacher: ModuleTeacher, folder: str | Path, *, student: nn.Module | None = None) -> Student:
    """The student that `distill_module` left in a run folder.

    Args:
        teacher: the network, wrapped.
        folder: of the run.
        student: a network built as the one that `distill_module` was given; None if it was given none.

    Raises:
        UserError: there are no weights, or they are damaged or another student's.
    """
    file = Path(folder) / WEIGHTS
    if not file.is_file():
        raise UserError(f"there is no {file}; give the folder of a run of distill_module that has ended")
    if (file.parent / "reading.json").is_file():
        remember(file.parent, reading_of(teacher))
    weights = read_weights(file)
    student = _student_of(teacher, student, two_times=any(name.startswith(f"{EMBEDDER}.") for name in weights))
    try:
        student.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{file} has the weights of another student ({first_line(error)}); give the `student` "
            "that distill_module was given, or the teacher of that run"
        ) from None
    student.sampler = sampler_of(from_yaml(Path(folder) / CONFIG))
    return student.eval()


def draw(
    teacher: ModuleTeacher,
    student: Student | None,
    prompts: str | Sequence[str] | int,
    *,
    seed: int = 0,
    steps: int | None = None,
) -> Tensor:
    """The student's samples, one a prompt, of unit variance [B, ...]; equal seeds start from equal noise.

    They are drawn with the student's own sampler, and its teacher's times.

    Args:
        teacher: the network, wrapped.
        student: of it; None for samples of the teacher itself, by its own sampler.
        prompts: B strings, or one; of a network that takes no condition, the number B.
        seed: of the noise.
        steps: network calls a sample; None: one of a student, 20 of the teacher.

    Raises:
        UserError: prompts for a network that takes none, or none for one that takes some; no step, or no sample.
        NonFiniteError: the samples are not finite.
    """
    _refuse_other_prompts(teacher, prompts)
    steps = (TEACHER_STEPS if student is None else 1) if steps is None else steps
    for name, count in (("steps", steps), ("prompts", prompts if isinstance(prompts, int) else len(prompts))):
        if not isinstance(count, int) or count < 1:
            raise UserError(f"{name} is {count}, and `draw` takes one or more; give a whole number from 1")
    prompts = [""] * prompts if isinstance(prompts, int) else as_texts(prompts)
    if student is not None and not isinstance(student, Student):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"student is a {type(student).__name__}; give what distill_module returned, or None")
    device, sigma_data = next((student or teacher.network).parameters()).device, teacher.sigma_data

    def noise(step: int) -> Tensor:
        parts = [normal(teacher.latent_shape, seed, "draw", step, i) for i in range(len(prompts))]
        return sigma_data * torch.stack(parts).to(device)

    guidance, condition = torch.ones(len(prompts), device=device), teacher.encode(prompts)
    condition = condition.to(device, condition.embeds.dtype)
    if student is None:
        drawn = sample_teacher(teacher, noise(0), condition, teacher.default_guidance * guidance, steps)
    else:
        times = teacher.student_times(steps, student.sampler)
        drawn = SAMPLERS[student.sampler](student, noise(0), condition, guidance, times, noise, sigma_data)
    if not bool(drawn.isfinite().all()):
        raise NonFiniteError(
            "the samples are not finite: the training diverged; train again with a lower optimiser.lr"
            if student
            else "the teacher's samples are not finite; check `prediction`, `schedule` and the network's weights"
        )
    return drawn / sigma_data
