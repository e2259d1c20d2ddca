"""A student's network for OpenVINO, from its onnx graph."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stepfold.errors import UserError
from stepfold.export.onnx import GRAPH, Runtime, check_libraries, export_graph

MODEL = "model.xml"
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
"""Without it CPUs that have bfloat16 compute in it."""
OPENVINO = Runtime(
    "a model of OpenVINO", "openvino", MODEL, "Tested with OpenVINO 2026.4, on a CPU.",
    f'openvino.Core().compile_model("FOLDER/{MODEL}", "CPU", {EXACT})', "network",
)  # fmt: skip


def check_openvino() -> None:
    """Refuses where no such model can be made.

    Raises:
        UserError: a library is missing, or torch is too old.
    """
    check_libraries("openvino")
    if find_spec("openvino") is None:
        raise UserError("--to openvino needs openvino; pip install 'openvino>=2026.4,<2027' onnx onnxscript")


def export_openvino(folder: Path, out: Path) -> None:
    """A folder with the model in float32, the student's card and a README that says how to sample with it.

    Raises:
        UserError: the libraries are missing, torch is too old, or cannot make a graph of this network.
    """
    check_openvino()
    export_graph(folder, out, OPENVINO, save_model)


def save_model(program: Any, part: Path) -> None:
    """Writes an onnx program as OpenVINO's two files; its core reads the graph, and nothing of it reports home."""
    import openvino  # type: ignore[import-not-found]

    graph = part / GRAPH
    program.save(str(graph))
    model = openvino.Core().read_model(graph)
    openvino.save_model(model, part / MODEL, compress_to_fp16=False)
    del model  # it maps the graph's weights
    for file in part.glob(f"{GRAPH}*"):
        file.unlink()
