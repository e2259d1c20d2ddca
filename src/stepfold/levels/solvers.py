"""Solvers over any falling noise levels, in flow coordinates x_flow = (1 - s) x_0 + s z."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from stepfold.maths.formulations import flow_velocity, trigflow_input, trigflow_time
from stepfold.maths.routes import NUM_TRAIN_TIMESTEPS, at_most
from stepfold.teachers.contract import Condition, Teacher

SolverName = Literal["euler", "unipc"]
Velocity = Callable[[Tensor, float], Tensor]
"""(x_flow [B, ...], level s) -> dx_flow/ds [B, ...]."""


def velocity_of(
    teacher: Teacher,
    condition: Condition,
    guidance: float,
    batch: int,
    tick: Callable[[int], None] = lambda count: None,
) -> Velocity:
    """A teacher's velocity in flow coordinates, for states that lie on the CPU.

    Args:
        teacher: gives dx/dt.
        condition: rows for all states.
        guidance: scale.
        batch: states that the network sees at once.
        tick: called with the number of states after each call.
    """
    highest = at_most(teacher.start_time, torch.float32)

    @torch.no_grad()
    def velocity(x: Tensor, level: float) -> Tensor:
        found = []
        for start in range(0, len(x), batch):
            part = x[start : start + batch].to(condition.mask.device)
            s = torch.full((len(part),), level, dtype=part.dtype, device=part.device)
            rows = condition.rows(slice(start, start + len(part))).trimmed()
            scale = torch.full((len(part),), guidance, device=part.device)
            t = trigflow_time(s).clamp(max=highest)
            dxdt = teacher.velocity(trigflow_input(part, s, teacher.sigma_data), t, rows, scale)
            found.append(flow_velocity(part, s, dxdt / teacher.sigma_data).to(x.device))
            tick(len(part))
        return torch.cat(found)

    return velocity


@dataclass(frozen=True)
class Steps:
    """A solver's steps down some levels.

    Attributes:
        calls: the level that the network is told at each step.
        advance: (x_flow, velocity) -> the state at the next level; called once for each step, in order.
    """

    calls: list[float]
    advance: Callable[[Tensor, Tensor], Tensor]


def euler(levels: Sequence[float]) -> Steps:
    """First-order steps x + (s' - s) v: DDIM, and Euler steps of TrigFlow, take the very same ones."""
    pairs = pairwise(levels)

    def advance(x: Tensor, velocity: Tensor) -> Tensor:
        level, lower = next(pairs)
        return x + (lower - level) * velocity

    return Steps(list(levels[:-1]), advance)


def unipc(levels: Sequence[float]) -> Steps:
    """Second-order steps by diffusers' UniPCMultistepScheduler, as the user's pipeline takes them.

    It tells the network whole timesteps of 1000, rounded down; the first level is a hair below 1.
    """
    scheduler = unipc_scheduler()
    scheduler.set_timesteps(sigmas=np.array(levels[:-1]))  # type: ignore[arg-type] # of a list it takes none
    scheduler.set_begin_index(0)
    times = iter(scheduler.timesteps)

    def advance(x: Tensor, velocity: Tensor) -> Tensor:
        return scheduler.step(velocity, next(times), x, return_dict=False)[0]

    return Steps((scheduler.timesteps / NUM_TRAIN_TIMESTEPS).tolist(), advance)


def unipc_scheduler() -> UniPCMultistepScheduler:
    """The one for listed levels: it would shift them again, so its shift is 1."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)


SOLVERS: dict[SolverName, Callable[[Sequence[float]], Steps]] = {"euler": euler, "unipc": unipc}


def rollout(
    velocity: Velocity, noise: Tensor, levels: Sequence[float], solver: SolverName, known: Sequence[Tensor] = ()
) -> tuple[Tensor, list[Tensor]]:
    """The end of a solver's steps, and the velocities at their starts.

    Args:
        velocity: of the teacher.
        noise: the state at the first level [B, ...].
        levels: k + 1, strictly falling, the last one 0.
        solver: its name.
        known: velocities of the first steps, of a rollout that had these levels too: they are not asked for again.
    """
    steps, x, found = SOLVERS[solver](levels), noise, list(known)
    for i, level in enumerate(steps.calls):
        if i == len(found):
            found.append(velocity(x, level))
        x = steps.advance(x, found[i])
    return x, found
