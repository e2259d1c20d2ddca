"""The numbers behind the figures, on a Gaussian teacher."""

import math

import pytest
import torch
from torch import Tensor

from stepfold.config import SpaceSettings
from stepfold.maths.closed_form import GaussianTeacher
from stepfold.reproduction.figures import SCHEMES, route_numbers, walk_numbers
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
    for scheme in SCHEMES:
        rows = numbers[scheme]
        assert rows["noise_forward"] == pytest.approx([1.0] * 16, abs=1e-4)
        assert rows["noise_backward"][0] == pytest.approx(1.0, abs=1e-4)
        assert len(rows["t"]) == 16 and rows["t"] == sorted(rows["t"], reverse=True)
        assert rows["picture_error"][-1] < rows["picture_error"][0]
    assert len(numbers["darkness"]) == 6
    assert all(0 < m < 1 for m in numbers["darkness"])  # the picture's variance, in units of the data's
