"""A student with rounded weights: as a pipeline folder, or as an onnx graph under onnxruntime's own int8."""

import copy
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from stepfold.errors import UserError
from stepfold.export.casting import Half
from stepfold.export.files import README
from stepfold.export.losses import measured_loss
from stepfold.export.onnx import GRAPH, check_libraries, export_onnx
from stepfold.export.pipeline import export_pipeline, write_cards
from stepfold.students.card import Card, Quantisation, read_card, write_card
from stepfold.students.loading import load_student
from stepfold.teachers.once import compute_afresh
from stepfold.teachers.quantised import Quantised
from stepfold.teachers.quantised_files import quantise_for_files, write_quantised
from stepfold.training.runs import writing

IN_ONNX = """
## Quantised

The weights of the matrix products are int8, by onnxruntime's dynamic quantisation; a product rounds its input too.
{measured}
"""


def write_quantised_pipeline(folder: Path, part: Path, kind: Quantised, dtype: Half | None) -> tuple[int, int]:
    """Writes the student of a folder as a pipeline whose networks are quantised; its card is to be finished.

    Args:
        folder: the student's, of plain weights.
        part: the folder to write.
        kind: of the linear layers in the networks' blocks.
        dtype: of the other weights; None for float32.

    Returns:
        Bytes of the networks' files before and after.

    Raises:
        UserError: the student cannot become a pipeline, or a weight is too large for float16.
    """
    export_pipeline(folder, part, dtype)
    teacher, _, _ = load_student(part, "cpu")
    before = after = 0
    for name, network in teacher.network_parts(teacher.transformer).items():
        rounded: Any = copy.deepcopy(network)
        compute_afresh(rounded.modules())
        quantise_for_files(rounded, kind, teacher.lora_blocks)
        before += size_of(part / name)
        write_quantised(rounded, part / name, kind, getattr(torch, dtype or "float32"))
        after += size_of(part / name)
    return before, after


def write_quantised_onnx(folder: Path, part: Path) -> tuple[int, int]:
    """Writes the student of a folder as an onnx graph in int8; returns bytes before and after.

    Raises:
        UserError: onnxruntime is missing, or torch can make no graph.
    """
    check_libraries("onnx")
    if find_spec("onnxruntime") is None:
        raise UserError("--onnx needs onnxruntime; pip install onnx onnxscript onnxruntime")
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    export_onnx(folder, part)
    plain = part.with_name(f"{part.name}.plain")
    before = size_of(part)
    plain.mkdir(exist_ok=True)
    try:
        for file in part.glob(f"{GRAPH}*"):
            file.rename(plain / file.name)
        graph = onnx.load(plain / GRAPH, load_external_data=False)
        del graph.graph.value_info[:]  # shapes that are no longer those of the rounded weights
        onnx.save(graph, plain / GRAPH)
        logging.disable(logging.WARNING)  # onnxruntime advises steps that torch's exporter has taken
        quantize_dynamic(
            plain / GRAPH, part / GRAPH, op_types_to_quantize=["MatMul"], per_channel=True,
            weight_type=QuantType.QUInt8,  # signed ones overflow on CPUs without VNNI
            use_external_data_format=(plain / f"{GRAPH}.data").is_file(),
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
        for file in plain.iterdir():
            file.unlink()
        plain.rmdir()
    return before, size_of(part)


def size_of(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(file.stat().st_size for ending in (".safetensors", GRAPH, ".data") for file in folder.glob(f"*{ending}"))


def write_quantised_cards(part: Path, *, kind: Quantised, dtype: Half | None, loss: dict[str, Any], onnx: bool) -> Card:
    """Finishes the cards of what was written, with the loss in them; empty where nothing was measured.

    The scores of the student that was quantised are left out: they are another network's.
    """
    said = Quantisation.model_validate({"kind": kind, "dtype": dtype or "float32", "loss": loss})
    card = read_card(part).model_copy(update={"quantised": said})
    if onnx:
        write_card(part, card)
        before = (part / README).read_text(encoding="utf-8").partition(IN_ONNX.partition("{")[0])[0]
        with writing(part / README) as readme:
            readme.write_text(before + IN_ONNX.format(measured=measured_loss(loss).strip()), encoding="utf-8")
    else:
        write_cards(part, card)
    return card
