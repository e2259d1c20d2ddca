"""The tangent of one operation: rules by its name, and torch's own differentiation for what has none."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakTensorKeyDictionary

from stepfold.errors import UserError
from stepfold.maths.attention import query_chunks

aten = torch.ops.aten
Tangents = WeakTensorKeyDictionary
Rule = Callable[..., Tensor | None]
"""(call, output) -> the output's tangent."""


class Call:
    """One intercepted operation.

    Attributes:
        func, args, kwargs: as the model called it.
        name: of the operation, without underscores; `rsub` for the reflected `-`, and so on.
    """

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tangents: Tangents) -> None:
        self.func, self.args, self.kwargs, self._tangents = func, args, kwargs, tangents
        plain = getattr(func, "__name__", "")
        if plain == "__get__":  # an attribute: `T` counts, `shape` does not
            plain = func.__self__.__name__
        self.name = plain.strip("_")
        in_place = plain in _IN_PLACE or (plain.endswith("_") and not plain.endswith("__"))
        self.changes_its_input = in_place or bool(kwargs.get("inplace"))
        self.is_dual = self.name not in _CONSTANT and any(value in tangents for value in self._tensors())

    def _tensors(self) -> Iterable[Tensor]:
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, list | tuple):
                yield from (part for part in value if isinstance(part, Tensor))

    def of(self, value: Any) -> Tensor | None:
        """The tangent of an argument, if it has one."""
        return self._tangents.get(value) if isinstance(value, Tensor) else None

    def option(self, position: int, name: str, default: Any) -> Any:
        """An argument by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def tangent(self, out: Any) -> Any:
        """The tangent of the output, by rule or by torch."""
        first = self.of(self.args[0]) if self.args else None
        if self.name in _LINEAR_IN_FIRST and first is not None and self._only_first():
            return self.func(first, *self.args[1:], **self.kwargs)
        rule = _RULES.get(self.name)
        found = rule(self, out) if rule else NotImplemented
        return self._by_torch() if found is NotImplemented else found

    def _only_first(self) -> bool:
        return sum(value in self._tangents for value in self._tensors()) == 1

    def _by_torch(self) -> Any:
        """Forward-mode differentiation of this one operation; fused attention has none, so not there."""
        primals: list[Tensor] = []
        tangents: list[Any] = []

        def number(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)([number(part) for part in value])
            if self.of(value) is None:
                return value.detach() if isinstance(value, Tensor) else value
            primals.append(value.detach())
            tangents.append(self.of(value))
            return _Place(len(primals) - 1)

        def fill(value: Any, duals: tuple[Tensor, ...]) -> Any:
            if isinstance(value, list | tuple):
                return type(value)([fill(part, duals) for part in value])
            return duals[value.index] if isinstance(value, _Place) else value

        args, kwargs = number(list(self.args)), {key: number(value) for key, value in self.kwargs.items()}

        def operation(*duals: Tensor) -> Any:
            return self.func(*fill(args, duals), **{key: fill(value, duals) for key, value in kwargs.items()})

        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(operation, tuple(primals), tuple(tangents), strict=False)[1]


class _Place:
    """Where a dual argument stood."""

    def __init__(self, index: int) -> None:
        self.index = index


def _add(sign: int) -> Rule:
    def rule(call: Call, out: Tensor) -> Any:
        a, b = (call.of(value) for value in _both(call))
        return _sum(out, a, None if b is None else sign * call.kwargs.get("alpha", 1) * b)

    return rule


def _rsub(call: Call, out: Tensor) -> Any:
    a, b = (call.of(value) for value in _both(call))
    return _sum(out, None if a is None else -a, b)


def _product(operation: Callable[[Any, Any], Tensor]) -> Rule:
    def rule(call: Call, out: Tensor) -> Any:
        a, b = _both(call)
        da, db = call.of(a), call.of(b)
        return _sum(
            out,
            None if da is None else operation(da, b),
            None if db is None else operation(a, db),
        )

    return rule


def _mul(call: Call, out: Tensor) -> Any:
    a, b = _both(call)
    da, db = call.of(a), call.of(b)
    if da is None or db is None:
        return _sum(out, b * da if db is None else a * db)
    return torch.addcmul(da * b, a, db)


def _div(call: Call, out: Tensor) -> Any:
    if call.kwargs.get("rounding_mode"):
        return NotImplemented
    a, b = _both(call)
    da, db = call.of(a), call.of(b)
    if db is None:
        return _sum(out, da / b)
    return (-out * db if da is None else torch.addcmul(da, out, db, value=-1)) / b


def _linear(call: Call, out: Tensor) -> Any:
    x, weight = call.option(0, "input", None), call.option(1, "weight", None)
    if call.of(x) is None or call.of(weight) is not None or call.of(call.option(2, "bias", None)) is not None:
        return NotImplemented
    return F.linear(call.of(x), weight)  # type: ignore[arg-type]


def _convolution(call: Call, out: Tensor) -> Any:
    weight = call.option(1, "weight", None)
    if len(call.args) < 1 or call.of(call.args[0]) is None or call.of(weight) is not None:
        return NotImplemented
    args = [call.of(call.args[0]), weight, None, *call.args[3:]]
    kwargs = {key: value for key, value in call.kwargs.items() if key not in ("weight", "bias")}
    return call.func(*args, **kwargs)


def _pad(call: Call, out: Tensor) -> Any:
    """A constant border has tangent 0, whatever the constant."""
    tangent = call.of(call.option(0, "input", None))
    return F.pad(tangent, call.option(1, "pad", None), call.option(2, "mode", "constant"))  # type: ignore[arg-type]


def _joined(call: Call, out: Tensor) -> Any:
    parts = call.option(0, "tensors", ())
    tangents = [torch.zeros_like(part) if call.of(part) is None else call.of(part) for part in parts]
    return call.func(tangents, *call.args[1:], **{key: v for key, v in call.kwargs.items() if key != "tensors"})


def _where(call: Call, out: Tensor) -> Any:
    if len(call.args) != 3 or call.kwargs:
        return NotImplemented
    condition, *sides = call.args
    zero = torch.zeros((), dtype=out.dtype, device=out.device)
    return torch.where(condition, *(zero if call.of(side) is None else call.of(side) for side in sides))  # type: ignore[arg-type]


def _dropout(call: Call, out: Tensor) -> Any:
    if call.option(2, "training", True) and call.option(1, "p", 0.5) > 0:
        raise UserError("the one_pass tangent cannot follow a dropout that is on; use training.tangent=two_pass")
    return call.of(call.option(0, "input", None))


def _elementwise(tangent: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Rule:
    """Of a function of one tensor; `tangent` takes the input's tangent, the input and the output.

    Element by element a derivative is the same in both directions: torch's own kernel of the backward pass, given the
    input's tangent for a gradient, is the output's tangent, in one operation.
    """

    def rule(call: Call, out: Tensor) -> Any:
        x = call.option(0, "input", None)
        return tangent(call.of(x), x, out)  # type: ignore[arg-type]

    return rule


def _gelu(call: Call, out: Tensor) -> Any:
    x = call.option(0, "input", None)
    return aten.gelu_backward(call.of(x), x, approximate=call.option(1, "approximate", "none"))


def _twice(dx: Tensor, x: Tensor) -> Tensor:
    """2 x dx, the tangent of a square, in one operation."""
    return torch.addcmul(dx.new_zeros(()), dx, x, value=2)


def _pow(call: Call, out: Tensor) -> Any:
    x, exponent = call.option(0, "input", None), call.option(1, "exponent", None)
    if isinstance(exponent, Tensor) or not isinstance(x, Tensor):
        return NotImplemented
    return _twice(call.of(x), x) if exponent == 2 else call.of(x) * exponent * x ** (exponent - 1)  # type: ignore[arg-type]


def _layer_norm(call: Call, out: Tensor) -> Any:
    """(dx - mean dx - n mean(n dx)) / deviation, with n the normalised input, times the weight.

    As a matrix that is symmetric, so the kernel of the backward pass is the tangent's.
    """
    x, shape = call.option(0, "input", None), call.option(1, "normalized_shape", None)
    weight, eps = call.option(2, "weight", None), call.option(4, "eps", 1e-5)
    if any(call.of(value) is not None for value in (weight, call.option(3, "bias", None))):
        return NotImplemented
    wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    value, dx = x.to(wide), call.of(x).to(wide)  # type: ignore[union-attr]
    _, mean, inverse = torch.native_layer_norm(value, shape, None, None, eps)
    only_input = [True, False, False]
    tangent = aten.native_layer_norm_backward(dx, value, shape, mean, inverse, None, None, only_input)[0]
    return tangent if weight is None else tangent * weight


def _attention(call: Call, out: Tensor) -> Any:
    """dO = P (dS - sum_k P dS) V + P dV with P = softmax(S), S = scale Q K^T + mask; a chunk of queries at a time.

    The primal's own attention stays fused.
    """
    q, k, v = (call.option(i, name, None) for i, name in enumerate(("query", "key", "value")))
    mask, causal = call.option(3, "attn_mask", None), call.option(5, "is_causal", False)
    if causal or call.option(4, "dropout_p", 0.0) or call.kwargs.get("enable_gqa") or call.of(mask) is not None:
        return NotImplemented
    scale = call.kwargs.get("scale") or q.shape[-1] ** -0.5
    dq, dk, dv = (call.of(value) for value in (q, k, v))
    parts = []
    for span, part in query_chunks(q.shape[-2], mask):
        scores = scale * q[..., span, :] @ k.mT
        if part is not None:
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
        weights = scores.softmax(-1)
        if part is not None and part.dtype == torch.bool:  # a query that attends to nothing gives zero, not 0 / 0
            weights = weights.masked_fill(~part.any(-1, keepdim=True), 0.0)
        slope = _sum(
            scores,
            None if dq is None else scale * dq[..., span, :] @ k.mT,
            None if dk is None else scale * q[..., span, :] @ dk.mT,
        )
        moved = weights * slope if dq is not None or dk is not None else None
        if moved is not None:
            moved = (moved - weights * moved.sum(-1, keepdim=True)) @ v
        parts.append(_sum(out[..., span, :], moved, None if dv is None else weights @ dv))
    return torch.cat(parts, dim=-2)


def _both(call: Call) -> tuple[Any, Any]:
    """The two operands of an operation, however they were given."""
    return call.option(0, "input", None), call.option(1, "mat2" if call.name == "bmm" else "other", None)


def _sum(like: Tensor, *terms: Tensor | None) -> Tensor:
    """The sum of those that are there, of the output's shape."""
    found = [term for term in terms if term is not None]
    total = found[0]
    for term in found[1:]:
        total = total + term
    return total if total.shape == like.shape else total.expand(like.shape)


_IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__imatmul__"}

_CONSTANT = {
    "detach", "shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "is_leaf", "grad_fn", "size",
    "dim", "numel", "stride", "is_floating_point", "is_contiguous", "eq", "ne", "lt", "le", "gt", "ge", "isfinite",
    "isnan", "zeros_like", "ones_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones", "argmax",
    "argmin", "argsort", "bool", "long", "int", "item", "tolist", "len", "data_ptr", "element_size", "new_tensor",
}  # fmt: skip
"""Names whose results have no tangent; `detach` is what the model itself asks for."""

_LINEAR_IN_FIRST = {
    "T", "mT", "reshape", "view", "view_as", "permute", "transpose", "swapaxes", "movedim", "flatten", "unflatten",
    "chunk", "split", "tensor_split", "unbind", "getitem", "expand", "expand_as", "repeat", "repeat_interleave", "tile",
    "unsqueeze", "squeeze", "contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16", "clone",
    "mean", "sum", "neg", "roll", "flip", "narrow", "select", "index_select", "gather", "cumsum", "pixel_shuffle",
    "pixel_unshuffle", "avg_pool2d", "adaptive_avg_pool2d", "alias", "positive", "broadcast_to", "diagonal",
}  # fmt: skip
"""Operations that are linear in their first argument when nothing else has a tangent."""

