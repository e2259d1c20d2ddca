"""Exported graphs called as students, to be measured and compared."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from stepfold.export.onnx import GRAPH
from stepfold.export.openvino import EXACT, MODEL
from stepfold.teachers.contract import Condition, Student

Run = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""The graph's inputs by their names -> F."""


class GraphStudent(Student):
    """The graph of a student, on the CPU; it is told one time."""

    def __init__(self, run: Run, names: set[str]) -> None:
        """`names` are those of the graph's inputs."""
        super().__init__()
        self.run, self.names = run, names

    @override
    def forward(
        self, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor, target: Tensor | None = None
    ) -> Tensor:
        given = {
            "x": x_unit, "t": t, "embeds": condition.embeds, "mask": condition.mask, "pooled": condition.pooled,
            "guidance": guidance,
        }  # fmt: skip
        read = {name: value.cpu().numpy() for name, value in given.items() if name in self.names and value is not None}

        return torch.tensor(self.run(read)).to(x_unit)


def onnx_student(folder: Path, threads: int = 0) -> GraphStudent:
    """The graph in a folder, under onnxruntime; 0 threads are as many as it likes."""
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session: Any = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
    return GraphStudent(lambda given: session.run(None, dict(given))[0], {each.name for each in session.get_inputs()})


def openvino_student(folder: Path, threads: int = 0) -> GraphStudent:
    """The model in a folder, under OpenVINO on the CPU; `threads` as in `onnx_student`."""
    import openvino  # type: ignore[import-not-found]

    options: Any = EXACT | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    network = openvino.Core().compile_model(folder / MODEL, "CPU", options)
    return GraphStudent(lambda given: network(dict(given))[0], {each.any_name for each in network.inputs})
