"""A teacher whose one-step map is known, through the real loop. A broken objective misses the bar."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from forms import cases
from torch import Tensor, nn

from stepfold.config import validate
from stepfold.maths.closed_form import MixtureTeacher
from stepfold.maths.formulations import data_prediction, interpolate
from stepfold.maths.tangent import Network, Tangent, total_derivative
from stepfold.objectives import consistency
from stepfold.prompts.reading import open_prompts
from stepfold.teachers.contract import Condition, Student
from stepfold.training import distill as loop
from stepfold.training.accelerators import make_accelerator
from stepfold.training.opening import open_run

SIGMA_DATA = 0.5
LABELS = ("left", "right")
MIXTURE = MixtureTeacher(
    means=torch.tensor([[[-0.7, 0.5], [0.7, 0.5]], [[-0.3, -0.6], [0.2, -0.5]]]),  # [component, label, axis]
    stds=torch.tensor([[0.15, 0.2], [0.2, 0.1]]),
    weights=torch.tensor([[0.5, 0.3], [0.5, 0.7]]),
    sigma_data=SIGMA_DATA,
)


@dataclass(frozen=True)
class LabelTeacher:
    """The mixture behind the teacher contract: a prompt is the name of a label."""

    sigma_data: float = SIGMA_DATA
    guidance_kind: str = "none"
    default_guidance: float = 4.5
    no_guidance: float = 1.0
    student_reads_guidance: bool = True
    latent_shape: tuple[int, ...] = (2,)
    latent_shapes: tuple[tuple[int, ...], ...] = ((2,),)
    start_time: float = math.pi / 2
    network: nn.Module = field(default_factory=nn.Identity)  # it has none

    def encode(self, prompts: Sequence[str]) -> Condition:
        labels = torch.tensor([LABELS.index(prompt) for prompt in prompts])
        return Condition(nn.functional.one_hot(labels, 2).float()[:, None], torch.ones(len(prompts), 1).long())

    def velocity(self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        return MIXTURE.velocity(x, t, condition.embeds[:, 0].argmax(1))

    def clear_prompt_cache(self) -> None:
        """It keeps nothing."""


class SmallStudent(Student):
    """An MLP behind the student contract."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip
        self.variance = nn.Linear(2, 1)
        nn.init.zeros_(self.variance.weight)
        nn.init.zeros_(self.variance.bias)

    def forward(self, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        return self.net(torch.cat([x_unit, t.cos()[:, None], t.sin()[:, None], condition.embeds[:, 0]], 1))

    def log_variance(self, t: Tensor, guidance: Tensor, target: Tensor | None = None) -> Tensor:
        return self.variance(torch.stack([t.cos(), t.sin()], 1)).squeeze(1)


def velocity_student(seed: int, steps: int = 400, batch: int = 1024) -> SmallStudent:
    """A student that starts as its teacher: fitted to the closed-form velocity."""
    torch.manual_seed(seed)
    teacher, student = LabelTeacher(), SmallStudent()
    optimiser = torch.optim.AdamW(student.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for _ in range(steps):
        label, t = torch.randint(2, (batch,)), torch.rand(batch) * math.pi / 2
        x0 = MIXTURE.sample(label, torch.rand(batch), torch.randn(batch, 2))
        x = interpolate(x0, SIGMA_DATA * torch.randn(batch, 2), t)
        condition = teacher.encode([LABELS[i] for i in label])
        error = SIGMA_DATA * student(x / SIGMA_DATA, t, condition, t) - MIXTURE.velocity(x, t, label)
        optimiser.zero_grad()
        error.square().mean().backward()
        optimiser.step()
        schedule.step()
    return student


def flow_map(noise: Tensor, label: Tensor, steps: int = 200) -> Tensor:
    """Where the teacher's ODE carries noise: Heun's method in float64."""
    x, times = noise.double(), torch.linspace(math.pi / 2, 0, steps + 1, dtype=torch.float64)
    teacher = MixtureTeacher(MIXTURE.means.double(), MIXTURE.stds.double(), MIXTURE.weights.double(), SIGMA_DATA)
    for i in range(steps):
        t, s = times[i].expand(len(x)), times[i + 1].expand(len(x))
        v = teacher.velocity(x, t, label)
        w = teacher.velocity(x + (s - t)[:, None] * v, s, label)
        x = x + (s - t)[:, None] * (v + w) / 2
    return x


def one_step_error(student: Student, num: int = 2000) -> float:
    """Root mean square distance of the student's one step to the teacher's ODE, in units of sigma_data."""
    generator = torch.Generator().manual_seed(1234)
    noise, label = SIGMA_DATA * torch.randn(num, 2, generator=generator), torch.arange(num) % 2
    t = torch.full((num,), math.pi / 2)
    with torch.no_grad():
        condition = LabelTeacher().encode([LABELS[i] for i in label])
        x0 = data_prediction(noise, t, SIGMA_DATA * student(noise / SIGMA_DATA, t, condition, t))
    return ((x0 - flow_map(noise, label)).square().sum(1).mean().sqrt() / SIGMA_DATA).item()


def distilled(folder: Path, student: Student, seed: int, steps: int = 400, objective: str = "continuous") -> Student:
    """The real loop, from a real prompts file, with real settings."""
    folder.mkdir()
    (folder / "prompts.txt").write_text("\n".join(LABELS) + "\n")
    config = validate(
        {
            "seed": seed,
            "objective": objective,
            "prompts": str(folder / "prompts.txt"),
            "space": {"route_shift": 1.0, "route_per": "prompt", "guidance": [1.0], "filter_rule": "off"},
            "consistency": {"r_schedule": "warmup", "r_warmup": 50, "r_final": 1.0},
            "optimiser": {"name": "adamw", "lr": 2e-3, "decay": 0.5, "clip": 1.0},
            "training": {"steps": steps, "prompts_per_step": 32, "ema": 0.95, "checkpoint_every": steps},
        }
    )  # fmt: skip
    open_run(folder / "run", config, resume=False)
    prompts, accelerator = open_prompts(folder / "prompts.txt"), make_accelerator("no")
    return loop.distill(config, folder / "run", LabelTeacher(), student, prompts, torch.zeros(2), accelerator)  # type: ignore[arg-type]


BAR = 0.38  # seeds 0 to 2 reach 0.30 to 0.31; the discrete objective 0.33 (seed 0)
EARLY_BAR = 0.45  # after 250 steps: 0.41, and 0.49 without the teacher's velocity in the derivative


@pytest.fixture(scope="module")
def untrained() -> SmallStudent:
    return velocity_student(seed=0)


@pytest.mark.parametrize(("steps", "bar"), cases([(250, EARLY_BAR), (400, BAR)], short=[(250, EARLY_BAR)]))
def test_the_loop_distils_the_one_step_map(tmp_path: Path, untrained: SmallStudent, steps: int, bar: float):
    assert one_step_error(untrained) > 2 * BAR  # a velocity network is no consistency model
    assert one_step_error(distilled(tmp_path / "run", copy.deepcopy(untrained), seed=0, steps=steps)) < bar


@pytest.mark.long
def test_the_discrete_objective_distils_it_too(tmp_path: Path, untrained: SmallStudent):
    student = distilled(tmp_path / "run", copy.deepcopy(untrained), seed=0, objective="discrete")
    assert one_step_error(student) < BAR


def _flipped(*args: Any) -> Tangent:
    tangent = total_derivative(*args)
    return Tangent(tangent.F, -tangent.dF)


def _dropped(*args: Any) -> Tangent:
    tangent = total_derivative(*args)
    return Tangent(tangent.F, torch.zeros_like(tangent.dF))


def _time_only(network: Network, x: Tensor, t: Tensor, dx: Tensor, *rest: Any) -> Tangent:
    return total_derivative(network, x, t, torch.zeros_like(dx), *rest)


@pytest.mark.long
@pytest.mark.parametrize(
    ("broken", "at_least"),
    [(_flipped, 2 * BAR), (_dropped, 2 * BAR), (_time_only, BAR)],
)
def test_a_broken_derivative_misses_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untrained: SmallStudent, broken: Any, at_least: float
):
    """The sign of the JVP term flipped, the term dropped, or the teacher's velocity missing from its direction."""
    monkeypatch.setattr(consistency, "total_derivative", broken)
    assert one_step_error(distilled(tmp_path / "run", copy.deepcopy(untrained), seed=0)) > at_least
