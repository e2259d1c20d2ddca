"""Discrete consistency: the student's picture must not change over one step of the teacher's (LCM-like)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiscreteTerms:
    """Per pair.

    Attributes:
        loss: [M], with gradient.
        squared_error: [M], ||f - f_next||^2 / D, without.
    """

    loss: Tensor
    squared_error: Tensor


def discrete_terms(x0: Tensor, target: Tensor, huber_constant: float) -> DiscreteTerms:
    """Pseudo-Huber distance sqrt(||f - target||^2 + C^2) - C with C = huber_constant sqrt(D), divided by sqrt(D).

    Args:
        x0: the student's picture f(x_t, t) [M, ...], with gradient.
        target: f(x_s, s) [M, ...], where the teacher's step from (x_t, t) to s < t ends; no gradient reaches it.
        huber_constant: >= 0; at 0 it is the norm, whose gradient is 0 where the pictures are equal; large it is the
            square.

    Returns:
        See `DiscreteTerms`.

    Reference: arXiv:2303.01469, Eq. 7 (the objective); arXiv:2310.04378 (with guided teachers); arXiv:2310.14189, Eq. 8
        (the distance).
    """
    squared = (x0.float() - target.detach().float()).square().flatten(1).mean(1)
    radicand = (squared + huber_constant**2).clamp(min=torch.finfo(squared.dtype).tiny)  # the root has no slope at 0
    loss = torch.sqrt(radicand) - huber_constant
    return DiscreteTerms(loss, squared.detach())
