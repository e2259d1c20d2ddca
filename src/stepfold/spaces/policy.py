"""Policy space (pi-Flow): the student's own policy is followed from noise, and the teacher is asked at its states."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from stepfold.maths.formulations import euler_step, flow_time
from stepfold.maths.policy import Policy, combined, unshifted
from stepfold.randomness import send
from stepfold.spaces.generation import Velocity
from stepfold.spaces.records import States
from stepfold.teachers.contract import Condition

Heads = Callable[[Tensor, Tensor, Condition, Tensor], Tensor]
"""(x [B, ...], t [B], condition, guidance scales [B]) -> N velocities dx/dt [B, N C, ...] of the student."""


@dataclass(frozen=True, kw_only=True)
class PolicyStates(States):
    """Where segments of a rollout begin, with states within each segment.

    Attributes:
        share: [M], length of the segment in unshifted flow time, times the number of segments: 1 on the average.
        x_at: [M, J, ...], the policy's own states in the segment.
        t_at: [M, J], their times.
        dxdt_at: [M, J, ...], the teacher's (guided) velocity at them.
        nodes_at: [M, J, N], weights of the student's velocities in what its path points along there.
    """

    share: Tensor
    x_at: Tensor
    t_at: Tensor
    dxdt_at: Tensor
    nodes_at: Tensor


@torch.no_grad()
def policy_states(
    heads: Heads,
    velocity: Velocity,
    policy: Policy,
    noise: Tensor,
    times: Sequence[float],
    uniform: Tensor,
    condition: Condition,
    guidance: Tensor,
) -> PolicyStates:
    """The segments of one rollout a prompt, in a row: each begins where the policy ends the one before.

    Args:
        heads: the student's velocities.
        velocity: the teacher's, guided.
        policy: the form of the student's.
        noise: [B, ...], of standard deviation sigma_data.
        times: K, where segments begin, falling from the first, without the final 0.
        uniform: draws of U[0, 1) [B, K, J], one for each of J equal parts of a segment's Euler steps.
        condition: B rows.
        guidance: scales [B].

    Returns:
        K states a prompt, prompt by prompt.

    Reference: arXiv:2510.14974 (pi-Flow), its data-free form.
    """
    x, found, (count, num_segments, num_states) = noise, list[PolicyStates](), uniform.shape
    index = torch.arange(count, device=noise.device)
    raw = unshifted(flow_time(torch.tensor([*times, 0.0], dtype=torch.float64)), policy.shift)
    for k, pair in enumerate(pairwise([*times, 0.0])):
        t, t_next = (torch.full((count,), time, dtype=noise.dtype, device=noise.device) for time in pair)
        path, F = policy.path(*pair), heads(x, t, condition, guidance)
        part = (uniform[:, k] + torch.arange(num_states, device=uniform.device)) / num_states
        drawn = (part * policy.substeps).long().clamp(max=policy.substeps - 1)  # [B, J]
        times_at, nodes, means = (send(values.to(noise.dtype), noise.device)[drawn] for values in path)
        within, velocities = [], []
        for j in range(num_states):
            within.append(euler_step(x, t, times_at[:, j], combined(F, means[:, j])))
            velocities.append(velocity(within[-1], times_at[:, j], condition, guidance))
        found.append(
            PolicyStates(
                x=x, t=t, t_target=t_next, condition=condition, guidance=guidance, prompt=index,
                number=num_segments * index + k, num_drawn=num_segments * count,
                share=torch.full_like(t, num_segments * float((raw[k] - raw[k + 1]) / (raw[0] - raw[-1]))),
                x_at=torch.stack(within, 1), t_at=times_at, dxdt_at=torch.stack(velocities, 1), nodes_at=nodes,
            )
        )  # fmt: skip
        x = euler_step(x, t, t_next, combined(F, path.means[-1]))
    return joined(found)


def joined(segments: Sequence[PolicyStates]) -> PolicyStates:
    """The K segments of B rollouts as one record of B K rows, prompt by prompt."""
    first = segments[0]
    names = [name for name, value in vars(first).items() if isinstance(value, Tensor)]
    values = {name: torch.stack([getattr(each, name) for each in segments], 1).flatten(0, 1) for name in names}
    return replace(first, condition=first.condition.repeat_interleave(len(segments)), **values)
