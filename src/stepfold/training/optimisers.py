"""Optimisers by name; all of them come from libraries."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stepfold.config import OptimiserSettings
from stepfold.training.processes import buckets

STUDENT = "student"
"""The name of the student's parameter groups; a critic's group has the critic's."""


def make_optimiser(params: Iterable[Tensor], settings: OptimiserSettings) -> torch.optim.Optimizer:
    """AdamW from torch, CAME (arXiv:2307.02047) from pytorch-optimizer.

    On a GPU AdamW is fused: the other kind makes whole lists of tensors as large as the weights while it steps. CAME
    gets its parameters in groups for that reason, and the kernels of 1 x 1 convolutions as the matrices that they are,
    as Sana's own does: it would keep four numbers a weight for them otherwise, in place of rows and columns.
    """
    params = list(params)
    if settings.name == "adamw":
        how = "fused" if all(parameter.is_cuda for parameter in params) else "foreach"
        options: dict[str, Any] = {how: True}
        return torch.optim.AdamW(
            [{"params": params, "name": STUDENT}],
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            **options,
        )
    from pytorch_optimizer import CAME

    class CAMEOfMatrices(CAME):
        def step(self, closure: None = None) -> None:
            with as_matrices(parameter for group in self.param_groups for parameter in group["params"]):
                super().step(closure)

    groups = [{"params": bucket, "name": STUDENT} for bucket in buckets(params)]
    return CAMEOfMatrices(groups, lr=settings.lr, weight_decay=settings.weight_decay)


def add_group(
    optimiser: torch.optim.Optimizer, name: str, params: Sequence[Tensor], betas: tuple[float, float] | None
) -> None:
    """Adds a critic's parameters under its name; `betas` are AdamW's, None for the student's."""
    own = {"betas": betas} if betas and isinstance(optimiser, torch.optim.AdamW) else {}
    optimiser.add_param_group({"params": list(params), "name": name} | own)


@contextmanager
def as_matrices(params: Iterable[Tensor]) -> Iterator[None]:
    """Within it the kernels of 1 x 1 convolutions [O, I, 1, 1] and their gradients are [O, I], in the same memory."""
    kernels = [
        (parameter, parameter.data, parameter.grad)
        for parameter in params
        if parameter.grad is not None and parameter.dim() > 2 and set(parameter.shape[2:]) == {1}
    ]
    for kernel, data, grad in kernels:
        kernel.grad = None  # it has to have the shape of its parameter
        kernel.data = data.view(data.shape[:2])
        kernel.grad = grad.view(grad.shape[:2])
    try:
        yield
    finally:
        for kernel, data, grad in kernels:
            kernel.grad = None
            kernel.data = data
            kernel.grad = grad


def long_warmup(steps: int, settings: OptimiserSettings) -> str | None:
    """A note for a run of which the learning rate's warm-up is more than a fifth; None for others."""
    if settings.warmup <= max(1, steps / 5):
        return None
    return (
        f"the learning rate rises during {settings.warmup} of {steps} steps (optimiser.warmup); for this run take "
        f"--set optimiser.warmup={steps // 10}"
    )


def learning_rate(step: int, steps: int, settings: OptimiserSettings) -> float:
    """Linear warm-up over `warmup` steps, then constant, then linear to 0 over the last `decay` of the run."""
    rise = (step + 1) / settings.warmup if settings.warmup else 1.0
    fall = (steps - step) / (settings.decay * steps) if settings.decay else 1.0
    return settings.lr * min(1.0, rise, fall)
