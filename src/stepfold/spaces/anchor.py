"""Anchor space: pure noise, and where the teacher's walk is after its first steps."""

from itertools import pairwise

import torch
from torch import Tensor

from stepfold.maths.formulations import euler_step
from stepfold.spaces.generation import Velocity
from stepfold.spaces.records import Pairs
from stepfold.teachers.contract import Condition


def anchored_pairs(velocity: Velocity, noise: Tensor, route: Tensor, condition: Condition, guidance: Tensor) -> Pairs:
    """One pair a prompt: the first state of a walk, and its last one as the target; a teacher call a step.

    Args:
        velocity: the teacher's, guided.
        noise: [B, ...], of standard deviation sigma_data.
        route: [B, k + 1], falling; the walk takes k steps and ends at its last time, above 0.
        condition: B rows.
        guidance: scales [B].

    Reference: arXiv:2602.03139 (DP-DMD), which regresses the first step of the student's on it.
    """
    index, times, x = torch.arange(len(noise), device=noise.device), list(route.T), noise
    first = velocity(x, times[0], condition, guidance)
    for i, (t, t_next) in enumerate(pairwise(times)):
        x = euler_step(x, t, t_next, velocity(x, t, condition, guidance) if i else first)
    return Pairs(
        x=noise, t=times[0], condition=condition, guidance=guidance, prompt=index, number=index, num_drawn=len(noise),
        dxdt=first, t_next=times[1], x0=x, t_target=times[-1], x_target=x,
    )  # fmt: skip
