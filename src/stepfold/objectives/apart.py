"""Derivatives of a flow map's F where a jump has a length; states that are asked to stay need none."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from stepfold.config import Config
from stepfold.maths.tangent import Network, Tangent
from stepfold.randomness import send
from stepfold.spaces.records import States

Kind = TypeVar("Kind", bound=States)


class Along(NamedTuple):
    """A network and the direction in which it is differentiated: arguments of `total_derivative`, M rows each."""

    network: Network
    x: Tensor
    t: Tensor
    dx: Tensor
    dt: Tensor
    bounds: Mapping[str, Tensor] = {}


def derivative(
    states: Kind, along: Callable[[Kind], Along], derive: Callable[[Along], Tangent], config: Config
) -> Tangent:
    """F of all states and its derivative; that of states that stay is 0, and costs one plain forward pass.

    Their derivative counts for nothing, since it comes with sin D = 0. Compiled code and sharded weights want passes of
    equal shapes and number, so there all states take the same one.

    Args:
        states: M of them; `stays` says which are asked to stay.
        along: what is differentiated in which direction, of some of the states.
        derive: calls `total_derivative`.
        config: the settings.
    """
    stays = [] if states.stays is None else states.stays.tolist()
    states = replace(states, stays=None, prompt_on_host=None)  # rows are chosen on the device
    if not any(stays) or config.training.compile or config.training.shard != "none":
        return derive(along(states))
    device, moving = states.t.device, [i for i, stay in enumerate(stays) if not stay]
    staying = [i for i, stay in enumerate(stays) if stay]
    order = [0] * len(stays)
    for place, i in enumerate([*moving, *staying]):
        order[i] = place
    rest = along(states.rows(send(torch.tensor(staying), device)))
    F = rest.network(rest.x, rest.t)
    if not moving:
        return Tangent(F, torch.zeros_like(F))
    found = derive(along(states.rows(send(torch.tensor(moving), device))))
    back = send(torch.tensor(order), device)
    none = torch.zeros_like(F, dtype=found.dF.dtype)
    return Tangent(torch.cat([found.F, F])[back], torch.cat([found.dF, none])[back])
