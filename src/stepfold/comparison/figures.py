"""The figures of `stepfold compare`, drawn from its records alone."""

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stepfold.comparison.verdicts import values_at
from stepfold.reproduction.figures import new_plots
from stepfold.reproduction.records import scored

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Mapping[str, list[dict[str, Any]]]
"""row -> the records of its seeds."""
LABELS = {"fd": "FD", "accuracy": "accuracy, %", "diversity": "diversity"}
SCALES = {"accuracy": 100.0}
SHOWN, COLOURS = 0.8, 10


def mean_at(records: list[dict[str, Any]], steps: int, metric: str) -> float | None:
    """Mean over the seeds, in the unit of `LABELS`; None where no seed has the score."""
    values = values_at(records, steps, metric)
    return SCALES.get(metric, 1.0) * statistics.fmean(values) if values else None


def leaders(rows: Rows, steps: tuple[int, ...], count: int = 2) -> list[str]:
    """Rows that are among the best `count` in FD or accuracy at some number of steps, in their order."""
    found: set[str] = set()
    for k in steps:
        for metric, sign in (("fd", 1), ("accuracy", -1)):
            means = {row: mean for row, records in rows.items() if (mean := mean_at(records, k, metric)) is not None}
            found |= set(sorted(means, key=lambda row: sign * means[row])[:count])
    return [row for row in rows if row in found]


def draw_steps(rows: Rows, teacher: Mapping[str, Any], steps: tuple[int, ...]) -> "Figure":
    """FD and accuracy against sampling steps: a line a row, the untrained teacher dashed.

    Rows that lead nowhere are grey, and cut off where they leave the range of those that do.
    """
    figure, plots = new_plots(2, 1, "sampling steps", size=7)
    figure.set_size_inches(9, 9)
    curves = {
        row: {metric: [(k, mean_at(records, k, metric)) for k in sorted(steps)] for metric in ("fd", "accuracy")}
        for row, records in rows.items()
    }
    own = {int(k): scores for k, scores in teacher.items() if int(k) in steps}
    curves["teacher, untrained"] = {
        metric: [(k, SCALES.get(metric, 1.0) * own[k][metric]) for k in sorted(own)] for metric in ("fd", "accuracy")
    }
    first = leaders(rows, steps)
    for plot, metric in zip(plots.flat, ("fd", "accuracy"), strict=True):
        plot.set_yscale("log" if metric == "fd" else "linear")
        for number, row in enumerate(first):
            _line(plot, curves[row][metric], marker="o", markersize=4, label=row, ls="-" if number < COLOURS else ":")
        plot.autoscale_view()
        plot.autoscale(enable=False, axis="y")
        for row in (row for row in curves if row not in first):
            own_line = {"color": "0.75", "lw": 0.8, "zorder": 1} if row in rows else {"color": "black", "ls": "--"}
            _line(plot, curves[row][metric], label="_" if row in rows else row, **own_line)
    for plot, metric in zip(plots.flat, ("fd", "accuracy"), strict=True):
        plot.set_xscale("log", base=2)
        plot.set_xticks(sorted(steps), [str(k) for k in sorted(steps)])
        plot.set(ylabel=LABELS[metric])
    plots[0][0].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _line(plot: "Axes", points: list[tuple[int, float | None]], **style: Any) -> None:
    known = [(k, value) for k, value in points if value is not None]
    if known:
        plot.plot(*zip(*known, strict=True), **style)


def draw_against(rows: Rows, fewest: Mapping[str, int], label: str, of: Mapping[str, float]) -> "Figure":
    """FD at the fewest steps that a row is made for, against a number `of` each row: memory or time."""
    figure, plots = new_plots(1, 1, label, size=8)
    figure.set_size_inches(8, 4.5)
    points = {row: (of[row], mean_at(records, fewest[row], "fd")) for row, records in rows.items() if row in of}
    _name_points(plots[0][0], {f"{row} ({fewest[row]})": point for row, point in points.items()})
    plots[0][0].set(ylabel="FD", yscale="log")
    return figure


def draw_diversity(rows: Rows, teacher: Mapping[str, Any], steps: tuple[int, ...]) -> "Figure":
    """Diversity beside accuracy at each of some numbers of steps; the teacher at its most steps is a cross.

    Rows below `SHOWN` of the best accuracy are left out.
    """
    figure, plots = new_plots(1, len(steps), LABELS["accuracy"], size=5)
    figure.set_size_inches(5.5 * len(steps), 4.5)
    best = next(iter(teacher.values()), None)
    for plot, k in zip(plots.flat, steps, strict=True):
        points = {
            row: (mean_at(records, k, "accuracy"), mean_at(records, k, "diversity")) for row, records in rows.items()
        }
        most = max((x for x, _ in points.values() if x is not None), default=0)
        _name_points(plot, {row: (x, y) for row, (x, y) in points.items() if x is not None and x >= SHOWN * most})
        if best:
            plot.plot(100 * best["accuracy"], best["diversity"], "kx", markersize=8)
        plot.set(ylabel=LABELS["diversity"], title=f"{k} steps" if k > 1 else "1 step")
    return figure


def _name_points(plot: "Axes", points: Mapping[str, tuple[float | None, float | None]]) -> None:
    for name, (x, y) in points.items():
        if x is not None and y is not None:
            plot.plot(x, y, "o", markersize=4)
            plot.annotate(name, (x, y), xytext=(4, 2), textcoords="offset points", fontsize=7)


def peak_memory(records: Rows) -> dict[str, float]:
    """Row -> GiB at most while training, of the rows that have it."""
    found = {row: [record.get("peak_memory_gib") for record in scored(of_row)] for row, of_row in records.items()}
    known = {row: [value for value in values if value is not None] for row, values in found.items()}
    return {row: statistics.fmean(values) for row, values in known.items() if values}
