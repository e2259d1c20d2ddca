"""Two scores and a student, all Gaussians: what tests of distribution matching and its kin share."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gaussians import Law, Score, batch_of, nothing
from torch import Tensor

from stepfold.config import Config, load_config
from stepfold.objectives.contract import Networks
from stepfold.objectives.denoising import FAKE
from stepfold.spaces.records import States
from stepfold.training.critics import fake_loss, fake_states
from stepfold.training.states import collect
from stepfold.training.terms import OBJECTIVES

NUM = 64
PICTURES = 24  # of an update, where networks learn


def quadrature(nodes: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """(z_0 [nodes^2, 1], z [nodes^2, 1], weight [nodes^2]): exact means over two independent N(0, 1)."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    points, weights = torch.tensor(x), torch.tensor(w / w.sum())
    first, second = torch.meshgrid(points, points, indexing="ij")
    return first.reshape(-1, 1), second.reshape(-1, 1), torch.outer(weights, weights).flatten()


def settings(*changes: str) -> Config:
    more = ("objective=matching", "space.kind=rollout", "fake.updates=1", "training.precision=no", "rollout.steps=1")
    return load_config("default", [*more, *changes])


def networks_of(student: Score, teacher: Law, fake: Score) -> Any:
    return Networks(student, teacher, {FAKE: fake})  # type: ignore[arg-type]


def states_of(num: int = NUM, guidance: float = 1.0, number: int = 0) -> tuple[States, Any]:
    """Pure noise at pi/2 in float64, and the batch's draws."""
    batch = batch_of(num, number)
    index = torch.arange(num)
    scales = torch.full((num,), guidance).double()
    t = torch.full((num,), math.pi / 2).double()
    x = batch.noise("rollout noise").double()
    states = States(x=x, t=t, condition=nothing(num), guidance=scales, prompt=index, number=index, num_drawn=num)
    return states, batch.draws


def alternate(student: Score, teacher: Law, fake: Score, config: Config, updates: int, rate: float) -> None:
    """The fake score's updates and the student's in turn, as in a step of a run; rates fall to 0."""
    networks = networks_of(student, teacher, fake)
    own, theirs = (torch.optim.Adam(each.parameters(), lr=rate) for each in (student, fake))
    for update in range(updates):
        rates = rate * (1 - update / updates)
        for group in (*own.param_groups, *theirs.param_groups):
            group["lr"] = rates if group in own.param_groups else 4 * rates
        batch = batch_of(PICTURES, update)
        for j in range(config.fake.updates):
            again = replace(batch, draws=batch.draws.of_update(j))
            count = update * config.fake.updates + j
            rolled = fake_states(networks, again, nothing(PICTURES), config, count, {})
            fake_loss(networks, again, rolled, config).value.mean().backward()
            theirs.step()
            theirs.zero_grad()
        states = collect(["rollout"], batch, nothing(PICTURES), networks, config, update)["rollout"]
        OBJECTIVES[config.objective](networks, states, batch.draws, config, update).value.mean().backward()
        assert all(parameter.grad is None for parameter in fake.parameters())
        own.step()
        own.zero_grad()
