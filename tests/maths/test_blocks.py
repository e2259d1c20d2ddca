"""Blocks that are compiled one by one. test_distill.py has code made for them; here they are only traced."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from forms import cases
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

from stepfold.maths.blocks import CompiledBlock, compiled_blocks
from stepfold.maths.tangent import total_derivative
from stepfold.maths.zeros import PRODUCTS, WithoutZeroProducts
from stepfold.students.whole import new_student
from stepfold.teachers.contract import Student
from stepfold.teachers.flux import FluxTeacher
from stepfold.teachers.sana import SanaTeacher
from stepfold.teachers.sd3 import SD3Teacher
from stepfold.training.processes import blocks_of

TRACED = "aot_eager_decomp_partition"
SMALL: dict[str, Any] = dict(height=16, width=32, max_tokens=24)
FAMILIES: dict[str, Callable[[Path, Path], Any]] = {
    "sana": lambda sana, _: SanaTeacher(sana, max_tokens=24),
    "sd3": lambda _, empty: SD3Teacher(
        tiny.save(tiny.make_sd3, empty / "sd3"), **SMALL
    ),  # blocks that return None, too
    "flux": lambda _, empty: FluxTeacher(tiny.save(tiny.make_flux, empty / "flux"), **SMALL),  # two classes of blocks
}


@pytest.fixture(autouse=True)
def _no_code_of_other_tests() -> None:
    torch.compiler.reset()


@pytest.fixture(scope="module", params=cases(FAMILIES, short=[]))
def teacher(request: pytest.FixtureRequest, tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return FAMILIES[request.param](tiny_sana, tmp_path_factory.mktemp("teacher"))


def step(teacher: Any, student: Student, backend: str = "one_pass") -> dict[str, Tensor]:
    """Output, tangent and every gradient, of two samples."""
    torch.manual_seed(1)
    x, dx = torch.randn(2, 2, *teacher.latent_shape)
    t, guidance, condition = torch.tensor([0.4, 1.2]), torch.full((2,), 4.5), teacher.encode(["red heart", "a dog"])
    student.zero_grad(set_to_none=True)
    found = total_derivative(lambda x, t: student(x, t, condition, guidance), x, t, dx, t.cos(), backend)
    found.F.square().sum().backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return {"F": found.F.detach(), "dF": found.dF} | gradients


def test_compiled_blocks_are_the_blocks_and_are_compiled_once(teacher: Any) -> None:
    student = new_student(teacher)
    plain, blocks = step(teacher, student), blocks_of(student)
    with compiled_blocks(blocks, backend=TRACED):
        assert all(isinstance(block.forward, CompiledBlock) for block in blocks)
        found = step(teacher, student)
        torch._dynamo.utils.counters.clear()
        step(teacher, student)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert not any("forward" in vars(block) for block in blocks)
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max() + 1e-3), msg=name)


def kept_bytes(student: Student, teacher: Any, recompute: bool) -> int:
    """What autograd keeps between forward and backward pass, weights left out."""
    kept: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        if not value.is_leaf or not value.requires_grad:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda value: value)
    with compiled_blocks(blocks_of(student), recompute=recompute, backend=TRACED), hooks:
        step(teacher, student)
    return sum(kept.values())


@pytest.mark.long
def test_recomputed_blocks_keep_less(tiny_sana: Path) -> None:
    teacher = SanaTeacher(tiny_sana, max_tokens=24)
    student = new_student(teacher)
    assert kept_bytes(student, teacher, recompute=True) < 0.5 * kept_bytes(student, teacher, recompute=False)


@pytest.mark.long
def test_a_network_without_lists_of_blocks_is_a_block_by_itself() -> None:
    network = nn.Linear(3, 3)
    x, t = torch.randn(2, 3), torch.ones(2)
    with compiled_blocks([network], backend=TRACED):
        found = total_derivative(lambda x, t: network(x) * t[:, None], x, t, x, t, "one_pass")
    torch.testing.assert_close(found.dF, x @ network.weight.T + network(x))


def test_products_with_zero_are_taken_out() -> None:
    """Those that torch's forward mode leaves: of a weight's tangent, which there is none of."""

    def joint(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        none = torch.full((), 0.0).expand(weight.shape), torch.full((), 0.0).expand(bias.shape)
        out = nn.functional.conv2d(x, weight, bias)
        return out, nn.functional.conv2d(x, weight) + nn.functional.conv2d(x, *none)

    inputs = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 1, 1), torch.randn(5)
    graph = make_fx(joint)(*inputs)
    for node in graph.graph.nodes:  # as the compiler's graphs have it
        if node.op == "call_function":
            node.meta["val"] = torch.empty(2, 5, 4, 4)
    wanted = graph(*inputs)
    assert sum(node.target in PRODUCTS for node in graph.graph.nodes) == 3
    WithoutZeroProducts()(graph.graph)
    graph.recompile()
    assert sum(node.target in PRODUCTS for node in graph.graph.nodes) == 2
    for found, value in zip(graph(*inputs), wanted, strict=True):
        torch.testing.assert_close(found, value)
    linear = symbolic_trace(lambda x, y: x @ y).graph  # nothing to find in other graphs
    WithoutZeroProducts()(linear)
    linear.lint()
