"""The page of `stepfold compare`: quality, verdicts and costs of all rows, and the raw numbers beside it."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from stepfold.comparison.figures import draw_against, draw_diversity, draw_steps, mean_at, peak_memory
from stepfold.comparison.rows import METHODS, SEARCH, TIMING, Comparison, load_rows, searched_name
from stepfold.comparison.stage import Stage
from stepfold.comparison.verdicts import BETTER, Verdict, disagreements, values_at, verdicts
from stepfold.evaluation.protocol import Protocol, counted
from stepfold.reproduction.figures import save_figures
from stepfold.reproduction.kept import keep
from stepfold.reproduction.page import number
from stepfold.reproduction.records import collect_scores, mean_and_spread, scored
from stepfold.reproduction.runs import known, teacher_note
from stepfold.training.runs import writing

SEARCHED = "searched_*.json"
"""Files with the scores of the teacher under searched levels."""
Records = list[dict[str, Any]]
INTRODUCTION = """\
Written by `stepfold compare` from the json file beside this page; no number is typed by hand.

Every row distils the bundled teacher {budget} a run. {equal} The settings are those of its preset, at guidance
scale {guidance:g}, with the changes that stand under [Settings](#settings). The learning rate's warm-up, the average
and the preset's phases are stretched to the run's length. {rates}

Scores are those of the bundled evaluator on {pictures:,} images a row, at equal prompts and noise, over {seeds}. FD is
a Frechet distance in the evaluator's features; it compares at an equal number of images only. Agreement is the latent
MSE against the teacher at {most} steps. Numbers are mean ± standard deviation over the seeds. A row is `worse` if it
is farther from the best row than twice the standard error of their difference. {weak}"""


def write_page(asked: Comparison, stage: Stage, protocol: Protocol, root: Path, path: Path) -> None:
    """Writes the markdown page and, beside it, a json file with every number that it stands on, and the figures.

    Args:
        asked: what is compared.
        stage: the runs, whether they have ended or not.
        protocol: of the scores.
        root: the folder of the runs.
        path: of the page, `.md`.
    """
    keep(stage.runs, root, path.with_suffix(".json"), "compare", (SEARCHED,))
    found, teacher = collect_scores(stage.runs, root), known(teacher_note(protocol, root))
    rows = found.get(METHODS, {})
    records = [record for of_row in rows.values() for record in scored(of_row)]
    teacher = teacher or next((record["teacher"] for record in records), {})
    searched = {who: of_who for note in sorted(root.glob(SEARCHED)) for who, of_who in known(note).items()}
    drawn: dict[str, str] = {}
    if records:
        drawn = save_figures(figures(asked, found, teacher), path.parent / "figures", ("svg",))
    with writing(path) as part:
        part.write_text(page(asked, stage, protocol, found, teacher, searched, drawn), encoding="utf-8")


def figures(
    asked: Comparison, found: Mapping[str, Mapping[str, Records]], teacher: Mapping[str, Any]
) -> dict[str, Any]:
    """Name -> caption and figure."""
    rows = found[METHODS]
    fewest = {name: min(row.steps) for name, row in asked.rows.items()}
    shown = tuple(k for k in (1, 4) if k in asked.steps) or asked.steps[:1]
    drawn = {
        "methods_steps": (
            "Quality against sampling steps; rows that are nowhere among the best two are grey.",
            draw_steps(rows, teacher, asked.steps),
        ),
        "methods_diversity": (
            "Diversity beside accuracy, of rows with 80% of the best; the cross is the teacher at its most steps.",
            draw_diversity(rows, teacher, shown),
        ),
        "methods_memory": (
            "FD at the fewest steps that a row is made for (in brackets) against peak memory while training.",
            draw_against(rows, fewest, "GiB at most while training", peak_memory(found.get(TIMING, {}))),
        ),
    }
    if asked.budget.kind == "pairs":  # at equal time it is the same for all
        minutes = {row: of_row[0] for row, records in rows.items() if (of_row := minutes_of(records))}
        drawn["methods_time"] = (
            "FD at the fewest steps that a row is made for (in brackets) against training time.",
            draw_against(rows, fewest, "minutes of training", minutes),
        )
    return drawn


def page(
    asked: Comparison,
    stage: Stage,
    protocol: Protocol,
    found: Mapping[str, Mapping[str, Records]],
    teacher: Mapping[str, Any],
    searched: Mapping[str, Any] = MappingProxyType({}),
    drawn: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The page as markdown.

    Args:
        asked, stage, protocol: as for `write_page`.
        found: part -> row -> records.
        teacher: steps -> scores of the untrained teacher.
        searched: `teacher, searched SOLVER` -> steps -> scores.
        drawn: figure -> caption.
    """
    rows = {name: found.get(METHODS, {}).get(name, []) for name in asked.rows}
    lines = ["# Methods side by side", "", _introduction(asked, protocol, rows), "", *_summary(asked, rows)]
    for k in sorted(asked.steps):
        lines += ["", *_quality(asked, rows, k)]
    lines += ["", *_teacher(teacher, searched), "", *_costs(asked, stage, found)]
    if asked.rates:
        lines += ["", *_rates(asked, stage, found.get(SEARCH, {}))]
    if drawn:
        lines += ["", "## Figures"]
    for figure, caption in drawn.items():
        lines += ["", f"![{caption}](figures/{figure}.svg)", "", caption]
    lines += ["", *_settings(asked)]
    commands = [f"- {name}: `{records[0]['command']}`" for name, records in rows.items() if records]
    lines += ["", "## Commands", "", "Each row's run with seed 0:", "", *(commands or ["- none yet"])]
    left = [f"- `{preset}`: {reason}" for preset, reason in load_rows().left_out.items()]
    return "\n".join([*lines, "", "Presets that are no row:", "", *left]) + "\n"


def _introduction(asked: Comparison, protocol: Protocol, rows: Mapping[str, Records]) -> str:
    equal = "That is processor time on a CPU, which other work does not lengthen, and time on a GPU."
    if asked.budget.kind == "pairs":
        equal = "A pair is a state that the student is trained on; the time differs by row."
    rates = "No learning rate was searched for."
    if asked.rates:
        listed = ", ".join(f"{rate:g}" for rate in asked.rates)
        rates = (
            f"The learning rate is that of its settings times the best of {listed}. A quarter of the budget and a seed "
            "of its own decide, by FD at the fewest steps that the row is made for."
        )
    counts = sorted({count for records in rows.values() if (count := len(scored(records)))})
    most = max(counts, default=0)
    seeds = "one seed" if most < 2 else f"{most} seeds" if len(counts) == 1 else f"{counts[0]} to {most} seeds a row"
    weak = "With two or three seeds that is weak evidence." if most > 1 else "One seed gives no verdict."
    return INTRODUCTION.format(
        budget=asked.budget.words, equal=equal, rates=rates, guidance=protocol.guidance, pictures=protocol.n,
        seeds=seeds, most=protocol.teacher_steps[0], weak=weak,
    )  # fmt: skip


def _settings(asked: Comparison) -> list[str]:
    """What is changed of the presets, in all rows and in one."""
    lines = ["## Settings", "", "All rows have these on top of their presets:", ""]
    lines += [f"- `{change}`" for change in asked.common]
    own = {name: row.changes for name, row in asked.rows.items() if row.changes}
    if own:
        lines += ["", "These rows have settings of their own too:", ""]
    for name, changes in own.items():
        lines.append(f"- {name}: {', '.join(f'`{change}`' for change in changes)}")
    return lines


def judged(rows: Mapping[str, Records], steps: int, metric: str) -> dict[str, Verdict]:
    """Row -> verdict in one score at so many sampling steps."""
    values = {row: values_at(records, steps, metric) for row, records in rows.items()}
    return verdicts(values, BETTER[metric])


def _summary(asked: Comparison, rows: Mapping[str, Records]) -> list[str]:
    """The best row of each column, and those that cannot be told from it."""
    lines = [
        "## The best at each number of steps",
        "",
        "The best mean, and the rows that the seeds cannot tell from it.",
    ]
    lines += ["", "| steps | score | best mean | not distinguishable from it |", "|---|---|---|---|"]
    for k in sorted(asked.steps):
        for metric, label, digits, scale in (("fd", "FD", 4, 1.0), ("accuracy", "accuracy, %", 1, 100.0)):
            answers = judged(rows, k, metric)
            if not answers:
                lines.append(f"| {k} | {label} | not run | |")
                continue
            means = {row: mean_at(rows[row], k, metric) or 0.0 for row in answers}
            best = (min if BETTER[metric] == "lower" else max)(means, key=means.__getitem__)
            same = [row for row, answer in answers.items() if answer == "not distinguishable from the best"]
            told = ", ".join(same) or ("none" if answers[best] else "one seed: no verdict")
            lines.append(f"| {k} | {label} | {best} {_of(rows[best], k, metric, digits, scale)} | {told} |")
    return lines


def _quality(asked: Comparison, rows: Mapping[str, Records], k: int) -> list[str]:
    """All rows at so many steps, the lowest FD first; those that are not sampled there come last."""
    answers = {metric: judged(rows, k, metric) for metric in BETTER}
    lines = [f"## {counted(k)}".capitalize() if k == 1 else f"## {counted(k)}", ""]
    lines += [f"Students sampled in {counted(k)}, the lowest FD first.", ""]
    second = means_of(rows, k, "fd_imagenet")
    heads = ["row", "made for", "accuracy, %", "verdict", "FD", "verdict", *["FD-ImageNet"] * bool(second), "diversity"]
    lines += [f"| {' | '.join([*heads, 'agreement', 'seeds'])} |", "|---" * (len(heads) + 2) + "|"]
    found = {row: mean_at(records, k, "fd") for row, records in rows.items()}
    for row in sorted(rows, key=lambda row: (found[row] is None, found[row] or 0.0)):
        records, steps = rows[row], ", ".join(map(str, asked.rows[row].steps))
        ended = scored(records)
        diverged = f", {len(records) - len(ended)} diverged" if len(records) > len(ended) else ""
        if found[row] is None:
            why = f"not run{diverged}" if not ended else f"has no times for {counted(k)}"
            lines.append(f"| {row} | {steps} | {'| ' * (len(heads) - 1)}{why} |")
            continue
        cells = (
            _of(records, k, "accuracy", 1, 100), answers["accuracy"][row], _of(records, k, "fd", 4),
            answers["fd"][row], *[_of(records, k, "fd_imagenet", 2)] * bool(second), _of(records, k, "diversity", 3),
            _of(records, k, "agreement", 3),
        )  # fmt: skip
        lines.append(f"| {row} | {steps} | {' | '.join(cells)} | {len(ended)}{diverged} |")
    return [*lines, *_opinions(means_of(rows, k, "fd"), second)]


def means_of(rows: Mapping[str, Records], steps: int, metric: str) -> dict[str, float]:
    """Row -> mean of a score at so many sampling steps, of the rows that have one."""
    means = {row: mean_at(records, steps, metric) for row, records in rows.items()}
    return {row: mean for row, mean in means.items() if mean is not None}


def _opinions(first: Mapping[str, float], second: Mapping[str, float]) -> list[str]:
    """Whether FD and FD-ImageNet put the rows in the same order, where there are several with both."""
    if len(first.keys() & second.keys()) < 2:
        return []
    apart = disagreements(first, second)
    if not apart:
        return ["", "FD-ImageNet puts the rows in the same order as FD."]
    pairs = "; ".join(f"{low} before {high}" for low, high in apart)
    turned = f"FD-ImageNet turns around these orders of FD, by the means, however close: {pairs}"
    return ["", f"{turned}. Take neither order as settled."]


def _of(records: Records, steps: int, metric: str, digits: int, scale: float = 1.0) -> str:
    values = [scale * value for value in values_at(records, steps, metric)]
    return number(*mean_and_spread(values), digits) if values else ""


def _teacher(own: Mapping[str, Any], searched: Mapping[str, Any]) -> list[str]:
    lines = ["## The teacher, without any training", ""]
    lines += ["The same images by the teacher itself, with Euler's method at even noise levels"]
    lines[-1] += " and under searched levels." if searched else "."
    lines += ["", "| solver | steps | accuracy, % | FD | diversity |", "|---|---|---|---|---|"]
    for solver, of_solver in ({"Euler, even": own} | dict(searched)).items():
        name = solver.replace("teacher, ", "")
        for steps, s in of_solver.items():
            lines.append(f"| {name} | {steps} | {100 * s['accuracy']:.1f} | {s['fd']:.4f} | {s['diversity']:.3f} |")
    return lines


def minutes_of(records: Records) -> list[float]:
    """Minutes of training, one a seed, of those that were timed to their end."""
    timed = [record for record in scored(records) if record.get("step_cost")]
    return [record["steps"] * record["step_cost"]["spent_sec"] / 60 for record in timed]


def _costs(asked: Comparison, stage: Stage, found: Mapping[str, Mapping[str, Records]]) -> list[str]:
    lines = [
        "## Costs",
        "",
        "A step's cost and the peak of memory come from short runs of each row, before the others. "
        "A run that was stopped on the way has no minutes.",
    ]
    lines += [
        "",
        "| row | s a step | pairs a step | training steps | minutes a run | peak GiB | million trained | lr |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    peaks, configs = peak_memory(found.get(TIMING, {})), {run.row: run.config for run in stage.of(METHODS)}
    for row in asked.rows:
        cost, records = stage.costs.get(row), found.get(METHODS, {}).get(row, [])
        if cost is None:
            ended = found.get(TIMING, {}).get(row)
            lines.append(f"| {row} | {'diverged' if ended else 'not timed'} | | | | | | |")
            continue
        timed, minutes = scored(found[TIMING][row])[0], minutes_of(records)
        cells = (
            f"{cost.spent_sec:.2f}", f"{cost.pairs:.0f}", str(stage.steps.get(row, "")),
            number(*mean_and_spread(minutes), 1) if minutes else "",
            f"{peaks[row]:.2f}" if row in peaks else "",
            f"{timed['trainable_parameters'] / 1e6:.2f}" if timed.get("trainable_parameters") else "",
            f"{configs[row].optimiser.lr:.3g}" if row in configs else "",
        )  # fmt: skip
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def _rates(asked: Comparison, stage: Stage, found: Mapping[str, Records]) -> list[str]:
    """FD of each factor of the learning rate, and which was chosen."""
    lines = ["## Learning rates", "", "FD of the search, by the factor of the preset's learning rate.", ""]
    lines += [f"| row | steps | {' | '.join(f'x {rate:g}' for rate in asked.rates)} | chosen |"]
    lines += [f"|---|---|{'---|' * len(asked.rates)}---|"]
    for name, row in asked.rows.items():
        cells = []
        for rate in asked.rates:
            records = found.get(searched_name(name, rate), [])
            values = values_at(records, min(row.steps), "fd")
            cells.append(f"{values[0]:.4f}" if values else "diverged" if records else "not run")
        chosen = stage.rates.get(name)
        ended = [cell for cell in cells if cell not in ("diverged", "not run")]
        at_edge = len(ended) > 1 and chosen in (min(asked.rates), max(asked.rates))
        told = "" if chosen is None else f"x {chosen:g}" + (", the last that was tried" if at_edge else "")
        lines.append(f"| {name} | {min(row.steps)} | {' | '.join(cells)} | {told} |")
    return lines
