import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from gaussians import SIGMA_DATA, Law, Map, batch_of, gaussian, nothing
from torch import Tensor

from stepfold.config import load_config
from stepfold.maths.closed_form import GaussianTeacher
from stepfold.maths.formulations import euler_step
from stepfold.objectives.contract import Loss, Networks
from stepfold.objectives.discrete import discrete_loss, discrete_terms
from stepfold.spaces.generation import pairs_from, walk
from stepfold.spaces.records import Pairs
from stepfold.spaces.targets import edge_below

SHAPE = (3, 2, 2)
D = 12


def test_the_distance_is_pseudo_huber_by_hand():
    x0, target = torch.randn(2, 4, *SHAPE, dtype=torch.float64)
    terms = discrete_terms(x0, target, 0.3)
    for i in range(4):
        total = sum((a - b) ** 2 for a, b in zip(x0[i].flatten().tolist(), target[i].flatten().tolist(), strict=True))
        constant = 0.3 * math.sqrt(D)
        assert terms.squared_error[i].item() == pytest.approx(total / D, rel=1e-6)
        by_hand = (math.sqrt(total + constant**2) - constant) / math.sqrt(D)
        assert terms.loss[i].item() == pytest.approx(by_hand, rel=1e-6)


def test_no_gradient_reaches_the_target_and_equal_pictures_cost_nothing():
    x0 = torch.randn(4, *SHAPE, requires_grad=True)
    target = (x0 + 1).clone()
    discrete_terms(x0, target, 0.1).loss.sum().backward()
    toward = x0.grad
    assert toward is not None and (toward < 0).all()  # down the loss is up, towards the target; through it, it is 0
    assert discrete_terms(x0.detach(), x0.detach(), 0.1).loss.abs().max() == 0


def test_at_constant_0_equal_pictures_have_no_gradient_and_others_a_unit_one():
    """The norm of a difference; its slope at none is 0, where that of a bare root is NaN."""
    target = torch.randn(2, *SHAPE)
    apart = torch.randn(1, *SHAPE)
    x0 = (target + torch.cat([torch.zeros(1, *SHAPE), apart])).requires_grad_()
    terms = discrete_terms(x0, target, 0.0)
    terms.loss.sum().backward()
    assert x0.grad is not None and torch.equal(x0.grad[0], torch.zeros(SHAPE)) and terms.loss[0].item() < 1e-18
    torch.testing.assert_close(x0.grad[1], apart[0] / apart.norm() / math.sqrt(D))
    torch.testing.assert_close(terms.loss[1].detach(), apart.norm() / math.sqrt(D))


def test_the_exact_flow_map_costs_ever_less_on_finer_routes():
    """f is constant along the ODE, and a first-order step leaves it by the square of its length."""
    teacher = GaussianTeacher(torch.zeros(SHAPE).double(), torch.tensor(0.2).double(), 0.5)
    x, t = 0.5 * torch.randn(64, *SHAPE).double(), torch.full((64,), 1.0).double()
    errors = []
    for step in (0.2, 0.1, 0.05):
        x_next = euler_step(x, t, t - step, teacher.velocity(x, t))
        terms = discrete_terms(teacher.consistency(x, t), teacher.consistency(x_next, t - step), 0.0)
        errors.append(terms.loss.mean())
    ratios = torch.stack(errors[:-1]) / torch.stack(errors[1:])
    assert ((ratios - 4).abs() < 0.8).all(), ratios


EDGES = [math.pi / 2, 1.1, 0.5]
"""Times of three steps; none of them is a time of the walks below."""


def walked(num_steps: int, edges: list[float] = EDGES) -> Pairs:
    """Two walks of N(0.4, 0.2^2) in float64, each state asked to jump to the lower end of its segment."""
    route = torch.linspace(math.pi / 2, 0, num_steps + 1).double()[:-1].expand(2, num_steps)
    noise = SIGMA_DATA * torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    law, ones = gaussian(0.4, 0.2), torch.ones(2)
    path = walk(lambda x, t, *_: law.velocity(x, t), noise, route, nothing(2), ones)
    pairs = pairs_from(path, nothing(2), ones, keep_first=True, keep=None)
    return replace(pairs, t_target=edge_below(pairs.t, edges))


