"""Target times: where a student is asked to jump to from each state, by a rule or a mixture of rules."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from stepfold.maths.formulations import flow_time, trigflow_time, unsqueeze_like
from stepfold.randomness import send
from stepfold.spaces.records import Pairs, States

Kind = TypeVar("Kind", bound=States)


@dataclass(frozen=True)
class Rules:
    """A mixture of rules, and what they need to know.

    Attributes:
        shares: rule -> its share of the states; they sum to 1.
        gap_mean: of the logit of the gap.
        gap_std: of the logit of the gap.
        grids: times of the student's own steps, falling from its first, without the final 0; one list for each number
            of segments that a walk may have.
    """

    shares: dict[str, float]
    gap_mean: float = -0.8
    gap_std: float = 1.0
    grids: Sequence[Sequence[float]] = ()


def gap_below(t: Tensor, uniform: Tensor, mean: float, std: float) -> Tensor:
    """s whose flow-matching time lies sigmoid(N(mean, std^2)) below that of t; 0 where that is below 0.

    Args:
        t: [M], in [0, pi/2].
        uniform: draws of U[0, 1) [M].
        mean: of the logit.
        std: of the logit.

    Reference: arXiv:2506.14603 (AYF), where the later time is drawn first.
    Deviation: t is that of the state; a gap longer than t ends at 0.
    """
    gap = torch.sigmoid(mean + std * torch.special.ndtri(uniform))
    return torch.minimum(trigflow_time((flow_time(t) - gap).clamp(min=0)), t)


def edge_below(t: Tensor, edges: Sequence[float]) -> Tensor:
    """The lower end s < t of the segment that t [M] lies in.

    Args:
        t: [M], in [0, pi/2].
        edges: times falling from the first step's, without the final 0; above the second one all is one segment.

    Reference: arXiv:2405.18407 (PCM); arXiv:2403.06807 (multistep consistency models).
    """
    rising = send(torch.tensor([0.0, *reversed(edges[1:])], dtype=t.dtype), t.device)
    return rising[(torch.bucketize(t, rising) - 1).clamp(min=0)]


def later_state(pairs: Pairs, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(time [M], state [M, ...]) of a later state of each pair's own walk, its end included, all equally likely.

    Args:
        pairs: whole walks, `walk_length` in a row.
        uniform: draws of U[0, 1) [M].

    Reference: arXiv:2509.24526 (CMT).
    """
    count = pairs.walk_length
    assert count, "pairs of whole walks"
    place = torch.arange(len(pairs), device=pairs.t.device) % count
    ahead = 1 + (uniform * (count - place)).long().clamp(max=count - 1 - place)
    ends = place + ahead == count
    row = torch.arange(len(pairs), device=pairs.t.device) + torch.where(ends, 0, ahead)
    time = torch.where(ends, 0, pairs.t[row])
    return time, torch.where(unsqueeze_like(ends, pairs.x), pairs.x0, pairs.x[row])


def aimed(states: Kind, rules: Rules, choice: Tensor, uniform: Tensor, grid: Tensor | None = None) -> Kind:
    """The states with a target time each and, where a rule takes a state of the walk, with that state.

    Args:
        states: `Pairs` of whole walks for the rule `later`.
        rules: the mixture.
        choice: draws of U[0, 1) [M] in the host's memory, which pick the rule.
        uniform: draws of U[0, 1) [M] on the states' device, which pick the time.
        grid: which of the rules' grids each state's walk has, int64 [M]; None for the first.
    """
    names, t = list(rules.shares), states.t
    borders = torch.tensor(list(rules.shares.values())).cumsum(0)[:-1].to(choice)
    picked = torch.bucketize(choice, borders, right=True)
    code = send(picked, t.device)
    s, x_target = torch.zeros_like(t), states.x0 if isinstance(states, Pairs) else None
    for number, name in enumerate(names):
        mine = code == number
        if name == "later":
            assert isinstance(states, Pairs) and x_target is not None
            time, state = later_state(states, uniform)
            x_target = torch.where(unsqueeze_like(mine, state), state, x_target)
        elif name == "diagonal":
            time = t
            x_target = None if x_target is None else torch.where(unsqueeze_like(mine, x_target), states.x, x_target)
        else:
            time = time_below(name, t, uniform, rules, grid)
        s = torch.where(mine, time, s)
    stays = picked == names.index("diagonal") if "diagonal" in names else None
    if isinstance(states, Pairs) and set(names) <= {"zero", "later", "diagonal"}:  # states of the walk are known
        states = replace(states, x_target=x_target)
    jumps = None
    if "edge" in names:
        counts = send(torch.tensor([len(edges) for edges in rules.grids], dtype=t.dtype), t.device)
        jumps = torch.where(code == names.index("edge"), counts[0] if grid is None else counts[grid], 1)
    return replace(states, t_target=s, stays=stays, num_jumps=jumps)


def time_below(rule: str, t: Tensor, uniform: Tensor, rules: Rules, grid: Tensor | None) -> Tensor:
    """s [M] by one of the rules that need nothing but the time."""
    if rule == "gap":
        return gap_below(t, uniform, rules.gap_mean, rules.gap_std)
    if rule == "uniform":
        return uniform * t
    if rule == "edge":
        below = torch.stack([edge_below(t, edges) for edges in rules.grids])
        return below[0] if grid is None else below.gather(0, grid[None])[0]
    assert rule == "zero", rule
    return torch.zeros_like(t)
