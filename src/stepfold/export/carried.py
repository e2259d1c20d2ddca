"""A LoRA student and its teacher's own LoRAs as one pair of matrices a layer, for the base model alone."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from stepfold.errors import UserError
from stepfold.sections import LoraSettings
from stepfold.teachers.lora_files import read_lora
from stepfold.teachers.lora_merging import located
from stepfold.teachers.pipeline import PipelineTeacher

ENDS = (".lora_A.weight", ".lora_B.weight")
Pair = tuple[Tensor, Tensor]
"""Down [R, I, ...] and up [O, R, ...]."""


def with_loras(
    weights: Mapping[str, Tensor], loras: Iterable[LoraSettings], teacher: PipelineTeacher
) -> dict[str, Tensor]:
    """A student's matrices and those of its teacher's LoRAs: down one below the other, up one beside the other.

    So the change of a layer is the sum of all changes. The layers of a part get one rank, filled up with zeros.

    Args:
        weights: PART.LAYER.lora_A.weight [R, I, ...] and PART.LAYER.lora_B.weight [O, R, ...], at scale 1.
        loras: the teacher's, each with its scale.
        teacher: of whose pipeline the names are; its weights do not matter.

    Returns:
        The same names, and those of layers that the teacher's LoRAs change besides; float32.

    Raises:
        UserError: a LoRA holds more than pairs of matrices.
    """
    pairs: dict[str, list[Pair]] = defaultdict(list)
    for name in (name.removesuffix(ENDS[0]) for name in weights if name.endswith(ENDS[0])):
        down, up = (weights[name + end].float() for end in ENDS)
        pairs[name].append((down, up))
    for lora in loras:
        for name, pair in pairs_of(lora, teacher):
            pairs[name].append(pair)
    ranks: dict[str, int] = defaultdict(int)
    for name, several in pairs.items():
        part = name.partition(".")[0]
        ranks[part] = max(ranks[part], sum(len(down) for down, _ in several))
    found: dict[str, Tensor] = {}
    for name, several in pairs.items():
        down, up = torch.cat([down for down, _ in several]), torch.cat([up for _, up in several], 1)
        missing = ranks[name.partition(".")[0]] - len(down)
        down = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
        up = torch.cat([up, up.new_zeros(len(up), missing, *up.shape[2:])], 1)
        found |= {name + ENDS[0]: down.contiguous(), name + ENDS[1]: up.contiguous()}
    return found


def pairs_of(settings: LoraSettings, teacher: PipelineTeacher) -> list[tuple[str, Pair]]:
    """PART.LAYER -> its pair of matrices at the settings' scale, for each place that a LoRA changes.

    Raises:
        UserError: as of `with_loras`.
    """
    lora = read_lora(settings.source)
    layers, parts, places = located(teacher.pipe, settings.source, lora, lambda: None)
    found = []
    for layer in layers:
        if more := sorted(layer.tensors.keys() - {"down", "up", "alpha"}):
            raise UserError(
                f"LoRA {settings.source!r} holds {layer.keys[more[0]]}, which is no pair of matrices; leave "
                "--with-loras out and load it beside the student, or merge all of it with --to pipeline"
            )
        for place in places[layer.name]:
            weight = parts[place.part].get_submodule(place.module).weight
            assert isinstance(weight, Tensor)
            down = layer.tensors["down"].float().reshape(layer.rank, *weight.shape[1:])
            up = down.new_zeros(len(weight), layer.rank)
            scaling = settings.scale * lora.scaling(layer, place.part, place.module)
            up[place.rows] = scaling * layer.tensors["up"].float().flatten(1)[place.of_layer]
            found.append((f"{place.part}.{place.module}", (down, up.reshape(*up.shape, *[1] * (weight.ndim - 2)))))
    return found
