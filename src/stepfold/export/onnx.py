"""A student's network as an onnx graph, for onnxruntime."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepfold.errors import UserError, first_line
from stepfold.export.files import listing
from stepfold.sampling.recipe import Recipe, times_of
from stepfold.sampling.samplers import in_diffusers
from stepfold.students.card import CARD, Card, write_card
from stepfold.students.loading import load_merged
from stepfold.teachers.contract import Condition, SamplerName, Student
from stepfold.teachers.once import compute_afresh
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.training.runs import writing

GRAPH = "model.onnx"
GRAPHS_SINCE = "2.12"  # torch 2.10 and 2.11 fix the number of samples in the graphs of Sana, FLUX and PixArt

README = """# A few-step student of `{teacher}`, as {title}

`{graph}` is the network F of a consistency model, x_0 = cos(t) x - sin(t) F, in latents of unit variance. Its inputs,
B samples of L tokens:

| input | type and shape |
|---|---|
{inputs}

Embeddings are those of the teacher's text encoders, with their mask and pooled vector where the graph asks for them.
Its autoencoder decodes `latents`, which is the last line below{layout}. `{card}` has the times of each number of steps.
{tested}

```python
import json
import numpy
import {package}

network = {opening}
times = json.load(open("FOLDER/{card}"))["recipe"]["times"]["{steps}"]
x = noise  # {shape}, standard normal
for t, after in zip(times, [*times[1:], 0.0]):
    F = {call}({before}{{"x": x, "t": numpy.full(len(x), t, numpy.float32), **others}})[0]
{step}
latents = x / {scale} + {offset}
```
"""


@dataclass(frozen=True)
class Runtime:
    """What runs a graph, in the words and the code of its README.

    Attributes:
        title: of what is written.
        package: its Python package.
        graph: name of the file.
        tested: with which versions.
        opening: opens the file.
        call: runs it; `before` are the arguments before the inputs.
    """

    title: str
    package: str
    graph: str
    tested: str
    opening: str
    call: str
    before: str = ""


ONNXRUNTIME = Runtime(
    "an onnx graph", "onnxruntime", GRAPH, "Tested with onnxruntime 1.29 and newer.",
    f'onnxruntime.InferenceSession("FOLDER/{GRAPH}")', "network.run", "None, ",
)  # fmt: skip

STEPS: dict[SamplerName, tuple[int, str]] = {
    "consistency": (
        2,
        """    x0 = numpy.cos(t) * x - numpy.sin(t) * F
    fresh = numpy.random.standard_normal(x.shape)
    x = (numpy.cos(after) * x0 + numpy.sin(after) * fresh).astype(numpy.float32)""",
    ),
    "flow": (8, "    x = (numpy.cos(t - after) * x - numpy.sin(t - after) * F).astype(numpy.float32)"),
}
"""Sampler of a graph that is told no target -> number of steps in the README's code, and how that takes a step."""


class Graph(nn.Module):
    """A student, called with plain tensors."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(
        self, x: Tensor, t: Tensor, embeds: Tensor, mask: Tensor, pooled: Tensor | None, guidance: Tensor
    ) -> Tensor:
        """See `Student` and `Condition`."""
        for tensor in (t, embeds, mask, guidance):
            torch._check(tensor.shape[0] == x.shape[0])  # the exporter does not find it out by itself
        return self.student(x, t, Condition(embeds, mask, pooled), guidance)


def to_program(module: nn.Module, inputs: dict[str, Tensor | None], outputs: list[str], sizes: Any = None) -> Any:
    """The onnx program of a module on the CPU, in float32, with the inputs that it reads.

    Args:
        module: called with the values of `inputs` in their order.
        inputs: name -> an example; an absent one is None.
        outputs: names of the results.
        sizes: name -> the dimensions that may differ from the example's, as torch.export takes them.
    """
    with torch.no_grad():
        program = torch.export.export(module.eval(), tuple(inputs.values()), dynamic_shapes=sizes, strict=False)
    for node in list(program.graph.nodes):  # torch lets a dimension that is not 1 be; onnx calls that an error
        if node.target is torch.ops.aten.squeeze.dim and node.args[0].meta["val"].shape[node.args[1]] != 1:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    names = [name for name, value in inputs.items() if value is not None]
    result = torch.onnx.export(program, dynamo=True, verbose=False, input_names=names, output_names=outputs)
    assert result is not None
    for unread in [each for each in result.model.graph.inputs if not each.uses()]:
        result.model.graph.inputs.remove(unread)
    return result


def trace(student: Student, inputs: dict[str, Tensor | None]) -> Any:
    """The onnx program of a student for any number of samples and tokens, with the inputs that it reads.

    Args:
        student: on the CPU, in float32.
        inputs: of `Graph.forward`, two samples; an absent one is None.
    """
    any_size = torch.export.Dim.AUTO
    sizes = {
        name: None if value is None else {0: any_size, **({1: any_size} if name in ("embeds", "mask") else {})}
        for name, value in inputs.items()
    }
    return to_program(Graph(student), inputs, ["F"], sizes)


def check_libraries(to: str) -> None:
    """Refuses `--to` where no graph can be made.

    Raises:
        UserError: the libraries are missing, or torch is too old.
    """
    if torch.__version__ < GRAPHS_SINCE:
        raise UserError(
            f"--to {to} needs torch {GRAPHS_SINCE} or newer, this is {torch.__version__}; "
            "install a newer one, or use --to pipeline"
        )
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise UserError(f"--to {to} needs {' and '.join(missing)}; pip install onnx onnxscript onnxruntime")


@contextmanager
def tracing(folder: Path) -> Iterator[None]:
    """Quiet while torch makes graphs of a student's folder.

    Raises:
        UserError: torch cannot make one of them.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except Exception as error:  # what the exporter trips over in a network comes as any kind
        while isinstance(error.__cause__, Exception):  # the exporter's own errors say only in which step it failed
            error = error.__cause__
        raise UserError(
            f"torch makes no onnx graph of {folder} ({first_line(error)}); "
            "use --to pipeline, or try newer releases: pip install -U onnx onnxscript"
        ) from None


