"""Memory of the four-step presets by count: their weights, LoRAs and a step, at published sizes; see counting.py."""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from counting import CPU, CountedBytes, default_dtype
from shapes import ENCODERS, SHAPES, Shape
from step_rows import Precision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stepfold import assets
from stepfold.config import load_config
from stepfold.objectives.contract import Networks
from stepfold.prompts.reading import open_prompts
from stepfold.students.lora import lora_student
from stepfold.teachers import pipeline
from stepfold.teachers.contract import Condition, deepcopy_sharing
from stepfold.teachers.loading import FAMILIES, load_teacher
from stepfold.teachers.parts import ENCODER_BLOCKS
from stepfold.teachers.quantised import quantise
from stepfold.training.draws import draw
from stepfold.training.precision import student_precision, walk_precision
from stepfold.training.states import collect
from stepfold.training.step import move_average
from stepfold.training.terms import add_gradients, terms_of


def count_preset(family: str, changes: Sequence[str] = ()) -> dict[str, float]:
    """GiB of a step of FAMILY-lora-4step, conditions from a cache; where blocks are equal, counted on few of them.

    Memory is linear in the number of blocks of a kind: one more has its weights, its LoRA and that one's states, and
    its input for the backward pass. So it is counted on one of each kind, and on one more of each.

    Args:
        family: one of `shapes.SHAPES`.
        changes: settings besides the preset's.

    Returns:
        `peak_gib`, `between_steps_gib`.
    """
    shape = SHAPES[family]
    one = dict.fromkeys(shape.stacks, 1)
    first = count_lora_step(family, shape, one, changes)
    total = dict(first)
    for stack, count in shape.stacks.items():
        more = count_lora_step(family, shape, one | {stack: 2}, changes)
        total = {what: total[what] + (count - 1) * (more[what] - first[what]) for what in total}
    return total


def count_weights(family: str, rank: int = 64) -> dict[str, float]:
    """GiB of FAMILY-lora-4step's network in bfloat16 and quantised, and of a LoRA with all that goes with it.

    Quantised are the linear layers of its blocks, as `teacher.quantise` does it; the rest stays in bfloat16.

    Args:
        family: one of `shapes.SHAPES`.
        rank: of the LoRA: weight, gradient, average and AdamW's two moments, in float32.

    Returns:
        `none`, `int8`, `fp8`, `nf4` and `lora`.
    """
    shape = SHAPES[family]
    blocks = FAMILIES[shape.pipeline].lora_blocks
    with torch.device("meta"):
        network = shape.make_network()
    matrices = rank * sum(o + i for o, i in layers_of(network, blocks))
    return rounded_gib(network, blocks) | {"lora": 5 * 4 * matrices / 2**30}


def count_encoder(name: str) -> dict[str, float]:
    """GiB of a text encoder in bfloat16, and quantised as `teacher.quantise_encoders` does it.

    Args:
        name: one of `shapes.ENCODERS`.

    Returns:
        `parameters` in billions, `none`, `int8`, `fp8` and `nf4`.
    """
    kind, configured = ENCODERS[name]
    with torch.device("meta"):
        encoder = kind(configured())
    return {"parameters": sum(p.numel() for p in encoder.parameters()) / 1e9} | rounded_gib(encoder, ENCODER_BLOCKS)


def layers_of(network: nn.Module, blocks: Sequence[str]) -> list[Any]:
    """Shapes of the weights of the linear layers of its blocks."""
    return [
        layer.weight.shape
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and any(part in name for part in blocks)
    ]


def rounded_gib(network: nn.Module, blocks: Sequence[str]) -> dict[str, float]:
    """GiB of a network in bfloat16, by how the linear layers of its blocks are quantised."""
    weights, layers = sum(p.numel() for p in network.parameters()), layers_of(network, blocks)
    inside, rows = sum(o * i for o, i in layers), sum(o for o, _ in layers)
    outside = 2 * (weights - inside)
    bytes_taken = {
        "none": 2 * weights,
        "int8": outside + inside + 4 * rows,
        "fp8": outside + inside + 4 * rows,
        "nf4": outside + inside / 2 + inside / 64 * 4,
    }
    return {kind: count / 2**30 for kind, count in bytes_taken.items()}


