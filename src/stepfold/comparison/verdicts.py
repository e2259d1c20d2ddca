"""What the seeds say: which row is the best of a column, and which cannot be told from it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from stepfold.reproduction.records import is_less, mean_and_spread, scored

Verdict = Literal["best", "not distinguishable from the best", "worse", ""]
BETTER: dict[str, Literal["higher", "lower"]] = {"fd": "lower", "accuracy": "higher"}
"""The scores that have a verdict, and which way is better."""


def values_at(records: Sequence[dict[str, Any]], steps: int, metric: str) -> list[float]:
    """One value a seed of a score at so many sampling steps, of the seeds that have one."""
    rows = [record["student"].get(str(steps)) for record in scored(list(records))]
    return [row[metric] for row in rows if row and row.get(metric) is not None]


def disagreements(first: Mapping[str, float], second: Mapping[str, float]) -> list[tuple[str, str]]:
    """Pairs of rows, the one with the lower first score leading, that the second score orders the other way."""
    rows = sorted(first.keys() & second.keys(), key=lambda row: (first[row], row))
    return [
        (low, high)
        for i, low in enumerate(rows)
        for high in rows[i + 1 :]
        if first[low] < first[high] and second[low] > second[high]
    ]


def verdicts(values: Mapping[str, Sequence[float]], better: Literal["higher", "lower"]) -> dict[str, Verdict]:
    """Row -> verdict, of the rows with values: the best mean, and the others against it.

    A row is `worse` if its mean is farther from the best one's than twice the standard error of their difference. With
    one seed of either there is no verdict.
    """
    sign = 1 if better == "lower" else -1
    signed = {row: [sign * value for value in of_row] for row, of_row in values.items() if of_row}
    if not signed:
        return {}
    best = min(signed, key=lambda row: mean_and_spread(signed[row])[0])
    answers: dict[str, Verdict] = {row: _against(signed[best], of_row) for row, of_row in signed.items()}
    answers[best] = "best" if len(signed[best]) > 1 else ""
    return answers


def _against(best: list[float], other: list[float]) -> Verdict:
    if len(best) < 2 or len(other) < 2:
        return ""
    return "worse" if is_less(best, other) else "not distinguishable from the best"
