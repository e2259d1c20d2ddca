"""What a run notes on its way for its report: time, memory, the tangent's backend."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from stepfold.teachers.contract import Student
from stepfold.training.memory import peak_memory_gib, reset_peak_memory
from stepfold.training.stages import Stages


@dataclass
class Course:
    """The course of a run in this process; the steps before a resume are not in it.

    Attributes:
        device: whose memory is noted.
        stages: seconds of each stage.
        tangent: the backend, and why.
        step_sec: seconds of each step.
        peak_steps_gib: peak memory of the steps.
        peak_previews_gib: peak memory of the previews.
    """

    device: torch.device
    stages: Stages
    tangent: str = ""
    step_sec: list[float] = field(default_factory=list)
    peak_steps_gib: float = 0.0
    peak_previews_gib: float = 0.0

    def note_memory(self) -> None:
        """Adds the peak since the last call to that of the steps, and counts from here."""
        self.peak_steps_gib = max(self.peak_steps_gib, peak_memory_gib(self.device))
        reset_peak_memory(self.device)

    def apart(self, preview: Callable[[Student, int], None]) -> Callable[[Student, int], None]:
        """A preview whose memory does not count as that of the steps."""

        def measured(average: Student, step: int) -> None:
            self.note_memory()
            preview(average, step)
            self.peak_previews_gib = max(self.peak_previews_gib, peak_memory_gib(self.device))
            reset_peak_memory(self.device)

        return measured

    def numbers(self) -> dict[str, Any]:
        """For report.json. Peak memory is that of training: neither of loading before nor of measuring after."""
        sec = self.step_sec
        return {
            "stages_sec": dict(self.stages.seconds),
            "timed_steps": len(sec),
            "step_sec": {"first": sec[0], "median": statistics.median(sec)} if sec else None,
            "tangent": self.tangent,
            "peak_memory_gib": max(self.peak_steps_gib, self.peak_previews_gib),
            "peak_memory_steps_gib": self.peak_steps_gib,
        }
