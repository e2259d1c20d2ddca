"""Optimisers and the learning rate."""

import pytest
import torch
from torch import nn

from stepfold.config import OptimiserSettings
from stepfold.training.optimisers import learning_rate, make_optimiser


def rates(steps: int, **settings: float) -> list[float]:
    return [learning_rate(step, steps, OptimiserSettings(**settings)) for step in range(steps)]  # type: ignore[arg-type]


def test_learning_rate_is_constant_by_default() -> None:
    assert rates(5, lr=0.3) == [0.3] * 5


def test_learning_rate_rises_holds_and_falls() -> None:
    got = rates(20, lr=2.0, warmup=4, decay=0.25)
    assert got[:4] == [0.5, 1.0, 1.5, 2.0]
    assert got[4:16] == [2.0] * 12
    assert got[15:] == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])


def test_learning_rate_is_positive_in_every_step_and_zero_right_after() -> None:
    settings = OptimiserSettings(lr=1.0, warmup=3, decay=1.0)
    assert min(rates(7, lr=1.0, warmup=3, decay=1.0)) > 0
    assert learning_rate(7, 7, settings) == 0


def test_warm_up_longer_than_the_run_never_passes_the_peak() -> None:
    assert rates(3, lr=1.0, warmup=10) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("name", ["adamw", "came"])
def test_every_parameter_moves_against_its_gradient(name: str) -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3,), (4, 3), (2, 3, 3, 3), (1, 1, 5), (1,))]
    optimiser = make_optimiser(parameters, OptimiserSettings(name=name, lr=1e-2))  # type: ignore[arg-type]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.7)
    optimiser.step()
    for parameter in parameters:
        assert (parameter < 0).all(), tuple(parameter.shape)
        assert (parameter.abs() < 0.2).all()  # CAME: about 11 lr in its first step


@pytest.mark.parametrize("name", ["adamw", "came"])
def test_weight_decay_pulls_to_zero(name: str) -> None:
    parameter = nn.Parameter(torch.ones(4, 4))
    settings = OptimiserSettings(name=name, lr=0.1, weight_decay=0.5)  # type: ignore[arg-type]
    optimiser = make_optimiser([parameter], settings)
    parameter.grad = torch.zeros(4, 4)
    optimiser.step()
    assert torch.allclose(parameter, torch.full((4, 4), 0.95), atol=1e-6)


def test_optimisers_reach_a_minimum() -> None:
    for name in ("adamw", "came"):
        target = torch.linspace(-1, 1, 12).view(3, 4)
        parameter = nn.Parameter(torch.zeros(3, 4))
        optimiser = make_optimiser([parameter], OptimiserSettings(name=name, lr=2e-2))  # type: ignore[arg-type]
        for _ in range(300):
            optimiser.zero_grad()
            (parameter - target).square().sum().backward()
            optimiser.step()
        assert (parameter - target).square().mean() < 0.02 * target.square().mean(), name
