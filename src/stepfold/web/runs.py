"""Run folders as the page shows them. They are only read, may be still going, and may be broken or not ours."""

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from stepfold.config import Config, from_yaml
from stepfold.errors import UserError
from stepfold.evaluation.curves import curve_svgs, curves_from_rows, ordered, quality_svgs
from stepfold.evaluation.preview import errors_over_steps
from stepfold.evaluation.symptoms import symptoms_of
from stepfold.evaluation.verdict import METRICS as SCORED
from stepfold.evaluation.verdict import curves_over_calls
from stepfold.training.opening import differences, is_running
from stepfold.training.runs import CONFIG, METRICS, read_metrics

DEPTH, MOST_RUNS = 3, 200
LARGEST_METRICS, LARGEST_PICTURE, LARGEST_REPORT = 64 * 2**20, 8 * 2**20, 16 * 2**20  # bytes
ENDS = ("student", "teacher", "student.safetensors")
"""What a finished run leaves: of distill, of retime, of a network of one's own."""
LARGEST_N = 10**9  # pictures of an evaluation
MOST_CALLS, LARGEST_VALUE = 10**4, 1e6  # of an image, and of a metric
PNG = b"\x89PNG\r\n\x1a\n"
SAFE_HEAD = (
    "<!doctype html><meta http-equiv='Content-Security-Policy' "
    "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
)
"""Goes before a report, whose page may be anybody's: it may show pictures and colours, and fetch and run nothing."""


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        name: its path below the folder of runs.
        folder: its path.
        state: `running`, `finished`, `stopped`, or `unreadable`.
        step: optimiser steps done.
        steps: to be done; None if its settings cannot be read.
        previews: steps that there is a preview grid of, rising.
        has_report: whether report.html is there.
        problem: what cannot be read of it, in one line.
    """

    name: str
    folder: Path
    state: str
    step: int
    steps: int | None
    previews: tuple[int, ...]
    has_report: bool
    problem: str = ""

    @property
    def progress(self) -> str:
        """`finished, 6,000 steps`, `running, step 120 of 700`."""
        if self.state == "finished":
            return f"finished, {self.step:,} step{'s' * (self.step != 1)}"
        return f"{self.state}, step {self.step:,}" + (f" of {self.steps:,}" if self.steps else "")


def find_runs(root: Path) -> list[str]:
    """Names of the run folders up to three folders below, in order of name; links are not followed."""
    found: list[str] = []

    def look(folder: Path, depth: int) -> None:
        try:
            inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
        except OSError:
            return
        for path in inside:
            if len(found) >= MOST_RUNS or path.name.startswith("."):
                continue
            if (path / CONFIG).is_file():
                found.append(path.relative_to(root).as_posix())
            elif depth > 1:
                look(path, depth - 1)

    look(root, DEPTH)
    return found


def newest(root: Path, names: Sequence[str]) -> str | None:
    """The run that logged last."""

    def logged(name: str) -> float:
        file = _file(root / name, METRICS)
        return file.stat().st_mtime if file else 0.0

    return max(names, key=logged, default=None)


def read_run(root: Path, name: Any) -> Run:
    """A run by its name.

    Raises:
        UserError: there is no such run below the folder.
    """
    if not isinstance(name, str) or name not in find_runs(root):
        raise UserError(f"There is no run {str(name)[:100]!r} here.")
    folder = root / name
    run = Run(name, folder, "stopped", 0, None, preview_steps(folder), _file(folder, "report.html") is not None)
    try:
        steps: int | None = settings_of(folder).training.steps
    except UserError as error:
        steps, run = None, replace(run, problem=str(error))
    try:
        step = int(max((row["step"] for row in rows_of(folder)), default=-1)) + 1
    except UserError as error:
        return replace(run, state="unreadable", steps=steps, problem=str(error))
    longer = steps is not None and 0 < step < steps  # than when it ended: it goes on
    done = any((folder / made).exists() for made in ENDS) and not longer
    state = "running" if is_running(folder) else "finished" if done else "stopped"
    return replace(run, state=state, step=step, steps=steps)


def settings_of(folder: Path) -> Config:
    """The settings of a run.

    Raises:
        UserError: they are not this version's.
    """
    path = _file(folder, CONFIG)
    if path is None:
        raise UserError("The settings are not there.")
    try:
        return from_yaml(path)
    except (OSError, ValueError) as error:
        raise UserError(f"The settings cannot be read: {' '.join(str(error).split())[:200]}") from None


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The logged rows of a run that has written any; what is no row with a step is left out.

    Raises:
        UserError: the file cannot be read.
    """
    path = _file(folder, METRICS)
    if path is None:
        return []
    try:
        stat = path.stat()
        if stat.st_size > LARGEST_METRICS:
            raise UserError(f"{METRICS} has {stat.st_size / 2**20:.0f} MiB, which is too much for this page.")
        return _rows(folder, stat.st_size, stat.st_mtime_ns)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{METRICS} cannot be read ({type(error).__name__}).") from None


