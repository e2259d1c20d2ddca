"""Merges LoRAs into a pipeline's weights, by each file's own arithmetic; diffusers is asked for names only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor, nn

from stepfold.errors import UserError, first_line
from stepfold.teachers.layouts import Rows, original_layers
from stepfold.teachers.lora_files import ENCODERS, NETWORK, Layer, LoraFile, read_lora

PREFIXES = {
    "lora_unet_": "",
    "lora_transformer_": "",
    "lycoris_": "",
    "diffusion_model.": "",
    "base_model.model.": "",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
"""How the name of a layer begins in a file -> the part that it is of; the pipeline's network where that is empty."""
OTHER = "give one that was made for this teacher"


@dataclass(frozen=True)
class Place:
    """Where rows of a layer of a file belong.

    Attributes:
        part: of the pipeline.
        module: its name in there.
        rows: of the module's weight [N].
        of_layer: those of the file's layer [N].
    """

    part: str
    module: str
    rows: Tensor
    of_layer: Tensor


@torch.no_grad()
def merge_lora(
    pipe: Any, source: str, scale: float, read_text_encoders: Callable[[], None], network: str | None = None
) -> bool:
    """Merges a LoRA into a pipeline's weights: W + scale x (what the file makes of W - W).

    Which is scale x alpha / rank x up x down, unless the file has magnitudes (DoRA, arXiv:2402.09353, Eq. (5)): then
    the rows of W + alpha / rank x up x down get those for their norms. Computed in float32, rounded once.

    Args:
        pipe: the pipeline.
        source: file, folder or hub id.
        scale: 1 for the file's own strength.
        read_text_encoders: called where the LoRA changes them; the pipeline may have been loaded without.
        network: the part that stands for the network, of a pipeline with several; None for the usual one.

    Returns:
        Whether plain diffusers merges it to the same: `LoraFile.in_diffusers`, and `read_alike` of its names.

    Raises:
        UserError: it does not load, or does not fit.
    """
    lora = read_lora(source)
    layers, parts, places = located(pipe, source, lora, read_text_encoders, network)
    alike = lora.in_diffusers and (network is not None or read_alike(pipe, source, layers, parts, places))
    for layer in layers:
        for place in places[layer.name]:
            module: Any = parts[place.part].get_submodule(place.module)
            try:
                if "weight" in layer.changes:
                    add(module.weight, place, scale, lambda rows, at=place, of=layer: merged_rows(lora, of, at, rows))
                if "bias" in layer.changes:
                    shift = layer.tensors["diff_b"][place.of_layer, None]
                    add(module.bias, place, scale, lambda rows, by=shift: rows + by.to(rows))
            except (ValueError, RuntimeError) as error:
                reason, _, fix = first_line(error).partition("; ")
                raise UserError(f"LoRA {source!r}, layer {layer.name}: {reason}; {fix or OTHER}") from None
    return alike


def read_alike(
    pipe: Any, source: str, layers: list[Layer], parts: Mapping[str, nn.Module], places: Mapping[str, list[Place]]
) -> bool:
    """Whether diffusers finds the places of a network's layers by the names in the file, as `located` did.

    Some names are ours alone: kohya's of Stable Diffusion 3, or those of a few layers of a family. Layers of text
    encoders are not looked at.
    """
    layers = [layer for layer in layers if all(place.part in NETWORK for place in places[layer.name])]
    if not layers:
        return True
    try:
        theirs = places_in_diffusers(pipe, source, layers, parts)
    except UserError:
        return False

    def told(found: list[Place]) -> set[tuple[Any, ...]]:
        return {(p.part, p.module, *p.rows.tolist(), *p.of_layer.tolist()) for p in found}

    return all(told(theirs[layer.name]) == told(places[layer.name]) for layer in layers)


def located(
    pipe: Any, source: str, lora: LoraFile, read_text_encoders: Callable[[], None], network: str | None = None
) -> tuple[list[Layer], dict[str, nn.Module], dict[str, list[Place]]]:
    """A LoRA's layers that change something, the pipeline's parts, and layer -> where its rows belong in those.

    Arguments as of `merge_lora`.

    Raises:
        UserError: there is no such layer, or one has no place.
    """
    layers = [layer for layer in lora.layers if not layer.idle]
    if not layers:
        raise UserError(f"LoRA {source!r} changes nothing: all that it holds is zero; leave it out")
    if any("text_encoder" in layer.name or layer.name.startswith("lora_te") for layer in layers):
        read_text_encoders()
    names = {name: (network or name) if name in NETWORK else name for name in (*NETWORK, *ENCODERS)}
    found = {name: getattr(pipe, own, None) for name, own in names.items() if getattr(pipe, name, None) is not None}
    parts = {name: part for name, part in found.items() if isinstance(part, nn.Module)}
    places = direct_places(layers, parts)
    if strange := [layer for layer in layers if layer.name not in places]:
        places |= places_in_originals(strange, parts)
    if strange := [layer for layer in strange if layer.name not in places]:
        places |= places_in_diffusers(pipe, source, strange, parts)
    check_places(type(pipe).__name__, source, layers, places, parts)
    return layers, parts, places


