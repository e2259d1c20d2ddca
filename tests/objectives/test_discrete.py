import math

import pytest
import torch

from stepfold.maths.closed_form import GaussianTeacher
from stepfold.maths.formulations import euler_step
from stepfold.objectives.discrete import discrete_terms

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
