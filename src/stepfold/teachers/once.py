"""What a frozen network computes of the prompt alone, computed once per prompt and not at every step of a walk."""

from collections.abc import Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

LAST = "_last_call"
"""Where a module keeps it."""


@dataclass(frozen=True)
class Last:
    """A module's last call without a gradient.

    Attributes:
        x: its input; held, so that no other tensor can take its place in memory.
        version: of the input then.
        autocast: whether autocast was on.
        out: what came out.
    """

    x: Tensor
    version: int
    autocast: bool
    out: Tensor

    def is_of(self, x: Tensor) -> bool:
        """Whether `x` is the very same memory, unchanged, under the same autocast."""
        same = (x.data_ptr(), x.shape, x.stride(), x.dtype) == (
            self.x.data_ptr(), self.x.shape, self.x.stride(), self.x.dtype,
        )  # fmt: skip
        return same and x._version == self.version and self.autocast == torch.is_autocast_enabled(x.device.type)


def compute_once(modules: Iterable[nn.Module]) -> None:
    """From now on each module, called with the tensor of its last call again, returns what it returned then.

    For frozen modules of one tensor, whose inputs come back call after call: a text encoder's output on its way through
    projections into the keys and values of cross-attention. Compiled code computes as before.
    """
    for module in modules:
        module.forward = MethodType(_forward_once, module)  # bound, so that a copied module has its own


def compute_afresh(modules: Iterable[nn.Module]) -> None:
    """Undoes `compute_once`, on copies of modules too."""
    for module in modules:
        module.__dict__.pop("forward", None)
        module.__dict__.pop(LAST, None)


def _forward_once(self: Any, x: Tensor, *rest: Any, **options: Any) -> Tensor:
    forward = type(self).forward
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or rest or options:
        return forward(self, x, *rest, **options)
    last: Last | None = self.__dict__.get(LAST)
    if last is None or not last.is_of(x):
        self.__dict__[LAST] = None  # its memory is free before the new output needs some
        last = Last(x, x._version, torch.is_autocast_enabled(x.device.type), forward(self, x))
        self.__dict__[LAST] = last
    return last.out


def forget(modules: Iterable[nn.Module]) -> None:
    """Lets go of what `compute_once` has them keep."""
    for module in modules:
        module.__dict__.pop(LAST, None)
