"""Exports in half precision: merged in float32, rounded when they are written."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepfold.errors import UserError

Half = Literal["bfloat16", "float16"]


def rounded_tensor(name: str, value: Tensor, dtype: Half) -> Tensor:
    """The tensor in half precision.

    Raises:
        UserError: it has a number that is too large for float16.
    """
    rounded = value.to(getattr(torch, dtype))
    if not rounded.isfinite().all():
        raise UserError(f"{name} has a weight that {dtype} cannot hold; give --dtype bfloat16, or leave it out")
    return rounded


def rounded_file(weights: Mapping[str, Tensor], dtype: Half | None) -> dict[str, Tensor]:
    """The weights of a LoRA file with its matrices rounded; its alphas, which count ranks, stay. None rounds nothing.

    Raises:
        UserError: as of `rounded_tensor`.
    """
    if not dtype:
        return dict(weights)
    return {name: rounded_tensor(name, value, dtype) if value.ndim else value for name, value in weights.items()}


def round_weights(module: nn.Module, dtype: Half) -> None:
    """Rounds a network's parameters in place, one tensor at a time; those that its class keeps in float32 stay.

    Args:
        module: of diffusers or transformers.
        dtype: name of a torch dtype.

    Raises:
        UserError: a weight is too large for float16.
    """
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, parameter in module.named_parameters():
        if kept & set(name.split(".")) or not parameter.is_floating_point():
            continue
        parameter.data = rounded_tensor(name, parameter.data, dtype)


def rounded_parts(pipe: Any, dtype: Half) -> dict[str, nn.Module]:
    """The networks and text encoders of a pipeline, rounded in place; its autoencoder stays as it is."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module) and name != "vae"}
    for part in parts.values():
        round_weights(part, dtype)
    return parts
