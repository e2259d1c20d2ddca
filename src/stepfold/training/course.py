"""What a run notes on its way for its report: time, memory, the tangent's backend."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stepfold.config import Config
from stepfold.teachers.contract import Student
from stepfold.training.memory import peak_memory_gib, reset_peak_memory
from stepfold.training.stages import Stages


def cycle_of(config: Config) -> int:
    """The number of steps after which times repeat: a walk serves `space.reuse` steps, an encoding several walks.

    The student's own rollouts stop at each of their steps in turn; those of cycled lengths repeat on average.
    """
    several, steps = config.space.reuse * config.training.encode_ahead, config.rollout.steps
    rollouts = (steps**2 if config.rollout.lengths == "cycled" else steps) if config.fake.updates else 1
    return math.lcm(several, rollouts)


def step_times(sec: Sequence[float], cycle: int) -> dict[str, float]:
    """Typical seconds of a step.

    Args:
        sec: of each step, one or more.
        cycle: number of steps after which times repeat.

    Returns:
        `first`: of the first step, which compiles.
        `again`: the mean of later steps that do the same work as the first.
        `median`: of all steps.
        `mean`: of the last whole cycles after the first step; of fewer steps where there is no whole one.
    """
    later = sec[1:] or sec
    whole = len(later) // cycle * cycle
    return {
        "first": sec[0],
        "again": statistics.fmean(sec[cycle::cycle] or later),
        "median": statistics.median(sec),
        "mean": statistics.fmean(later[-whole:]),
    }


@dataclass
class Course:
    """The course of a run in this process; the steps before a resume are not in it.

    Attributes:
        device: whose memory is noted.
        stages: seconds of each stage.
        cycle: steps after which times repeat, see `cycle_of`.
        tangent: the backend, and why.
        step_sec: seconds of each step.
        peak_steps_gib: peak memory of the steps.
        peak_previews_gib: peak memory of the previews.
    """

    device: torch.device
    stages: Stages
    cycle: int = 1
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
        return {
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "stages_sec": dict(self.stages.seconds),
            "timed_steps": len(self.step_sec),
            "step_sec": step_times(self.step_sec, self.cycle) if self.step_sec else None,
            "tangent": self.tangent,
            "peak_memory_gib": max(self.peak_steps_gib, self.peak_previews_gib),
            "peak_memory_steps_gib": self.peak_steps_gib,
        }
