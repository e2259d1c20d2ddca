"""States and pairs: what every sample space yields and every objective takes."""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from stepfold.teachers.contract import Condition


@dataclass(frozen=True, kw_only=True)
class States:
    """Points (x, t) in TrigFlow, with what the networks are told there.

    Attributes:
        x: [M, ...], at time t; the data part and the noise part have the standard deviation sigma_data.
        t: [M], in [0, pi/2].
        condition: M rows.
        guidance: scales [M], that the student is told and the teacher is guided by.
        prompt: int64 [M], the prompt of the batch that each state belongs to.
        number: int64 [M], the state's place among the `num_drawn`.
        num_drawn: how many states there were before filtering.
        is_padding: the states count for nothing; a process without states of its own makes its passes with them.
        t_target: [M], in [0, t], the time that the student is asked to jump to; None for 0, a consistency student's.
        stays: bool [M], in the host's memory, which of them are asked to stay: t_target = t; None where none is.
        prompt_on_host: `prompt` in the host's memory, where a term reads it.
        num_jumps: [M], how many jumps from edge to edge of its segments lead from noise to an image; None where there
            are no segments.
    """

    x: Tensor
    t: Tensor
    condition: Condition
    guidance: Tensor
    prompt: Tensor
    number: Tensor
    num_drawn: int
    is_padding: bool = False
    t_target: Tensor | None = None
    stays: Tensor | None = None
    prompt_on_host: Tensor | None = None
    num_jumps: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, index: Tensor | slice) -> Self:
        """The states that `index` selects."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen: dict[str, Any] = {name: v[index] for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, condition=self.condition.rows(index), **chosen)


@dataclass(frozen=True, kw_only=True)
class Pairs(States):
    """States with the teacher's velocity at them.

    Attributes:
        dxdt: [M, ...], the teacher's (guided) velocity at (x, t).
        t_next: [M], the time below t that the route goes on to, 0 at its end.
        x0: [M, ...], the clean latent at the pair's t = 0: the end of its walk, or what was noised.
        x_target: [M, ...], the state that it should reach at t_target, where one is known.
        walk_length: how many pairs in a row are one walk, each where the teacher's step from the one before ends; 0
            where they are not, or where a micro-batch cuts walks.
    """

    dxdt: Tensor
    t_next: Tensor
    x0: Tensor
    x_target: Tensor | None = None
    walk_length: int = 0


def pairs_per_prompt(route_steps: int, keep_first: bool) -> int:
    """How many states of a walk are trained on, and how many times a latent is noised to."""
    return route_steps - (not keep_first)


def with_prompts_on_host(states: States, count: int) -> States:
    """With `prompt_on_host`, of a batch of `count` prompts. A device is waited for only where a filter dropped some."""
    if len(states) == states.num_drawn:  # prompt by prompt
        return replace(states, prompt_on_host=torch.arange(count).repeat_interleave(states.num_drawn // count))
    return replace(states, prompt_on_host=states.prompt.cpu())


def kept_index(keep: Tensor | None, of: Tensor) -> Tensor:
    """The numbers of the kept samples of `of` [B, ...]: all without a filter, which needs no host-device sync."""
    return torch.arange(len(of), device=of.device) if keep is None else keep.nonzero().squeeze(1)


def state_numbers(index: Tensor, count: int) -> Tensor:
    """The `number` of the states of the kept prompts `index` [K], of `count` states each: [K count]."""
    return (index[:, None] * count + torch.arange(count, device=index.device)).flatten()
