"""`stepfold quantise`: a student with rounded weights, and what that costs."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stepfold import assets
from stepfold.commands.options import DeviceOption, JsonOption, Quiet, StudentArgument, write_json
from stepfold.errors import UserError, first_line, out_of_memory
from stepfold.jobs.devices import usable_device

if TYPE_CHECKING:
    from stepfold.display import Display
    from stepfold.export.casting import Half
    from stepfold.teachers.contract import Student
    from stepfold.teachers.quantised import Quantised

STEPS = (4, 2, 1)


def quantise(
    student: StudentArgument,
    kind: Annotated[
        Literal["int8", "fp8", "nf4"], typer.Option(help="Weights of the linear layers in the network's blocks.")
    ] = "int8",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write. Default: beside the student, e.g. student-int8.", show_default=False),
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="An onnx graph, in int8 by onnxruntime (extra onnx).")] = False,
    dtype: Annotated[
        Literal["bfloat16", "float16"] | None,
        typer.Option(help="Precision of the other weights. Default: float32.", show_default=False),
    ] = None,
    n: Annotated[
        int,
        typer.Option(
            min=0, help="Prompts to measure the loss on, 64 at most (images, for the bundled model). 0 leaves it out."
        ),
    ] = 500,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts. Default: the run's, those first that it did not train on.", show_default=False),
    ] = None,
    json_file: JsonOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    device: DeviceOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Round a student's weights to a byte or half a byte, and measure what that costs.

    The folder is a pipeline: `stepfold sample` takes it, and plain diffusers with torchao (int8, fp8) or bitsandbytes
    (nf4). The loss at 1, 2 and 4 steps stands in its card, beside the student before.

    stepfold quantise runs/mine/student --kind nf4 --dtype bfloat16

    stepfold quantise runs/mine/student --onnx --n 16
    """
    from stepfold.display import Display, quiet_libraries, results_table, show_table

    quiet_libraries()
    target, loss = run_quantise(
        student, kind, out, onnx=onnx, dtype=dtype, n=n, prompts=prompts, force=force, device=usable_device(device),
        display=Display(quiet),
    )  # fmt: skip
    write_json(json_file, loss)
    if loss:
        show_table(results_table({"pipelines": loss["forms"], "protocol": {"n": loss["images"]}}))
    typer.echo(f"{kind}: {target}")


def run_quantise(
    student: Path,
    kind: "Quantised",
    out: Path | None,
    *,
    onnx: bool,
    dtype: "Half | None",
    n: int,
    prompts: Path | None,
    force: bool,
    device: str,
    display: "Display",
) -> tuple[Path, dict[str, Any]]:
    """Writes the quantised student, measures it as it is read back, and finishes its card; options as of `quantise`.

    Returns:
        Where it is; the loss, empty where n is 0.

    Raises:
        UserError: the student is quantised already or cannot be exported, or the place is taken.
    """
    from stepfold.commands.own_teacher import choose
    from stepfold.evaluation.latents import NUM_PROMPTS
    from stepfold.export.quantising import write_quantised_cards, write_quantised_onnx, write_quantised_pipeline
    from stepfold.jobs.exporting import check_target
    from stepfold.students.card import is_run, read_card, student_folder
    from stepfold.training.runs import writing

    if onnx and (kind != "int8" or dtype):
        given = f"--dtype {dtype}" if dtype else f"--kind {kind}"
        raise UserError(f"{given} is not for --onnx, which is int8 by onnxruntime; leave it out")
    beside = student / "student" if is_run(student) else student
    target = out or beside.with_name(f"{beside.name}-{'onnx-' if onnx else ''}{kind}")
    folder, card = student_folder(student).resolve(), read_card(student)
    card.check_plain()
    card.check_told()
    check_target(target, folder, force=force)
    texts = choose(student, card, prompts, min(n, NUM_PROMPTS)) if n else None  # refused before anything is written
    finish = partial(write_quantised_cards, kind=kind, dtype=dtype, onnx=onnx)
    with writing(target) as part:
        if onnx:
            sizes = write_quantised_onnx(folder, part)
        else:
            sizes = write_quantised_pipeline(folder, part, kind, dtype)
        finish(part, loss={})
    if texts is None:
        return target, {}
    try:
        measured = losses(
            student, target, "onnx int8" if onnx else kind, onnx=onnx, n=n, chosen=texts, device=device,
            display=display,
        )  # fmt: skip
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"out of memory while measuring ({first_line(error)}); {target} is written, without its loss: --device cpu "
            "measures slowly, --n 0 not at all"
        ) from error
    loss = {"bytes": sizes} | measured
    finish(target, loss=loss)
    return target, loss


