"""Generation space over a teacher whose flow map is known."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from passes import gradient_step
from torch import Tensor, nn

from stepfold.config import Config, load_config
from stepfold.errors import UserError
from stepfold.maths.closed_form import GaussianTeacher
from stepfold.spaces.generation import Trajectory, brightness_filter, pairs_from, walk
from stepfold.spaces.records import Pairs
from stepfold.teachers.contract import Condition, Student
from stepfold.training.draws import draw_route

SIGMA_DATA = 0.5
SHAPE = (2, 3, 3)
HALF_PI = math.pi / 2


@dataclass
class ScaledGaussian:
    """A Gaussian whose mean is guidance times the condition, so that a mixed-up row shows. Notes its calls."""

    std: float = 0.3
    sigma_data: float = SIGMA_DATA
    latent_shape: tuple[int, ...] = SHAPE
    calls: list[Tensor] = field(default_factory=list)

    def encode(self, prompts: Sequence[str]) -> Condition:
        embeds = torch.tensor([float(prompt) for prompt in prompts], dtype=torch.float64)[:, None, None]
        return Condition(embeds, torch.ones(len(prompts), 1).long())

    def gaussian(self, condition: Condition, guidance: Tensor) -> GaussianTeacher:
        mean = (guidance * condition.embeds[:, 0, 0]).reshape(-1, 1, 1, 1)
        return GaussianTeacher(mean, torch.tensor(self.std, dtype=torch.float64), self.sigma_data)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        self.calls.append(t)
        return self.gaussian(condition, guidance).velocity(x, t)


def start(num: int = 4) -> tuple[Tensor, Condition, Tensor]:
    """Noise, conditions and guidance scales, different in every row."""
    noise = SIGMA_DATA * torch.randn(num, *SHAPE, dtype=torch.float64)
    condition = ScaledGaussian().encode([f"{0.1 * (i + 1)}" for i in range(num)])
    return noise, condition, torch.linspace(1, 5, num, dtype=torch.float64)


def even_route(num_rows: int, num_steps: int) -> Tensor:
    return torch.linspace(HALF_PI, 0, num_steps + 1, dtype=torch.float64)[:-1].expand(num_rows, -1)


def test_a_walk_follows_the_exact_flow_with_first_order():
    """Halving the steps halves the error of every state on the way and of the end; N steps are N calls."""
    teacher, (noise, condition, guidance) = ScaledGaussian(), start()
    exact = teacher.gaussian(condition, guidance)
    top = torch.full((4,), HALF_PI, dtype=torch.float64)
    ends, states = [], []
    for num_steps in (16, 32, 64, 128):
        teacher.calls.clear()
        route = even_route(4, num_steps)
        path = walk(teacher.velocity, noise, route, condition, guidance)
        assert torch.equal(torch.stack(teacher.calls), route.T) and torch.equal(path.t, route.T)
        assert torch.equal(path.x[0], noise) and path.x.shape == path.dxdt.shape == (num_steps, 4, *SHAPE)
        for x, t, dxdt in zip(path.x, path.t, path.dxdt, strict=True):
            assert torch.equal(dxdt, exact.velocity(x, t))
        half = num_steps // 2
        states.append((path.x[half] - exact.flow_map(noise, top, path.t[half])).abs().max())
        ends.append((path.x0 - exact.consistency(noise, top)).abs().max())
    for errors in (torch.stack(ends), torch.stack(states)):
        assert ((errors[:-1] / errors[1:] - 2).abs() < 0.15).all(), errors
        assert errors[-1] < 0.05


def test_a_step_is_exact_where_data_and_noise_stand_still():
    teacher, (noise, condition, guidance) = ScaledGaussian(std=1e-9), start()
    path = walk(teacher.velocity, noise, even_route(4, 3), condition, guidance)
    mean = teacher.gaussian(condition, guidance).mean
    torch.testing.assert_close(path.x0, mean.expand_as(noise), rtol=0, atol=1e-7)
    cos, sin = (f(path.t)[..., None, None, None] for f in (torch.cos, torch.sin))
    torch.testing.assert_close(path.x, cos * mean + sin * noise, rtol=0, atol=1e-7)


def test_every_row_walks_its_own_route():
    teacher, (noise, condition, guidance) = ScaledGaussian(), start()
    route = torch.rand(4, 5, dtype=torch.float64).sort(dim=1, descending=True).values * HALF_PI
    together = walk(teacher.velocity, noise, route, condition, guidance)
    for i in range(4):
        row = slice(i, i + 1)
        alone = walk(teacher.velocity, noise[row], route[row], condition.rows(row), guidance[row])
        torch.testing.assert_close(alone.x[:, 0], together.x[:, i], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(alone.x0[0], together.x0[i], rtol=1e-13, atol=1e-13)


def numbered(num_steps: int = 4, num_rows: int = 3) -> tuple[Trajectory, Condition, Tensor]:
    """A trajectory whose state n of prompt b is 10 b + n; its velocity and time are that plus a half, a quarter."""
    number = 10.0 * torch.arange(num_rows) + torch.arange(num_steps)[:, None]
    x = number[..., None, None, None].expand(-1, -1, *SHAPE)
    condition = Condition(torch.arange(num_rows).float()[:, None, None] + 100, torch.ones(num_rows, 1).long())
    return Trajectory(x, number + 0.25, x + 0.5, x[-1]), condition, torch.arange(num_rows) + 4.0


@pytest.mark.parametrize(
    ("keep_first", "keep", "expected"),
    [
        (False, [True, True, True], [1, 2, 3, 11, 12, 13, 21, 22, 23]),
        (True, [True, True, True], [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]),
        (False, [True, False, True], [1, 2, 3, 21, 22, 23]),
        (True, [False, True, False], [10, 11, 12, 13]),
        (False, [False, False, False], []),
    ],
)
def test_pairs_come_prompt_by_prompt_from_noise_to_picture(keep_first: bool, keep: list[bool], expected: list[int]):
    path, condition, guidance = numbered()
    pairs = pairs_from(path, condition, guidance, keep_first=keep_first, keep=torch.tensor(keep))
    numbers, prompt = torch.tensor(expected).float(), torch.tensor(expected, dtype=torch.int64) // 10
    assert len(pairs) == len(expected) and pairs.num_drawn == (12 if keep_first else 9)
    assert torch.equal(pairs.x, numbers[:, None, None, None].expand(-1, *SHAPE))
    assert torch.equal(pairs.dxdt, pairs.x + 0.5) and torch.equal(pairs.t, numbers + 0.25)
    assert torch.equal(pairs.prompt, prompt) and torch.equal(pairs.guidance, prompt + 4.0)
    assert torch.equal(pairs.condition.embeds[:, 0, 0], prompt + 100.0) and len(pairs.condition) == len(pairs)


def test_rows_of_pairs_select_everything_alike():
    path, condition, guidance = numbered()
    pairs = pairs_from(path, condition, guidance, keep_first=False, keep=torch.ones(3, dtype=torch.bool))
    part = pairs.rows(slice(2, 5))
    assert part.t.tolist() == [3.25, 11.25, 12.25] and part.x[:, 0, 0, 0].tolist() == [3, 11, 12]
    assert part.dxdt[:, 0, 0, 0].tolist() == [3.5, 11.5, 12.5] and part.prompt.tolist() == [0, 1, 1]
    assert part.guidance.tolist() == [4, 5, 5] and part.condition.embeds[:, 0, 0].tolist() == [100, 101, 101]
    assert part.num_drawn == pairs.num_drawn


def ends_at(*distances: float) -> tuple[Tensor, Tensor]:
    """Clean samples whose mean squared distance to the black latent is as given, and that latent."""
    black = torch.randn(SHAPE)
    return SIGMA_DATA * (black + torch.tensor(distances).sqrt()[:, None, None, None]), black


def test_filter_rules():
    x0, black = ends_at(0.0, 0.5, 0.99, 1.01, 9.0)
    uniform = torch.full((5,), 0.6)
    settings: dict[str, Any] = dict(black=black, sigma_data=SIGMA_DATA, uniform=uniform)
    assert brightness_filter(x0, **settings, threshold=1.0, rule="hard").tolist() == [False, False, False, True, True]
    # random: a keep probability of 0, 0.5, 0.99, 1, 1 against a draw of 0.6
    assert brightness_filter(x0, **settings, threshold=1.0, rule="random").tolist() == [False, False, True, True, True]
    assert brightness_filter(x0, **settings, threshold=0.6, rule="random").tolist() == [False, True, True, True, True]
    assert brightness_filter(x0, **settings, threshold=8.0, rule="hard").tolist() == [False] * 4 + [True]
    with pytest.raises(UserError, match="random or hard"):
        brightness_filter(x0, **settings, threshold=1.0, rule="soft")  # type: ignore[arg-type]


def test_the_random_rule_keeps_in_proportion_to_the_distance():
    x0, black = ends_at(*[0.3] * 1000)
    even = (torch.arange(1000) + 0.5) / 1000
    assert brightness_filter(x0, black, SIGMA_DATA, even, threshold=1.0, rule="random").sum() == pytest.approx(
        300, abs=1
    )
    assert brightness_filter(x0, black, SIGMA_DATA, even, threshold=0.5, rule="random").sum() == pytest.approx(
        600, abs=1
    )


def preset(name: str) -> Config:
    return load_config(name, prompts="prompts.txt", teacher__source="folder")


def pairs_of(config: Config, keep: Sequence[bool]) -> Pairs:
    """What a preset makes of the closed-form teacher."""
    space, (noise, condition, guidance) = config.space, start(len(keep))
    route = torch.stack([draw_route(space, config.seed, 0, i, SIGMA_DATA) for i in range(len(keep))]).double()
    path = walk(ScaledGaussian().velocity, noise, route, condition, guidance)
    return pairs_from(path, condition, guidance, keep_first=space.keep_first, keep=torch.tensor(keep))


def test_the_released_preset_trains_on_fifteen_pairs_of_one_shared_route():
    pairs = pairs_of(preset("released"), [True, True])
    assert len(pairs) == 2 * 15 and pairs.t.max() < HALF_PI - 1e-4
    assert torch.equal(pairs.t[:15], pairs.t[15:])
    assert preset("released").space.filter_rule == "random" and preset("released").space.filter_denominator == "all"


def test_the_paper_preset_trains_on_all_sixteen_pairs_of_a_route_per_prompt():
    pairs = pairs_of(preset("paper"), [True, True])
    assert len(pairs) == 2 * 16 and pairs.t[0] == pairs.t[16] == pytest.approx(HALF_PI, abs=1e-6)
    assert not torch.equal(pairs.t[:16], pairs.t[16:])
    assert preset("paper").space.filter_rule == "hard" and preset("paper").space.filter_denominator == "kept"


class Net(Student):
    """A student in float64 that is linear in its input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        return self.scale * x_unit

    def log_variance(self, t: Tensor, guidance: Tensor, target: Tensor | None = None) -> Tensor:
        return torch.zeros_like(t)


def test_filtered_pairs_count_in_the_denominator_where_the_public_code_counts_them():
    """One of four prompts kept: the mean over all walked pairs is a quarter of the mean over the kept ones."""
    pairs, gradients = pairs_of(preset("released"), [False, False, True, False]), {}
    for rule in ("kept", "all"):
        config = load_config(
            "released",
            [f"space.filter_denominator={rule}", "objective=continuous"],
            prompts="p",
            teacher__source="f",
            training__precision="no",
        )
        student = Net()
        gradient_step(student, pairs, config, 4000)
        assert student.scale.grad is not None
        gradients[rule] = student.scale.grad.item()
    assert abs(gradients["kept"]) > 1e-3
    assert gradients["all"] == pytest.approx(gradients["kept"] / 4, rel=1e-6)
