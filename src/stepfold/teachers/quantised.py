"""Linear layers of a frozen network in 8 or 4 bits a weight; each call multiplies them out, and keeps nothing of it.

Of the libraries, torchao has int8 and fp8 but no NF4, and bitsandbytes' NF4 has a tangent of zero, silently
(docs/lab-log.md). Here a layer is plain torch on every device: all tangent backends go through it.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

Quantised = Literal["none", "int8", "fp8", "nf4"]
BLOCK = 64
"""Weights with a scale of their own in NF4; the other kinds have a scale for each row."""
LARGEST = {"int8": 127.0, "fp8": 448.0}
"""The largest code of a kind, which stands for the largest weight of a row."""


def nf4_levels() -> Tensor:
    """The 16 levels of NF4 in [-1, 1]: even quantiles of a normal distribution, and 0 (arXiv:2305.14314, Eq. (4))."""
    last = 1 - (1 / 32 + 1 / 30) / 2
    above, below = (torch.special.ndtri(torch.linspace(last, 0.5, count, dtype=torch.float64))[:-1] for count in (9, 8))
    levels = torch.cat([-below, above.new_zeros(1), above]).sort().values
    return (levels / levels.max()).float()


@cache
def nf4_pairs(device: torch.device) -> Tensor:
    """The two levels [256, 2] of each byte, the high half's first; once on each device."""
    levels = nf4_levels()
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1).to(device)


def encoded(weight: Tensor, kind: Quantised) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight [O, I].

    Args:
        weight: on any device.
        kind: how; NF4 needs an even I.

    Returns:
        codes: uint8 [O, I], or [O, I / 2] of NF4, two a byte.
        scales: float32 [O, 1], or [O, I / block].
    """
    weight = weight.detach().float()
    if kind == "nf4":
        blocks = weight.unflatten(1, (-1, math.gcd(weight.shape[1], BLOCK)))
        scales = blocks.abs().amax(-1)
        levels = nf4_levels().to(weight.device)
        middles = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(blocks / scales.clamp(min=1e-30)[..., None], middles, out_int32=True).flatten(1)
        return (codes[:, ::2] * 16 + codes[:, 1::2]).to(torch.uint8), scales
    scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / LARGEST[kind]
    scaled = weight / scales
    codes = scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), scales


def decoded(codes: Tensor, scales: Tensor, kind: Quantised) -> Tensor:
    """The float32 weight [O, I] of `encoded`'s codes and scales."""
    if kind == "nf4":
        values = nn.functional.embedding(codes.int(), nf4_pairs(codes.device)).flatten(1)
        return (values.unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)
    return codes.view(torch.int8 if kind == "int8" else torch.float8_e4m3fn).float() * scales


class QuantisedLinear(nn.Linear):
    """A frozen linear layer; `weight` is multiplied out each time that it is asked for.

    Autograd keeps the codes alone: the backward pass multiplies them out again.
    """

    kind: Quantised
    codes: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear, kind: Quantised, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        """Takes a layer's sizes and its bias; codes and scales are those of `encoded`, the dtype is the weight's."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kind, self.dtype = kind, dtype
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = layer.bias

    @property
    def weight(self) -> Any:
        """[O, I], of the dtype that it had."""
        return self.multiplied_out(self.dtype)

    def multiplied_out(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] in a dtype."""
        return decoded(self.codes, self.scales, self.kind).to(dtype)

    @override
    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.dtype
        weight = self.multiplied_out(dtype)
        if not torch.is_grad_enabled():
            return nn.functional.linear(input, weight, self.bias)
        storage = weight.untyped_storage()._cdata

        def keep(value: Tensor) -> Any:
            own = value.untyped_storage()._cdata == storage
            return (value.size(), value.stride(), value.storage_offset()) if own else value

        def again(kept: Any) -> Tensor:
            return kept if isinstance(kept, Tensor) else self.multiplied_out(dtype).as_strided(*kept)

        with torch.autograd.graph.saved_tensors_hooks(keep, again):
            return nn.functional.linear(input, weight, self.bias)


def quantised_layer(layer: nn.Linear, kind: Quantised, device: torch.device | str) -> QuantisedLinear:
    """A layer with its weight quantised on a device, and its own bias."""
    return QuantisedLinear(layer, kind, *encoded(layer.weight.to(device), kind), layer.weight.dtype)


def quantise(
    network: nn.Module, kind: Quantised, blocks: Sequence[str], device: torch.device | str, columns: int = 2
) -> nn.Module:
    """The network with the linear layers of its blocks quantised; changed in place.

    Args:
        network: frozen.
        kind: how; `none` leaves it, and layers that are quantised already stay as they are.
        blocks: parts of the names of its blocks.
        device: where each layer goes, one after the other.
        columns: layers whose inputs are no multiple of it stay as they are.
    """
    layers = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear)
        and not isinstance(layer, QuantisedLinear)
        and any(part in name for part in blocks)
        and layer.in_features % columns == 0
    }
    for name, layer in layers.items() if kind != "none" else ():
        network.set_submodule(name, quantised_layer(layer, kind, device))
    return network
