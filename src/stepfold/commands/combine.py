"""`stepfold combine`: the checkpoints of a finished run as one student, if that is nearer to the teacher."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepfold.commands.options import DeviceOption, Quiet
from stepfold.errors import UserError
from stepfold.jobs.devices import usable_device

if TYPE_CHECKING:
    from torch import Tensor

    from stepfold.display import Display
    from stepfold.evaluation.measure import Sampler
    from stepfold.teachers.contract import Condition
    from stepfold.teachers.pipeline import PipelineTeacher

FEW = 8
"""Prompts of either half, at least."""


def combine(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run with its checkpoints.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the new student.", show_default=False)],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps. Default: what it was made for.", show_default=False)
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="Prompts to search on, and as many others for the verdict.")] = 64,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts. Default: the run's, those first that it did not train on.", show_default=False),
    ] = None,
    sweeps: Annotated[int, typer.Option(min=1, help="Sweeps over all checkpoints, at most.")] = 3,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier student in --out.")] = False,
    device: DeviceOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Combine the checkpoints of a run into one student: a weighted sum, whose weights may be negative.

    The weights are those whose images end nearest to the teacher's. A student is written only if it is nearer on other
    prompts too. Keep more checkpoints for it: training.keep_checkpoints.

    stepfold combine runs/mine --out runs/mine/combined

    stepfold combine runs/mine --out runs/combined --steps 4 --prompts others.txt
    """
    from stepfold.display import Display, quiet_libraries
    from stepfold.jobs.exporting import check_target
    from stepfold.students.card import student_folder

    quiet_libraries()
    if not run.is_dir():
        raise UserError(f"there is no folder {str(run)!r}; give the folder of a run")
    check_target(out, student_folder(run).resolve(), force=force)
    found = run_combine(
        run, out, steps=steps, n=n, prompts=prompts, sweeps=sweeps, display=Display(quiet),
        device=usable_device(device),
    )  # fmt: skip
    for name, coefficient in zip(found["states"], found["coefficients"], strict=True):
        typer.echo(f"{name:24} {coefficient:+.3f}")
    less = 100 * (1 - found["after"] / found["before"])
    typer.echo(
        f"latent error on other prompts: {found['before']:.4f} before, {found['after']:.4f} now ({less:.2g}% less)"
    )
    typer.echo(f"student: {out}")


