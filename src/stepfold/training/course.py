"""What a run notes on its way for its report: time, memory, the tangent's backend."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stepfold.config import Config
from stepfold.teachers.contract import Student
from stepfold.training.looks import Progress
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


def step_cost(spent_sec: Sequence[float], pairs: Sequence[float]) -> dict[str, float]:
    """Means over all steps of whatever phase: `spent_sec`, without the first step, which compiles, and `pairs`.

    Args:
        spent_sec: of each step, one or more; see `stages.spent_sec`.
        pairs: of each step.
    """
    return {"spent_sec": statistics.fmean(spent_sec[1:] or spent_sec), "pairs": statistics.fmean(pairs)}


@dataclass
class Course:
    """The course of a run in this process; the steps before a resume are not in it.

    Attributes:
        device: whose memory is noted.
        stages: seconds of each stage.
        cycle: steps after which times repeat, see `cycle_of`.
        tangent: the backend, and why.
        step_sec: seconds of each step.
        spent_sec: of `stages.spent_sec` for each step.
        pairs: states that each step trains the student on.
        trainable: how many of the student's numbers are trained.
        peak_steps_gib: peak memory of the steps.
        peak_previews_gib: peak memory of the previews.
    """

    device: torch.device
    stages: Stages
    cycle: int = 1
    tangent: str = ""
    step_sec: list[float] = field(default_factory=list)
    spent_sec: list[float] = field(default_factory=list)
    pairs: list[float] = field(default_factory=list)
    trainable: int = 0
    peak_steps_gib: float = 0.0
    peak_previews_gib: float = 0.0

    def add(self, progress: Progress) -> None:
        """Notes what a step took."""
        self.step_sec.append(progress.row["sec"])
        self.spent_sec.append(progress.spent_sec)
        self.pairs.append(progress.row["pairs"])

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
            "step_cost": step_cost(self.spent_sec, self.pairs) if self.spent_sec else None,
            "trainable_parameters": self.trainable,
            "tangent": self.tangent,
            "peak_memory_gib": max(self.peak_steps_gib, self.peak_previews_gib),
            "peak_memory_steps_gib": self.peak_steps_gib,
        }
