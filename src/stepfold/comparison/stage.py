"""What is known of a comparison by now, and the runs that follow from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepfold.comparison.rows import (
    REFERENCE,
    SEARCH,
    SEARCH_SHARE,
    TIMING,
    Comparison,
    Cost,
    plan_methods,
    plan_search,
    plan_timing,
    searched_name,
    steps_for,
)
from stepfold.comparison.verdicts import values_at
from stepfold.reproduction.experiments import Run
from stepfold.reproduction.records import SCORES, collect_scores, scored


@dataclass(frozen=True)
class Stage:
    """What is known by now.

    Attributes:
        runs: that are planned: timing, search and methods.
        costs: row -> what a step costs, of the timed rows.
        steps: row -> steps of its budget.
        rates: row -> the factor of its learning rate.
    """

    runs: list[Run]
    costs: dict[str, Cost]
    steps: dict[str, int]
    rates: dict[str, float]

    def of(self, table: str) -> list[Run]:
        """The runs of one part."""
        return [run for run in self.runs if run.table == table]


def stage_of(asked: Comparison, root: Path) -> Stage:
    """What `root` says by now, and the runs that follow from it."""
    timing = plan_timing(asked)
    costs = costs_of(timing, root)
    reference = costs.get(REFERENCE)
    ready = [name for name in asked.rows if name in costs and (reference or asked.budget.kind != "demo steps")]
    steps = {name: steps_for(asked.budget, costs[name], reference) for name in ready}
    search = plan_search(asked, steps)
    rates = choose_rates(asked, collect_scores(search, root).get(SEARCH, {}))
    return Stage([*timing, *search, *plan_methods(asked, steps, rates)], costs, steps, rates)


def costs_of(timing: list[Run], root: Path) -> dict[str, Cost]:
    """Row -> what a step costs, of the rows whose short run has ended well."""
    found = collect_scores(timing, root).get(TIMING, {})
    ended = {name: scored(records) for name, records in found.items()}
    return {name: Cost(**records[0]["step_cost"]) for name, records in ended.items() if records}


def choose_rates(asked: Comparison, found: Mapping[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Row -> the factor with the lowest FD at the fewest steps that the row is made for; 1 without a search.

    A row whose runs have not all ended is not in it. One that diverges at every factor keeps 1.
    """
    if not asked.rates:
        return dict.fromkeys(asked.rows, 1.0)
    chosen = {}
    for name, row in asked.rows.items():
        records = {rate: found.get(searched_name(name, rate), []) for rate in asked.rates}
        if all(records.values()):
            fds = {rate: values_at(of_rate, min(row.steps), "fd") for rate, of_rate in records.items()}
            ended = {rate: of_rate[0] for rate, of_rate in fds.items() if of_rate}
            chosen[name] = min(ended, key=ended.__getitem__) if ended else 1.0
    return chosen


@dataclass(frozen=True)
class Line:
    """A run of the plan, with its steps and seconds where they are known by now."""

    run: Run
    sec: float | None
    done: bool


def listing(asked: Comparison, root: Path) -> tuple[list[Line], float | None]:
    """The runs that can be planned by now, and what is to do in seconds of training; None before rows are timed."""
    stage = stage_of(asked, root)
    lines, left = [], 0.0
    for run in stage.runs:
        done, cost = (root / run.name / SCORES).exists(), stage.costs.get(run.row.partition(" x ")[0])
        sec = run.config.training.steps * cost.spent_sec if cost else None
        lines.append(Line(run, sec, done))
        left += sec if sec and not done else 0
    whole = budget_sec(asked, stage)
    unplanned = {name for name in asked.rows if name not in stage.rates or name not in stage.steps}
    if unplanned and whole is None:
        return lines, None
    searches = len(asked.rates) * SEARCH_SHARE if asked.rates else 0
    for name in unplanned:
        left += (whole or 0) * (asked.seeds + (0 if name in stage.steps else searches))
    return lines, left


def budget_sec(asked: Comparison, stage: Stage) -> float | None:
    """Seconds of a run's budget; None where it counts what is not timed yet, or pairs."""
    if asked.budget.kind == "minutes":
        return 60 * asked.budget.amount
    reference = stage.costs.get(REFERENCE)
    return asked.budget.amount * reference.spent_sec if reference and asked.budget.kind == "demo steps" else None
