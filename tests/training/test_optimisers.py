"""Optimisers and the learning rate."""

import pytest
import torch
from torch import nn

from stepfold.config import OptimiserSettings
from stepfold.training import processes
from stepfold.training.optimisers import add_group, learning_rate, make_optimiser


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


@pytest.mark.parametrize("size", [2**26, 10])
def test_came_takes_a_1_x_1_convolution_for_the_matrix_that_it_is(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights come out, in their own memory, from as little state; and in groups of parameters, too."""
    monkeypatch.setattr(processes, "BUCKET", size)
    start = torch.randn(6, 5)
    shapes = [(6, 5), (6, 5, 1, 1), (6, 5, 1), (6, 5, 1, 1, 1)]
    parameters = [nn.Parameter(start.clone().view(shape)) for shape in shapes]
    parameters.append(nn.Parameter(start.clone().view(6, 5, 1, 1).contiguous(memory_format=torch.channels_last)))
    memory = [parameter.data_ptr() for parameter in parameters]
    optimiser = make_optimiser(parameters, OptimiserSettings(name="came", lr=1e-2))
    assert len(optimiser.param_groups) == (1 if size > 10 else 5)
    for _ in range(3):
        loss = torch.stack([(parameter.flatten(1).sin() * start.cos()).sum() for parameter in parameters]).sum()
        loss.backward()
        optimiser.step()
        for parameter in parameters:
            assert parameter.grad is not None and parameter.grad.shape == parameter.shape
        optimiser.zero_grad()
    assert [parameter.data_ptr() for parameter in parameters] == memory
    assert [tuple(parameter.shape) for parameter in parameters] == [*shapes, (6, 5, 1, 1)]
    assert not torch.equal(parameters[0], start)
    for parameter in parameters:
        torch.testing.assert_close(parameter.flatten(1), parameters[0], rtol=1e-6, atol=1e-7)
        kept = sum(value.numel() for value in optimiser.state[parameter].values() if isinstance(value, torch.Tensor))
        assert kept <= 30 + 2 * (6 + 5) + 2


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


@pytest.mark.parametrize("name", ["adamw", "came"])
def test_a_critics_group_walks_as_an_optimiser_of_its_own_and_waits_without_gradients(name: str) -> None:
    """Its updates stand between the student's, as in a run: a group without gradients neither moves nor decays."""
    settings = OptimiserSettings(name=name, lr=0.05, weight_decay=0.1, betas=(0.5, 0.9))  # type: ignore[arg-type]
    starts = [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    together, apart = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    both = make_optimiser(together[:1], settings)
    add_group(both, "fake", together[1:], None)
    each = [make_optimiser([parameter], settings) for parameter in apart]
    for update in range(9):
        turn = 0 if update % 3 == 2 else 1  # two of the critic's, then the student's
        for parameter in (together[turn], apart[turn]):
            parameter.grad = torch.sin(7 * parameter.detach() + update)
        before = together[1 - turn].detach().clone()
        for optimiser in (both, each[turn]):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        assert torch.equal(together[1 - turn], before)
    for ours, theirs, start in zip(together, apart, starts, strict=True):
        assert torch.equal(ours, theirs) and not torch.equal(ours, start)