def count_lora_step(family: str, shape: Shape, stacks: dict[str, int], changes: Sequence[str]) -> dict[str, float]:
    """The same of a network of so many blocks; one step, whose optimiser's states are there from its beginning."""
    few = ("space.route_steps=2", "training.precision=bf16", "training.walk_precision=bf16")  # states are small
    fake, counted = FakeTensorMode(allow_non_fake_inputs=True), CountedBytes()
    address, ragged = (
        patch.object(Tensor, "data_ptr", id),
        patch.object(Condition, "texts", lambda own: list(own.embeds)),
    )
    with tempfile.TemporaryDirectory() as name, patch.object(nn.Module, "to", lambda module, *_, **__: module), address:
        folder = Path(name)
        given = load_config(f"{family}-lora-4step", [*few, *changes], teacher__source=name, prompts=str(assets.PROMPTS))
        kind, kept = given.teacher.quantise, given.teacher.model_copy(update={"quantise": "none"})
        config = given.model_copy(update={"teacher": kept})
        pipe = pipe_of(shape, stacks, folder)
        with fake, counted, default_dtype(getattr(torch, config.teacher.dtype)):
            network = shape.make_network(**stacks).requires_grad_(False)
            setattr(pipe, shape.network_part, quantise(network, kind, FAMILIES[shape.pipeline].lora_blocks, CPU))
            del network
        with patch.object(pipeline, "load_pipeline", lambda *_, **__: pipe):
            teacher = load_teacher(config.teacher, CPU, null=texts_of(shape, 1))
        batch = draw(0, open_prompts(assets.PROMPTS), teacher, config, CPU)
        with fake, counted, ragged:
            student = lora_student(teacher, config.student.lora)
            student.recompute_blocks()
            still = [*(p for p in student.parameters() if not p.requires_grad), *student.buffers()]
            average = deepcopy_sharing(student, still).requires_grad_(False)
            trained = [p for p in student.parameters() if p.requires_grad]
            moments = [torch.zeros_like(p) for p in trained for _ in range(2)]  # AdamW's
            precision: Any = Precision(CPU, True, cached=False)
            networks = Networks(
                student, teacher, tangent="none", precision=partial(student_precision, precision, "bf16"),
                walk_precision=partial(walk_precision, "bf16", CPU, teacher.network), average=average,
            )  # fmt: skip
            counted.peak = counted.now
            conditions = texts_of(shape, len(batch.index))
            states = collect(list(config.space.weights), batch, conditions, networks, config, 0)
            teacher.clear_prompt_cache()
            add_gradients(terms_of(config), networks, states, batch.draws, config, 0, precision)
            move_average(average, student, config.training.ema)
            for parameter in trained:
                parameter.grad = None
            del states, moments
    return {"peak_gib": counted.peak / 2**30, "between_steps_gib": counted.now / 2**30}


def pipe_of(shape: Shape, stacks: dict[str, int], folder: Path) -> Any:
    """A pipeline without weights, and in `folder` what a teacher reads of one besides them."""
    kind: Any = getattr(diffusers, shape.pipeline)
    made, options = shape.vae
    with torch.device("meta"):
        network, vae = shape.make_network(**stacks), made(**options)
    parts: dict[str, Any] = dict.fromkeys(kind._get_signature_keys(kind)[0] - {"self"})
    pipe = kind(**parts | {shape.network_part: network, "scheduler": shape.scheduler()})
    pipe.register_modules(vae=vae)
    pipe.save_config(folder)
    vae.save_config(folder / "vae")
    pipe.vae = None
    return pipe


def texts_of(shape: Shape, count: int) -> Condition:
    """Of prompts that fill all tokens."""
    tokens, width = shape.text
    pooled = None if shape.pooled is None else torch.zeros(count, shape.pooled)
    return Condition.whole(torch.zeros(count, tokens, width), pooled)
