"""Looks at what steps leave behind: logs it, reports it, stops a run that went wrong."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stepfold.errors import NonFiniteError
from stepfold.prompts.reading import Prompts
from stepfold.training.draws import prompt_index, step_samples
from stepfold.training.runs import (
    append_metrics,
)
from stepfold.training.stages import spent_sec
from stepfold.training.step import Run
from stepfold.training.step_log import StepRecord, of_all, row_of


@dataclass(frozen=True)
class Progress:
    """What `distill` tells its caller after every step, the seconds of `spent_sec` that it took among them."""

    step: int
    row: dict[str, Any]
    spent_sec: float = 0.0


@dataclass
class Looks:
    """Looks at what steps leave behind, some steps at a time: logs them, and stops the run where one went wrong.

    Attributes:
        run: see `Run`.
        folder: of the run.
        prompts: of the run.
        report: called for every step.
        skipped: steps of the run that were skipped so far.
        records: of the steps since the last look.
    """

    run: Run
    folder: Path
    prompts: Prompts
    report: Callable[[Progress], None]
    skipped: int = 0
    records: list[StepRecord] = field(default_factory=list)
    began: float = 0.0
    spent: float = 0.0

    def __post_init__(self) -> None:
        self.restart_clock()

    @property
    def are_due(self) -> bool:
        """Whether as many steps have gone by as `training.look_every` says."""
        on_cpu = self.run.accelerator.device.type == "cpu"
        return len(self.records) == (self.run.config.training.look_every or (1 if on_cpu else 10))

    def restart_clock(self) -> None:
        """Begins to time the next steps, unless some are still to be looked at."""
        if not self.records:
            self.began, self.spent = time.perf_counter(), spent_sec(self.run.accelerator.device)

    def look(self) -> None:
        """Writes and reports the rows of the steps since the last look.

        Raises:
            NonFiniteError: a step went wrong; nothing of them is kept.
        """
        rows = [self.row(record) for record in self.records]
        allowed = self.run.config.training.skip_nonfinite
        self.skipped += sum("skipped" in row for row in rows)
        if self.skipped > allowed:
            what = next(row["nonfinite"] for row in reversed(rows) if "nonfinite" in row)
            raise NonFiniteError(
                f"step {self.records[-1].step}: {what}; that makes {self.skipped} such steps, and "
                f"training.skip_nonfinite allows {allowed} to be skipped. Earlier checkpoints are intact."
            )
        seconds = (time.perf_counter() - self.began) / len(rows)
        spent = (spent_sec(self.run.accelerator.device) - self.spent) / len(rows)
        for record, row in zip(self.records, rows, strict=True):
            if self.run.processes.first:
                append_metrics(self.folder, row)
            pairs = sum(metrics.kept for metrics in record.spaces.values())
            self.report(Progress(record.step + 1, row | {"sec": seconds, "pairs": pairs}, spent))
        self.records.clear()

    def row(self, record: StepRecord) -> dict[str, Any]:
        """See `row_of`; with the states of all processes."""
        config, processes = self.run.config, self.run.processes
        if processes.count == 1 or not record.norms:
            return row_of(record)
        samples = step_samples(record.step // config.space.reuse, config)
        texts = [self.prompts.prompt(i) for i in prompt_index(samples, self.prompts, config.seed)]
        share = processes.largest_share(config.training.prompts_per_step)
        return row_of(of_all(replace(record, prompts=texts), processes, share))