def add(parameter: Tensor, place: Place, scale: float, merged: Callable[[Tensor], Tensor]) -> None:
    """Changes a place's rows of a parameter, by the scale's share of the way to what they are merged.

    Args:
        parameter: [O, ...], changed in place.
        place: which rows.
        scale: 1 for all of the way.
        merged: rows [N, I] in float32, or float64 -> those with the LoRA.

    Raises:
        ValueError: the result is not finite.
    """
    old = parameter[place.rows].to(torch.promote_types(parameter.dtype, torch.float32)).reshape(len(place.rows), -1)
    new = (old + scale * (merged(old) - old)).to(parameter.dtype)
    if not new.isfinite().all():
        raise ValueError("what it makes of the weights is not finite; give it a smaller scale, FILE:0.5")
    parameter[place.rows] = new.reshape(-1, *parameter.shape[1:])


def merged_rows(lora: LoraFile, layer: Layer, place: Place, rows: Tensor) -> Tensor:
    """What the file makes of some rows of a weight [N, I].

    Raises:
        ValueError: the shapes do not go together, or magnitudes are of columns of which the rows are a part.
    """
    scaling = lora.scaling(layer, place.part, place.module) if "down" in layer.tensors else 0.0
    gain = layer.gain(scaling, rows.dtype)
    if gain.shape[1] != rows.shape[1]:
        raise ValueError(f"its weight is {list(gain.shape)}, the teacher's has {rows.shape[1]} columns; {OTHER}")
    merged = rows + gain.to(rows.device)[place.of_layer]
    if "magnitude" not in layer.tensors:
        return merged
    magnitude = layer.tensors["magnitude"].to(rows)
    of_columns = magnitude.ndim > 1 and magnitude.shape[0] == 1 != layer.out and "dora_scale" in layer.keys["magnitude"]
    if not of_columns and magnitude.numel() == layer.out:
        return magnitude.flatten()[place.of_layer, None] * merged / merged.norm(dim=1, keepdim=True)
    if of_columns and len(rows) == layer.out and magnitude.shape[1] == layer.tensors["down"].shape[1]:
        by_column = merged.reshape(len(rows), magnitude.shape[1], -1)
        norm = by_column.norm(dim=(0, 2), keepdim=True)
        return (magnitude.reshape(1, -1, 1) * by_column / norm).reshape(merged.shape)
    raise ValueError(f"its magnitudes {list(magnitude.shape)} are neither of the rows nor of the columns; {OTHER}")


def part_of(name: str, parts: Mapping[str, nn.Module]) -> tuple[str, str]:
    """The part that a layer's name in a file says, and the rest of the name."""
    network = next(part for part in NETWORK if part in parts)
    while prefix := next((each for each in PREFIXES if name.startswith(each)), None):
        name, part = name.removeprefix(prefix), PREFIXES[prefix]
        if prefix != "base_model.model.":
            return part or network, name
    first, _, rest = name.partition(".")
    return (first, rest) if first in (*NETWORK, *ENCODERS) else (network, name)


def modules_of(network: nn.Module) -> dict[str, str | None]:
    """Names of modules with weights as files may have them -> their names; None for two modules of one name.

    kohya's names have `_` for every dot, and `text_model` comes and goes with the version of transformers.
    """
    found: dict[str, str | None] = {}
    for name, module in network.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            for spelling in (name, f"text_model.{name}", name.removeprefix("text_model.")):
                for key in {spelling, spelling.replace(".", "_")}:
                    found[key] = name if found.get(key, name) == name else None
    return found


def direct_places(layers: list[Layer], parts: Mapping[str, nn.Module]) -> dict[str, list[Place]]:
    """Layer -> its place, for parts of which all layers go by the teacher's own names.

    Of another part none has a place here, since some names mean two things: the third norm of a block of Wan in its
    authors' code is the second in diffusers'.
    """
    known = {part: modules_of(network) for part, network in parts.items()}
    found = {layer: part_of(layer.name, parts) for layer in layers}
    modules = {layer: (part, known.get(part, {}).get(name)) for layer, (part, name) in found.items()}
    strange = {part for part, module in modules.values() if module is None}
    return {
        layer.name: [Place(part, module, torch.arange(layer.out), torch.arange(layer.out))]
        for layer, (part, module) in modules.items()
        if module is not None and part not in strange
    }


def places_in_originals(layers: list[Layer], parts: Mapping[str, nn.Module]) -> dict[str, list[Place]]:
    """Layer -> its places, where all layers of the network go by its authors' names, with `.` or with kohya's `_`.

    diffusers converts those of some families alone, and of whole blocks.
    """
    part = next(part for part in NETWORK if part in parts)
    names = {layer.name: name for layer in layers for where, name in [part_of(layer.name, parts)] if where == part}
    try:
        known = original_layers(parts[part])
    except UserError:  # a class without a table
        return {}
    known |= {name.replace(".", "_"): rows for name, rows in known.items()}
    if not set(names.values()) <= known.keys():
        return {}
    return {layer: places_of_rows(part, known[name]) for layer, name in names.items()}