@lru_cache(maxsize=8)
def _rows(folder: Path, size: int, changed: int) -> list[dict[str, Any]]:
    rows: list[Any] = read_metrics(folder)
    return [row for row in rows if isinstance(row, dict) and type(row.get("step")) is int]


def stamp(root: Path, names: Sequence[Any]) -> str:
    """Changes when there is something new to show of these runs, or another run is there."""
    parts: list[Any] = [find_runs(root)]
    for name in names:
        if name in parts[0]:
            run, file = read_run(root, name), _file(root / name, METRICS)
            parts.append((run.progress, run.previews, run.has_report, file.stat().st_mtime_ns if file else 0))
    return repr(parts)


def curves_of(runs: Sequence[Run]) -> dict[str, str]:
    """Name of what was logged -> an SVG element with the curves of one run or two."""
    curves = []
    for run in runs:
        try:
            logged = curves_from_rows(rows_of(run.folder))
        except UserError:
            logged = {}
        errors = errors_over_steps(run.folder) if run.previews else []
        curves.append(ordered(({"latent_error": errors} if errors else {}) | logged))
    return curve_svgs(curves)


def symptoms_in(run: Run) -> list[str]:
    """What a run's logged numbers look like, in sentences; none where they look healthy or cannot be read."""
    try:
        return symptoms_of(curves_from_rows(rows_of(run.folder)))
    except (UserError, OverflowError):  # a whole number of hundreds of digits
        return []


def time_left(run: Run) -> float | None:
    """Seconds that a run still needs for its steps, by the pace since one of its last previews; None if not known."""
    logged = _file(run.folder, METRICS)
    if run.state != "running" or not run.steps or logged is None:
        return None
    for step in reversed(run.previews):
        path = _file(run.folder / "previews", f"step_{step:06d}.png")
        if path and run.step - step > 0:
            sec = (logged.stat().st_mtime - path.stat().st_mtime) / (run.step - step)
            return (run.steps - run.step) * sec if sec > 0 else None
    return None


def compared(a: Run, b: Run) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> both values, of the settings in which two runs differ; nothing if either's cannot be read."""
    try:
        return differences(settings_of(a.folder), settings_of(b.folder))
    except UserError:
        return {}


def preview_steps(folder: Path) -> tuple[int, ...]:
    """Steps that there is a preview grid of, rising."""
    names = (path.stem.removeprefix("step_") for path in (folder / "previews").glob("step_*.png"))
    return tuple(sorted({int(name) for name in names if name.isascii() and name.isdigit() and len(name) < 12}))


def last_preview(runs: Sequence[Run]) -> int:
    """The last step of which one of the runs has a preview grid."""
    return max((run.previews[-1] for run in runs if run.previews), default=0)


def stride(runs: Sequence[Run]) -> int:
    """The largest step by which every preview of every run can be reached."""
    return math.gcd(*(step for run in runs for step in run.previews)) or 1


