"""Checkpoints combined: a weighted sum of a run's weights, by how near its images end to the teacher's."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from stepfold.maths.golden import golden_section

REACH = 0.5  # how far a weight moves from where it is, in each sweep
EVALUATIONS = 6
Weights = Mapping[str, Tensor]


@torch.no_grad()
def put_sum(module: nn.Module, states: Sequence[Weights], coefficients: Sequence[float]) -> None:
    """Gives a module the sum of states, each with its coefficient; numbers that are not floating are the first's.

    Args:
        module: changed in place; tensors that no state has stay as they are.
        states: K, of the same names and shapes.
        coefficients: K, of sum 1.
    """
    there = module.state_dict()
    for name, first in states[0].items():
        if first.is_floating_point():
            total = sum(a * state[name].to(torch.float64) for a, state in zip(coefficients, states, strict=True) if a)
            there[name].copy_(torch.as_tensor(total))
        else:
            there[name].copy_(first)


def with_coefficient(coefficients: Sequence[float], index: int, value: float, reference: int) -> list[float]:
    """The coefficients with another one at `index`; that of the reference makes the sum 1 again."""
    changed = list(coefficients)
    changed[index] = value
    changed[reference] = 1 - sum(a for i, a in enumerate(changed) if i != reference)
    return changed


def combine(
    error: Callable[[Sequence[float]], float], count: int, reference: int, sweeps: int
) -> tuple[list[float], float]:
    """Coefficients of the least error, by coordinate descent from the reference alone; they may be negative.

    Args:
        error: of a sum of states with these coefficients.
        count: K, of states.
        reference: the state that it starts from, and whose coefficient keeps the sum at 1.
        sweeps: over all other states.

    Returns:
        (coefficients, their error), never worse than the reference.

    Reference: arXiv:2404.02241 (LCSC), which searches by evolution on FID, with images.
    """
    best = [float(i == reference) for i in range(count)]
    least = error(best)
    for _ in range(sweeps):
        before = least
        for index in range(count):
            if index == reference:
                continue
            measured = partial(_error_at, error, best, index, reference)
            value, found = golden_section(best[index] - REACH, best[index] + REACH, measured, EVALUATIONS)
            if found < least:
                best, least = with_coefficient(best, index, value, reference), found
        if least > 0.999 * before:
            break
    return best, least


def _error_at(
    error: Callable[[Sequence[float]], float], best: Sequence[float], index: int, reference: int, value: float
) -> float:
    return error(with_coefficient(best, index, value, reference))
