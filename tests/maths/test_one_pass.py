"""The tangent carried beside a forward, against forward-mode differentiation in a pass of its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

from stepfold.errors import UserError
from stepfold.maths import attention
from stepfold.maths import one_pass as module
from stepfold.maths.tangent import Network, total_derivative

Case = tuple[nn.Module, Network, tuple[int, ...]]


def sana() -> Case:
    model: Any = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=4,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=6,
        qk_norm="rms_norm_across_heads", guidance_embeds=True,
    )  # fmt: skip
    caption, mask = torch.randn(2, 5, 6).double(), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    guidance = torch.tensor([0.4, 0.5]).double()

    def network(x: Tensor, t: Tensor) -> Tensor:
        return model(
            x, encoder_hidden_states=caption.to(x.dtype), encoder_attention_mask=mask, timestep=t,
            guidance=guidance.to(x.dtype), return_dict=False,
        )[0]  # fmt: skip

    return model, network, (4, 4, 4)


def sd3() -> Case:
    model: Any = SD3Transformer2DModel(
        sample_size=4, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=6, caption_projection_dim=16, pooled_projection_dim=5,
        pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    text, pooled = torch.randn(2, 5, 6).double(), torch.randn(2, 5).double()
    return (
        model,
        lambda x, t: model(
            hidden_states=x,
            encoder_hidden_states=text.to(x),
            pooled_projections=pooled.to(x),
            timestep=t,
            return_dict=False,
        )[0],
        (4, 4, 4),
    )  # fmt: skip


def flux() -> Case:
    model: Any = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=6, pooled_projection_dim=5, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    text, pooled = torch.randn(2, 5, 6).double(), torch.randn(2, 5).double()
    places, guidance = torch.rand(16, 3).double(), torch.tensor([3.5, 4.5]).double()
    return (
        model,
        lambda x, t: model(
            hidden_states=x, encoder_hidden_states=text.to(x), pooled_projections=pooled.to(x), timestep=t,
            guidance=guidance.to(x), img_ids=places.to(x), txt_ids=torch.zeros(5, 3).to(x), return_dict=False,
        )[0],
        (16, 4),
    )  # fmt: skip


def flux2() -> Case:
    """Its blocks share their modulations, and its single blocks are one product in and one out."""
    model: Any = Flux2Transformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=6, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    text, guidance = torch.randn(2, 5, 6).double(), torch.tensor([3.5, 4.5]).double()
    places, words = (torch.cartesian_prod(*map(torch.arange, sides)) for sides in ((1, 4, 4, 1), (1, 1, 1, 5)))
    return (
        model,
        lambda x, t: model(
            hidden_states=x, encoder_hidden_states=text.to(x), timestep=t, guidance=guidance.to(x), img_ids=places,
            txt_ids=words, return_dict=False,
        )[0],
        (16, 4),
    )  # fmt: skip


def pixart() -> Case:
    model: Any = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=4,
        patch_size=1, cross_attention_dim=16, caption_channels=6, use_additional_conditions=False,
    )  # fmt: skip
    text, mask = torch.randn(2, 5, 6).double(), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return (
        model,
        lambda x, t: model(
            x, encoder_hidden_states=text.to(x), encoder_attention_mask=mask, timestep=t, return_dict=False,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )[0],
        (4, 4, 4),
    )  # fmt: skip


def unet() -> Case:
    model: Any = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=6, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    text = torch.randn(2, 5, 6).double()
    return model, lambda x, t: model(x, t, encoder_hidden_states=text.to(x), return_dict=False)[0], (4, 8, 8)


def wan() -> Case:
    """It fills a new tensor part by part."""
    model: Any = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=6, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=8,
    )  # fmt: skip
    text = torch.randn(2, 5, 6)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return model(x, encoder_hidden_states=text.to(x.dtype), timestep=t, return_dict=False)[0]

    return model, network, (4, 2, 4, 4)


def lumina() -> Case:
    """It turns its queries and keys as complex numbers, and joins texts of different lengths with the picture."""
    model: Any = Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(8, 4, 4), axes_lens=(16, 8, 8),
        cap_feat_dim=6,
    )  # fmt: skip
    text, mask = torch.randn(2, 5, 6), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    def network(x: Tensor, t: Tensor) -> Tensor:
        return model(
            x, timestep=t, encoder_hidden_states=text.to(x.dtype), encoder_attention_mask=mask, return_dict=False
        )[0]

    return model, network, (4, 4, 4)


def z_image() -> Case:
    """It joins what it is given as lists, of different lengths, and fills them up."""
    model: Any = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=6, t_scale=1.0,
        axes_dims=[8, 4, 4], axes_lens=[128, 8, 8],
    )  # fmt: skip
    texts = [torch.randn(3, 6), torch.randn(35, 6)]

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack(model(list(x[:, :, None]), 1 - t, [text.to(x.dtype) for text in texts]).sample)[:, :, 0]

    return model, network, (4, 4, 4)


IN_FLOAT32 = {"sana": 1e-7, "sd3": 1e-7, "unet": 1e-7, "wan": 3e-7, "lumina": 1e-7, "z-image": 1e-7}
"""Networks with parts in float32 -> how far that takes the tangent."""
CASES: dict[str, Callable[[], Case]] = {
    "sana": sana,
    "sd3": sd3,
    "flux": flux,
    "flux2": flux2,
    "pixart": pixart,
    "unet": unet,
    "wan": wan,
    "lumina": lumina,
    "z-image": z_image,
}


def prepared(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Network, tuple[Tensor, ...]]:
    """A model with no zeroed layer, and where and along what it is differentiated."""
    torch.manual_seed(0)
    model, network, shape = CASES[name]()
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.to(dtype)
    x, dx = torch.randn(2, 2, *shape, dtype=torch.float64)
    return model, network, (x, torch.tensor([0.5, 1.0]).double(), 0.4 * dx, torch.tensor([0.42, 0.45]).double())


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_two_pass_tangent_and_the_plain_forwards_graph(name: str) -> None:
    """Diffusers computes some parts (time embeddings, norms, Sana's attention) in float32 whatever it is given."""
    model, network, inputs = prepared(name)
    exact, ours = (total_derivative(network, *inputs, backend=b) for b in ("two_pass", "one_pass"))
    assert torch.equal(ours.F, exact.F)
    assert exact.dF.norm() > 1e-3
    assert (ours.dF - exact.dF).norm() <= IN_FLOAT32.get(name, 1e-9) * exact.dF.norm()
    assert not ours.dF.requires_grad
    target = exact.F.detach() + exact.dF
    wanted, found = (gradients(model, (F - target).square().mean()) for F in (exact.F, ours.F))
    assert wanted.norm() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", CASES)
def test_in_float32_tangent_loss_and_every_gradient_agree_to_1e_4(name: str) -> None:
    """Each backend with the loss that its own tangent gives."""
    model, network, inputs = prepared(name, torch.float32)
    inputs = tuple(value.float() for value in inputs)
    found = {}
    for backend in ("two_pass", "one_pass"):
        tangent = total_derivative(network, *inputs, backend=backend)
        loss = (tangent.F - tangent.F.detach() - tangent.dF).square().mean()
        model.zero_grad(set_to_none=True)
        loss.backward()
        found[backend] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found[backend] |= {"tangent of the network": tangent.dF, "the loss": loss.detach()}
    assert found["one_pass"].keys() == found["two_pass"].keys() and len(found["two_pass"]) > 10
    largest = max(value.norm() for name, value in found["two_pass"].items() if name != "the loss")
    for part, wanted in found["two_pass"].items():
        scale = max(float(wanted.norm()), 1e-3 * float(largest))  # of gradients that are nothing but rounding
        assert float((found["one_pass"][part] - wanted).norm()) <= 1e-4 * scale, part


@pytest.mark.parametrize("name", ["sd3", "pixart", "unet"])
def test_finite_differences_come_nearer_at_second_order(name: str) -> None:
    """Where the network is smooth: a quarter of the step, a sixteenth of the error, until rounding."""
    _, network, inputs = prepared(name)
    exact = total_derivative(network, *inputs, backend="two_pass").dF
    errors = [
        float((total_derivative(network, *inputs, backend="finite_difference", step=step).dF - exact).norm())
        for step in (0.08, 0.02)
    ]
    assert errors[1] < errors[0] / 12, errors


@pytest.mark.parametrize("name", ["sana", "sd3", "unet"])
def test_checkpointing_recomputes_the_forward_alone(name: str) -> None:
    """The tangent is right, the gradient is right, and the backward pass computes no tangent again."""
    model, network, inputs = prepared(name)
    plain = total_derivative(network, *inputs, backend="one_pass")
    wanted = gradients(model, plain.F.square().mean())
    model.enable_gradient_checkpointing()  # type: ignore[operator]
    model.train()
    saved = total_derivative(network, *inputs, backend="one_pass")
    torch.testing.assert_close(saved.dF, plain.dF, rtol=1e-12, atol=1e-15)
    seen: list[str] = []
    original = module.Call.tangent
    module.Call.tangent = lambda call, out: seen.append(call.name) or original(call, out)  # type: ignore[method-assign]
    try:
        found = gradients(model, saved.F.square().mean())
    finally:
        module.Call.tangent = original  # type: ignore[method-assign]
    assert seen == []
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


def test_in_bfloat16_autocast_it_is_as_good_as_two_passes() -> None:
    model, network, inputs = prepared("sana")
    exact = total_derivative(network, *inputs).dF
    model.float()
    narrow = tuple(value.float() for value in inputs)
    errors = []
    for backend in ("two_pass", "one_pass"):
        with torch.autocast("cpu", torch.bfloat16):
            errors.append((total_derivative(network, *narrow, backend=backend).dF - exact).norm() / exact.norm())  # type: ignore[arg-type]
    assert errors[1] < max(2 * errors[0], torch.tensor(0.02))


Operation = Callable[[Tensor, Tensor], Tensor]
OPERATIONS: dict[str, Operation] = {
    "arithmetic": lambda x, t: (1 - x) / (2 + t.exp()[:, None]) - (x - t[:, None]) * x + 3 / (2 + x.square()) - (-x),
    "torch.add with alpha": lambda x, t: torch.add(x, x.sin(), alpha=2) - torch.sub(x, x * t[:, None], alpha=0.5),
    "powers": lambda x, t: (x.abs() + 1) ** 1.5 + (x.square() + 1).rsqrt() * (x.square() + 2).sqrt() + 2**x + x**2,
    "shapes": lambda x, t: torch.stack(torch.cat([x, t[:, None]], 1).flip(1)[:, :6].T.chunk(2)).flatten().view(3, 8).mT,
    "unpacking": lambda x, t: sum(row * (i + 1) for i, row in enumerate(x)),  # type: ignore[arg-type, return-value]
    "unpacking two": lambda x, t: (lambda a, b, *_: a * b)(*x),
    "unbound": lambda x, t: x.unbind(1)[0] * t + torch.split(x, 2, dim=1)[0][:, 0],
    "constant border": lambda x, t: F.pad(x, (1, 2), value=5.0) * F.pad(t[:, None], (2, 2), mode="replicate")[:, :1],
    "where": lambda x, t: torch.where(x > 0, x * t[:, None], 0.1 * x) + torch.where(x > 0, 1.0, x),
    "norms": lambda x, t: F.layer_norm(x, (6,)) + F.group_norm(x[..., None], 2)[..., 0] + F.rms_norm(x, (6,)),
    "lengths": lambda x, t: F.normalize(x) * x.norm(dim=1, keepdim=True) + x.std(1, keepdim=True),
    "gates": lambda x, t: F.silu(x) * F.gelu(x) + F.relu(x) * x.sigmoid() + x.tanh() * F.gelu(x, approximate="tanh"),
    "softmax": lambda x, t: (x * t[:, None]).softmax(-1) + x.log_softmax(1) + x.clamp(min=0.1) + x.amax(1)[:, None],
    "products": lambda x, t: x @ x.mT @ x + torch.bmm(x[None], x.mT[None])[0] @ x + torch.einsum("ij,ik->jk", x, x)[:4],
    "a constant": lambda x, t: x.detach() * t[:, None] + torch.ones_like(x) * x.shape[0],
    "a tensor made of numbers": lambda x, t: x * torch.arange(6).double() + t.new_zeros(4, 1),
    "keywords": lambda x, t: torch.cat(tensors=[torch.mul(input=x, other=t[:, None]), F.silu(input=x)], dim=1)
    - torch.add(input=x, other=x.exp(), alpha=3).repeat(1, 2) + F.linear(input=x, weight=torch.ones(12, 6).double())
    + F.layer_norm(input=x, normalized_shape=(6,)).repeat(1, 2)
    + torch.div(x, x.exp(), rounding_mode=None).repeat(1, 2),
    "casts": lambda x, t: x.to(torch.float64).double().type_as(t).contiguous().clone() * t[:, None].expand(4, 6),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    torch.manual_seed(0)
    x, dx = torch.randn(2, 4, 6, dtype=torch.float64)
    t, dt = torch.rand(2, 4, dtype=torch.float64)
    weight = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return OPERATIONS[name](F.linear(x, weight) + x, t.sin())

    exact, ours = (total_derivative(network, x, t, dx, dt, backend=b) for b in ("two_pass", "one_pass"))
    torch.testing.assert_close(ours.F, exact.F)
    torch.testing.assert_close(ours.dF, exact.dF, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["none", "boolean", "added", "a query without keys"])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_attention_in_chunks(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERY_CHUNK", chunk)
    torch.manual_seed(0)
    x, dx = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    t, dt = torch.rand(2, 4, dtype=torch.float64)
    masks = {"none": None, "boolean": torch.rand(4, 1, 1, 7) > 0.3, "added": torch.randn(4, 1, 7, 7).double()}
    mask = (masks | {"a query without keys": torch.ones(4, 1, 7, 7, dtype=torch.bool)})[kind]
    if kind == "boolean":
        mask[..., 0] = True  # type: ignore[index]
    if kind == "a query without keys":
        mask[:, :, 2] = False  # type: ignore[index]

    def network(x: Tensor, t: Tensor) -> Tensor:
        q, k, v = (x * t[:, None, None])[:, None].chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask) + F.scaled_dot_product_attention(
            q.detach(), k, v.detach(), attn_mask=mask, scale=0.3
        )

    exact, ours = (total_derivative(network, x, t, dx, dt, backend=b) for b in ("two_pass", "one_pass"))
    torch.testing.assert_close(ours.dF, exact.dF, rtol=1e-9, atol=1e-12)


def test_causal_attention_is_left_to_torch() -> None:
    x, dx = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    t = torch.ones(2, dtype=torch.float64)
    network: Network = lambda x, t: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)  # noqa: E731
    exact, ours = (total_derivative(network, x, t, dx, t, backend=b) for b in ("two_pass", "one_pass"))
    torch.testing.assert_close(ours.dF, exact.dF, rtol=1e-9, atol=1e-12)


def test_a_new_tensor_may_be_filled_part_by_part() -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[..., 0::2] = x[..., 0::2] * t[:, None]
        out[..., 1::2] = x[..., 1::2].sin()
        out[0] = out[0].cos()
        out[1, 2] = 3.0  # and its tangent is gone
        return out * x

    (x, dx), t = torch.randn(2, 3, 6, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    exact, ours = (total_derivative(network, x, t, dx, t, backend=b) for b in ("two_pass", "one_pass"))
    torch.testing.assert_close(ours.dF, exact.dF, rtol=1e-9, atol=1e-12)


def test_what_it_cannot_follow_it_refuses() -> None:
    x, t = torch.randn(2, 3), torch.ones(2)
    cases: dict[str, Network] = {
        "mul_": lambda x, t: (x + 2).mul_(t[:, None]),
        "add_": lambda x, t: (x * 2).__iadd__(t[:, None]),
        "__setitem__": lambda x, t: (lambda y: (y.__setitem__(0, 1.0), y)[1])(x * 2),
        "__setitem__ of a view": lambda x, t: (lambda y: (y[0].__setitem__(0, t[0]), y)[1])(torch.zeros(2, 3)),
        "relu": lambda x, t: F.relu(x * 2, inplace=True),
        "dropout that is on": lambda x, t: F.dropout(x * 2, 0.1),
    }
    for name, network in cases.items():
        with pytest.raises(UserError, match=f"{name.removesuffix(' of a view')}.*two_pass"):
            total_derivative(network, x, t, x, t, backend="one_pass")
    still = total_derivative(lambda x, t: F.dropout(x, 0.1, training=False), x, t, x, t, backend="one_pass")
    torch.testing.assert_close(still.dF, x)


def test_a_compiled_network_runs_as_if_it_were_not() -> None:
    """Compiled code may go past the interception: on Sana, torch's code generator lost 2% of the tangent in silence."""
    compiled: list[Any] = []

    def compiler(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    x, dx = torch.randn(2, 3, 6, dtype=torch.float64)
    t = torch.ones(3, dtype=torch.float64)
    plain: Network = lambda x, t: F.silu(x) * t[:, None]  # noqa: E731
    network = torch.compile(plain, backend=compiler)
    ours = total_derivative(network, x, t, dx, t, backend="one_pass")
    torch.testing.assert_close(ours.dF, total_derivative(plain, x, t, dx, t).dF, rtol=1e-9, atol=1e-12)
    assert not compiled
    network(x, t)
    assert compiled


def test_a_network_that_ignores_its_inputs_has_tangent_0() -> None:
    x, t = torch.randn(2, 3), torch.ones(2)
    assert total_derivative(lambda x, t: torch.ones(2, 3), x, t, x, t, backend="one_pass").dF.abs().max() == 0


def test_tangents_do_not_outlive_what_the_model_holds() -> None:
    """Autograd keeps the activations of a hundred layers; their tangents go."""
    assert module.KEPT_BY_GRAPH is not None, "this torch keeps all of them; the step takes more memory"
    layers = [torch.randn(4, 4, requires_grad=True, dtype=torch.float64) for _ in range(100)]
    counts: list[int] = []
    original = module.Dual._sweep

    def sweep(dual: module.Dual) -> None:
        original(dual)
        counts.append(len(dual.tangents))

    def network(x: Tensor, t: Tensor) -> Tensor:
        first = x * t[:, None]
        x = first
        for layer in layers:
            x = F.silu(F.linear(x, layer)) + 0.1 * x
        return x + first  # used again at the end, so its tangent has to stay

    x, dx = torch.randn(2, 3, 4, dtype=torch.float64)
    t = torch.ones(3, dtype=torch.float64)
    exact = total_derivative(network, x, t, dx, t)
    module.Dual._sweep = sweep  # type: ignore[method-assign]
    try:
        ours = total_derivative(network, x, t, dx, t, backend="one_pass")
    finally:
        module.Dual._sweep = original  # type: ignore[method-assign]
    torch.testing.assert_close(ours.dF, exact.dF, rtol=1e-9, atol=1e-12)
    assert len(counts) > 20 and max(counts) < 10, counts
