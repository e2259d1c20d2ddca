"""A student becomes something else: which writer, and where it may write."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from stepfold.errors import UserError

if TYPE_CHECKING:
    from stepfold.export.casting import Half
    from stepfold.export.lora_keys import Keys


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
    with_loras: bool = False,
) -> Path:
    """Writes a student as something else; returns where: `out`, or beside the student.

    `steps` folds a flow map for that many steps alone; `keys` names the layers of a LoRA file; `runtime` is where
    onnxruntime-web is; `dtype` is that of the weights of a pipeline, a LoRA or a single file; `with_loras` carries the
    teacher's LoRAs in a LoRA file.

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
    from stepfold.students.intact import check_digests

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
    check_options(to, steps, keys, runtime, dtype, with_loras)
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
        write = partial(write, keys=keys)
        ending = ending.replace("-lora.safetensors", "-peft") if keys == "peft" else ending
    if with_loras:
        write = partial(write, whole=True)
    if dtype:
        write = partial(write, dtype=dtype)
    beside = student / "student" if is_run(student) else student  # of the bundled student: here
    target = out or beside.with_name(beside.name + ending)
    student = student_folder(student).resolve()
    card = read_card(student)
    if steps is None and not (to == "pipeline" and card.recipe.policy):
        card.check_told()
        card.check_folded(to)
    if to != "pipeline" or dtype or steps:
        card.check_plain()
    suffix = Path(ending).suffix
    if target.suffix != suffix and suffix:
        raise UserError(f"--out {target} is no {suffix} file; give a name that ends in {suffix}")
    check_target(target, student, force=force, to_file=bool(suffix))
    check_digests(student, card.digests)
    if suffix == ".safetensors" and not force:
        check_free(target)
    write(student, target)
    return target


def check_options(
    to: str, steps: int | None, keys: str | None, runtime: Path | None, dtype: str | None, with_loras: bool
) -> None:
    """Refuses options of `run_export` that are for another target.

    Raises:
        UserError: naming the first.
    """
    from stepfold.export.casting import Half
    from stepfold.export.lora_keys import Keys

    for name, value, names in (("keys", keys, get_args(Keys)), ("dtype", dtype, get_args(Half))):
        if value and value not in names:
            raise UserError(f"--{name} is {value!r}; give one of {', '.join(names)}")
    if keys and to != "lora":
        raise UserError(f"--keys {keys} is for --to lora; leave it out of --to {to}")
    if with_loras and (to != "lora" or steps is not None):
        raise UserError("--with-loras is for --to lora without --steps; leave it out, --to pipeline merges them")
    if dtype and (to not in ("pipeline", "lora", "single-file") or steps is not None):
        raise UserError(f"--dtype {dtype} is for --to pipeline, lora or single-file without --steps; leave it out")
    if runtime and to != "web":
        raise UserError(f"--runtime {runtime} is for --to web; leave it out of --to {to}")


def check_target(target: Path, student: Path, *, force: bool, to_file: bool = False) -> None:
    """Refuses a place to write that is the student's own, or taken, or a file's name where a folder is written.

    Raises:
        UserError: it is.
    """
    if target.suffix == ".safetensors" and not to_file:
        raise UserError(f"--out {target} is a file's name, and this writes a folder; give a name without the ending")
    if target.resolve() == student or student in target.resolve().parents:
        raise UserError(f"--out {target} is the student itself, or in it; choose another --out")
    if target.exists() and not (force and replaceable(target, to_file)):
        raise UserError(f"{target} is there already; choose another --out, or --force to replace an earlier export")


def replaceable(path: Path, to_file: bool) -> bool:
    """Whether `--force` may replace it: any file by a file, and a folder only where stepfold wrote it."""
    from stepfold.students.card import CARD

    return path.is_file() if to_file else (path / CARD).is_file()
