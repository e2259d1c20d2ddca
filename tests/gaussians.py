"""A teacher and networks whose laws are Gaussians, behind the real contracts: closed forms for critics and rollouts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stepfold.maths.closed_form import GaussianTeacher
from stepfold.maths.formulations import guide
from stepfold.randomness import Draws
from stepfold.teachers.contract import Condition, Student, Teacher
from stepfold.training.draws import Batch

SIGMA_DATA = 0.5
SHAPE = (3,)
CPU = torch.device("cpu")


def double(number: float) -> Tensor:
    """A number in float64."""
    return torch.tensor(number, dtype=torch.float64)


def gaussian(mean: float, std: float) -> GaussianTeacher:
    """Data N(mean, std^2) in each of the elements, in float64."""
    return GaussianTeacher(double(mean), double(std), SIGMA_DATA)


class Score(Student):
    """F of a Gaussian's velocity; its mean and standard deviation are learned. What a fake score should become."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(double(mean)), nn.Parameter(double(std).log())

    def forward(
        self, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor, target: Tensor | None = None
    ) -> Tensor:
        law = GaussianTeacher(self.mean, self.log_std.exp(), SIGMA_DATA)
        return law.velocity(SIGMA_DATA * x_unit, t) / SIGMA_DATA

    def log_variance(self, t: Tensor, guidance: Tensor, target: Tensor | None = None) -> Tensor:
        return torch.zeros_like(t)


class Perfect(Score):
    """The perfect consistency student of a Gaussian: one step from noise gives its law, exactly."""

    def forward(
        self, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor, target: Tensor | None = None
    ) -> Tensor:
        law = GaussianTeacher(self.mean, self.log_std.exp(), SIGMA_DATA)
        return law.F_of_consistency(SIGMA_DATA * x_unit, t)


class Map(Score):
    """The perfect flow map of a Gaussian, told two times: every jump of it keeps the law, exactly."""

    reads_target = True

    def forward(
        self, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor, target: Tensor | None = None
    ) -> Tensor:
        law = GaussianTeacher(self.mean, self.log_std.exp(), SIGMA_DATA)
        return law.F_of_flow_map(SIGMA_DATA * x_unit, t, torch.zeros_like(t) if target is None else target)


@dataclass(frozen=True)
class Law:
    """A Gaussian behind the teacher contract."""

    mean: float = 0.0
    std: float = 0.5
    sigma_data: float = SIGMA_DATA
    guidance_kind: str = "none"
    default_guidance: float = 1.0
    student_reads_guidance: bool = False
    latent_shape: tuple[int, ...] = SHAPE
    latent_shapes: tuple[tuple[int, ...], ...] = (SHAPE,)
    start_time: float = math.pi / 2
    shift: float = 1.0
    max_tokens: int = 1
    network: nn.Module = field(default_factory=nn.Identity)

    guidance_weight = Teacher.guidance_weight
    guidance_scale = Teacher.guidance_scale

    def encode(self, prompts: Sequence[str]) -> Condition:
        return nothing(len(prompts))

    def velocity(
        self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, with_gradient: bool = False
    ) -> Tensor:
        with torch.set_grad_enabled(with_gradient):
            return gaussian(self.mean, self.std).velocity(x, t)

    def student_times(self, num_steps: int, sampler: str) -> list[float]:
        return torch.linspace(math.pi / 2, 0, num_steps + 1)[:-1].tolist()

    def clear_prompt_cache(self) -> None:
        """It keeps nothing."""

    def new_student(self, depth: float = 1.0) -> Score:
        return Score(self.mean, self.std)

    def features(self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> list[Tensor]:
        """The state itself, as one token."""
        return [x[:, None]]


@dataclass(frozen=True)
class Guided(Law):
    """A Gaussian given the prompt and one without, under classifier-free guidance."""

    mean_without: float = 0.0
    std_without: float = 0.5
    guidance_kind: str = "classifier_free"

    def velocity(
        self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, *, with_gradient: bool = False
    ) -> Tensor:
        with torch.set_grad_enabled(with_gradient):
            without = gaussian(self.mean_without, self.std_without).velocity(x, t)
            return guide(without, gaussian(self.mean, self.std).velocity(x, t), 1 if guidance is None else guidance)

    def null(self, like: Condition) -> Condition:
        """Zeros, where a prompt has ones."""
        return Condition.whole(torch.zeros_like(like.embeds))


class TwoScores(Score):
    """A fake score with a law of its own where there is no prompt, which is not learned."""

    def __init__(self, mean: float, std: float, mean_without: float, std_without: float) -> None:
        super().__init__(mean, std)
        self.without = gaussian(mean_without, std_without)

    def forward(self, x_unit: Tensor, t: Tensor, condition: Condition, *rest: Any) -> Tensor:
        without = self.without.velocity(SIGMA_DATA * x_unit, t) / SIGMA_DATA
        return torch.where(condition.embeds[:, 0] > 0, super().forward(x_unit, t, condition, *rest), without)


def nothing(num: int) -> Condition:
    """The condition of no prompt, in float64."""
    return Condition.whole(torch.ones(num, 1, 1).double())


def batch_of(num: int, number: int = 0, seed: int = 0) -> Batch:
    """A batch of so many samples."""
    samples = range(number * num, (number + 1) * num)
    return Batch(
        number=number,
        prompts=[""] * num,
        index=[0] * num,
        guidance=torch.ones(num).double(),
        shape=SHAPE,
        shape_index=0,
        sigma_data=SIGMA_DATA,
        start_time=math.pi / 2,
        draws=Draws(seed, samples, CPU),
    )
