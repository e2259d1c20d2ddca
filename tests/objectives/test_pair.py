"""Pairs of a walk's states: neighbours give the teacher's velocity, the end gives its picture, exact states the map."""

import math
from typing import Any

import pytest
import torch
from gaussians import SIGMA_DATA, Law, Map, batch_of, gaussian, nothing
from torch import Tensor

from stepfold.config import load_config
from stepfold.maths.formulations import euler_step, flow_input, flow_time, flow_velocity, unsqueeze_like
from stepfold.objectives import pair
from stepfold.objectives.contract import Networks
from stepfold.objectives.pair import SHORTEST, jump_velocity, pair_loss
from stepfold.spaces.generation import Trajectory, pairs_from, walk
from stepfold.spaces.records import Pairs

EXACT: dict[str, Any] = dict(rtol=1e-12, atol=1e-12)


def walked(num_steps: int = 12) -> tuple[Pairs, Trajectory]:
    """Four of the teacher's walks, every state of them."""
    route = torch.linspace(math.pi / 2, 0, num_steps + 1).double()[:-1].expand(4, -1)
    noise = SIGMA_DATA * torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    found = walk(Law(0.4, 0.2).velocity, noise, route, nothing(4), torch.ones(4))
    return pairs_from(found, nothing(4), torch.ones(4), keep_first=True, keep=None), found


def exact() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, t, the exact state at s, s, dx/dt."""
    t, s = torch.linspace(0.2, math.pi / 2, 9).double(), torch.linspace(0, 1.3, 9).double() * torch.linspace(1, 0.5, 9)
    s = torch.minimum(s, t - 0.05)
    law, x = gaussian(0.4, 0.2), torch.randn(9, 3).double()
    return x, t, law.flow_map(x, t, s), s, law.velocity(x, t)


def test_a_neighbour_gives_the_teachers_velocity_to_rounding() -> None:
    pairs, trajectory = walked()
    at = trajectory.x.flatten(0, 1)
    ends = torch.cat([trajectory.x[1:], trajectory.x0[None]]).flatten(0, 1)
    t = trajectory.t.flatten()
    s = torch.cat([trajectory.t[1:], torch.zeros_like(trajectory.t[:1])]).flatten()
    dxdt = trajectory.dxdt.flatten(0, 1)
    torch.testing.assert_close(jump_velocity(at, t, ends, s, dxdt), dxdt, rtol=1e-11, atol=1e-11)
    assert len(pairs) == len(at)


def test_the_walks_end_is_regression_on_its_picture() -> None:
    """The jump that the target makes ends at x_0, so the loss is that of the picture, weighted."""
    pairs, _ = walked()
    zero = torch.zeros_like(pairs.t)
    target = jump_velocity(pairs.x, pairs.t, pairs.x0, zero, pairs.dxdt)
    torch.testing.assert_close(euler_step(pairs.x, pairs.t, zero, target), pairs.x0, **EXACT)
    student, config = Map(0.3, 0.3), load_config("default", ["objective=pair"])
    networks: Any = Networks(student, Law())  # type: ignore[arg-type]
    loss = pair_loss(networks, pairs, batch_of(4).draws, config, 0)
    picture = euler_step(pairs.x, pairs.t, zero, SIGMA_DATA * student(pairs.x / SIGMA_DATA, pairs.t, *[None] * 2))  # type: ignore[arg-type]
    apart = (picture - pairs.x0) / unsqueeze_like(SIGMA_DATA * pairs.t.sin(), picture)
    torch.testing.assert_close(loss.value, apart.square().mean(1), rtol=1e-10, atol=1e-12)


def test_exact_states_give_the_exact_flow_map_and_flow_matchings_mean_velocity() -> None:
    x, t, landing, s, dxdt = exact()
    found = jump_velocity(x, t, landing, s, dxdt) / SIGMA_DATA
    torch.testing.assert_close(found, gaussian(0.4, 0.2).F_of_flow_map(x, t, s), rtol=1e-11, atol=1e-11)
    x_flow, ahead, t_flow, s_flow = (
        flow_input(x, t, SIGMA_DATA), flow_input(landing, s, SIGMA_DATA), flow_time(t), flow_time(s),
    )  # fmt: skip
    mean = (x_flow - ahead) / unsqueeze_like(t_flow - s_flow, x)
    torch.testing.assert_close(flow_velocity(x_flow, t_flow, found), mean, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [0.0, SHORTEST / 2])
def test_a_jump_of_no_length_has_the_velocity_as_its_target(length: float) -> None:
    x, t, _, _, dxdt = exact()
    near = (x * 1.001).float()
    found = jump_velocity(x.float(), t.float(), near, (t - length).float(), dxdt.float())
    assert torch.equal(found, dxdt.float())


WRONG = {
    "the state is not turned": lambda x, t, landing, s, v: (x - landing) / unsqueeze_like((t - s).sin(), x),
    "the jump goes up": lambda x, t, landing, s, v: jump_velocity(x, t, landing, t + (t - s), v),
    "t in place of the interval": lambda x, t, landing, s, v: jump_velocity(x, t, landing, 0 * s, v),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_seen(mistake: str) -> None:
    x, t, landing, s, dxdt = exact()
    found = WRONG[mistake](x, t, landing, s, dxdt) / SIGMA_DATA
    assert (found - gaussian(0.4, 0.2).F_of_flow_map(x, t, s)).abs().max() > 0.05


def test_the_gradient_is_that_of_the_square() -> None:
    x, t, landing, s, dxdt = exact()
    pairs = Pairs(
        x=x, t=t, dxdt=dxdt, t_next=s, x0=landing, condition=nothing(9), guidance=torch.ones(9), num_drawn=9,
        prompt=torch.arange(9), number=torch.arange(9), t_target=s, x_target=landing,
    )  # fmt: skip
    student, config = Map(0.3, 0.3), load_config("default", ["objective=pair"])
    networks: Any = Networks(student, Law())  # type: ignore[arg-type]
    loss = pair_loss(networks, pairs, batch_of(4).draws, config, 0).value.sum()
    F = student(x / SIGMA_DATA, t, nothing(9), torch.ones(9), s)
    wanted = torch.autograd.grad(
        (2 / 3 * (F.detach() - gaussian(0.4, 0.2).F_of_flow_map(x, t, s)) * F).sum(), list(student.parameters())
    )
    for ours, theirs in zip(torch.autograd.grad(loss, list(student.parameters())), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_nothing_is_differentiated_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "total_derivative" not in vars(pair)
