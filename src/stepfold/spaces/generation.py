"""Generation space (TBCM): pairs come from the teacher's own way from noise to picture. No image is involved."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stepfold.maths.filters import FilterRule, darkness, keep_mask
from stepfold.maths.formulations import euler_step
from stepfold.spaces.records import Pairs, kept_index, state_numbers
from stepfold.teachers.contract import Condition

Velocity = Callable[[Tensor, Tensor, Condition, Tensor], Tensor]
"""(x [B, ...], t [B], condition, guidance scales [B]) -> dx/dt [B, ...]: a teacher's `velocity`, compiled or not."""


@dataclass(frozen=True)
class Trajectory:
    """A teacher's walk down a route.

    Attributes:
        x: [N, B, ...], the states, from noise on.
        t: [N, B], their times.
        dxdt: [N, B, ...], the velocity that each step was taken with.
        x0: [B, ...], where the last step, to t = 0, ends.
    """

    x: Tensor
    t: Tensor
    dxdt: Tensor
    x0: Tensor


def walk(velocity: Velocity, noise: Tensor, route: Tensor, condition: Condition, guidance: Tensor) -> Trajectory:
    """Walks the teacher from noise to t = 0 with first-order TrigFlow steps; one teacher call a step.

    Args:
        velocity: the teacher's, guided.
        noise: [B, ...], of standard deviation sigma_data.
        route: [B, N], falling from pi/2.
        condition: B rows.
        guidance: scales [B].

    Returns:
        See `Trajectory`.

    Reference: arXiv:2511.20410, Algorithm 1 and Eq. 9.
    Deviation: x <- cos(D) x - sin(D) dxdt with dxdt = sigma_data F; the printed Eq. 9 applies sigma_data twice.
    """
    times = torch.cat([route, torch.zeros_like(route[:, :1])], dim=1).T
    x, states, velocities = noise, [], []
    for t, t_next in pairwise(times):
        dxdt = velocity(x, t, condition, guidance)
        states.append(x)
        velocities.append(dxdt)
        x = euler_step(x, t, t_next, dxdt)
    return Trajectory(torch.stack(states), times[:-1], torch.stack(velocities), x)


def pairs_from(
    trajectory: Trajectory,
    condition: Condition,
    guidance: Tensor,
    *,
    keep_first: bool,
    keep: Tensor | None,
) -> Pairs:
    """Flattens the kept trajectories into pairs, prompt by prompt, from noise to picture.

    Args:
        trajectory: N states of B prompts.
        condition: B rows.
        guidance: [B].
        keep_first: whether the state at t = pi/2 is a training pair too. Released code: no; its weight is ~0.
        keep: bool [B], from the brightness filter; None for all.

    Returns:
        Pairs of the kept prompts only: dropped ones cost the student nothing.
    """
    first = 0 if keep_first else 1
    count = len(trajectory.t) - first
    index = kept_index(keep, trajectory.x0)

    def flat(values: Tensor) -> Tensor:
        return values[first:, index].transpose(0, 1).flatten(0, 1)

    return Pairs(
        x=flat(trajectory.x),
        t=flat(trajectory.t),
        t_next=flat(torch.cat([trajectory.t[1:], torch.zeros_like(trajectory.t[:1])])),
        dxdt=flat(trajectory.dxdt),
        condition=condition.rows(index).repeat_interleave(count),
        guidance=guidance[index].repeat_interleave(count),
        x0=trajectory.x0[index].repeat_interleave(count, 0),
        prompt=index.repeat_interleave(count),
        number=state_numbers(index, count),
        num_drawn=count * len(trajectory.x0),
        walk_length=count,
    )


def brightness_filter(
    x0: Tensor,
    black: Tensor,
    sigma_data: float,
    uniform: Tensor,
    *,
    threshold: float,
    rule: FilterRule,
) -> Tensor:
    """Which trajectories to keep: bool [B]. Those that end near an all-black picture are dropped.

    Args:
        x0: trajectory ends [B, ...].
        black: the all-black picture's unit-variance latent [...].
        sigma_data: standard deviation of the latents.
        uniform: draws from U[0, 1) [B].
        threshold: mean squared distance below which a trajectory may be dropped.
        rule: `random` or `hard`.

    Reference: arXiv:2511.20410, Sec. 4.3 and appendix D.
    """
    return keep_mask(darkness(x0, black, sigma_data), threshold, uniform, rule)
