"""What the contract asks of every teacher, of networks of one's own; those have no pipeline and no pictures."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from stepfold.api import distill_module, draw, load_module_student
from stepfold.errors import UserError
from stepfold.maths.noise_schedules import vp_sde
from stepfold.students.whole import new_student
from stepfold.teachers.contract import Condition
from stepfold.teachers.module import ModuleTeacher
from stepfold.training.runs import read_metrics

from .test_contract import (
    state,
    test_a_new_student_is_its_teacher,
    test_a_new_student_owns_its_weights_and_can_learn_all_of_them,
    test_a_velocity_lets_a_gradient_through,
    test_everything_that_velocity_is_given_matters,
    test_guidance_in_float64_does_not_promote,
    test_one_network_call_a_velocity,
    test_rows_do_not_know_of_each_other,
    test_states_may_be_more_precise_than_the_network,
    test_the_branches_make_the_velocity_at_every_scale,
    test_velocity_is_finite_deterministic_and_has_no_graph,
)

__all__ = [
    "state",
    "test_a_new_student_is_its_teacher",
    "test_a_new_student_owns_its_weights_and_can_learn_all_of_them",
    "test_a_velocity_lets_a_gradient_through",
    "test_everything_that_velocity_is_given_matters",
    "test_guidance_in_float64_does_not_promote",
    "test_one_network_call_a_velocity",
    "test_rows_do_not_know_of_each_other",
    "test_states_may_be_more_precise_than_the_network",
    "test_the_branches_make_the_velocity_at_every_scale",
    "test_velocity_is_finite_deterministic_and_has_no_graph",
]

SHAPE = (2, 4, 4)


class Own(nn.Module):
    """A small network of latents, time and the mean of the words."""

    def __init__(self) -> None:
        super().__init__()
        size = math.prod(SHAPE)
        self.first, self.words, self.last = nn.Linear(size + 1, 32), nn.Linear(8, 32), nn.Linear(32, size)
        tiny.enliven(self)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        words = (condition.embeds * condition.mask[..., None]).sum(1) / condition.mask.sum(1, keepdim=True)
        state = torch.cat([x.flatten(1), t[:, None]], 1)
        return self.last(torch.tanh(self.first(state)) + self.words(words)).view_as(x)


class OwnDenoiser(Own):
    """Whose states may be as large as the noise."""

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        size = (1 + t.square()).sqrt()
        return super().forward(x / size.view(-1, 1, 1, 1), size.log() / 4, condition)


def encode(prompts: Any) -> Condition:
    """A row of numbers for every letter."""
    length = max(1, *map(len, prompts))
    codes = torch.tensor([[ord(letter) for letter in prompt.ljust(length)] for prompt in prompts])
    mask = torch.tensor([[int(place < max(1, len(prompt))) for place in range(length)] for prompt in prompts])
    return Condition(torch.sin(codes[..., None] * torch.arange(1, 9)), mask)


class Seen(ModuleTeacher):
    """What the suite asks of a pipeline's teacher besides."""

    dtype, rounds = torch.float32, False

    @property
    def transformer(self) -> nn.Module:
        return self.network

    def idle_parameters(self) -> tuple[str, ...]:
        return ()


TEACHERS: dict[str, Callable[[], Seen]] = {
    "flow": lambda: Seen(Own(), encode, SHAPE),
    "flow, guided": lambda: Seen(Own(), encode, SHAPE, nothing=encode([""]), guidance=4.0),
    "trigflow": lambda: Seen(Own(), encode, SHAPE, "trigflow"),
    "trigflow, guided": lambda: Seen(Own(), encode, SHAPE, "trigflow", nothing=encode([""]), guidance=4.0),
    "edm": lambda: Seen(OwnDenoiser(), encode, SHAPE, "edm", sigma_max=160.0),
    "noise, guided": lambda: Seen(
        Own(), encode, SHAPE, "noise", schedule=vp_sde(), data_std=0.7, nothing=encode([""]), guidance=4.0
    ),
}


class FromZero(ModuleTeacher):
    """One whose scale s means u + (s + 1) (c - u)."""

    no_guidance = 0.0

    def guidance_weight(self, scale: Any) -> Any:
        return scale + 1


def test_a_scale_means_the_weight_that_its_teacher_says() -> None:
    network = Own()
    usual, shifted = (
        kind(network, encode, SHAPE, nothing=encode([""]), guidance=4.0) for kind in (ModuleTeacher, FromZero)
    )
    x, t, condition = torch.randn(2, *SHAPE), torch.tensor([0.4, 1.1]), encode(["a", "fox"])
    ours, theirs = shifted.velocity(x, t, condition, torch.zeros(2)), shifted.branches(x, t, condition)[1]
    torch.testing.assert_close(ours, theirs)
    three, four = torch.full((2,), 3.0), torch.full((2,), 4.0)
    assert torch.equal(shifted.velocity(x, t, condition, three), usual.velocity(x, t, condition, four))


@pytest.fixture(params=TEACHERS)
def teacher(request: pytest.FixtureRequest) -> Seen:
    torch.manual_seed(0)
    return TEACHERS[request.param]()


@pytest.mark.parametrize("objective", ["continuous", "discrete"])
def test_it_is_distilled_and_its_student_comes_back(
    teacher: Seen, prompts_file: Path, tmp_path: Path, objective: str
) -> None:
    """Every parameter moves, the loss is finite, and the file holds the student."""
    few = [
        f"objective={objective}", "training.steps=3", "training.prompts_per_step=2", "space.route_steps=4",
        "training.precision=no", "optimiser.name=adamw", "optimiser.lr=1e-3", "optimiser.warmup=0",
        "consistency.r_warmup=0",
    ]  # fmt: skip
    student = distill_module(teacher, prompts_file, tmp_path / "run", few, quiet=True)
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 3 and all(math.isfinite(row["loss"]) for row in rows)
    before = dict(new_student(teacher).named_parameters())
    still = {name for name, value in student.named_parameters() if torch.equal(value, before[name])}
    assert still == (set() if objective == "continuous" else {n for n in before if n.startswith("variance_head.")})
    again = load_module_student(teacher, tmp_path / "run")
    for steps in (1, 2):
        now, then = (draw(teacher, each, ["red heart", "a cat"], seed=1, steps=steps) for each in (student, again))
        assert now.shape == (2, *SHAPE) and torch.equal(now, then)


def test_what_only_pipelines_have_is_refused(teacher: Seen) -> None:
    with pytest.raises(UserError, match=r"leave student\.depth at 1"):
        new_student(teacher, 0.5)
