"""The page of `stepfold reproduce`: every claim with what was measured and a verdict, and the raw numbers beside it."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from stepfold.config import load_config
from stepfold.reproduction.claims import CLAIMS, Finding
from stepfold.reproduction.experiments import EQUAL_TIME_ROW, Experiment, Experiments, Metric, Run
from stepfold.reproduction.figures import draw_all
from stepfold.reproduction.kept import keep
from stepfold.reproduction.records import (
    Verdict,
    collect_scores,
    mean_and_spread,
    scored,
    share_less,
    values_of,
    verdict,
    with_times,
)
from stepfold.reproduction.runs import FIGURES, known, solvers_note
from stepfold.training.runs import writing

Records = list[dict[str, Any]]
STEPS = ("1", "2", "4")
NO_CLAIM = "(no claim)"
DISCUSSION = "What to make of it, and why some of it came out as it did: [discussion]({file})."
INTRODUCTION = """\
Written by `stepfold reproduce` from the scores in the json file beside this page; no number is typed by hand.

The teacher is the bundled one. Every row is the preset `{preset}` with the settings named, sees the same number of
pairs ({steps} steps of 28 to 32){changed} and is measured on the same {pictures} prompts and noises by the \
bundled judge;
rows called "equal time" train for as long as the preset's own row takes instead. What a step takes was measured
apart, in two short runs of every row, one after the other with nothing else running. The learning rate is the
preset's for all rows; none was tuned for itself. FD is a Frechet distance in the judge's features and stands for
the paper's FID: the paper's numbers do not compare with ours, only the order of rows does. Diversity is the distance
between images of one prompt, agreement the latent MSE against the teacher at 20 steps. Numbers are mean ±
standard deviation over the seeds. A comparison counts when the one-step FDs differ by more than twice the standard
error of their difference; with two or three seeds that is weak evidence."""


def write_page(
    experiments: Experiments,
    runs: list[Run],
    root: Path,
    path: Path,
    extra: Sequence[str] = (),
) -> None:
    """Writes the markdown page and, beside it, a json file with every number that it stands on, and the figures.

    Args:
        experiments: what was asked.
        runs: of all tables, whether they have ended or not.
        root: the sweep's folder.
        path: of the page, `.md`.
        extra: settings of every run, as for `plan`.
    """
    keep(runs, root, path.with_suffix(".json"), "reproduce")
    solvers, figures = known(solvers_note(experiments, root)), known(root / FIGURES)
    shown = {
        table: rows if experiments.tables[table].costs else with_times(rows)
        for table, rows in collect_scores(runs, root).items()
        if table in experiments.tables
    }
    drawn = draw_all(figures, shown, path.parent / "figures")
    grids = sorted((path.parent / "figures").glob("grid_*.png"))
    beside = path.with_name(f"{path.stem}-discussion.md")
    discussion = [DISCUSSION.format(file=beside.name)] if beside.exists() else []
    with writing(path) as part:
        part.write_text(page(experiments, shown, solvers, figures, drawn, grids, discussion, extra), encoding="utf-8")


def page(
    experiments: Experiments,
    found: dict[str, dict[str, Records]],
    solvers: dict[str, dict[str, Any]],
    numbers: dict[str, Any] | None = None,
    figures: Mapping[str, str] = MappingProxyType({}),
    grids: Sequence[Path] = (),
    discussion: Sequence[str] = (),
    extra: Sequence[str] = (),
) -> str:
    """The page as markdown.

    Args:
        experiments: as for `write_page`.
        found: table -> row -> records.
        solvers: solver -> steps -> scores of the untrained teacher.
        numbers: of the figures, for the claims that lie in them.
        figures: name -> caption.
        grids: the files of `pictures.draw_grids`.
        discussion: lines that stand under the summary.
        extra: as for `write_page`.
    """
    records = [record for rows in found.values() for of_row in rows.values() for record in of_row]
    own = next((record["teacher"] for record in records if "teacher" in record), None)
    lines = [
        "# The paper, run again",
        "",
        INTRODUCTION.format(
            preset=experiments.preset,
            pictures=experiments.pictures,
            steps=load_config(experiments.preset, extra).training.steps,
            changed=f", all with `{' '.join(extra)}`," * bool(extra),
        ),
        "",
        "## Summary",
        "",
    ]
    rows = [
        _summary(name, experiment, found.get(name, {}), metric)
        for name, experiment in experiments.tables.items()
        for metric in experiment.by
    ]
    for claim, examine in CLAIMS.items():
        finding = examine(numbers or {}, found) or Finding("not run", "not run")
        rows.append(("", claim, finding.here, finding.verdict))
    lines += [_counted([row[-1] for row in rows]), "", *discussion, *([""] if discussion else [])]
    lines += ["| table | the paper says | here | verdict |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *_teacher({"Euler, even noise levels": own} if own else {}, solvers)]
    for name, experiment in experiments.tables.items():
        lines += ["", *_table(name, experiment, found.get(name, {}))]
    if figures or grids:
        lines += ["", "## Figures"]
    for figure, caption in figures.items():
        lines += ["", f"![{caption}](figures/{figure}.svg)", "", caption]
    for grid in grids:
        what = grid.stem.removeprefix("grid_").replace("_", " ")
        same = what.startswith("methods")
        caption = f"{what}, equal prompts and noise." if same else f"{what}: the nearest to black, and the farthest."
        lines += ["", f"![{caption}](figures/{grid.name})", "", caption]
    return "\n".join(lines) + "\n"


NAMES: dict[Metric, tuple[str, int, float]] = {
    "fd": ("FD at one step", 4, 1),
    "sec_per_pair": ("milliseconds a pair", 1, 1000),
    "peak_memory_gib": ("GiB at most while training", 2, 1),
}
"""metric -> its name, the digits that it is printed with, and what it is multiplied by."""


def _counted(verdicts: list[str]) -> str:
    """How many claims came out how. At equal pairs, where a claim was also judged at equal time."""
    first = [text.removeprefix("at equal pairs: ").split(";")[0] for text in verdicts if text != NO_CLAIM]
    counts = Counter(first)
    told = ", ".join(f"{counts[name]} {name}" for name in get_args(Verdict) if counts[name])
    return f"Of {len(first)} claims of the paper at this scale: {told}."


def _summary(name: str, experiment: Experiment, rows: dict[str, Records], metric: Metric) -> tuple[str, str, str, str]:
    label, digits, scale = NAMES[metric]
    values = {row: [scale * value for value in values_of(records, metric)] for row, records in rows.items()}
    told = "; ".join(f"{row} {number(*mean_and_spread(of), digits)}" for row, of in values.items() if of)
    answer = verdict(experiment, rows, metric) or NO_CLAIM
    if metric in experiment.less_by and answer != "not run":
        less = share_less(experiment, rows, metric)
        told += f". {experiment.worst_to_best[-1]} takes {abs(100 * less):.0f}% {'less' if less >= 0 else 'more'}"
    equal_time = {row: rows.get(f"{row}{EQUAL_TIME_ROW}", records) for row, records in rows.items()}
    if equal_time != rows and (experiment.worst_to_best or experiment.best):
        answer = f"at equal pairs: {answer}; at equal time: {verdict(experiment, equal_time, metric)}"
    link = f"[{name}](#{name.lower()}) {experiment.title}"
    return link, experiment.claim, f"{label}: {told}" if told else "not run", answer


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
    lines = [f"## {name}", "", f"{experiment.title}. The paper: {experiment.claim}", ""]
    lines += _cost_table(experiment, rows) if experiment.costs else _score_table(experiment, rows)
    commands = [f"- {row}: `{records[0]['command']}`" for row, records in rows.items() if records]
    return [*lines, *(["", "Commands of seed 0:", "", *commands] if commands else [])]


def _ended(experiment: Experiment, rows: dict[str, Records]) -> dict[str, tuple[Records, str]]:
    """row -> the records that have numbers, and how many seeds in words; the rows of equal time come last."""
    ended = {}
    for row in dict.fromkeys((*experiment.rows, *rows)):
        every = rows.get(row, [])
        records = scored(every)
        seeds = f"{len(records)}" + (f", {len(every) - len(records)} diverged" if len(every) > len(records) else "")
        ended[row] = (records, seeds if every else "not run")
    return ended


def _score_table(experiment: Experiment, rows: dict[str, Records]) -> list[str]:
    lines = [
        "| row | steps | accuracy, % | CLIP score | FD | diversity | agreement | images/s | s a training step | "
        "training steps | million parameters | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, (records, seeds) in _ended(experiment, rows).items():
        if not records:
            lines.append(f"| {row} | | | | | | | | | | | {seeds} |")
            continue
        cost = _of(records, "sec_per_step", 2)
        told = f"{cost} | {records[0]['steps']} | {records[0]['parameters'] / 1e6:.2f} | {seeds}"
        for steps in STEPS:
            scores = [record["student"][steps] for record in records]
            cells = (
                _of(scores, "accuracy", 1, 100), _of(scores, "clip_score", 1), _of(scores, "fd", 4),
                _of(scores, "diversity", 3), _of(scores, "agreement", 3), _of(scores, "images_per_sec", 0),
            )  # fmt: skip
            lines.append(f"| {row} | {steps} | {' | '.join(cells)} | {told} |")
    return [*lines, *(f"| {row} | not run: {reason} |" for row, reason in experiment.not_run.items())]


def _cost_table(experiment: Experiment, rows: dict[str, Records]) -> list[str]:
    """Seconds and memory, and their ratios to the first row's of the same number of pairs."""
    ended = _ended(experiment, rows)
    stages = dict.fromkeys(name for records, _ in ended.values() for r in records for name in r["stages_sec"] or {})
    head = ["row", "pairs a step", "ms a pair", "ratio", "ms a step", "peak GiB", "ratio", *(f"ms {s}" for s in stages)]
    lines = [f"| {' | '.join([*head, 'seeds'])} |", f"|{'---|' * (len(head) + 1)}"]
    first: dict[float, tuple[float, float]] = {}
    for row, (records, seeds) in ended.items():
        timed = [record for record in records if record["stages_sec"]]
        if not timed:
            lines.append(f"| {row} |{' |' * (len(head) - 1)} {seeds} |")
            continue
        pairs = timed[0]["pairs_per_step"]
        sec, memory = ([record[key] for record in timed] for key in ("sec_per_pair", "peak_memory_gib"))
        means = mean_and_spread(sec)[0], mean_and_spread(memory)[0]
        first.setdefault(pairs, means)
        cells = [
            f"{pairs:.0f}", number(*mean_and_spread([1000 * s for s in sec]), 1), f"{means[0] / first[pairs][0]:.2f}",
            _of(timed, "sec_per_step", 0, 1000), number(*mean_and_spread(memory), 2),
            f"{means[1] / first[pairs][1]:.2f}",
            *(f"{mean_and_spread([1000 * r['stages_sec'].get(s, 0) for r in timed])[0]:.0f}" for s in stages),
        ]  # fmt: skip
        lines.append(f"| {row} | {' | '.join(cells)} | {seeds} |")
    return lines


def _of(scores: list[dict[str, Any]], name: str, digits: int, scale: float = 1) -> str:
    values = [scale * score[name] for score in scores if score[name] is not None]
    return number(*mean_and_spread(values), digits) if values else "not timed"


def number(mean: float, spread: float, digits: int) -> str:
    """`0.12 ± 0.03`, or `0.12` where the spread is not known."""
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")
