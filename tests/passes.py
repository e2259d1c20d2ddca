"""The gradient of one step outside the loop, for tests that look at it."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stepfold.config import Config
from stepfold.objectives.contract import Networks
from stepfold.randomness import Draws
from stepfold.spaces.records import Pairs
from stepfold.teachers.contract import Student
from stepfold.training.accelerators import make_accelerator
from stepfold.training.precision import student_precision
from stepfold.training.terms import add_gradients, terms_of

CPU = torch.device("cpu")


def gradient_step(
    student: Student,
    pairs: Pairs,
    config: Config,
    step: int = 10,
    *,
    teacher: Any = None,
    tangent: str = "two_pass",
    critics: Mapping[str, nn.Module] | None = None,
    draws: Draws | None = None,
) -> dict[str, Tensor]:
    """Adds the gradient of all terms of `config` on the pairs; their metrics [M]. Without a teacher, sigma_data 0.5."""
    accelerator = make_accelerator(config.training.precision.replace("auto", "no"))
    networks = Networks(
        student,
        teacher or SimpleNamespace(sigma_data=0.5),  # type: ignore[arg-type]
        critics or {},
        tangent,
        lambda: student_precision(accelerator, config.training.precision),
    )
    draws = draws or Draws(config.seed, [], CPU)
    return add_gradients(terms_of(config), networks, {config.space.first: pairs}, draws, config, step, accelerator)[
        config.space.first
    ]
