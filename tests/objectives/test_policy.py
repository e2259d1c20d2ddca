"""Policy imitation on a Gaussian teacher, in float64: states, weights, and the policy whose loss is 0."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from gaussians import SIGMA_DATA, Law, batch_of, double, gaussian, nothing
from torch import Tensor, nn

from stepfold.config import Config, load_config
from stepfold.errors import UserError
from stepfold.maths.closed_form import GaussianTeacher
from stepfold.maths.formulations import data_prediction, dxdt_from_denoised, euler_step
from stepfold.maths.policy import Policy
from stepfold.objectives.contract import Loss, Networks
from stepfold.objectives.policy import policy_loss
from stepfold.sampling.policy import sample_policy
from stepfold.spaces.policy import PolicyStates, policy_states
from stepfold.teachers.contract import Student
from stepfold.training.states import collect

LAW, NODES, STEPS = Law(0.4, 0.2), 4, 3


class Follower(Student):
    """The perfect policy, whose nodes are those of the teacher's own Euler steps, plus an offset."""

    def __init__(self, policy: Policy, times: list[float]) -> None:
        super().__init__()
        self.policy, self.ends = policy, dict(pairwise([*times, 0.0]))
        self.offset = nn.Parameter(torch.zeros(policy.nodes, dtype=torch.float64))

    def forward(self, x_unit: Tensor, t: Tensor, *rest: Any) -> Tensor:
        rows = [self.nodes_of(SIGMA_DATA * x[None], float(time)) for x, time in zip(x_unit, t, strict=True)]
        return torch.cat(rows) + self.offset.repeat_interleave(x_unit.shape[1])

    def nodes_of(self, x: Tensor, time: float) -> Tensor:
        assert self.policy is not None
        start = min(self.ends, key=lambda known: abs(known - time))
        path, found, state = self.policy.path(start, self.ends[start]), list[Tensor](), x
        fine = Policy(self.policy.nodes, self.policy.nodes - 1, self.policy.shift).path(start, self.ends[start])
        for now, then in pairwise(fine.times):
            dxdt = gaussian(0.4, 0.2).velocity(state, now[None])
            found.insert(0, data_prediction(state, now[None], dxdt))
            state = euler_step(state, now[None], then[None], dxdt)
        found.insert(0, found[0])  # of the end, where no step begins
        assert path.nodes.shape[1] == len(found)
        return torch.cat([dxdt_from_denoised(x, path.times[:1], x0) for x0 in found], 1) / SIGMA_DATA


def settings(*changes: str) -> Config:
    own = ("objective=policy", "space.kind=policy", f"policy.nodes={NODES}", f"policy.steps={STEPS}", "policy.states=3")
    return load_config("default", [*own, "training.precision=no", *changes])


def states_of(student: Student, config: Config, count: int = 4) -> PolicyStates:
    """Those of a run, in float64."""
    batch, part = batch_of(count), config.policy
    uniform = batch.draws.uniform("policy states", (part.steps, part.states))
    noise, times = batch.noise().double(), LAW.student_times(part.steps, "policy")
    assert student.policy is not None

    def heads(x: Tensor, t: Tensor, *rest: Any) -> Tensor:
        return SIGMA_DATA * student(x / SIGMA_DATA, t, *rest)

    return policy_states(
        heads, LAW.velocity, student.policy, noise, times, uniform, nothing(count), torch.ones(count).double()
    )


def collected(student: Student, config: Config) -> PolicyStates:
    networks: Any = Networks(student, LAW)  # type: ignore[arg-type]
    found = collect(["policy"], batch_of(4), nothing(4), networks, config)["policy"]
    assert isinstance(found, PolicyStates)
    return found


def loss_of(student: Student, states: PolicyStates, config: Config) -> Loss:
    return policy_loss(Networks(student, LAW), states, batch_of(4).draws, config, 0)  # type: ignore[arg-type]


def follower(substeps: int = NODES - 1) -> Follower:
    return Follower(Policy(NODES, substeps, 2.5), LAW.student_times(STEPS, "policy"))


def test_nodes_on_the_teachers_own_steps_have_no_loss_and_no_gradient() -> None:
    config = settings(f"policy.substeps={NODES - 1}")
    student = follower()
    loss = loss_of(student, states_of(student, config), config)
    assert loss.value.max() < 1e-24 and loss.value.shape == (4 * STEPS,)
    loss.value.sum().backward()
    assert student.offset.grad is not None and student.offset.grad.abs().max() < 1e-12
    for mistake in (follower(2 * NODES), follower()):  # other Euler steps than the teacher's; an offset
        with torch.no_grad():
            mistake.offset[1] += 0.1 * (mistake.policy == student.policy)
        wrong = loss_of(mistake, states_of(mistake, config), config).value
        assert wrong.mean() > 1e-6


def test_the_gradient_points_back_and_runs_through_the_velocities_alone() -> None:
    config = settings(f"policy.substeps={NODES - 1}")
    for sign in (1, -1):
        student = follower()
        with torch.no_grad():
            student.offset.add_(sign * 0.1)
        states = states_of(student, config)
        assert not any(value.requires_grad for value in vars(states).values() if isinstance(value, Tensor))
        loss_of(student, states, config).value.sum().backward()
        grad = student.offset.grad
        assert grad is not None and (sign * grad[1:] > 0).all() and grad[0] == 0  # no step begins at node 0


