"""Training pairs: what every sample space yields and every objective takes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stepfold.teachers.contract import Condition


@dataclass(frozen=True)
class Pairs:
    """States with the teacher's velocity at them.

    Attributes:
        x: [M, ...], at time t, data part of standard deviation sigma_data.
        t: [M], in [0, pi/2].
        t_next: [M], the time below t that the route goes on to, 0 at its end.
        dxdt: [M, ...], the teacher's (guided) velocity at (x, t).
        condition: M rows.
        guidance: [M], the guidance scale that is in dxdt.
        x0: [M, ...], the clean latent at the pair's t = 0: the end of its walk, or what was noised.
        prompt: int64 [M], which prompt of the batch each pair belongs to.
        number: int64 [M], the pair's place among the `num_walked`.
        num_walked: how many pairs there would be, had none been filtered out.
        stand_in: whether they stand in for no pairs at all, so that a process among several has a pass to make with
            the others; they count for nothing.
    """

    x: Tensor
    t: Tensor
    t_next: Tensor
    dxdt: Tensor
    condition: Condition
    guidance: Tensor
    x0: Tensor
    prompt: Tensor
    number: Tensor
    num_walked: int
    stand_in: bool = False

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, index: Tensor | slice) -> "Pairs":
        """The pairs that `index` selects."""
        return Pairs(
            self.x[index],
            self.t[index],
            self.t_next[index],
            self.dxdt[index],
            self.condition.rows(index),
            self.guidance[index],
            self.x0[index],
            self.prompt[index],
            self.number[index],
            self.num_walked,
            self.stand_in,
        )


def pairs_per_prompt(route_steps: int, keep_first: bool) -> int:
    """How many states of a walk are trained on, and how many times a latent is noised to."""
    return route_steps - (not keep_first)


def kept_index(keep: Tensor | None, of: Tensor) -> Tensor:
    """The numbers of the kept samples of `of` [B, ...]: all without a filter, which asks the device for nothing."""
    return torch.arange(len(of), device=of.device) if keep is None else keep.nonzero().squeeze(1)


def pair_numbers(index: Tensor, count: int) -> Tensor:
    """The `number` of the pairs of the kept prompts `index` [K], of `count` pairs each: [K count]."""
    return (index[:, None] * count + torch.arange(count, device=index.device)).flatten()
