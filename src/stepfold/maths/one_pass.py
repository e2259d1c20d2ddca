"""A forward pass that carries its own directional derivative beside it (the `one_pass` backend of `tangent.py`).

Every operation runs once, as written in the model, and autograd records it as in any forward. Beside it, outside the
graph, the derivative of the operation acts on the tangents of its inputs. Models are not changed: their operations are
intercepted. What has no rule here is differentiated by torch, at the price of computing it a second time.
"""

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from stepfold.errors import UserError
from stepfold.maths.blocks import CompiledBlock
from stepfold.maths.tangent_rules import Call

SWEEP_EVERY = 16
"""Operations between two looks for tangents that nothing can use any more."""


def _count_when_kept_by_graph() -> int | None:
    """What sys.getrefcount says of a tensor that the graph alone holds; None if this torch does not tell it apart."""
    with torch.enable_grad():
        held = torch.zeros(1, requires_grad=True) * 2
        graph, ref = held.sin(), weakref.ref(held)
        with_model = sys.getrefcount(ref())
        del held
        without = sys.getrefcount(ref())
    return without if graph.requires_grad and with_model == without + 1 else None


KEPT_BY_GRAPH = _count_when_kept_by_graph()


class Dual(TorchFunctionMode):
    """While active, outputs of operations on tensors that have a tangent get one too."""

    def __init__(self) -> None:
        super().__init__()
        self.tangents = WeakTensorKeyDictionary()
        self._filled = WeakTensorKeyDictionary()  # made without a tangent; parts of them were set to something with one
        self._until_sweep = SWEEP_EVERY

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `func` as it is, then its tangent."""
        kwargs = kwargs or {}
        call = Call(func, args, kwargs, self.tangents)
        if not call.is_dual:
            return func(*args, **kwargs)
        if isinstance(func, CompiledBlock):
            out, tangent = func.with_tangent(self.tangents, *args, **kwargs)
            self._remember(out, tangent)
            return out
        if call.name == "setitem" and self._fills(args[0]):
            func(*args)
            self._fill(*args)
            return None
        if call.changes_its_input:
            raise UserError(
                f"the one_pass tangent cannot follow {getattr(func, '__name__', func)}, which changes a tensor in "
                "place; use training.tangent=two_pass for this model"
            )
        if call.name == "iter":  # unpacking: `a, b = x`
            parts = args[0].unbind()
            self._remember(parts, call.of(args[0]).unbind())  # type: ignore[union-attr]
            return iter(parts)
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor | list | tuple):
            return out
        with torch.no_grad():
            self._remember(out, call.tangent(out))
        self._until_sweep -= 1
        if self._until_sweep == 0:
            self._sweep()
        return out

    def _fills(self, out: Tensor) -> bool:
        """Whether parts of `out` may be set: it is no view, and its tangent, if it has one, came of being filled."""
        return not out._is_view() and (out in self._filled or out not in self.tangents)

    @torch.no_grad()
    def _fill(self, out: Tensor, index: Any, value: Any) -> None:
        """The tangent of `out[index] = value`."""
        if out not in self._filled:
            self._filled[out], self.tangents[out] = True, torch.zeros_like(out)
        tangent = self.tangents.get(value) if isinstance(value, Tensor) else None
        self.tangents[out][index] = 0.0 if tangent is None else tangent

    def _sweep(self) -> None:
        """Forgets the tangents of tensors that the model has let go of and only autograd's graph still holds."""
        self._until_sweep = SWEEP_EVERY
        if KEPT_BY_GRAPH is not None:
            for ref in self.tangents.keyrefs():
                if sys.getrefcount(ref()) == KEPT_BY_GRAPH and ref()._use_count() > 1:
                    del self.tangents[ref()]

    def _remember(self, out: Any, tangent: Any) -> None:
        if isinstance(out, Tensor):
            if tangent is not None and (out.is_floating_point() or out.is_complex()):
                self.tangents[out] = tangent.to(out.dtype)
        elif isinstance(out, list | tuple) and tangent is not None:
            for part, its in zip(out, tangent, strict=True):
                self._remember(part, its)


def one_pass(
    network: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, dx: Tensor, dt: Tensor
) -> tuple[Tensor, Tensor]:
    """(F, dF): F with its graph, as of a plain call; dF without one.

    Args:
        network: see `tangent.Network`.
        x, t: where.
        dx, dt: the direction.

    A network that is compiled, or has compiled parts, runs as if it were not: compiled code would go past the mode. The
    blocks of `compiled_blocks` are the exception: each is one operation here, and brings its own tangent.

    Raises:
        UserError: it is called from compiled code; the network changes a tensor in place (but for filling a new one
            part by part), or draws random numbers in a dropout.
    """
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()  # so that the error is raised: what raises while traced is run again untraced
        raise UserError(
            "torch.compile cannot trace what the one_pass and block tangents intercept; compile the network's blocks, "
            "with stepfold.maths.blocks.compiled_blocks, and call the tangent from plain code"
        )
    dual = Dual()
    x, t = x.view_as(x), t.view_as(t)  # the caller's own tensors stay without tangents
    dual.tangents[x], dual.tangents[t] = dx, dt
    with torch.compiler.set_stance("force_eager"), dual:
        out = network(x, t)
    tangent = dual.tangents.get(out)
    return out, torch.zeros_like(out) if tangent is None else tangent.detach()