def loss_of(student: Any, pairs: Pairs, rule: str = "edge", changes: Sequence[str] = ()) -> Loss:
    config = load_config("default", ["student.times=two", "objective=discrete", f"target.rule={rule}", *changes])
    return discrete_loss(Networks(student, Law(0.4, 0.2)), pairs, batch_of(2).draws, config, 0)  # type: ignore[arg-type]


def landings(student: Any, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return euler_step(x, t, s, SIGMA_DATA * student(x / SIGMA_DATA, t, None, None, s))


def test_a_jump_lands_where_that_of_the_walks_next_state_does():
    """Where the next state lies beyond the target, the teacher's step is cut at it; one pass gives what two do."""
    pairs, student = walked(8), Map(0.3, 0.3)
    s = pairs.t_target
    assert s is not None and bool((pairs.t_next < s).any()) and bool((pairs.t_next > s).any())
    m = torch.maximum(pairs.t_next, s)
    x_m = euler_step(pairs.x, pairs.t, m, pairs.dxdt)
    target = torch.where((m > s)[:, None], landings(student, x_m, m, s), x_m)
    wanted = (landings(student, pairs.x, pairs.t, s) - target).square().mean(1)
    exact: dict[str, Any] = dict(rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(loss_of(student, pairs).metrics["squared_error"], wanted, **exact)
    cut = replace(pairs, walk_length=0)  # by a micro-batch
    torch.testing.assert_close(loss_of(student, cut).metrics["squared_error"], wanted, **exact)


def test_targets_that_a_walk_does_not_share_take_a_second_pass():
    pairs, student = walked(8), Map(0.3, 0.3)
    pairs = replace(pairs, t_target=pairs.t * torch.linspace(0.1, 0.9, len(pairs)).double())
    m = torch.maximum(pairs.t_next, pairs.t_target)  # type: ignore[arg-type]
    x_m = euler_step(pairs.x, pairs.t, m, pairs.dxdt)
    wanted = landings(student, pairs.x, pairs.t, pairs.t_target) - landings(student, x_m, m, pairs.t_target)  # type: ignore[arg-type]
    found = loss_of(student, pairs, "uniform").metrics["squared_error"]
    torch.testing.assert_close(found, wanted.square().mean(1), rtol=1e-12, atol=1e-15)


def test_the_exact_flow_map_costs_ever_less_on_finer_walks():
    """To every edge; another map does not."""
    errors = [loss_of(Map(0.4, 0.2), walked(n)).metrics["squared_error"].max().sqrt() for n in (32, 64, 128)]
    assert 3 < errors[0] / errors[1] < 5 and 3 < errors[1] / errors[2] < 5
    wrong = [loss_of(Map(0.4, 0.3), walked(n)).metrics["squared_error"].max().sqrt() for n in (64, 128)]
    assert wrong[1] > 10 * errors[2] and wrong[0] / wrong[1] < 3


def test_one_segment_is_discrete_consistency():
    pairs = walked(8, [math.pi / 2])
    assert torch.equal(pairs.t_target, torch.zeros_like(pairs.t))  # type: ignore[arg-type]
    told, plain = loss_of(Map(0.3, 0.3), pairs), loss_of(Map(0.3, 0.3), replace(pairs, t_target=None), "zero")
    torch.testing.assert_close(told.value, plain.value, rtol=1e-12, atol=1e-15)


def test_what_a_jump_misses_counts_by_the_number_of_jumps():
    pairs, student = walked(8), Map(0.3, 0.3)
    once = loss_of(student, pairs).metrics["squared_error"]
    times = torch.arange(1, len(pairs) + 1).double()
    for power in (0.0, 0.5, 1.0):
        often = loss_of(student, replace(pairs, num_jumps=times), changes=[f"discrete.jump_power={power}"])
        torch.testing.assert_close(often.metrics["squared_error"], times ** (2 * power) * once, rtol=1e-12, atol=0)
