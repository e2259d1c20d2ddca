"""What was found: the scores of the runs, and what they say about a claim."""

import json
import math
import statistics
from pathlib import Path
from typing import Any, Literal

from stepfold.reproduction.experiments import EQUAL_TIME_ROW, TIMED_ROW, Experiment, Metric, Run

SCORES = "scores.json"
Verdict = Literal["reproduced", "not reproduced", "not distinguishable", "not measurable here", "not run"]


def collect_scores(runs: list[Run], root: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """table -> row -> the records of its seeds that have ended, well or diverged."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        rows = found.setdefault(run.table, {}).setdefault(run.row, [])
        path = root / run.name / SCORES
        if path.exists():
            rows.append(json.loads(path.read_text(encoding="utf-8")))
    return found


def with_times(rows: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of a table of scores, each with the times of its short runs instead of its own, which are dropped."""
    timed = {row.removesuffix(TIMED_ROW): scored(records) for row, records in rows.items() if row.endswith(TIMED_ROW)}
    shown = {}
    for row, records in rows.items():
        if row.endswith(TIMED_ROW):
            continue
        times = timed.get(row.removesuffix(EQUAL_TIME_ROW), [])
        sec = mean_sec_per_step(times)
        shown[row] = [record | {"sec_per_step": sec} for record in records]
        sampled = [record["student"] for record in times if "student" in record]
        for record in scored(shown[row]):
            rates = {
                k: statistics.mean(student[k]["images_per_sec"] for student in sampled) if sampled else None
                for k in record["student"]
            }
            record["student"] = {k: scores | {"images_per_sec": rates[k]} for k, scores in record["student"].items()}
    return shown


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean, and standard deviation with n - 1; the spread of one value is not known."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def scored(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records that have scores: all but the diverged."""
    return [record for record in records if not record["diverged"]]


def values_of(records: list[dict[str, Any]], metric: Metric) -> list[float]:
    """One value a seed, of those that have one; FD is that of one step."""
    found = [record["student"]["1"]["fd"] if metric == "fd" else record[metric] for record in scored(records)]
    return [value for value in found if value is not None]


def mean_sec_per_step(records: list[dict[str, Any]]) -> float | None:
    """Mean over the seeds that were timed; None if none was."""
    timed = [record["sec_per_step"] for record in scored(records) if record["sec_per_step"] is not None]
    return statistics.mean(timed) if timed else None


def is_less(a: list[float], b: list[float]) -> bool | None:
    """Whether the mean of `a` is below that of `b`; None if they are nearer than twice their standard error."""
    (mean_a, spread_a), (mean_b, spread_b) = mean_and_spread(a), mean_and_spread(b)
    error = math.sqrt(spread_a**2 / len(a) + spread_b**2 / len(b))
    return None if math.isnan(error) or abs(mean_a - mean_b) < 2 * error else mean_a < mean_b


def share_less(experiment: Experiment, rows: dict[str, list[dict[str, Any]]], metric: Metric) -> float:
    """By which share the claim's last row is below its first."""
    first, last = (statistics.mean(values_of(rows[experiment.worst_to_best[i]], metric)) for i in (0, -1))
    return 1 - last / first


def verdict(experiment: Experiment, rows: dict[str, list[dict[str, Any]]], metric: Metric = "fd") -> Verdict | None:
    """What the seeds say about the claim, in one metric; None if there is no claim.

    `reproduced` if every comparison of the claim comes out as claimed, `not reproduced` if one comes out the other way
    round, `not distinguishable` if one lies within the spread, `not run` if a row has fewer than two seeds with scores.
    """
    if experiment.best:
        beaten = experiment.beaten or [row for row in experiment.rows if row != experiment.best]
        compared = [(experiment.best, row) for row in beaten]
    else:
        order = experiment.worst_to_best
        compared = list(zip(order[1:], order[:-1], strict=True)) if order else []
    if not compared:
        return None
    values = {row: values_of(rows.get(row, []), metric) for pair in compared for row in pair}
    if any(len(of_row) < 2 for of_row in values.values()):
        return "not run"
    answers = [is_less(values[better], values[worse]) for better, worse in compared]
    if False in answers or (
        metric in experiment.less_by and share_less(experiment, rows, metric) < experiment.less_by[metric] / 2
    ):
        return "not reproduced"
    return "not distinguishable" if None in answers else "reproduced"