def places_of_rows(part: str, rows: Rows) -> list[Place]:
    """The places of an original layer's pieces, one below the other."""
    places, first = [], 0
    for _, (module, piece) in sorted(rows.items()):
        own = torch.arange(piece.start, piece.stop)
        places.append(Place(part, module, own, torch.arange(first, first + len(own))))
        first += len(own)
    return places


def places_in_diffusers(
    pipe: Any, source: str, layers: list[Layer], parts: Mapping[str, nn.Module]
) -> dict[str, list[Place]]:
    """Layer -> where its rows belong, by diffusers' own conversion of names.

    It converts matrices of rank 1 that say which they are: every down is filled with its layer's number, every up
    holds the numbers of its rows, both from 1. So what it splits, repeats, permutes or leaves out can be read from
    what comes out.
    """
    probes: dict[str, Tensor] = {}
    alphas = {layer.keys["alpha"]: torch.ones((), dtype=torch.float64) for layer in layers if "alpha" in layer.keys}
    for i, layer in enumerate(layers):
        if "down" in layer.keys:
            down, up = layer.tensors["down"], layer.tensors["up"]
            probes[layer.keys["down"]] = torch.full((1, *down.shape[1:]), float(i + 1), dtype=torch.float64)
            numbers = torch.arange(1, len(up) + 1, dtype=torch.float64)
            probes[layer.keys["up"]] = numbers.reshape(-1, *[1] * (up.ndim - 1))
    network = next(part for part in NETWORK if part in parts)
    options = {"unet_config": pipe.unet.config} if network == "unet" else {}
    try:
        try:
            found = pipe.lora_state_dict(dict(probes), **options)
        except KeyError:  # some of its conversions want an alpha beside each pair
            found = pipe.lora_state_dict(probes | alphas, **options)
    except Exception:  # it raises whatever it stumbles over
        raise UserError(
            f"LoRA {source!r} does not fit: diffusers does not know the names of its layers, such as {layers[0].name}; "
            f"{OTHER}, in the names of diffusers or kohya's scripts"
        ) from None
    state: dict[str, Tensor] = found[0] if isinstance(found, tuple) else found
    places: dict[str, list[Place]] = {layer.name: [] for layer in layers}
    for part, part_network in parts.items():
        known = modules_of(part_network)
        inner = {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}
        converted = in_peft_names(inner, part)
        for key, down in converted.items():
            module = known.get(key.removesuffix(".lora_A.weight")) if key.endswith(".lora_A.weight") else None
            up = converted.get(key.replace(".lora_A.", ".lora_B."))
            if module is not None and up is not None:
                for name, place in places_of(layers, part, module, down, up):
                    places[name].append(place)
    return places


def in_peft_names(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Names that diffusers' conversion has ended in, as MODULE.lora_A.weight and MODULE.lora_B.weight."""
    if not state or all(".lora_A." in key or ".lora_B." in key for key in state):
        return state
    if part in NETWORK:
        return convert_unet_state_dict_to_peft(state)
    return convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))


def places_of(layers: list[Layer], part: str, module: str, down: Tensor, up: Tensor) -> list[tuple[str, Place]]:
    """The places that a converted pair of probes tells of, one for each layer in it."""
    found = []
    for row, column in zip(down.flatten(1), up.flatten(1).T, strict=True):
        number = int(row[0])
        if 1 <= number <= len(layers) and bool((row == number).all()):
            rows = column.nonzero().flatten()
            found.append((layers[number - 1].name, Place(part, module, rows, column[rows].long() - 1)))
    return found


def check_places(
    pipeline: str, source: str, layers: list[Layer], places: Mapping[str, list[Place]], parts: Mapping[str, nn.Module]
) -> None:
    """Refuses a LoRA of which a row has no place, or more than one, or one in a module of another shape.

    Raises:
        UserError: naming the first such layer.
    """

    def fits(layer: Layer) -> bool:
        rows = sorted(row for place in places[layer.name] for row in place.of_layer.tolist())
        return rows == list(range(layer.out)) and all(
            (parameter := getattr(parts[place.part].get_submodule(place.module), name, None)) is not None
            and (len(places[layer.name]) > 1 or len(parameter) == layer.out)
            and int(place.rows.max()) < len(parameter)
            for place in places[layer.name]
            for name in layer.changes
        )

    if lost := [layer.name for layer in layers if not fits(layer)]:
        raise UserError(
            f"LoRA {source!r} does not fit: {pipeline} has no place for {len(lost)} of its {len(layers)} layers, such "
            f"as {lost[0]}; {OTHER}, or a copy without those"
        )
