"""A LoRA's matrices under the names of other tools, from the tables of single files."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepfold.errors import UserError
from stepfold.export.comfyui import Keys
from stepfold.teachers.layouts import Rows, original_layers
from stepfold.teachers.lora_files import ENCODERS

CLIP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
"""Ends of the names of a CLIP text encoder's layers that kohya's scripts train and ComfyUI knows."""


def renamed(weights: Mapping[str, Tensor], network: Any, part: str, keys: Keys) -> dict[str, Tensor]:
    """A LoRA in diffusers' names under those of another tool.

    Layers that the original has in one, such as q, k and v, get one pair of matrices: down one below the other, up in
    the blocks of a diagonal. Their product is the same.

    Args:
        weights: PART.LAYER.lora_A.weight [R, I, ...] and PART.LAYER.lora_B.weight [O, R, ...], at scale 1.
        network: the network that they are for; its tensors may be on the meta device.
        part: of the pipeline, the network's name.
        keys: whose names.

    Raises:
        UserError: no names of this class of networks are known, or they have no place for one of the layers.
    """
    if keys in ("diffusers", "peft"):
        return dict(weights)
    down, up = (
        {
            name.removeprefix(f"{part}.").removesuffix(end): value
            for name, value in weights.items()
            if name.endswith(end)
        }
        for end in (".lora_A.weight", ".lora_B.weight")
    )
    if keys == "kohya" and is_first_unet(network):
        return dict(entry for layer in down for entry in in_kohya(layer, down[layer], up[layer]))
    found: dict[str, Tensor] = {}
    for whole, rows in originals(network, down).items():
        a, b = joined(rows, down, up)
        if keys == "kohya":
            found |= dict(in_kohya(whole, a, b))
        else:
            found |= {f"diffusion_model.{whole}.lora_A.weight": a, f"diffusion_model.{whole}.lora_B.weight": b}
    return found


def is_first_unet(network: Any) -> bool:
    """Whether it is a Stable Diffusion 1 or 2, whose layers kohya's scripts call by diffusers' names."""
    return type(network).__name__ == "UNet2DConditionModel" and network.config.addition_embed_type is None


def of_text_encoders(weights: Mapping[str, Tensor], pipe: Any, keys: Keys) -> dict[str, Tensor]:
    """A LoRA's matrices of CLIP text encoders under kohya's names, or those of diffusers that ComfyUI reads too.

    Both say `text_model`, which versions of transformers put into the names of modules or leave out.

    Args:
        weights: PART.LAYER.lora_A.weight [R, I] and PART.LAYER.lora_B.weight [O, R], at scale 1.
        pipe: the pipeline that has the text encoders.
        keys: whose names, kohya's or ComfyUI's.

    Raises:
        UserError: one of them is of a layer without such a name.
    """
    found: dict[str, Tensor] = {}
    single = getattr(pipe, "text_encoder_2", None) is None
    for name in (name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")):
        part, _, layer = name.partition(".")
        if not (type(getattr(pipe, part)).__name__.startswith("CLIPText") and layer.endswith(CLIP)):
            raise UserError(
                f"a LoRA of the teacher changes {name}, which has no name of --keys {keys} here; export with --keys "
                "diffusers, or load that LoRA beside the student"
            )
        layer = f"text_model.{layer.removeprefix('text_model.')}"
        down, up = weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]
        if keys == "kohya":
            prefix = "lora_te" if single else f"lora_te{ENCODERS.index(part) + 1}"
            found |= dict(in_kohya(layer, down, up, prefix))
        else:
            found |= {f"{part}.{layer}.lora_A.weight": down, f"{part}.{layer}.lora_B.weight": up}
    return found


def in_kohya(layer: str, down: Tensor, up: Tensor, prefix: str = "lora_unet") -> list[tuple[str, Tensor]]:
    """A layer's entries; the alpha is its rank, which stands for scale 1."""
    name = f"{prefix}_{layer.replace('.', '_')}"
    return [
        (f"{name}.lora_down.weight", down),
        (f"{name}.lora_up.weight", up),
        (f"{name}.alpha", torch.tensor(float(len(down)))),
    ]


def originals(network: Any, layers: Mapping[str, Tensor]) -> dict[str, Rows]:
    """The original layers that any of `layers` is of, each with all its pieces.

    Raises:
        UserError: as of `renamed`.
    """
    found, kind = original_layers(network), type(network).__name__
    there = {layer for rows in found.values() for layer, _ in rows.values()}
    if lost := [layer for layer in layers if layer not in there]:
        raise UserError(f"these names of a {kind} have no place for {lost[0]}; export with --keys diffusers")
    return {whole: rows for whole, rows in found.items() if any(layer in layers for layer, _ in rows.values())}


def joined(rows: Rows, down: Mapping[str, Tensor], up: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One pair of matrices for an original layer; pieces without a LoRA have rows of zeros."""
    pieces = [rows[place] for place in sorted(rows)]
    kept = list(dict.fromkeys(layer for layer, _ in pieces if layer in down))
    ends = [0, *torch.tensor([len(down[layer]) for layer in kept]).cumsum(0).tolist()]
    columns = {layer: slice(*ends[i : i + 2]) for i, layer in enumerate(kept)}
    first, blocks = up[kept[0]], []
    for layer, part in pieces:
        block = first.new_zeros(part.stop - part.start, ends[-1], *first.shape[2:])
        if layer in down:
            block[:, columns[layer]] = up[layer][part]
        blocks.append(block)
    return torch.cat([down[layer] for layer in kept]), torch.cat(blocks)
