"""The page of `stepfold reproduce`: every claim with what was measured and a verdict, and the raw numbers beside it."""

import json
import math
from pathlib import Path
from typing import Any

from stepfold.reproduction.figures import FIGURES, draw_all
from stepfold.reproduction.runs import Experiment, Experiments, fd_at_one_step, mean_and_spread, scored, verdict
from stepfold.training.runs import writing

Records = list[dict[str, Any]]
STEPS = ("1", "2", "4")
INTRODUCTION = """\
Written by `stepfold reproduce` from the scores in the json file beside this page; no number is typed by hand.

The teacher is the bundled one. Every row is the preset `{preset}` with the settings named, sees the same number of
pairs (60 to 64 a step) and is measured on the same {pictures} prompts and noises by the bundled judge. The learning
rate is the preset's for all rows; none was tuned for itself. FD is a Frechet distance in the judge's features and
stands for the paper's FID: the paper's numbers do not compare with ours, only the order of rows does. Numbers are
mean ± standard deviation over the seeds. A comparison counts when the one-step FDs differ by more than twice the
standard error of their difference; with two or three seeds that is weak evidence."""


def write_page(
    experiments: Experiments,
    found: dict[str, dict[str, Records]],
    solvers: dict[str, dict[str, Any]],
    figures: dict[str, Any],
    path: Path,
) -> None:
    """Writes the markdown page and, beside it, a json file with every score that it stands on, and the figures.

    Args:
        experiments: what was asked.
        found: table -> row -> the records of the seeds that have ended.
        solvers: solver -> steps -> scores of the untrained teacher.
        figures: the numbers of the figures, or nothing for none.
        path: of the page, `.md`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path.with_suffix(".json")) as part:
        part.write_text(json.dumps({"tables": found, "solvers": solvers}, indent=1) + "\n")
    if figures:
        draw_all(figures, path.parent / "figures")
    with writing(path) as part:
        part.write_text(page(experiments, found, solvers, with_figures=bool(figures)))


def page(
    experiments: Experiments,
    found: dict[str, dict[str, Records]],
    solvers: dict[str, dict[str, Any]],
    with_figures: bool = False,
) -> str:
    """The page as markdown."""
    every = [record for rows in found.values() for records in rows.values() for record in scored(records)]
    lines = [
        "# The paper, run again",
        "",
        INTRODUCTION.format(preset=experiments.preset, pictures=experiments.pictures),
        "",
        "## Summary",
        "",
        "| table | the paper says | one-step FD here | verdict |",
        "|---|---|---|---|",
        *(
            f"| [{name}](#{name.lower()}) {e.title} | {e.claim} | {_in_short(found.get(name, {}))} | "
            f"{verdict(e, found.get(name, {})) or '(no claim)'} |"
            for name, e in experiments.tables.items()
        ),
    ]
    lines += ["", *_teacher({"Euler, even noise levels": every[0]["teacher"]} if every else {}, solvers)]
    for name, experiment in experiments.tables.items():
        lines += ["", *_table(name, experiment, found.get(name, {}))]
    if with_figures:
        lines += ["", "## Figures"]
        for figure, (caption, _) in FIGURES.items():
            lines += ["", f"![{caption}](figures/{figure}.svg)", "", caption]
    return "\n".join(lines) + "\n"


def _in_short(rows: dict[str, Records]) -> str:
    done = {row: fd_at_one_step(scored(records)) for row, records in rows.items() if scored(records)}
    return "; ".join(f"{row} {_number(*fd, 4)}" for row, fd in done.items()) or "not run"


def _teacher(own: dict[str, dict[str, Any]], solvers: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "## The teacher, without any training",
        "",
        "Solvers by name are diffusers', on their own ladders; the last noise level is near 0 at any number of steps.",
        "",
        "| solver | steps | accuracy, % | CLIP score | FD | diversity |",
        "|---|---|---|---|---|---|",
    ]
    for solver, rows in (own | solvers).items():
        for steps, s in rows.items():
            numbers = (
                f"{100 * s['accuracy']:.1f}",
                f"{s['clip_score']:.1f}",
                f"{s['fd']:.4f}",
                f"{s['diversity']:.3f}",
            )
            lines.append(f"| {solver} | {steps} | {' | '.join(numbers)} |")
    return lines


def _table(name: str, experiment: Experiment, rows: dict[str, Records]) -> list[str]:
    lines = [
        f"## {name}",
        "",
        f"{experiment.title}. The paper: {experiment.claim}",
        "",
        "| row | steps | accuracy, % | CLIP score | FD | diversity | agreement | s a step | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in experiment.rows:
        ended = rows.get(row, [])
        records = scored(ended)
        seeds = f"{len(records)}" + (f", {len(ended) - len(records)} diverged" if len(ended) > len(records) else "")
        if not records:
            lines.append(f"| {row} | {'diverged' if ended else 'not run'} | | | | | | | {seeds} |")
            continue
        for steps in STEPS:
            scores = [record["student"][steps] for record in records]
            cells = (
                _of(scores, "accuracy", 1, 100), _of(scores, "clip_score", 1), _of(scores, "fd", 4),
                _of(scores, "diversity", 3), _of(scores, "agreement", 3),
            )  # fmt: skip
            timed = [record["sec_per_step"] for record in records if record["sec_per_step"] is not None]
            cost = _number(*mean_and_spread(timed), 2) if timed else "not timed"
            lines.append(f"| {row} | {steps} | {' | '.join(cells)} | {cost} | {seeds} |")
    lines += [f"| {row} | not run: {reason} | | | | | | | |" for row, reason in experiment.not_run.items()]
    commands = [f"- {row}: `{records[0]['command']}`" for row, records in rows.items() if records]
    return [*lines, *(["", "Commands of seed 0:", "", *commands] if commands else [])]


def _of(scores: list[dict[str, float]], name: str, digits: int, scale: float = 1) -> str:
    return _number(*mean_and_spread([scale * score[name] for score in scores]), digits)


def _number(mean: float, spread: float, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")
