import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from stepfold.errors import UserError
from stepfold.maths import attention
from stepfold.maths.attention import ChunkedAttention
from stepfold.maths.blocks import compiled_blocks
from stepfold.maths.closed_form import GaussianTeacher
from stepfold.maths.formulations import unsqueeze_like
from stepfold.maths.tangent import BACKENDS, Network, total_derivative

SIGMA_DATA = 0.5


class AttentionNet(nn.Module):
    """Tokens with fused attention; notes at each call whether fused kernels were allowed and a graph was recorded."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Linear(2, width), nn.Linear(width, 3 * width)
        self.out, self.time = nn.Linear(width, 2), nn.Linear(1, width)
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append((torch.backends.cuda.flash_sdp_enabled(), torch.is_grad_enabled()))
        h = torch.tanh(self.embed(x) + self.time(t[:, None])[:, None])
        q, k, v = self.qkv(h)[:, None].chunk(3, dim=-1)
        return self.out(h + nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])


def attention_case() -> tuple[AttentionNet, tuple[Tensor, Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    net = AttentionNet().double()
    x, dx = torch.randn(2, 4, 6, 2, dtype=torch.float64)
    t = torch.tensor([0.3, 0.7, 1.0, 1.4], dtype=torch.float64)
    return net, (x, t, dx, torch.tensor([0.5, -0.8, 1.0, 0.2], dtype=torch.float64))


def observed_orders(network: Network, inputs: tuple[Tensor, Tensor, Tensor, Tensor], steps: list[float]) -> list[float]:
    """Observed orders at which the finite difference approaches the exact tangent as its step halves."""
    exact = total_derivative(network, *inputs).dF
    errors = [
        (total_derivative(network, *inputs, backend="finite_difference", step=step).dF - exact).norm().item()
        for step in steps
    ]
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_derivative(backend):
    def network(x: Tensor, t: Tensor) -> Tensor:
        return x**2 * torch.sin(3 * unsqueeze_like(t, x))

    x, dxdt = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.linspace(0.1, 1.5, 5, dtype=torch.float64)
    dt = torch.tensor([1.0, -0.5, 0.2, 2.0, 1e-9], dtype=torch.float64)
    s, dx = t[:, None], dt[:, None] * dxdt
    expected = 2 * x * torch.sin(3 * s) * dx + 3 * x**2 * torch.cos(3 * s) * dt[:, None]
    tangent = total_derivative(network, x, t, dx, dt, backend=backend)
    torch.testing.assert_close(tangent.F, network(x, t))
    torch.testing.assert_close(tangent.dF, expected, rtol=1e-7, atol=1e-16)


def test_backends_agree_at_second_order():
    net, inputs = attention_case()
    orders = observed_orders(net, inputs, [0.04, 0.02, 0.01, 0.005])
    assert all(1.9 < order < 2.1 for order in orders), orders


def test_backends_agree_on_a_real_backbone():
    """In diffusers' Sana the time embedding and the linear attention run in float32, hence large steps for the order.

    The order shows along the time alone: along x the ReLUs of the attention switch, and only a small step agrees.
    """
    torch.manual_seed(0)
    sana = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=2, sample_size=4,
        num_cross_attention_heads=2, cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=6,
        qk_norm="rms_norm_across_heads",
    ).double()  # fmt: skip
    caption, mask = torch.randn(2, 5, 6, dtype=torch.float64), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    def network(x: Tensor, t: Tensor) -> Tensor:
        return sana(x, encoder_hidden_states=caption, encoder_attention_mask=mask, timestep=t, return_dict=False)[0]

    x, dx = torch.randn(2, 2, 4, 4, 4, dtype=torch.float64)
    t, dt = torch.tensor([0.5, 1.0], dtype=torch.float64), torch.tensor([0.42, 0.45], dtype=torch.float64)
    orders = observed_orders(network, (x, t, 0 * dx, dt), [0.2, 0.1, 0.05])
    assert all(1.8 < order < 2.2 for order in orders), orders
    exact = total_derivative(network, x, t, 0.4 * dx, dt)
    near = total_derivative(network, x, t, 0.4 * dx, dt, backend="finite_difference", step=0.001)
    assert (near.dF - exact.dF).norm() < 1e-3 * exact.dF.norm()
    exact.F.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in sana.parameters())


def test_fused_attention_is_off_inside_the_tangent_pass_only():
    net, inputs = attention_case()
    assert torch.backends.cuda.flash_sdp_enabled()
    total_derivative(net, *inputs)
    assert net.calls == [(False, False), (True, True)]
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_through_the_derivative(backend):
    net, inputs = attention_case()
    tangent = total_derivative(net, *inputs, backend=backend)
    assert (tangent.F.requires_grad, tangent.dF.requires_grad) == (True, False)
    (tangent.F * tangent.dF).sum().backward()
    mixed = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    x, t, _, _ = inputs
    (net(x, t) * tangent.dF).sum().backward()  # dF as a constant
    torch.testing.assert_close(mixed, [p.grad for p in net.parameters()], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert not total_derivative(net, *inputs, backend=backend).F.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_difference_is_safe_at_the_ends_and_stays_inside(dtype):
    times = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        times.append(t)
        return torch.sin(x + unsqueeze_like(t, x))

    t = torch.tensor([0.0, 1e-5, 1.5707, math.pi / 2 - 1e-7, math.pi / 2], dtype=dtype)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    dt = (t.cos() * t.sin()).clamp(min=0)
    dx = dt[:, None] * x
    exact = total_derivative(network, x, t, dx, dt)
    times.clear()
    near = total_derivative(network, x, t, dx, dt, backend="finite_difference")
    torch.testing.assert_close(near.dF, exact.dF, rtol=1e-3, atol=2e-6)
    slack = torch.finfo(dtype).eps
    assert all(((s >= 0) & (s <= math.pi / 2 + slack)).all() for s in times)
    still = total_derivative(network, x, t, dx, torch.zeros_like(t), backend="finite_difference")
    torch.testing.assert_close(still.dF, torch.cos(x + unsqueeze_like(t, x)) * dx, rtol=1e-3, atol=2e-4)


def gaussian_df_dt(error: float, backend: str) -> Tensor:
    """df/dt of a Gaussian teacher's exact consistency function along a velocity that is wrong by a factor 1 + error."""
    teacher = GaussianTeacher(torch.tensor(2.0).double(), torch.tensor(0.8).double(), SIGMA_DATA)
    t = torch.linspace(0.2, 1.5, 27, dtype=torch.float64)
    x = teacher.flow_map(
        SIGMA_DATA * torch.linspace(-2, 2, 27, dtype=torch.float64)[:, None], torch.full_like(t, math.pi / 2), t
    )
    dxdt = (1 + error) * teacher.velocity(x, t)
    cos, sin = t.cos()[:, None], t.sin()[:, None]
    network: Callable[[Tensor, Tensor], Tensor] = lambda x, t: teacher.F_of_consistency(SIGMA_DATA * x, t)  # noqa: E731
    tangent = total_derivative(
        network, x / SIGMA_DATA, t, cos * sin * dxdt / SIGMA_DATA, t.cos() * t.sin(), backend=backend
    )
    dFdt = tangent.dF / (cos * sin)
    return -sin * x + cos * dxdt - SIGMA_DATA * (cos * tangent.F + sin * dFdt)