def network_graph(
    folder: Path, teacher: PipelineTeacher, student: Student, card: Card
) -> tuple[Any, dict[str, Tensor | None]]:
    """The onnx program of a loaded student, and the example of its inputs that it was made with.

    Raises:
        UserError: torch cannot make a graph of this network.
    """
    compute_afresh(student.modules())
    if card.with_images:
        raise UserError(f"{folder} reads an image too, and an onnx graph here takes a text; use --to pipeline")
    condition = teacher.encode((teacher.examples or (card.example, "a cat"))[:2]).each(Tensor.contiguous)
    if condition.second is not None:
        raise UserError(f"{folder} reads two texts, and an onnx graph here takes one; use --to pipeline")
    if len(parts := teacher.network_parts(teacher.transformer)) > 1:
        raise UserError(f"{folder} has {len(parts)} networks, and an onnx graph here holds one; use --to pipeline")
    inputs: dict[str, Tensor | None] = {
        "x": torch.randn(2, *teacher.latent_shape),
        "t": torch.tensor([1.5, 0.7]),
        "embeds": condition.embeds,
        "mask": condition.mask,
        "pooled": condition.pooled,
        "guidance": torch.full((2,), card.recipe.guidance),
    }
    with tracing(folder):
        return trace(student, inputs), inputs


def told_one_time(recipe: Recipe, teacher: PipelineTeacher) -> Recipe:
    """How a graph is sampled, which is told no target: a flow map's as a consistency model's."""
    sampler = in_diffusers(recipe.sampler)
    if sampler == recipe.sampler:
        return recipe
    times = recipe.without_target(times_of(teacher, sampler))
    return recipe.model_copy(update={"sampler": sampler, "times": times})


def export_onnx(folder: Path, out: Path) -> None:
    """A folder with the graph, the student's card and a README that says how to sample with it.

    Raises:
        UserError: the libraries are missing, torch is too old, or cannot make a graph of this network.
    """
    check_libraries("onnx")
    export_graph(folder, out, ONNXRUNTIME, lambda program, part: program.save(str(part / GRAPH)))


def export_graph(folder: Path, out: Path, runtime: Runtime, save: Callable[[Any, Path], object]) -> None:
    """A folder with a graph for a runtime, the student's card and a README.

    Args:
        folder: the student's.
        out: the folder to write.
        runtime: what runs the graph.
        save: writes an onnx program into a folder, for the runtime.

    Raises:
        UserError: torch cannot make a graph of this network.
    """
    teacher, student, card = load_merged(folder, "cpu")
    program, inputs = network_graph(folder, teacher, student, card)
    scale, offset = teacher.autoencoder_scale()
    steps, step = STEPS[in_diffusers(card.recipe.sampler)]
    read = {each.name: inputs[each.name] for each in program.model.graph.inputs}
    with writing(out) as part:
        part.mkdir()
        save(program, part)
        write_card(part, card.model_copy(update={"merged": True}))
        (part / "README.md").write_text(
            README.format(
                **asdict(runtime),
                teacher=card.teacher,
                card=CARD,
                steps=steps,
                step=step,
                inputs="\n".join(f"| {name} | {described(name, value)} |" for name, value in read.items()),
                shape=described("x", inputs["x"]),
                scale=in_numpy(scale),
                offset=in_numpy(offset),
                layout=f", {teacher.autoencoder_layout}" if teacher.autoencoder_layout else "",
            )
            + listing(part)
        )


def in_numpy(values: Any) -> str:
    """A number, or one a channel [C, 1, ...], as Python's source."""
    if not isinstance(values, Tensor):
        return repr(float(values))
    channels = ", ".join(f"{value:.9g}" for value in values.flatten().tolist())
    return f"numpy.array([{channels}], numpy.float32).reshape{tuple(values.shape)}"


def described(name: str, value: Tensor | None) -> str:
    """`float32 [B, L, 32]`, of an example of an input."""
    assert value is not None
    sizes = ["B", *map(str, value.shape[1:])]
    if name in ("embeds", "mask"):
        sizes[1] = "L"
    return f"{str(value.dtype).removeprefix('torch.')} [{', '.join(sizes)}]"