def preview_at(run: Run, step: float) -> tuple[int, str] | None:
    """The last preview grid up to a step, or else the first: its step, and the PNG as a data address.

    Raises:
        UserError: the file is no PNG, or too large.
    """
    if not run.previews:
        return None
    chosen = max((s for s in run.previews if s <= step), default=run.previews[0])
    path = next((p for width in (6, 0) if (p := _file(run.folder / "previews", f"step_{chosen:0{width}d}.png"))), None)
    data = _content(path, LARGEST_PICTURE)
    if not data.startswith(PNG):
        raise UserError(f"The preview of step {chosen} is no PNG.")
    return chosen, "data:image/png;base64," + base64.b64encode(data).decode()


def report_of(run: Run) -> str:
    """The report's page, fit for an iframe without rights.

    Raises:
        UserError: it is not there, or is no text.
    """
    try:
        return SAFE_HEAD + _content(_file(run.folder, "report.html"), LARGEST_REPORT).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError("The report is no text.") from None


def scores_of(run: Run) -> tuple[int, dict[str, float]]:
    """The report's scores of the student, after the number of steps; none if they cannot be read.

    The number is the student's usual one where pictures were judged at it, else the fewest.

    Beside them is `n`, the pictures that they were measured with, where the report says so.
    """
    try:
        report = _report(run)
        student = report["student"]
        usual = str(report.get("usual_steps"))
        steps = usual if "accuracy" in student.get(usual, {}) else min(student, key=int, default="1")
        row = student.get(steps, {})
        n = report["protocol"].get("n") if isinstance(report.get("protocol"), dict) else None
        if report.get("fresh_noise") and int(steps) > 1:  # whose latent error does not compare
            row = {name: value for name, value in row.items() if name != "latent_error"}
        if row and type(n) is int and 0 < n < LARGEST_N:
            row = row | {"n": n}
        return int(steps), {str(name): float(value) for name, value in row.items() if isinstance(value, int | float)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return 1, {}


def quality_of(runs: Sequence[Run]) -> dict[str, str]:
    """Metric's label -> an SVG element with students and their teachers over network calls, of reports that say so."""
    found = []
    for run in runs:
        try:
            curves = curves_over_calls(_report(run))
            points = [point for of in curves.values() for each in of.values() for point in each]
            usual = all(0 < calls <= MOST_CALLS and abs(value) < LARGEST_VALUE for calls, value in points)
            found.append(curves if usual else {})
        except (ValueError, KeyError, TypeError, AttributeError):
            found.append({})
    return {SCORED[name].label: svg for name, svg in quality_svgs(found).items()}


def count_of(run: Run) -> int | None:
    """On how many images those scores stand; numbers of different counts do not compare."""
    try:
        count = _report(run)["protocol"]["n"]
    except (KeyError, TypeError):
        return None
    return count if type(count) is int else None


def method_of(run: Run) -> tuple[str, str]:
    """What a run trains with, and what: `discrete on generation`, `LoRA 64`; empty if its settings cannot be read."""
    try:
        config = settings_of(run.folder)
    except UserError:
        return "", ""
    kinds = ", ".join(config.space.weights)
    return f"{config.objective} on {kinds}", f"LoRA {config.student.lora}" if config.student.lora else "all weights"


def _report(run: Run) -> Any:
    """What is in report.json; nothing where it cannot be read."""
    try:
        path = _file(run.folder, "report.json")
        return json.loads(_content(path, LARGEST_REPORT)) if path else {}
    except (UserError, ValueError, RecursionError):
        return {}


def _file(folder: Path, name: str) -> Path | None:
    """A regular file of a folder that is no way out of it, or None."""
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
        return path if inside and path.is_file() else None
    except (OSError, RuntimeError):  # a link to itself is the latter before Python 3.13
        return None


def _content(path: Path | None, most: int) -> bytes:
    try:
        if path is None or path.stat().st_size > most:
            raise UserError(f"{path.name if path else 'The file'} is {'too large' if path else 'not there'}.")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path.name if path else 'The file'} cannot be read ({error.strerror}).") from None
