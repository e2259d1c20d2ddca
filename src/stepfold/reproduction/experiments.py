"""What to run: the tables of the page, their rows, and the distillations that they take."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field

from stepfold.config import Config, Section, load_config
from stepfold.errors import UserError
from stepfold.evaluation.solvers import Solver

IMAGES = "{images}"
PRESET = "preset="
EQUAL_TIME_ROW, TIMED_ROW = ", equal time", ", timed"
TIMED = ("training.steps=12", "training.checkpoint_every=12", "training.preview_every=12", "training.time_stages=true")
"""Settings of a run that is made for its times: these come from short runs one after the other, on a quiet machine."""
Metric = Literal["fd", "sec_per_pair", "peak_memory_gib"]


class Experiment(Section):
    """A table of the page.

    Attributes:
        title: its heading.
        claim: what the paper says.
        worst_to_best: rows in the order that the claim puts them in, if it does.
        best: the row that the claim calls the best, if it does.
        beaten: the rows that `best` is claimed to beat; none means all others.
        less_by: metric -> the share by which the paper's last row is below its first; half of it counts as reproduced.
        by: what the claim compares, less being better: FD at one step (for the paper's FID), seconds or memory.
        costs: whether the table is about time and memory alone; its students are not scored.
        equal_time: the row whose training time all other rows get once more, in runs of their own. What a step of each
            row takes is measured before, see `plan_timing`.
        common: settings of all rows, as `key=value`.
        seeds: runs a row, with seeds 0, 1, ...
        rows: name -> settings that differ from the preset; `preset=NAME` begins with another one.
        not_run: name -> the reason, of rows that cannot be run yet.
    """

    title: str
    claim: str
    worst_to_best: tuple[str, ...] = ()
    best: str | None = None
    beaten: tuple[str, ...] = ()
    less_by: dict[Metric, float] = Field(default={})
    by: tuple[Metric, ...] = ("fd",)
    costs: bool = False
    equal_time: str | None = None
    common: tuple[str, ...] = ()
    seeds: int = Field(ge=2)
    rows: dict[str, tuple[str, ...]]
    not_run: dict[str, str] = Field(default={})


class Experiments(Section):
    """All tables.

    Attributes:
        preset: that every row changes, unless it names another one.
        pictures: that a score is made from.
        solvers: solver -> step counts that the untrained teacher is measured at.
        walks: of the teacher, that the figures show.
        tables: name -> table.
    """

    preset: str
    pictures: int = Field(ge=2)
    solvers: dict[Solver, tuple[int, ...]] = Field(default={})
    walks: int = Field(default=128, ge=2)
    tables: dict[str, Experiment]


@dataclass(frozen=True)
class Run:
    """One distillation.

    Attributes:
        table, row: where it belongs.
        preset: that the settings begin with.
        changes: `key=value` strings, the seed's among them.
        config: the whole settings.
        costs: whether only time and memory are wanted.
        steps: numbers of sampling steps that its student is scored at; none for all of the protocol's.
        beside: whether it may run beside others although its times count.
    """

    table: str
    row: str
    preset: str
    changes: tuple[str, ...]
    config: Config
    costs: bool = False
    steps: tuple[int, ...] = ()
    beside: bool = False

    @property
    def alone(self) -> bool:
        """Whether its times count, so that nothing may run beside it."""
        return not self.beside and (self.costs or self.row.endswith(TIMED_ROW))

    @property
    def name(self) -> str:
        """Of its folder: a hash of the settings that are not the defaults.

        Equal settings run once, whatever table asks for them, and neither a setting that a later version adds nor the
        place of the images changes a name.
        """
        changed = self.config.model_dump(mode="json", exclude_defaults=True)
        if self.config.space.images:
            changed["space"]["images"] = IMAGES
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]


def load_experiments() -> Experiments:
    """The tables that ship with the package."""
    return Experiments.model_validate(
        yaml.safe_load((resources.files("stepfold.reproduction") / "experiments.yaml").read_text(encoding="utf-8"))
    )


def plan(experiments: Experiments, tables: list[str], extra: list[str], images: Path | None = None) -> list[Run]:
    """The runs of some tables, all rows of seed 0 first: an early look at every row.

    Args:
        experiments: see `Experiments`.
        tables: names; none means all.
        extra: settings for every run, as `key=value`; another number of steps stretches the course of r with it.
        images: the folder for rows that need one; without it they are left out.

    Raises:
        UserError: no such table, or a setting that is bad or that a row or its seeds set.
    """
    tables = [name.upper() for name in tables]
    if unknown := [name for name in tables if name not in experiments.tables]:
        raise UserError(f"no table {unknown[0]!r}; there are {', '.join(experiments.tables)}")
    check_extra(experiments, extra, tables or list(experiments.tables))
    runs = [
        (seed, table, row, tuple(change.replace(IMAGES, str(images)) for change in changes))
        for table, experiment in experiments.tables.items()
        if table in tables or not tables
        for row, changes in experiment.rows.items()
        if images or not any(IMAGES in change for change in changes)
        for seed in range(experiment.seeds)
    ]
    runs.sort(key=lambda run: run[0])
    planned = []
    for seed, table, row, changes in runs:
        own = (*changes, *experiments.tables[table].common)
        run = make_run(experiments, table, row, (*own, *extra, f"seed={seed}"))
        if extra:
            before, steps = make_run(experiments, table, row, own).config, run.config.training.steps
            if steps != before.training.steps:
                longer = stretched(before, steps)
                run = make_run(experiments, table, row, (*own, *longer, *extra, f"seed={seed}"))
        planned.append(run)
    return planned


def check_extra(experiments: Experiments, extra: Sequence[str], tables: Sequence[str]) -> None:
    """Refuses a change of every run that some rows differ in: they would be one method under several names.

    Raises:
        UserError: naming the setting.
    """
    for name in (change.partition("=")[0].strip() for change in extra):
        if name == "seed":
            raise UserError("--set seed is not for reproduce, whose tables have seeds of their own; leave it out")
        for table in tables:
            rows = experiments.tables[table].rows
            if row := next((r for r, own in rows.items() if any(c.partition("=")[0] == name for c in own)), None):
                raise UserError(
                    f"--set {name} is what the rows of {table} differ in (row {row}); leave it out, or give other "
                    "tables by --table"
                )


def make_run(experiments: Experiments, table: str, row: str, changes: tuple[str, ...]) -> Run:
    """A run from what its row says."""
    named = [change.removeprefix(PRESET) for change in changes if change.startswith(PRESET)]
    preset, rest = (named or [experiments.preset])[-1], tuple(c for c in changes if not c.startswith(PRESET))
    return Run(table, row, preset, rest, load_config(preset, rest), experiments.tables[table].costs)


def plan_timing(experiments: Experiments, runs: list[Run]) -> list[Run]:
    """Two short runs of every row of the tables that compare at equal time; they show what a step of it takes.

    They are apart from `runs`, which may take days, and share the machine with other work. The student of seed 0 is
    scored too, alone on the machine, for its pictures a second.
    """
    timed = [run for run in runs if experiments.tables[run.table].equal_time and run.config.seed < 2]
    return [
        replace(
            make_run(experiments, run.table, run.row + TIMED_ROW, (PRESET + run.preset, *run.changes, *TIMED)),
            costs=run.config.seed > 0,
        )
        for run in timed
    ]


def stretched(config: Config, steps: int) -> list[str]:
    """The settings that make a run `steps` long and stretch the course of r with it."""
    c, factor = config.consistency, steps / config.training.steps
    counted = {"r_warmup": c.r_warmup, "r_cooldown_start": c.r_cooldown_start, "r_cooldown_steps": c.r_cooldown_steps}
    return [
        f"training.steps={steps}",
        *(f"consistency.{name}={round(factor * value)}" for name, value in counted.items()),
    ]
