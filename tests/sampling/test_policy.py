"""The DX policy's identities, in float64, and diffusers' own scheduler beside it."""

import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from stepfold.maths.closed_form import GaussianTeacher
from stepfold.maths.formulations import (
    data_prediction,
    dxdt_from_denoised,
    euler_step,
    flow_time,
    trigflow_time,
)
from stepfold.maths.policy import Policy, combined, unshifted
from stepfold.sampling.flow import sample_flow
from stepfold.sampling.policy import sample_policy
from stepfold.teachers.contract import Condition, Student

SIGMA_DATA, NODES = 0.5, 5
SEGMENTS = [(math.pi / 2, 0.9), (1.2, 0.3), (0.7, 0.0), (math.pi / 2, 0.0)]
each_segment = pytest.mark.parametrize(("t", "t_next"), SEGMENTS)
LAW = GaussianTeacher(torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64), SIGMA_DATA)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def at(time: float | Tensor, x: Tensor) -> Tensor:
    return torch.full((len(x),), float(time), dtype=x.dtype)


def followed(policy: Policy, x: Tensor, t: float, t_next: float, velocities: Tensor) -> Tensor:
    """The policy's Euler steps one by one, by its definition: x_0 linear between nodes even in unshifted flow time."""
    nodes = [data_prediction(x, at(t, x), v) for v in velocities.chunk(policy.nodes, 1)]
    first, last = (
        unshifted(flow_time(torch.tensor(time, dtype=torch.float64)), policy.shift).item() for time in (t, t_next)
    )
    raw = [first + i / policy.substeps * (last - first) for i in range(policy.substeps + 1)]
    shifted = torch.tensor(raw, dtype=torch.float64)
    times = list(trigflow_time(policy.shift * shifted / (1 + (policy.shift - 1) * shifted)))
    for u, now, then in zip(raw, times, times[1:], strict=False):
        place = (u - last) / (first - last) * (policy.nodes - 1)
        low = min(int(place), policy.nodes - 2)
        x0 = (low + 1 - place) * nodes[low] + (place - low) * nodes[low + 1]
        x = euler_step(x, at(now, x), at(then, x), dxdt_from_denoised(x, at(now, x), x0))
    return x


@each_segment
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_rollout_is_one_step_with_a_mean_of_the_velocities(t: float, t_next: float, shift: float) -> None:
    policy, x, velocities = Policy(NODES, 32, shift), normal(2, 3, 4, 4), normal(2, NODES * 3, 4, 4, seed=1)
    path = policy.path(t, t_next)
    torch.testing.assert_close(path.means.sum(1), torch.ones(33).double(), rtol=0, atol=1e-12)
    one = euler_step(x, at(t, x), at(t_next, x), combined(velocities, path.means[-1]))
    torch.testing.assert_close(one, followed(policy, x, t, t_next, velocities), rtol=0, atol=1e-12)
    wrong = euler_step(x, at(t, x), at(t_next, x), combined(velocities, path.means[-1].flip(0)))
    assert (wrong - one).abs().max() > 1e-3


@each_segment
def test_the_weights_on_the_way_are_those_of_the_steps_so_far(t: float, t_next: float) -> None:
    policy, x, velocities = Policy(NODES, 8, 2.0), normal(1, 3), normal(1, NODES * 3, seed=1)
    path = policy.path(t, t_next)
    states = [euler_step(x, at(t, x), at(s, x), combined(velocities, w)) for s, w in zip(*path[::2], strict=True)]
    torch.testing.assert_close(states[0], x, rtol=0, atol=1e-15)
    for i in range(8):
        x0 = data_prediction(x, at(t, x), combined(velocities, path.nodes[i]))
        now, then = (at(path.times[k], x) for k in (i, i + 1))
        ahead = euler_step(states[i], now, then, dxdt_from_denoised(states[i], now, x0))
        torch.testing.assert_close(states[i + 1], ahead, rtol=0, atol=1e-12)