def run_combine(
    folder: Path,
    out: Path,
    *,
    steps: int | None,
    n: int,
    prompts: Path | None,
    sweeps: int,
    display: "Display",
    device: str,
) -> dict[str, Any]:
    """Searches the coefficients and writes the student; arguments as of the command.

    Raises:
        UserError: too few checkpoints or prompts, or the sum is not nearer on the prompts of the verdict.
    """
    from safetensors.torch import load_file

    from stepfold.commands.own_teacher import choose
    from stepfold.config import validate
    from stepfold.evaluation.measure import student_sampler
    from stepfold.export.pipeline import save_student
    from stepfold.prompts.conditions import encoded
    from stepfold.students.card import read_card, student_folder
    from stepfold.students.combining import EVALUATIONS, put_sum
    from stepfold.students.combining import combine as search
    from stepfold.students.starting import make_student
    from stepfold.teachers.loading import load_teacher
    from stepfold.training.runs import checkpoints, damage

    if student_folder(folder).resolve() == folder.resolve():
        run = folder.resolve().parent
        fix = f"give its run, {run}" if (run / "checkpoints").is_dir() else "give the folder of its run"
        raise UserError(f"{folder} is a student, and the checkpoints are in its run; {fix}")
    card = read_card(folder)
    config = validate(card.config)
    saved = [path for path in checkpoints(folder) if damage(path) is None]
    if len(saved) < 2:
        raise UserError(
            f"{folder} has {len(saved)} whole checkpoint{'s' * (len(saved) != 1)}, and a sum needs 2 or more; train "
            "with --set training.keep_checkpoints=8"
        )
    texts, chosen = choose(folder, card, prompts, 2 * n)
    half = len(chosen.index) // 2
    if half < FEW:
        raise UserError(f"{len(chosen.index)} prompts, half of them for the verdict; give {2 * FEW} or more")
    display.note(f"searched and judged on halves of {chosen.said}")
    teacher = load_teacher(card.teacher_settings(), device)
    start = config.student.model_copy(update={"init": None})
    student = make_student(teacher, start, card.teacher_settings(), card.recipe.policy)
    names = [f"{part} {path.name}" for path in saved for part in ("average", "student")]
    states = [load_file(path / f"{part}.safetensors") for path in saved for part in ("average", "student")]
    reference = names.index(f"average {saved[-1].name}")
    count = steps or card.usual_steps
    sampler = student_sampler(student, card.recipe, count, 0)
    with display.measuring({"the teacher": 2 * half}) as tick:
        encode, scale = partial(encoded, teacher, texts), card.recipe.guidance
        halves = [
            teacher_ends(teacher, scale, encode, chosen.index[i : i + half], i, partial(tick, "the teacher"))
            for i in (0, half)
        ]

    error_on = partial(error_of, student, sampler, states)
    display.note(
        f"{len(states)} states of {len(saved)} checkpoints, {half} prompts, {count} sampling step{'s' * (count != 1)}"
    )
    with display.searching({"coefficients": 1 + sweeps * (len(states) - 1) * EVALUATIONS}) as tick:
        counted = partial(tick, "coefficients", 1)
        found, _ = search(partial(error_on, halves[0], counted), len(states), reference, sweeps)
        tick("coefficients", 0, done=True)
    alone = [float(i == reference) for i in range(len(states))]
    before, after = (error_on(halves[1], lambda: None, a) for a in (alone, found))
    if not after < before:
        raise UserError(
            f"the sum is not nearer to the teacher on the prompts of the verdict ({after:.4f}, {before:.4f} without); "
            "nothing was written: keep the run's own student"
        )
    put_sum(student, states, found)
    save_student(teacher, student, out, config, card.recipe, card.example)
    return {"states": names, "coefficients": found, "before": before, "after": after}


def error_of(
    student: Any,
    sampler: "Sampler",
    states: Sequence[dict[str, "Tensor"]],
    batches: Sequence[Any],
    tick: Callable[[], None],
    coefficients: Sequence[float],
) -> float:
    """Latent error of the student whose weights are this sum of states, on batches of `teacher_ends`."""
    import torch

    from stepfold.evaluation.metrics import relative_error
    from stepfold.students.combining import put_sum

    put_sum(student, states, coefficients)
    errors = [
        relative_error(sampler(noise, condition, scales, samples).cpu(), end.cpu())
        for noise, condition, scales, samples, end in batches
    ]
    tick()
    return torch.cat(errors).mean().item()


def teacher_ends(
    teacher: "PipelineTeacher",
    scale: float,
    encode: "Callable[[Sequence[int]], Condition]",
    index: Sequence[int],
    first: int,
    tick: Callable[[int], None],
) -> list[Any]:
    """(noise, condition, scales, sample numbers, the teacher's end) of each batch of prompts, in 20 steps.

    Args:
        teacher, scale: and its scale.
        encode: numbers of prompts -> their conditions.
        index: numbers of the prompts.
        first: number of the first sample.
        tick: called with the number of samples done.
    """
    import torch

    from stepfold.evaluation.latents import BATCH, TEACHER_STEPS
    from stepfold.evaluation.measure import evaluation_noise, teacher_sampler

    batches, exact = [], teacher_sampler(teacher, TEACHER_STEPS)
    for start in range(0, len(index), BATCH):
        these = range(first + start, first + min(start + BATCH, len(index)))
        condition = encode(index[start : start + BATCH])
        noise = evaluation_noise(0, these, teacher, teacher.device)
        scales = torch.full((len(these),), scale, device=teacher.device)
        batches.append((noise, condition, scales, these, exact(noise, condition, scales, these)))
        tick(len(these))
    return batches