@pytest.mark.parametrize(("backend", "tolerance"), [("two_pass", 1e-10), ("finite_difference", 1e-8)])
def test_the_exact_flow_map_does_not_move_along_its_trajectory(backend, tolerance):
    assert gaussian_df_dt(0.0, backend).abs().max() < tolerance
    assert gaussian_df_dt(0.01, backend).abs().max() > 1e-2


def test_impossible_values_are_refused():
    net, inputs = attention_case()
    with pytest.raises(UserError, match="two_pass, one_pass, block, finite_difference"):
        total_derivative(net, *inputs, backend="onepass")
    for step in (0.0, -1.0, math.nan):
        with pytest.raises(UserError):
            total_derivative(net, *inputs, backend="finite_difference", step=step)


def test_a_difference_that_rounding_swamps_is_refused():
    net, inputs = attention_case()
    narrow = tuple(value.bfloat16() for value in inputs)
    with pytest.raises(UserError, match=r"rounding in bfloat16 .*training.tangent=two_pass"):
        total_derivative(net.bfloat16(), *narrow, backend="finite_difference")
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        total_derivative(net.float(), *(value.float() for value in inputs), backend="finite_difference")


class LargestScores(TorchDispatchMode):
    """Notes the most elements that any softmax has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "softmax" in func.__name__:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("kind", ["none", "boolean", "added", "a row for all"])
def test_the_tangent_pass_never_holds_all_attention_scores(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, dx = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    t, dt = torch.rand(2, 4, dtype=torch.float64)
    masks = {"none": None, "boolean": torch.rand(4, 1, 7, 7) > 0.3, "added": torch.randn(4, 1, 7, 7).double()}
    mask = (masks | {"a row for all": torch.randn(4, 1, 1, 7).double()})[kind]
    if kind == "boolean":
        mask[..., 0] = True  # type: ignore[index]

    def network(x: Tensor, t: Tensor) -> Tensor:
        q, k, v = (x * t[:, None, None])[:, None].chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v, mask) + nn.functional.scaled_dot_product_attention(
            query=q.detach(), key=k, value=v, attn_mask=mask, scale=0.3
        )

    found, elements = [], []
    for chunk in (100, 3):
        monkeypatch.setattr(attention, "QUERY_CHUNK", chunk)
        with LargestScores() as largest, torch.no_grad():
            found.append(total_derivative(network, x, t, dx, dt))
        elements.append(largest.elements)
    torch.testing.assert_close(found[1].dF, found[0].dF, rtol=1e-12, atol=1e-15)
    assert elements[0] == 4 * 7 * 7 and found[0].dF.norm() > 0
    with LargestScores() as largest, torch.no_grad(), ChunkedAttention(), sdpa_kernel(SDPBackend.MATH):
        network(x, t)
    assert largest.elements == 4 * 3 * 7


class SelfAttention(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(h, 2 * h, h)


def test_attention_in_compiled_blocks_is_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """`two_pass` under training.compile: no more scores at once than without it."""
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "QUERY_CHUNK", 3)
    x, dx, t, dt = torch.randn(4, 7, 6), torch.randn(4, 7, 6), torch.rand(4), torch.rand(4)
    block, found, elements = SelfAttention(), [], []

    def network(x: Tensor, t: Tensor) -> Tensor:
        return block((x * t[:, None, None])[:, None])

    for compiling in (nullcontext(), compiled_blocks([block], backend="eager")):
        with compiling, LargestScores() as largest, torch.no_grad():
            found.append(total_derivative(network, x, t, dx, dt).dF)
        elements.append(largest.elements)
    torch.testing.assert_close(found[1], found[0])
    assert elements == [4 * 3 * 7] * 2


def test_attention_that_cannot_be_cut_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERY_CHUNK", 2)
    q = torch.randn(1, 1, 5, 4)
    whole = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    with ChunkedAttention():
        assert torch.equal(nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True), whole)
