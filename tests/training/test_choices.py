"""What `auto` becomes."""

import platform
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from stepfold.config import Config
from stepfold.errors import UserError
from stepfold.maths import tangent
from stepfold.maths.tangent import total_derivative
from stepfold.students.lora import lora_student
from stepfold.students.whole import new_student
from stepfold.teachers.contract import Condition, Student
from stepfold.teachers.loading import load_teacher
from stepfold.teachers.sana import SanaTeacher
from stepfold.teachers.stable_diffusion import StableDiffusionTeacher
from stepfold.training import choices
from stepfold.training.choices import TangentChoice, choose_tangent, keep_freed_memory, kept_bytes

Settings = Callable[..., Config]


def chosen(teacher: SanaTeacher, config: Config, student: Student | None = None) -> TangentChoice:
    return choose_tangent(config, student or new_student(teacher), teacher.encode(["fox"]), teacher.latent_shape)


def test_the_rule(teacher: SanaTeacher, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = chosen(teacher, settings())
    assert (plain.backend, plain.recompute) == ("one_pass", False) and "agrees with two_pass" in plain.reason
    compiled = chosen(teacher, settings("training.compile=true"))
    assert (compiled.backend, compiled.recompute) == ("one_pass", False)
    assert chosen(teacher, settings("training.checkpointing=true")).backend == "block"
    assert chosen(teacher, settings("objective=discrete")).backend == "none"
    for backend in ("two_pass", "one_pass", "block", "finite_difference"):
        choice = chosen(teacher, settings(f"training.tangent={backend}"))
        assert (choice.backend, choice.recompute, choice.reason) == (backend, backend == "block", "as set")
    monkeypatch.setattr(choices, "device_memory", lambda device: 10_000_000)
    small = chosen(teacher, settings())
    assert (small.backend, small.recompute) == ("block", True) and "blocks recomputed" in small.reason
    assert chosen(teacher, settings("objective=discrete")).recompute
    assert chosen(teacher, settings("training.compile=true")).backend == "block"


def test_what_is_not_compiled_together_with_its_tangent(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = StableDiffusionTeacher(tiny.save(tiny.make_sd1, tmp_path / "sd"), height=16, width=32, max_tokens=24)
    config = settings("training.compile=true")
    choice = choose_tangent(config, new_student(unet), unet.encode(["fox"]), unet.latent_shape)
    assert choice.backend == "two_pass" and "group norm" in choice.reason
    monkeypatch.setattr(choices, "QUERY_CHUNK", 63)  # it has 8 x 8 latents
    choice = chosen(teacher, config)
    assert choice.backend == "two_pass" and "attention of 64 queries" in choice.reason


def test_a_lora_on_weights_in_half_precision_may_differ_by_their_rounding(
    tiny_sana: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("teacher.dtype=bfloat16", "student.lora=2")
    half = load_teacher(config.teacher, "cpu")
    assert isinstance(half, SanaTeacher)
    student = lora_student(half, 2)
    choice = chosen(half, config, student)
    assert choice.backend == "one_pass", choice.reason
    monkeypatch.setattr(choices, "HALF_AGREEMENT", choices.AGREEMENT)
    assert chosen(half, config, student).backend == "two_pass"
    with pytest.raises(UserError, match=r"which needs float32; leave teacher\.dtype out"):
        chosen(half, config, Awkward(lambda x: Outside.apply(x)))  # type: ignore[arg-type, no-any-return]
    with pytest.raises(UserError, match="does not go with tangent=finite_difference"):
        settings("teacher.dtype=bfloat16", "student.lora=2", "training.tangent=finite_difference")


def test_what_a_gpu_holds_besides_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    assert choices.held_besides(300, torch.device("cuda")) == 700
    assert choices.held_besides(3000, torch.device("cuda")) == choices.held_besides(300, torch.device("cpu")) == 0


class Awkward(Student):
    """A student that `one_pass` cannot follow, or follows wrongly."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale, self.operation = nn.Parameter(torch.tensor(0.3)), operation

    def forward(self, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        return self.operation(self.scale * x_unit) * t.view(-1, 1, 1, 1)

    def log_variance(self, t: Tensor, guidance: Tensor, target: Tensor | None = None) -> Tensor:
        return torch.zeros_like(t)


class Outside(torch.autograd.Function):
    """An operation that leaves torch, as a kernel of one's own does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def test_what_one_pass_cannot_follow_takes_two(
    teacher: SanaTeacher, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = chosen(teacher, settings(), Awkward(lambda x: (x + 1).mul_(x)))
    assert choice.backend == "two_pass" and "one_pass cannot follow this model" in choice.reason
    assert "mul_" in choice.reason
    choice = chosen(teacher, settings(), Awkward(lambda x: Outside.apply(x)))  # type: ignore[arg-type, no-any-return]
    assert choice.backend == "finite_difference" and "two_pass cannot follow this model" in choice.reason
    monkeypatch.setattr(tangent, "one_pass", lambda network, x, t, dx, dt: (network(x, t), dx))
    choice = chosen(teacher, settings())
    assert choice.backend == "two_pass" and "one_pass differs from two_pass by" in choice.reason
    with pytest.raises(UserError, match="no blocks to recompute"):
        Awkward(lambda x: x).recompute_blocks()


def test_one_state_at_a_kink_does_not_cost_the_fast_backend(
    teacher: SanaTeacher, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = tangent.one_pass, []

    def at_a_kink(network: Any, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> Any:
        F, dF = real(network, x, t, dx, dt)
        calls.append(x)
        return F, dF if len(calls) > 1 else 1.02 * dF

    monkeypatch.setattr(tangent, "one_pass", at_a_kink)
    assert chosen(teacher, settings()).backend == "one_pass"
    assert len(calls) == 2 and not torch.equal(*calls)


def test_what_autograd_keeps_is_counted_once_and_without_weights() -> None:
    weight, x = torch.randn(16, 16, requires_grad=True), torch.randn(8, 16)

    def forward() -> Tensor:
        h = (x @ weight).tanh()  # kept: x (a leaf), weight (a leaf), tanh's output
        return h * h  # keeps it twice more

    assert kept_bytes(forward) == 8 * 16 * 4


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(("optimiser", "copies"), [("adamw", 5), ("came", 4)])
def test_the_estimate_is_what_a_pass_keeps_and_the_states(
    teacher: SanaTeacher, settings: Settings, precision: str, optimiser: str, copies: int
) -> None:
    size = ("space.route_steps=4", "training.prompts_per_step=3")
    config = settings(*size, f"training.precision={precision}", f"optimiser.name={optimiser}")
    student, condition = new_student(teacher), teacher.encode(["fox"])
    network, x, t = choices.trial(student, condition, teacher.latent_shape, count=9)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        kept = kept_bytes(lambda: network(x, t))
    states = copies * sum(p.numel() * p.element_size() for p in student.parameters())
    need, fits = choices.memory_estimate(config, student, condition, teacher.latent_shape, 3)
    assert need * 2**30 == pytest.approx(kept + states, rel=1e-6) and fits


def test_where_not_even_three_pairs_have_room_blocks_are_recomputed(
    teacher: SanaTeacher, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(forward: Callable[[], Tensor]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(choices, "kept_bytes", no_room)
    choice = chosen(teacher, settings())
    assert (choice.backend, choice.recompute) == ("block", True)
    assert "more than there is, blocks recomputed" in choice.reason


def test_nothing_is_kept_while_it_is_counted() -> None:
    weight, h, made = torch.randn(16, 16, requires_grad=True), torch.randn(8, 16), []
    most = 0

    def forward() -> Tensor:
        nonlocal h, most
        for _ in range(10):
            h = (h @ weight).tanh()  # its backward pass needs its own output
            made.append(weakref.ref(h.untyped_storage()))
            most = max(most, sum(storage() is not None for storage in made))
        return h

    assert kept_bytes(forward) == 10 * 8 * 16 * 4
    assert most <= 2


def test_blocks_that_are_recomputed_keep_less_and_give_the_same_gradient(teacher: SanaTeacher) -> None:
    student, condition = new_student(teacher), teacher.encode(["fox", "pizza"])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    x, dx = torch.randn(2, 2, *teacher.latent_shape)
    t, dt, guidance = torch.tensor([0.4, 1.0]), torch.tensor([0.4, 0.3]), torch.full((2,), 4.5)

    def gradients(backend: str) -> list[Tensor]:
        student.zero_grad(set_to_none=True)
        both = total_derivative(lambda x, t: student(x, t, condition, guidance), x, t, dx, dt, backend)
        (both.F - both.F.detach() - both.dF).square().mean().backward()
        return [p.grad.clone() for p in student.parameters() if p.grad is not None]

    def kept() -> int:
        return kept_bytes(lambda: student(x, t, condition, guidance))

    plain, before = gradients("two_pass"), kept()
    student.recompute_blocks()
    for backend in ("block", "two_pass"):
        for found, wanted in zip(gradients(backend), plain, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    assert kept() < 0.5 * before


@pytest.mark.long
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_freed_memory_is_kept() -> None:
    """A block of 16 MiB that is freed and asked for again costs no new pages."""
    code = """
import resource, torch
from stepfold.training.choices import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(4 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain, _ = faults(), keep_freed_memory(torch.device("cpu"))
faults()
print(plain, faults())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) > 4_000 and int(out[1]) < 0.1 * int(out[0]), out  # 4,096 pages in one block
    assert not keep_freed_memory(torch.device("meta"))
