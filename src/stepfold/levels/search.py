"""The search for noise levels: a start, coordinate descent on the end of the real rollout, a verdict on other prompts.

Local errors do not tell how good the end is, since the flow damps some of them and amplifies others. So the descent
goes by the distance of the end itself.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from stepfold.levels.solvers import SolverName, Velocity, rollout
from stepfold.maths.golden import golden_section

EVALUATIONS = 6  # of a golden section: the bracket shrinks to a 10th, and the next sweep has a new one
LEAST_GAIN = 0.005  # of a sweep over all levels; below it the descent ends
NEAREST = 1e-3  # of two levels


@dataclass(frozen=True)
class Reference:
    """The teacher's long trajectory from the same noise.

    Attributes:
        levels: N + 1, falling from the first level to 0.
        states: x_flow at those levels [N + 1, B, ...].
    """

    levels: list[float]
    states: Tensor

    @property
    def noise(self) -> Tensor:
        """Where it begins [B, ...]."""
        return self.states[0]

    @property
    def end(self) -> Tensor:
        """Where it ends [B, ...]."""
        return self.states[-1]

    def first(self, count: int) -> "Reference":
        """Of the first samples."""
        return Reference(self.levels, self.states[:, :count])

    def thinned(self, most: int) -> "Reference":
        """At `most` steps or fewer, evenly chosen, with both ends."""
        every = -(-(len(self.levels) - 1) // most)
        kept = [*range(0, len(self.levels) - 1, every), len(self.levels) - 1]
        return Reference([self.levels[i] for i in kept], self.states[kept])


def reference(velocity: Velocity, noise: Tensor, levels: Sequence[float]) -> Reference:
    """Euler steps down many levels, each state kept."""
    states = [noise]
    for level, lower in pairwise(levels):
        states.append(states[-1] + (lower - level) * velocity(states[-1], level))
    return Reference(list(levels), torch.stack(states))


def error(end: Tensor, wanted: Tensor) -> float:
    """Root mean square distance, in standard deviations of the data."""
    return (end - wanted).double().square().mean().sqrt().item()


def cheapest_path(cost: Tensor, num_steps: int) -> list[int]:
    """The nodes of the path from first to last with exactly so many edges and the least sum of costs.

    Args:
        cost: [N, N], of the edge from i to j > i.
        num_steps: edges, from 1 to N - 1.

    Returns:
        num_steps + 1 numbers of nodes.

    Reference: arXiv:2312.16414 (BOSS), arXiv:2405.11326 (GITS).
    """
    count = len(cost)
    upper = torch.ones_like(cost).triu(1).bool()
    edges = torch.where(upper, cost, torch.inf)
    best = torch.full((count,), torch.inf, dtype=cost.dtype)
    best[0] = 0
    came_from = []
    for _ in range(num_steps):
        total, origin = (best[:, None] + edges).min(0)
        came_from.append(origin.tolist())
        best = total
    path = [count - 1]
    for origin in reversed(came_from):
        path.append(origin[path[-1]])
    return path[::-1]


def local_start(velocity: Velocity, fine: Reference, num_steps: int) -> list[float]:
    """Levels whose single Euler steps, each from the teacher's own state, have the least sum of errors."""
    count = len(fine.levels)
    cost = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count - 1):
        slope = velocity(fine.states[i], fine.levels[i])
        for j in range(i + 1, count):
            landed = fine.states[i] + (fine.levels[j] - fine.levels[i]) * slope
            cost[i, j] = error(landed, fine.states[j])
    return [fine.levels[node] for node in cheapest_path(cost, num_steps)]


def rollout_start(velocity: Velocity, fine: Reference, num_steps: int) -> list[float]:
    """Levels from a table of the best rollouts to each level in 1, 2, ... steps; one table entry leads to the next.

    Greedy, so not the best of all paths. The first level is fixed.

    Reference: arXiv:2503.21774 (OSS).
    """
    count = len(fine.levels)
    states: list[Tensor | None] = [fine.noise, *[None] * (count - 1)]
    paths: list[list[int]] = [[0], *[[] for _ in range(count - 1)]]
    for step in range(num_steps):
        last = step == num_steps - 1
        slopes = {i: velocity(state, fine.levels[i]) for i, state in enumerate(states[:-1]) if state is not None}
        reached: list[Tensor | None] = [None] * count
        led: list[list[int]] = [[] for _ in range(count)]
        for j in [count - 1] if last else range(step + 1, count - (num_steps - 1 - step)):
            best = math.inf
            for i, slope in slopes.items():
                if i >= j:
                    continue
                origin = states[i]
                assert origin is not None
                landed = origin + (fine.levels[j] - fine.levels[i]) * slope
                if (distance := error(landed, fine.states[j])) < best:
                    best, reached[j], led[j] = distance, landed, [*paths[i], j]
        states, paths = reached, led
    return [fine.levels[node] for node in paths[-1]]


@dataclass(frozen=True)
class Found:
    """Levels and the error of their rollout on the prompts that were searched on."""

    levels: list[float]
    error: float


def descend(
    velocity: Velocity, fine: Reference, levels: Sequence[float], solver: SolverName, sweeps: int
) -> Iterator[Found]:
    """Coordinate descent on the distance of the rollout's end: each interior level in turn, between its neighbours.

    Args:
        velocity: of the teacher.
        fine: the trajectory whose noise and end count.
        levels: where it starts, k + 1.
        solver: its name.
        sweeps: over all interior levels, at most; a sweep that gains less than LEAST_GAIN is the last.

    Yields:
        What each sweep found, no worse than before it; the start first.
    """
    levels = list(levels)
    end, known = rollout(velocity, fine.noise, levels, solver)
    least = error(end, fine.end)
    yield Found(levels, least)
    for _ in range(sweeps):
        before = least
        for i in range(1, len(levels) - 1):
            margin = min(NEAREST, (levels[i - 1] - levels[i + 1]) / 4)
            bounds = levels[i + 1] + margin, levels[i - 1] - margin
            measure = partial(_error_with, velocity, fine, levels, i, solver, known[:i])
            level, value = golden_section(*bounds, measure, EVALUATIONS)
            if value < least:
                levels, least = _with(levels, i, level), value
                _, known = rollout(velocity, fine.noise, levels, solver, known[:i])
        yield Found(levels, least)
        if least > (1 - LEAST_GAIN) * before:
            return


def _with(levels: Sequence[float], i: int, level: float) -> list[float]:
    return [*levels[:i], level, *levels[i + 1 :]]


def _error_with(
    velocity: Velocity, fine: Reference, levels: Sequence[float], i: int, solver: SolverName, known: Sequence[Tensor],
    level: float,
) -> float:  # fmt: skip
    """The error of the rollout whose i-th level is another one; the velocities before it are known."""
    return error(rollout(velocity, fine.noise, _with(levels, i, level), solver, known)[0], fine.end)


def calls_of_search(num_steps: int, sweeps: float) -> int:
    """Network calls for each sample that `descend` takes at most."""
    return num_steps + round(sweeps * (EVALUATIONS + 1) * num_steps * (num_steps - 1) / 2)
