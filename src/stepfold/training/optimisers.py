"""Optimisers by name; all of them come from libraries."""

from collections.abc import Iterable

import torch
from torch import Tensor

from stepfold.config import OptimiserSettings


def make_optimiser(params: Iterable[Tensor], settings: OptimiserSettings) -> torch.optim.Optimizer:
    """AdamW from torch, CAME (arXiv:2307.02047) from pytorch-optimizer.

    On a GPU AdamW is fused: the other kind makes whole lists of tensors as large as the weights while it steps.
    """
    if settings.name == "adamw":
        params = list(params)
        how = "fused" if all(parameter.is_cuda for parameter in params) else "foreach"
        return torch.optim.AdamW(
            params, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, **{how: True}
        )
    from pytorch_optimizer import CAME

    return CAME(params, lr=settings.lr, weight_decay=settings.weight_decay)


def learning_rate(step: int, steps: int, settings: OptimiserSettings) -> float:
    """Linear warm-up over `warmup` steps, then constant, then linear to 0 over the last `decay` of the run."""
    rise = (step + 1) / settings.warmup if settings.warmup else 1.0
    fall = (steps - step) / (settings.decay * steps) if settings.decay else 1.0
    return settings.lr * min(1.0, rise, fall)
