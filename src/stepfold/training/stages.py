"""Where a run's time goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

BESIDE_STEPS = ("load", "first preview", "preview", "checkpoint", "evaluation")
"""Stages of a run that are no part of its optimiser steps."""


def spent_sec(device: torch.device) -> float:
    """A clock of what work costs: on a CPU this process's processor time, which other work does not lengthen."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


@dataclass
class Stages:
    """Seconds spent in each stage of the step.

    Attributes:
        device: waited for at the end of each stage; None not to wait, and then a GPU's time falls into later stages.
        seconds: by stage.
    """

    device: torch.device | None = None
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time that the block takes to stage `name`."""
        began = time.perf_counter()
        yield
        if self.device and self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - began
