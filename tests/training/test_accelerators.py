"""Device and precision of a run."""

import pytest
import torch
from torch import nn

from stepfold.errors import UserError
from stepfold.training.accelerators import make_accelerator


def test_runs_of_one_process_have_each_its_own_precision() -> None:
    """accelerate keeps the first one's for all: the second run was a ValueError of accelerate's own."""
    layer = nn.Linear(2, 2)
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16), ("no", torch.float32)):
        accelerator = make_accelerator(precision)
        with accelerator.autocast():
            assert layer.to(accelerator.device)(torch.ones(1, 2, device=accelerator.device)).dtype == dtype


def test_gradients_that_the_environment_would_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate lets the variable win over what it is told: 4 made every gradient a quarter."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(UserError, match=r"GRADIENT_ACCUMULATION_STEPS=4, .* unset .* training\.micro_batch"):
        make_accelerator("no")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    make_accelerator("no")
