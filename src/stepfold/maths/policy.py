"""The DX policy of pi-Flow: one network call gives N velocities, whose clean samples are the nodes of a path x_0(t).

From the state (x_a, t_a) to the time t_b the path is linear between nodes, which lie evenly in unshifted flow time;
node 0 is at t_b. The policy's ODE, dx/dt = (cos t x - x_0(t)) / sin t, is solved by Euler steps without the network.
They are linear in the velocities, with weights of sum 1 that the times alone decide: wherever the steps have come to,
the state is that of one Euler step from t_a with a weighted mean of the velocities.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stepfold.maths.formulations import flow_time, trigflow_time, unsqueeze_like


class Path(NamedTuple):
    """A policy's Euler steps over one segment, in float64.

    Attributes:
        times: [S + 1], from t_a to t_b.
        nodes: [S, N], weights of the velocities in the one that the path points along at times[i]; see `combined`.
        means: [S + 1, N], weights in the velocity of the one Euler step from t_a to times[i].
    """

    times: Tensor
    nodes: Tensor
    means: Tensor


@dataclass(frozen=True)
class Policy:
    """The form of a student's policy; its velocities are the student's.

    Attributes:
        nodes: N, of a segment; 2 or more.
        substeps: S, Euler steps of a segment.
        shift: of the noise levels; nodes and Euler steps are even in the time before that shift.
    """

    nodes: int
    substeps: int
    shift: float

    def path(self, t: float, t_next: float) -> Path:
        """The Euler steps from t to t_next < t, both in [0, pi/2].

        Reference: arXiv:2510.14974 (pi-Flow), its DX policy.
        """
        ends = torch.tensor([t, t_next], dtype=torch.float64)
        first, last = unshifted(flow_time(ends), self.shift)
        share = torch.arange(self.substeps + 1, dtype=torch.float64) / self.substeps
        raw = first + share * (last - first)
        inner = trigflow_time(self.shift * raw / (1 + (self.shift - 1) * raw))[1:-1]
        times = torch.cat([ends[:1], inner, ends[1:]])
        place = (1 - share[:-1, None]) * (self.nodes - 1) - torch.arange(self.nodes, dtype=torch.float64)
        nodes = (1 - place.abs()).clamp(min=0)
        means = [nodes[0]]
        reached = torch.zeros(self.nodes, dtype=torch.float64)  # x = sin s / sin t x_a + sum of reached x_0
        for i in range(self.substeps):
            now, then = times[i], times[i + 1]
            reached = (then.sin() * reached + (now - then).sin() * nodes[i]) / now.sin()
            means.append(reached * times[0].sin() / (times[0] - then).sin())
        return Path(times, nodes, torch.stack(means))


def unshifted(t_flow: Tensor, shift: float) -> Tensor:
    """Flow-matching times before the shift: the inverse of shift u / (1 + (shift - 1) u)."""
    return t_flow / (shift - (shift - 1) * t_flow)


def combined(velocities: Tensor, weights: Tensor) -> Tensor:
    """A weighted sum of N velocities.

    Args:
        velocities: [M, N C, ...], node by node along the channels.
        weights: [N], or [M, N].

    Returns:
        [M, C, ...].
    """
    each = velocities.unflatten(1, (weights.shape[-1], -1))
    weights = weights.to(velocities).expand(len(each), -1)
    return (unsqueeze_like(weights, each) * each).sum(1)
