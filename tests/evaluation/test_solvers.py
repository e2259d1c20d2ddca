"""Solvers on a Gaussian teacher, whose ODE ends where its flow map says."""

from typing import Any

import pytest
import torch
from torch import Tensor

from stepfold.errors import UserError
from stepfold.evaluation.solvers import make_scheduler, solver_sampler
from stepfold.maths.closed_form import GaussianTeacher
from stepfold.maths.routes import half_pi
from stepfold.sampling.teacher import sample_teacher
from stepfold.teachers.contract import Condition

SHAPE = (2, 4, 4)


class Gaussian:
    """Its mean is guidance times the condition. Counts its calls."""

    sigma_data, shift, ode = 0.5, 1.0, "flow"

    def __init__(self) -> None:
        self.num_calls = 0

    def exact(self, condition: Condition, guidance: Tensor) -> GaussianTeacher:
        mean = (guidance * condition.embeds[:, 0, 0]).reshape(-1, 1, 1, 1)
        return GaussianTeacher(mean, torch.tensor(0.2, dtype=torch.float64), self.sigma_data)

    def shift_at(self, num_steps: int) -> float:
        return self.shift

    def velocity(self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        self.num_calls += 1
        return self.exact(condition, guidance).velocity(x, t)


def start(num: int = 4) -> tuple[Tensor, Condition, Tensor]:
    condition = Condition(torch.linspace(-0.2, 0.2, num).double()[:, None, None], torch.ones(num, 1).long())
    return 0.5 * torch.randn(num, *SHAPE).double(), condition, torch.linspace(1, 5, num).double()


def error(solver: Any, num_steps: int) -> tuple[float, int]:
    """Largest distance to the flow map, and the number of network calls."""
    teacher, (noise, condition, guidance) = Gaussian(), start()
    x0 = solver_sampler(teacher, solver, num_steps)(noise, condition, guidance, range(4))  # type: ignore[arg-type]
    top = torch.full((4,), half_pi(torch.float64)).double()
    exact = teacher.exact(condition, guidance).consistency(noise, top)
    return (x0 - exact).abs().max().item(), teacher.num_calls


def test_euler_is_the_teachers_own_sampler():
    teacher, (noise, condition, guidance) = Gaussian(), start()
    solved = solver_sampler(teacher, "euler", 7)(noise, condition, guidance, range(4))  # type: ignore[arg-type]
    own = sample_teacher(teacher, noise, condition, guidance, 7)  # type: ignore[arg-type]
    torch.testing.assert_close(solved, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("solver", "calls"), [("euler", 20), ("heun", 39), ("dpmsolver++", 20)])
def test_solvers_end_at_the_flow_map(solver: str, calls: int):
    distance, num_calls = error(solver, 20)
    assert num_calls == calls
    assert distance < 0.08
    assert error(solver, 5)[0] > 2 * distance


def test_higher_order_is_nearer_than_euler():
    euler = error("euler", 20)[0]
    assert error("heun", 20)[0] < euler / 2
    assert error("dpmsolver++", 20)[0] < euler / 2


def test_an_unknown_solver_is_named():
    with pytest.raises(UserError, match=r"unknown solver 'rk45'; use one of euler, heun, dpmsolver\+\+"):
        make_scheduler("rk45", 1.0)  # type: ignore[arg-type]