@each_segment
def test_nodes_of_the_teachers_euler_times_make_the_teachers_own_steps(t: float, t_next: float) -> None:
    """N - 1 Euler steps, whose x_0 are the nodes from the first to the one before the last."""
    policy, start = Policy(NODES, NODES - 1, 3.0), normal(2, 3)
    path, x, nodes = policy.path(t, t_next), start, []
    for now, then in zip(path.times, path.times[1:], strict=False):
        dxdt = LAW.velocity(x, at(now, x))
        nodes.append(data_prediction(x, at(now, x), dxdt))
        x = euler_step(x, at(now, x), at(then, x), dxdt)
    path_x0 = torch.stack([*nodes, normal(2, 3, seed=5)]).flip(0)  # node 0 is at the end, and nothing asks for it
    velocities = torch.cat([dxdt_from_denoised(start, at(t, start), x0) for x0 in path_x0], 1)
    ours = euler_step(start, at(t, start), at(t_next, start), combined(velocities, path.means[-1]))
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)
    finer = combined(velocities, Policy(NODES, 2 * NODES, 3.0).path(t, t_next).means[-1])
    assert (euler_step(start, at(t, start), at(t_next, start), finer) - x).abs().max() > 1e-3


class Heads(Student):
    """N F of a channel each: those of Gaussians of several means, or all of the same."""

    def __init__(self, means: Tensor) -> None:
        super().__init__()
        self.means, self.policy = nn.Parameter(means), Policy(len(means), 16, 2.0)

    def forward(self, x_unit: Tensor, t: Tensor, *rest: object) -> Tensor:
        laws = [GaussianTeacher(mean, LAW.std, SIGMA_DATA) for mean in self.means]
        return torch.cat([law.velocity(SIGMA_DATA * x_unit, t) / SIGMA_DATA for law in laws], 1)


NOTHING = Condition(torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.long))


@pytest.mark.parametrize("times", [(math.pi / 2,), (math.pi / 2, 1.3, 0.8)])
def test_equal_velocities_are_the_teachers_euler_steps_and_others_are_not(times: tuple[float, ...]) -> None:
    class Velocity(Heads):
        def forward(self, x_unit: Tensor, t: Tensor, *rest: object) -> Tensor:
            return LAW.velocity(SIGMA_DATA * x_unit, t) / SIGMA_DATA

    told = (SIGMA_DATA * normal(2, 3), NOTHING, torch.ones(2), times, lambda i: torch.empty(0), SIGMA_DATA)
    same = torch.full((NODES,), 0.4, dtype=torch.float64)
    steps = sample_flow(Velocity(same), *told)
    torch.testing.assert_close(sample_policy(Heads(same), *told), steps, rtol=0, atol=1e-12)
    assert (sample_policy(Heads(same + torch.arange(NODES) / 10), *told) - steps).abs().max() > 0.01


@pytest.mark.skipif(not hasattr(diffusers, "PiflowScheduler"), reason="a diffusers without it")
def test_our_steps_are_those_of_diffusers_own_scheduler() -> None:
    """Its layout is channels last, its levels are its own, and its policy is the same."""
    theirs: Any = diffusers.PiflowScheduler(shift=3.2, n_grid=NODES, num_policy_substeps=14, eps=1e-9)
    theirs.set_timesteps(4)
    levels = theirs.sigmas.double()
    x = normal(2, 6, 3)
    for i in range(4):
        t, t_next = trigflow_time(levels[i]), trigflow_time(levels[i + 1])
        last = i == 3
        policy = Policy(NODES, 2 if last else 4, 3.2)  # a half-size last segment, of as many steps a unit of time
        v = normal(2, 6, NODES * 3, seed=i)
        stepped = theirs.step(v.float(), theirs.timesteps[i], x.float()).prev_sample
        mean = combined(v.mT, policy.path(float(t), float(t_next)).means[-1]).mT
        x = x + (levels[i + 1] - levels[i]) * mean  # Euler's step in flow matching is the same operation
        torch.testing.assert_close(stepped.double(), x, rtol=0, atol=2e-4 if last else 2e-5)
