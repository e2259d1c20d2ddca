"""The anchor (DP-DMD): the first step of the student's leads where the teacher's walk is after its first steps."""

from typing import Any

import pytest
import torch
from gaussians import SIGMA_DATA, Law, Perfect, Score, batch_of, gaussian, nothing
from scores import networks_of, settings
from torch import Tensor

from stepfold.config import Config
from stepfold.errors import UserError
from stepfold.objectives.pair import pair_loss
from stepfold.spaces.records import Pairs
from stepfold.training.states import collect
from stepfold.training.terms import terms_of

LAW = Law(0.4, 0.2)


def anchored(*changes: str) -> tuple[Pairs, Config]:
    config = settings(
        "rollout.steps=4", "rollout.first=2", "anchor.weight=0.05", "anchor.steps=60", "space.route_steps=200", *changes
    )
    networks = networks_of(Perfect(0.4, 0.2), LAW, Score(0.4, 0.2))
    found = collect([term.space for term in terms_of(config)], batch_of(6), nothing(6), networks, config, 0)
    assert [(term.objective, term.space, term.weight) for term in terms_of(config)] == [
        ("matching", "rollout", 1.0), ("pair", "anchor", 0.05),
    ]  # fmt: skip
    assert (found["rollout"].t < 1.5).all()  # the first step is the anchor's
    pairs = found["anchor"]
    assert isinstance(pairs, Pairs)
    return pairs, config


class FirstJump(Score):
    """A student told one time, whose step from pure noise leads to a given time of the Gaussian's ODE."""

    landing = 0.0

    def forward(self, x_unit: Tensor, t: Tensor, *rest: Any) -> Tensor:
        law = gaussian(0.4, 0.2)
        return law.F_of_flow_map(SIGMA_DATA * x_unit, t, torch.full_like(t, self.landing)) + 0 * self.mean


def test_the_target_is_a_state_of_the_teachers_walk() -> None:
    pairs, config = anchored()
    assert pairs.t_target is not None and pairs.x_target is not None
    assert (pairs.t >= 1.57).all() and (pairs.t_target < 1.5).all() and (pairs.t_target > 0.5).all()
    exact = gaussian(0.4, 0.2).flow_map(pairs.x.double(), pairs.t.double(), pairs.t_target.double())
    assert (pairs.x_target - exact).abs().max() < 0.02  # the walk takes steps of a finite size
    student = FirstJump(0.4, 0.2)
    losses = []
    for landing in (float(pairs.t_target[0]), 0.0):
        student.landing = landing
        losses.append(pair_loss(networks_of(student, LAW, student), pairs, batch_of(6).draws, config, 0).value.mean())
    assert losses[0] < 1e-3 < losses[1]  # the picture itself is another target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("anchor.weight=0.05",), r"give anchor\.weight=0\.05 with rollout\.first=2"),
        (("rollout.steps=4", "rollout.first=2"), r"give anchor\.weight=0\.05 with rollout\.first=2"),
        (("rollout.steps=4", "rollout.first=2", "anchor.weight=1", "anchor.steps=16"), "give fewer"),
        (("objective=discrete", "space.kind=generation", "anchor.weight=1"), "give objective=matching, or 0"),
    ],
)
def test_a_first_step_of_nobody_or_of_two_is_refused(changes: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(*changes)


def test_beside_another_objective_that_one_trains_the_first_step() -> None:
    beside = ("objective=discrete", "space.kind=generation", "matching.weight=1", "rollout.steps=4", "rollout.first=2")
    terms = terms_of(settings(*beside, "matching.form=decoupled"))
    assert [(term.objective, term.space, term.weight) for term in terms] == [
        ("discrete", "generation", 1.0), ("decoupled", "rollout", 1.0),
    ]  # fmt: skip
    assert [term.objective for term in terms_of(settings(*beside))] == ["discrete", "matching"]
    with pytest.raises(UserError, match=r"matching\.fake_guidance=2.* does not go with decoupled matching"):
        settings(*beside, "matching.form=decoupled", "matching.fake_guidance=2", "fake.unprompted=0.1")