def losses(
    student: Path,
    part: Path,
    form: str,
    *,
    onnx: bool,
    n: int,
    chosen: tuple[Any, Any],
    device: str,
    display: "Display",
) -> dict[str, Any]:
    """Scores of a student before and after, at few steps.

    Args:
        student: of plain weights.
        part: the folder that was written.
        form: its name in the result.
        onnx: whether it is a graph.
        chosen: a file of prompts, and which of it.
        n, device, display: as of `run_quantise`.

    Returns:
        `prompts` and `protocol` of the latent error, `images` of the evaluator (None without), and `forms`: name ->
        steps -> scores.
    """
    from stepfold.evaluation.latents import LatentProtocol, known_steps, measure_change
    from stepfold.export.onnx import told_one_time
    from stepfold.export.runtimes import onnx_student
    from stepfold.prompts.conditions import encoded
    from stepfold.students.loading import load_merged, load_student
    from stepfold.teachers.loading import load_teacher

    _, plain, card = load_merged(student, device)
    students: dict[str, Student] = {
        "student": plain, form: onnx_student(part) if onnx else load_student(part, device)[1]
    }  # fmt: skip
    teacher = load_teacher(card.teacher_settings(), device)
    recipe = told_one_time(card.recipe, teacher) if onnx else card.recipe
    texts, picked = chosen
    protocol = LatentProtocol(
        n=len(picked.index),
        steps=tuple(k for k in STEPS if k in recipe.times) or known_steps(recipe),
        guidance=recipe.guidance,
        prompts_sha256=texts.sha256,
        index=picked.index,
    )
    names = [f"reference {protocol.teacher_steps}", *(f"{name} {k}" for k in protocol.steps for name in students)]
    with display.measuring(dict.fromkeys(names, protocol.n)) as tick:
        condition = encoded(teacher, texts, picked.index)
        forms: dict[str, Any] = measure_change(teacher, students, recipe, protocol, condition, tick)
    result = {"prompts": picked.said, "protocol": protocol.record(), "images": None, "forms": forms}
    if card.teacher != "emoji" or n < 2:
        return result
    scores = image_scores(teacher, students, recipe, protocol.steps, n, display)
    for name, rows in forms.items():
        for steps in rows:
            rows[steps] |= scores[f"{name} {steps}"]
    return result | {"images": n}


def image_scores(
    teacher: Any, students: "dict[str, Student]", recipe: Any, steps: tuple[int, ...], n: int, display: "Display"
) -> dict[str, dict[str, float]]:
    """`NAME STEPS` -> accuracy and FD of students of the bundled teacher, by its evaluator."""
    from stepfold.evaluation.judge import load_judge
    from stepfold.evaluation.measure import measure, student_sampler
    from stepfold.evaluation.protocol import emoji_protocol

    protocol = emoji_protocol([recipe], steps, n, recipe.guidance)
    samplers = {
        f"{n} {k}": student_sampler(each, recipe, k, protocol.seed) for k in steps for n, each in students.items()
    }
    judge = load_judge(assets.JUDGE, teacher.device)
    with display.measuring(dict.fromkeys(samplers, n)) as tick:
        found = measure(judge, protocol, teacher, samplers, teacher.device, partial(tick))
    return {name: {"accuracy": row.accuracy, "fd": row.fd} for name, row in found.items()}
