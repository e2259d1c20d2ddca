"""The numbers behind the figures, on a Gaussian teacher."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepfold.config import SpaceSettings
from stepfold.maths.closed_form import GaussianTeacher
from stepfold.reproduction.figures import (
    SCHEMES,
    TABLE_FIGURES,
    draw_all,
    draw_memory,
    draw_quality_and_cost,
    draw_stages,
    plane,
    route_numbers,
    walk_numbers,
)
from stepfold.teachers.contract import Condition


class Gaussian:
    """Mean 0; its flow map scales noise, so that a walk's states all lie along it."""

    sigma_data, latent_shape = 0.5, (2, 4, 4)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        return GaussianTeacher(torch.zeros(1), torch.tensor(0.2), self.sigma_data).velocity(x, t)


def test_densities_sum_to_one_and_routes_begin_at_the_top():
    numbers = route_numbers(SpaceSettings(), 0.5, num_routes=300)
    assert set(numbers) == set(SCHEMES)
    for scheme in SCHEMES:
        assert sum(numbers[scheme]["shares"]) == pytest.approx(1)
        assert len(numbers[scheme]["routes"]) == 5
        for route in numbers[scheme]["routes"]:
            assert route[0] == pytest.approx(math.pi / 2) and route == sorted(route, reverse=True)
    top = {scheme: sum(numbers[scheme]["shares"][20:]) for scheme in SCHEMES}
    assert abs(top["random"] - 0.5) < 0.07 and top["reference"] > 0.6  # a shift of 2.5 leans towards noise


def test_equivalent_noise_is_its_own_on_the_forward_process():
    condition = Condition(torch.zeros(6, 1, 1), torch.ones(6, 1).long())
    black = torch.zeros(2, 4, 4)
    numbers = walk_numbers(Gaussian(), condition, torch.ones(6), SpaceSettings(), black)  # type: ignore[arg-type]
    assert set(numbers["schemes"]) == set(SCHEMES)
    assert [len(rows["t"]) for rows in numbers["counts"].values()] == [4, 8, 16, 32]
    for rows in numbers["schemes"].values():
        assert rows["noise_forward"] == pytest.approx([1.0] * 16, abs=1e-4)
        assert rows["noise_backward"][0] == pytest.approx(1.0, abs=1e-4)
        assert len(rows["t"]) == 16 and rows["t"] == sorted(rows["t"], reverse=True)
        assert rows["picture_error"][-1] < rows["picture_error"][0]
    assert len(numbers["darkness"]) == 6
    assert all(0 < m < 1 for m in numbers["darkness"])  # the picture's variance, in units of the data's
    maps, tsne = numbers["maps"], numbers["tsne"]
    assert len(maps["t"]) == 5 and maps["t"][0] == pytest.approx(math.pi / 2)
    for later in maps["forward"][1:]:
        torch.testing.assert_close(torch.tensor(later), torch.tensor(maps["forward"][0]), rtol=1e-3, atol=1e-3)
    assert [len(points) for points in tsne["points"]] == [6] * 5 and len(tsne["points"][0][0]) == 2


def test_points_that_are_far_apart_stay_apart_in_the_plane():
    near, far = torch.randn(20, 8), torch.randn(20, 8) + 30
    a, b = (torch.tensor(points) for points in plane([near, far]))
    assert torch.cdist(a, b).min() > torch.cdist(a, a.mean(0)[None]).mean()


def record(row: float, **changes: Any) -> dict[str, Any]:
    return {
        "diverged": False, "steps": 240, "sec_per_step": row, "pairs_per_step": 60.0, "peak_memory_gib": 1 + row,
        "stages_sec": {"teacher": row / 2, "optimiser": row / 2}, "student": {"1": {"fd": row / 10}}, **changes,
    }  # fmt: skip


def test_figures_of_tables_show_what_the_records_say():
    stages = draw_stages({"a": [record(1.0), record(2.0)], "b": [record(3.0)], "c; 9": [record(1.0, pairs_per_step=9)]})
    bars = [[round(bar.get_width()) for bar in bars] for bars in stages.axes[0].containers]
    assert bars == [[750, 1500], [750, 1500]]  # teacher of a and b, optimiser of a and b; c has other pairs
    memory = draw_memory({"a": [record(1.0)], "a; 9": [record(0.5, pairs_per_step=9)], "b": [record(3.0)]})
    assert [line.get_xydata().tolist() for line in memory.axes[0].lines] == [[[9, 1.5], [60, 2]], [[60, 4]]]
    quality = draw_quality_and_cost({"a": [record(1.0), record(2.0)], "b": [record(1.0, sec_per_step=None)]})
    assert len(quality.axes[0].containers) == 1
    assert quality.axes[0].containers[0].lines[0].get_xydata().tolist() == [[pytest.approx(6), pytest.approx(0.15)]]


def test_only_figures_with_numbers_are_drawn(tmp_path: Path):
    assert draw_all({}, {}, tmp_path) == {} and not list(tmp_path.iterdir())
    untimed = record(1.0, sec_per_step=None, stages_sec=None)
    assert draw_all({}, {"T2": {"a": [untimed]}, "T3": {"a": [{"diverged": True}]}}, tmp_path) == {}
    assert set(draw_all({}, {"T2": {"a": [record(1.0)]}, "T3": {"a": [record(1.0)]}}, tmp_path)) == set(TABLE_FIGURES)