def test_the_segments_are_one_rollout_in_a_row() -> None:
    config, student = settings("policy.substeps=16"), follower(16)
    states, times = states_of(student, config), LAW.student_times(STEPS, "policy")
    noise = batch_of(4).noise().double()
    for name, value in vars(collected(student, config)).items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value.double(), vars(states)[name].double(), rtol=1e-4, atol=1e-4)
    assert torch.equal(states.x[::STEPS], noise) and states.prompt.tolist() == sorted([*range(4)] * STEPS)
    assert states.number.tolist() == list(range(4 * STEPS)) and states.num_drawn == 4 * STEPS
    end = noise
    for k, (t, t_next) in enumerate(pairwise([*times, 0.0])):
        part = states.rows(slice(k, None, STEPS))
        torch.testing.assert_close(part.x, end, rtol=0, atol=1e-12)
        assert part.t_target is not None and (part.t - t).abs().max() < 1e-12
        assert (part.t_target - t_next).abs().max() < 1e-12
        assert (part.t_at <= t).all() and (part.t_at > t_next).all() and (part.t_at[:, :-1] >= part.t_at[:, 1:]).all()
        wanted = LAW.velocity(part.x_at.flatten(0, 1), part.t_at.flatten(), nothing(12), None)
        torch.testing.assert_close(part.dxdt_at.flatten(0, 1), wanted, rtol=0, atol=1e-12)
        whole = Follower(student.policy, [t])  # type: ignore[arg-type]
        whole.ends = {t: t_next}
        mean = student.policy.path(t, t_next).means[-1]  # type: ignore[union-attr]
        F = whole(part.x / SIGMA_DATA, part.t).view(4, NODES, -1)
        end = euler_step(part.x, part.t, part.t_target, SIGMA_DATA * torch.einsum("n,bnd->bd", mean, F))
    told = (nothing(4), torch.ones(4).double(), times, lambda i: torch.empty(0), SIGMA_DATA)
    torch.testing.assert_close(sample_policy(student, noise, *told), end, rtol=0, atol=1e-12)
    share = states.share.view(4, STEPS)
    torch.testing.assert_close(share.mean(1), torch.ones(4).double(), rtol=0, atol=1e-12)
    assert torch.equal(share[0], share[1]) and share[0].unique().numel() == STEPS


def test_rows_do_not_know_of_each_other() -> None:
    config, student = settings("policy.substeps=16"), follower(16)
    with torch.no_grad():
        student.offset.add_(torch.arange(NODES) / 10)
    states = states_of(student, config)
    whole = loss_of(student, states, config)
    for row in range(len(states)):
        alone = loss_of(student, states.rows(slice(row, row + 1)), config)
        for name, values in (whole.metrics | {"loss": whole.value}).items():
            other = (alone.metrics | {"loss": alone.value})[name]
            torch.testing.assert_close(values[row : row + 1], other, rtol=1e-9, atol=1e-12)
    one = states_of(student, config, count=1)
    torch.testing.assert_close(one.x_at, states.x_at[:STEPS], rtol=0, atol=1e-12)


def test_the_mean_over_all_times_is_that_of_the_segments_by_length() -> None:
    """Segments of unequal length: with all substeps drawn, shares weigh each as much as its part of the path."""
    config = settings("policy.substeps=8", "policy.states=8")
    states = states_of(follower(8), config)
    first, last = states.t[0], double(0.0)
    assert float(first) == pytest.approx(math.pi / 2) and last == 0
    lengths = states.share[:STEPS] / STEPS
    assert lengths.sum() == pytest.approx(1.0, abs=1e-12) and states.t_at.shape == (4 * STEPS, 8)
    assert all(row.unique().numel() == 8 for row in states.t_at)  # one of each part


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["objective=policy"], "give objective=policy and space.kind=policy, or neither"),
        (["space.kind=policy"], "give objective=policy and space.kind=policy, or neither"),
        (["objective=policy", "space.kind=policy", "matching.weight=0.1"], r"matching\.weight has no place"),
        (["objective=policy", "space.kind=policy", "student.times=two"], "leave student.times at one"),
        (["objective=policy", "space.kind=policy", "policy.nodes=2"], "greater than or equal to 3"),
        (["objective=policy", "space.kind=policy", "policy.states=40"], "there are 32 substeps"),
        (["training.phases=[{steps: 2, set: {objective: policy, space.kind: policy}}]"], "in all phases"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config("default", changes)


def test_a_student_of_one_velocity_is_refused() -> None:
    class One(Student):
        def forward(self, x_unit: Tensor, t: Tensor, *rest: Any) -> Tensor:
            return GaussianTeacher(double(0.4), double(0.2), SIGMA_DATA).velocity(x_unit, t)

    with pytest.raises(UserError, match="needs a student that gives several F at a time"):
        collected(One(), settings())
