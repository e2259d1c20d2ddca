"""`stepfold export`: a student becomes something else."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stepfold.commands.options import StudentArgument
from stepfold.errors import UserError

if TYPE_CHECKING:
    from stepfold.export.casting import Half
    from stepfold.export.lora_keys import Keys


def export(
    student: StudentArgument,
    to: Annotated[
        str,
        typer.Option("--to", help="pipeline, lora, single-file, onnx, openvino, web or anyflow.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File or folder to write. Default: beside the student, e.g. student-onnx.", show_default=False
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Fold a flow map for exactly so many steps (pipeline, lora).", show_default=False),
    ] = None,
    keys: Annotated[
        Literal["diffusers", "comfy", "kohya", "peft"] | None,
        typer.Option(
            help="Names in a LoRA: diffusers (the default), comfy for ComfyUI, kohya for the web UIs, peft for a "
            "folder that PEFT loads.",
            show_default=False,
        ),
    ] = None,
    runtime: Annotated[
        Path | None,
        typer.Option(
            help="Folder dist of onnxruntime-web, for --to web. Default: node_modules/onnxruntime-web/dist.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16"] | None,
        typer.Option(
            help="Precision of the weights (pipeline, single-file). Default: the student's own, merged LoRAs float32.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write a student as a pipeline, a LoRA file, a single file for ComfyUI, an onnx graph or a page.

    - `pipeline`: a folder for plain diffusers; a LoRA student is merged into its teacher's network.

    - `lora`: the one file of a LoRA student, for `load_lora_weights`. `--keys comfy` is for ComfyUI, `--keys kohya` for
      ComfyUI, Forge and other web UIs. `--keys peft` makes a folder for PEFT.

    - `single-file`: the network under the names of its original checkpoint, for ComfyUI's Load Diffusion Model.

    A file gets its card and, for ComfyUI, a workflow beside it.

    - `onnx`: the network as a graph, for onnxruntime (extra onnx).

    - `openvino`: the network for OpenVINO, in float32 (extra openvino).

    - `web`: a page that samples in the browser without a server, for students of the bundled teacher (extra onnx).

    - `anyflow`: a flow map of Wan for diffusers' AnyFlowPipeline, in any of its card's numbers of steps.

    stepfold export runs/mine/student --to pipeline

    stepfold export runs/mine/student --to lora --keys kohya --out models/loras/mine.safetensors

    stepfold export runs/mine/student --to single-file --dtype float16 --out models/diffusion_models/mine.safetensors

    stepfold export runs/map/student --to pipeline --steps 4

    stepfold export emoji-student --to web --out page --runtime node_modules/onnxruntime-web/dist
    """
    from stepfold.display import quiet_libraries

    quiet_libraries()
    target = run_export(student, to, out, force=force, steps=steps, keys=keys, runtime=runtime, dtype=dtype)
    typer.echo(f"{to}: {target}")
    if target.is_file():
        from stepfold.export.beside import card_of, workflow_of

        workflow = workflow_of(target)
        typer.echo(f"ComfyUI: {workflow if workflow.is_file() else f'no workflow; {card_of(target)} says why'}")
        typer.echo(f"the file has no scheduler and no times in it: {card_of(target)} says how to sample with it")


def run_export(
    student: Path,
    to: str,
    out: Path | None,
    *,
    force: bool,
    steps: int | None = None,
    keys: "Keys | None" = None,
    runtime: Path | None = None,
    dtype: "Half | None" = None,
) -> Path:
    """Writes a student as something else; returns where: `out`, or beside the student.

    `steps` folds a flow map for that many steps alone; `keys` names the layers of a LoRA file; `runtime` is where
    onnxruntime-web is; `dtype` is that of the weights of a pipeline or a single file.

    Raises:
        UserError: the student cannot become that, or the place is taken.
    """
    from stepfold.export.anyflow import export_anyflow
    from stepfold.export.beside import check_free
    from stepfold.export.folded import export_folded, export_folded_lora
    from stepfold.export.lora import export_lora
    from stepfold.export.onnx import export_onnx
    from stepfold.export.openvino import export_openvino
    from stepfold.export.pipeline import export_pipeline
    from stepfold.export.single_file import export_single_file
    from stepfold.export.web import export_web
    from stepfold.students.card import is_run, read_card, student_folder

    writers: dict[str, tuple[Callable[[Path, Path], None], str]] = {
        "pipeline": (export_pipeline, "-pipeline"),
        "lora": (export_lora, "-lora.safetensors"),
        "single-file": (export_single_file, "-single-file.safetensors"),
        "onnx": (export_onnx, "-onnx"),
        "openvino": (export_openvino, "-openvino"),
        "web": (partial(export_web, runtime=runtime), "-web"),
        "anyflow": (export_anyflow, "-anyflow"),
    }
    if to not in writers:
        raise UserError(f"--to is {to!r}; a student becomes {', '.join(writers)}")
    write: Callable[[Path, Path], None]
    write, ending = writers[to]
    if steps is not None:
        folded = {"pipeline": export_folded, "lora": export_folded_lora}
        if to not in folded:
            raise UserError(
                f"--steps folds a flow map with --to pipeline or lora; export the folder it makes --to {to}"
            )
        write, ending = partial(folded[to], num_steps=steps), f"-{steps}step{ending.removeprefix('-pipeline')}"
    if keys:
        if to != "lora":
            raise UserError(f"--keys {keys} is for --to lora; leave it out of --to {to}")
        write = partial(write, keys=keys)
        ending = ending.replace("-lora.safetensors", "-peft") if keys == "peft" else ending
    if dtype:
        if to not in ("pipeline", "single-file") or steps is not None:
            raise UserError(f"--dtype {dtype} is for --to pipeline or single-file without --steps; leave it out")
        write = partial(write, dtype=dtype)
    if runtime and to != "web":
        raise UserError(f"--runtime {runtime} is for --to web; leave it out of --to {to}")
    beside = student / "student" if is_run(student) else student  # of the bundled student: here
    target = out or beside.with_name(beside.name + ending)
    student = student_folder(student).resolve()
    card = read_card(student)
    if steps is None:
        card.check_told()
    if to != "pipeline" or dtype or steps:
        card.check_plain()
    suffix = Path(ending).suffix
    if target.suffix != suffix and suffix:
        raise UserError(f"--out {target} is no {suffix} file; give a name that ends in {suffix}")
    check_target(target, student, force=force, to_file=bool(suffix))
    if suffix == ".safetensors" and not force:
        check_free(target)
    write(student, target)
    return target


def check_target(target: Path, student: Path, *, force: bool, to_file: bool = False) -> None:
    """Refuses a place to write that is the student's own, or taken.

    Raises:
        UserError: it is.
    """
    if target.resolve() == student or student in target.resolve().parents:
        raise UserError(f"--out {target} is the student itself, or in it; choose another --out")
    if target.exists() and not (force and replaceable(target, to_file)):
        raise UserError(f"{target} is there already; choose another --out, or --force to replace an earlier export")


def replaceable(path: Path, to_file: bool) -> bool:
    """Whether `--force` may replace it: any file by a file, and a folder only where stepfold wrote it."""
    from stepfold.students.card import CARD

    return path.is_file() if to_file else (path / CARD).is_file()
