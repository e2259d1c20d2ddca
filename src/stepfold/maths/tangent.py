"""The total derivative of a network along a trajectory: one meaning, several backends."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepfold.errors import UserError
from stepfold.maths.attention import ChunkedAttention
from stepfold.maths.formulations import unsqueeze_like
from stepfold.maths.one_pass import one_pass

Network = Callable[[Tensor, Tensor], Tensor]
"""(x_unit [B, ...], t [B]) -> F [B, ...]: a closure over a module, its condition and its guidance scale."""

BACKENDS = ("two_pass", "one_pass", "block", "finite_difference")
COARSEST = 1e-6  # rounding error of forwards that a finite difference survives: float32's is 1.2e-7, float16's 1e-3


@dataclass(frozen=True)
class Tangent:
    """A network's output and its directional derivative.

    Attributes:
        F: [B, ...], with a graph to the parameters where gradients are enabled.
        dF: [B, ...], the derivative of F along exactly the direction that was given; never carries a graph.
    """

    F: Tensor
    dF: Tensor


def total_derivative(
    network: Network,
    x: Tensor,
    t: Tensor,
    dx: Tensor,
    dt: Tensor,
    backend: str = "two_pass",
    step: float | None = None,
    *,
    low: Tensor | float = 0.0,
    high: Tensor | float = math.pi / 2,
) -> Tangent:
    """F and its derivative along (dx, dt) at (x, t): dF = (dF/dx) dx + (dF/dt) dt, per sample.

    For the consistency objective dx = cos t sin t dxdt / sigma_data and dt = cos t sin t; dF then holds that factor.

    Args:
        network: see `Network`.
        x: x / sigma_data [B, ...].
        t: [B], in [0, pi/2].
        dx: [B, ...], dtype of x.
        dt: [B], dtype of t.
        backend: `two_pass` (forward-mode differentiation in a pass of its own, exact), `one_pass` (the same beside the
            forward itself, exact, cheaper; see `one_pass.py`), `block` (the same with a network that checkpoints its
            blocks, see `Student.recompute_blocks`: the backward pass computes each block's forward again, and no
            tangent) or `finite_difference` (forwards only, second order).
        step: of `finite_difference`, see there, like low and high.
        low: [B].
        high: [B].

    Returns:
        See `Tangent`.

    Raises:
        UserError: unknown backend, or what the backend refuses (see each, and docs/tangents.md).
    """
    if backend == "two_pass":
        return two_pass(network, x, t, dx, dt)
    if backend in ("one_pass", "block"):
        return Tangent(*one_pass(network, x, t, dx, dt))
    if backend == "finite_difference":
        return finite_difference(network, x, t, dx, dt, step, low=low, high=high)
    raise UserError(f"unknown tangent backend {backend!r}; use one of {', '.join(BACKENDS)}")


def two_pass(network: Network, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> Tangent:
    """Forward-mode differentiation in a pass of its own without a graph, then one ordinary forward with one.

    Fused attention kernels have no forward-mode rule, so the first pass uses torch's unfused one, on a chunk of queries
    at a time; the second is free. Compiled parts run uncompiled in the first: no compiled code is differentiated.
    """
    uncompiled = torch.compiler.set_stance("force_eager")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), ChunkedAttention(), uncompiled:
        dF = torch.func.jvp(network, (x, t), (dx, dt))[1]
    return Tangent(F=network(x, t), dF=dF.detach())


def finite_difference(
    network: Network,
    x: Tensor,
    t: Tensor,
    dx: Tensor,
    dt: Tensor,
    step: float | None = None,
    *,
    low: Tensor | float = 0.0,
    high: Tensor | float = math.pi / 2,
) -> Tangent:
    """Central difference along (dx, dt), scaled so that the time moves by `step` either way; three plain forwards.

    Both points stay within [low, high]: nearer than `step` to an end the move is shortened to the distance. There dt =
    cos t sin t falls in proportion, so the shorter move costs no accuracy. Where the time cannot move (dt = 0, or t at
    an end) the direction is multiplied by `step` itself.

    Second order where the network is smooth. Across the kinks of ReLU (Sana's linear attention has them) it is first
    order at best, so prefer a small step there.

    Args:
        network: as in `total_derivative`, like x, t, dx and dt.
        x: [B, ...].
        t: [B].
        dx: [B, ...].
        dt: [B].
        step: change of time, in radians; by default the cube root of the rounding error of x's dtype (float32: 5e-3),
            which balances rounding and truncation.
        low: lowest time [B]; of a flow map, whose jump has no meaning from below its target, the target.
        high: highest time [B].

    Raises:
        UserError: a step that is not positive, or forwards in half precision, whose rounding swamps the difference.
    """
    kind = x.device.type
    forwards = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if torch.finfo(forwards).eps > COARSEST:
        name = str(forwards).removeprefix("torch.")
        raise UserError(
            f"the finite_difference tangent needs forwards in float32, since rounding in {name} swamps the difference; "
            "use training.precision=no, or training.tangent=two_pass"
        )
    if step is None:
        step = float(torch.finfo(x.dtype).eps ** (1 / 3))
    if not (math.isfinite(step) and step > 0):
        raise UserError(f"the finite-difference step is {step}, but it must be positive; leave it out for the default")
    move = torch.minimum(t - low, high - t).clamp(min=0, max=step)
    movable = (move > 0) & (dt.abs() > torch.finfo(dt.dtype).tiny)
    scale = torch.where(movable, move / torch.where(movable, dt.abs(), 1), step)
    offset_x, offset_t = unsqueeze_like(scale, x) * dx, scale * dt
    with torch.no_grad():
        difference = network(x + offset_x, t + offset_t) - network(x - offset_x, t - offset_t)
    return Tangent(F=network(x, t), dF=difference / unsqueeze_like(2 * scale, difference))