_RULES: dict[str, Rule] = {
    "add": _add(1), "radd": _add(1), "sub": _add(-1), "subtract": _add(-1), "rsub": _rsub,
    "mul": _mul, "multiply": _mul, "rmul": _mul,
    "div": _div, "truediv": _div, "divide": _div,
    "matmul": _product(torch.matmul), "bmm": _product(torch.bmm),
    "linear": _linear, "conv1d": _convolution, "conv2d": _convolution, "conv3d": _convolution,
    "pad": _pad, "cat": _joined, "concat": _joined, "concatenate": _joined, "stack": _joined, "where": _where,
    "dropout": _dropout, "gelu": _gelu,
    "silu": _elementwise(lambda dx, x, _: aten.silu_backward(dx, x)),
    "relu": _elementwise(lambda dx, _, out: aten.threshold_backward(dx, out, 0)),
    "sigmoid": _elementwise(lambda dx, _, out: aten.sigmoid_backward(dx, out)),
    "tanh": _elementwise(lambda dx, _, out: aten.tanh_backward(dx, out)),
    "pow": _pow, "square": _elementwise(lambda dx, x, _: _twice(dx, x)),
    "exp": _elementwise(lambda dx, _, out: dx * out), "sin": _elementwise(lambda dx, x, _: dx * x.cos()),
    "cos": _elementwise(lambda dx, x, _: -dx * x.sin()), "sqrt": _elementwise(lambda dx, _, out: 0.5 * dx / out),
    "rsqrt": _elementwise(lambda dx, x, out: -0.5 * dx * out / x), "layer_norm": _layer_norm,
    "scaled_dot_product_attention": _attention,
}  # fmt: skip
