"""What depends on the prompt alone is computed once, and never for another prompt."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepfold.spaces.generation import walk
from stepfold.teachers.once import compute_once
from stepfold.teachers.sana import SanaTeacher


@pytest.fixture
def teacher(tiny_sana: Path) -> SanaTeacher:
    return SanaTeacher(tiny_sana, max_tokens=16)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.tensor(2.0)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight


def test_the_same_tensor_is_computed_once_and_any_other_afresh() -> None:
    module = Counting()
    compute_once([module])
    x = torch.ones(3)
    with torch.no_grad():
        assert module(x) is module(x) and module(x.view(3)) is module(x) and module.calls == 1
        x.add_(1)  # changed in place
        assert module(x).tolist() == [4, 4, 4] and module.calls == 2
        assert module(x[:2]).tolist() == [4, 4] and module(x.clone()).tolist() == [4, 4, 4] and module.calls == 4
        for value in range(5):  # memory that the allocator gives again
            assert module(torch.full((3,), float(value))).tolist() == [2.0 * value] * 3
        before = module.calls
        module(x)
        with torch.autocast("cpu", torch.bfloat16):
            module(x)
        assert module.calls == before + 2
    assert module(x).requires_grad and module(x) is not module(x)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.weight.fill_(5.0)
        assert other(x.clone()).tolist() == [10, 10, 10] and module(x).tolist() == [4, 4, 4]


def test_a_walk_projects_its_prompts_once(teacher: SanaTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    linear = nn.functional.linear

    def counting(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        calls.append(id(weight))
        return linear(x, weight, *rest)

    monkeypatch.setattr(nn.functional, "linear", counting)
    routes = torch.linspace(1.5, 0.3, 4).expand(2, 4)
    noise, scales = 0.5 * torch.randn(2, *teacher.latent_shape), torch.full((2,), 4.5)
    parts = [id(p.weight) for p in teacher.of_the_prompt_alone() if isinstance(p, nn.Linear)]
    assert len(parts) >= 2
    first, second = teacher.encode(["fox", "pizza"]), teacher.encode(["red heart", "sun"])
    with torch.no_grad():
        for condition in (first, second):
            calls.clear()
            walk(teacher.velocity, noise, routes, condition, scales)
            assert all(calls.count(part) == 1 for part in parts)
            assert calls.count(id(teacher.transformer.transformer_blocks[0].attn1.to_q.weight)) == 4
        calls.clear()
        teacher.clear_prompt_cache()
        assert all("_last_call" not in part.__dict__ for part in teacher.of_the_prompt_alone())
        teacher.velocity(noise, routes[:, 0], second, scales)
        assert all(calls.count(part) == 1 for part in parts)  # computed afresh


def test_velocities_are_the_same_to_the_bit(teacher: SanaTeacher, tiny_sana: Path) -> None:
    """Whatever was asked before: other prompts, other precision, gradients."""
    x, t = 0.5 * torch.randn(2, *teacher.latent_shape), torch.tensor([0.4, 1.2])
    scales, conditions = torch.full((2,), 4.5), [teacher.encode(p) for p in (["fox", "pizza"], ["sun", "red heart"])]
    for condition in (*conditions, *conditions):
        expected = SanaTeacher(tiny_sana, max_tokens=16).velocity(x, t, condition, scales)
        with torch.autocast("cpu", torch.bfloat16):
            teacher.velocity(x, t, condition, scales)
        for _ in range(2):
            assert torch.equal(teacher.velocity(x, t, condition, scales), expected)
