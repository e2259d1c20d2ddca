"""The report of a run: report.json for programs and a self-contained report.html for people."""

import base64
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from stepfold import __version__
from stepfold.errors import UserError
from stepfold.evaluation.protocol import counted, teachers_of
from stepfold.training.runs import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = {
    "accuracy": (
        "Accuracy",
        "Share of pictures whose nearest name, among all names, is the prompt's. Higher is better.",
    ),
    "clip_score": (
        "CLIP score",
        "100 × the cosine between picture and prompt in the judge's features; higher is better.",
    ),
    "fd": (
        "FD",
        "Fréchet distance to real pictures in the judge's features; not comparable with Inception FID, "
        "nor between different numbers of pictures. Lower is better.",
    ),
    "diversity": (
        "Diversity",
        "Mean feature distance between pictures of one prompt. Close to that of real pictures is best; near 0, "
        "every seed gives the same picture.",
    ),
    "agreement": (
        "Agreement",
        "Squared error to the latents of the teacher that was followed, at its most steps and at its guidance scale, "
        "from the same noise, in units of the latents' variance. 0 is the same picture, 2 an unrelated one.",
    ),
    "images_per_sec": ("Images/s", "Pictures made per second on this machine, judging left out."),
}
_DIGITS = {"accuracy": 3, "clip_score": 1, "fd": 3, "diversity": 3, "agreement": 3, "images_per_sec": 1}
_MAX_BINS = 240
# Colours drawn by matplotlib that are swapped for the page's own, so that a curve follows its light or dark theme.
_THEME = {
    "#010101": "currentColor",
    "#020202": "var(--accent)",
    "#030303": "var(--line)",
    "#040404": "var(--other)",
}
_INK, _ACCENT, _LINE, _OTHER = _THEME

Curves = Mapping[str, Sequence[Sequence[float | None]]]
Row = Mapping[str, float | None]


def versions() -> dict[str, str]:
    """What a result was made with."""
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")}
    return {"stepfold": __version__, "python": platform.python_version(), "machine": platform.machine()} | libraries


def write_report(folder: str | Path, report: Mapping[str, Any]) -> tuple[Path, Path]:
    """Writes report.json and report.html, each whole or not at all.

    Args:
        folder: made if missing; image paths in the report are relative to it.
        report: {"title", "command": str, "versions", "config", "protocol": dict, "teacher", "student": {steps: scores},
            "reals": scores, "stages_sec": {stage: s}, "peak_memory_gib": float, "curves": {name: [[step, value], ...]},
            "images": {caption: path of a PNG}}. Only the title is needed. Numbers that are not finite become null.

    Returns:
        The paths of report.json and report.html.

    Raises:
        UserError: the folder cannot be written, or an image is missing or no PNG.
    """
    folder = Path(folder)
    plain = _finite(report)
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"
    page = render_html(plain, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = folder / "report.json", folder / "report.html"
        for path, content in zip(paths, (text, page), strict=True):
            _write_whole(path, content)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); free space or give another folder") from error
    return paths


def _write_whole(path: Path, content: str) -> None:
    with writing(path) as part, part.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _finite(value: Any) -> Any:
    """The value as plain JSON types, with None for every float that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render_html(report: Mapping[str, Any], folder: Path) -> str:
    """The page as text. Everything from the report is escaped; images and curves are inside it, and no address is."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        title=report["title"],
        command=report.get("command"),
        verdict=verdict(report),
        columns=[(key, label) for key, (label, _) in METRICS.items()],
        explanations=list(METRICS.values()),
        groups=_table(report),
        images=[(caption, _embedded_png(folder / path)) for caption, path in report.get("images", {}).items()],
        curves=[
            (name, Markup(svg))  # noqa: S704 - matplotlib drew it from numbers
            for name, svg in curve_svgs([report.get("curves", {})]).items()
        ],
        stages=_stages(report.get("stages_sec", {})),
        peak_memory_gib=report.get("peak_memory_gib"),
        details=[
            (key.capitalize(), _flat(report[key])) for key in ("config", "protocol", "versions") if report.get(key)
        ],
    )


def _table(report: Mapping[str, Any]) -> list[list[tuple[str, list[str]]]]:
    """Rows (label, cells in the order of METRICS), one list for the student, the teacher and the real pictures each."""
    groups = []
    for who in ("student", *teachers_of(report)):
        rows = _by_steps(report, who)
        groups.append([(f"{who.capitalize()}, {counted(steps)}", _cells(scores)) for steps, scores in rows.items()])
    if report.get("reals"):
        groups.append([("Real pictures", _cells(report["reals"]))])
    return [group for group in groups if group]


def _cells(scores: Row) -> list[str]:
    return [_number(scores.get(key), _DIGITS[key]) for key in METRICS]


def _number(value: float | None, digits: int) -> str:
    """A fixed number of digits, or two significant ones where that would show a small number as zero."""
    if value is None:
        return "–"
    fixed = f"{value:.{digits}f}"
    return fixed if value == 0 or float(fixed) else f"{value:.1e}"


def _by_steps(report: Mapping[str, Any], who: str) -> dict[int, Row]:
    """Scores by step count, most steps first."""
    return {int(steps): scores for steps, scores in sorted(report.get(who, {}).items(), key=lambda item: -int(item[0]))}


def verdict(report: Mapping[str, Any]) -> str:
    """One paragraph, computed from the numbers: the student at its fewest steps against the teacher."""
    student, teacher = _by_steps(report, "student"), _by_steps(report, "teacher")
    if not student or not teacher:
        return f"Nothing to compare: no {'student' if not student else 'teacher'} has been measured."
    steps, best = min(student), max(teacher)
    ours, theirs = student[steps], teacher[best]
    parts = [
        _accuracy_part(ours, theirs, best),
        _fd_part(ours, teacher, steps),
        _ratio_part(ours, theirs, "diversity", "diversity {:.0f}% of the teacher's", 100),
        _ratio_part(ours, theirs, "images_per_sec", "{:.1f} times as many images per second", 1),
    ]
    said = [part for part in parts if part]
    first = f"{'One step' if steps == 1 else counted(steps)}: {'; '.join(said) or 'not measured'}."
    return f"{first}{_ranking(ours, teacher)}{_taught(report)}"


def _accuracy_part(ours: Row, theirs: Row, best: int) -> str | None:
    a, b = ours.get("accuracy"), theirs.get("accuracy")
    if a is None or b is None:
        return None
    share = f"{100 * a / b:.0f}% of the teacher's accuracy " if b else "accuracy "
    return f"{share}({a:.3f} against {b:.3f} at {counted(best)})"


def _fd_part(ours: Row, teacher: Mapping[int, Row], steps: int) -> str | None:
    a, b = ours.get("fd"), teacher.get(steps, {}).get("fd")
    if a is None or b is None:
        return None
    same = "one step" if steps == 1 else counted(steps)
    return f"FD {_number(a, 3)} against {_number(b, 3)} for the teacher's {same}"


def _ratio_part(ours: Row, theirs: Row, key: str, phrase: str, scale: float) -> str | None:
    a, b = ours.get(key), theirs.get(key)
    return phrase.format(scale * a / b) if a is not None and b else None


def _ranking(ours: Row, teacher: Mapping[int, Row]) -> str:
    """At how many steps the teacher's FD is worse than the student's."""
    fd = ours.get("fd")
    known = {steps: value for steps, scores in teacher.items() if (value := scores.get("fd")) is not None}
    if fd is None or not known:
        return ""
    beaten = sorted(steps for steps, value in known.items() if fd < value)
    if not beaten:
        return " Its FD is worse than the teacher's at every measured step count."
    if len(beaten) == len(known):
        return " Its FD is better than the teacher's at every measured step count."
    counts = " and ".join(filter(None, [", ".join(map(str, beaten[:-1])), str(beaten[-1])]))
    return f" Its FD is better than the teacher's at {counts} step{'s' * (beaten != [1])}."


def _taught(report: Mapping[str, Any]) -> str:
    """The teacher at the scale that the student was taught, where that is not the one it is compared with."""
    said = ""
    for who in teachers_of(report):
        for steps, scores in _by_steps(report, who).items() if who != "teacher" else ():
            row = {key: _number(scores.get(key), 3) for key in ("accuracy", "fd")}
            said += f" The {who}, as the student was taught: accuracy {row['accuracy']}, FD {row['fd']} "
            said += f"at {counted(steps)}."
    return said


def _stages(stages_sec: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """(stage, duration in words, percentage of the longest)."""
    longest = max(stages_sec.values(), default=0) or 1
    return [(stage, duration(seconds), 100 * seconds / longest) for stage, seconds in stages_sec.items()]


def duration(seconds: float) -> str:
    """For people: `12.3 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted.key, text)."""
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows


def _embedded_png(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: image of the report is not readable ({error.strerror}); make it first") from error
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise UserError(f"{path}: image of the report is not a PNG; save it as PNG")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def curves_from_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """Logged rows, {"step": 10, "loss": 0.3, ...} each, as curves {"loss": [[10, 0.3], ...], ...}; numbers only."""
    curves: dict[str, list[list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                curves.setdefault(name, []).append([row["step"], value])
    return curves


def plot_curves(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws every number of the logged rows over the step, a panel each, into one PNG.

    Args:
        rows: as for `curves_from_rows`.
        path: where the PNG goes.
    """
    from matplotlib.figure import Figure

    curves = curves_from_rows(rows)
    assert curves, "no numbers to plot"
    num_columns = min(3, len(curves))
    num_rows = -(-len(curves) // num_columns)
    figure = Figure(figsize=(4.2 * num_columns, 2.6 * num_rows), dpi=120, layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flat
    for panel, (name, points) in zip(panels, curves.items(), strict=False):
        _draw(panel, [points], ink="#333333", accents=["#2f6f8f"], line="#dddddd")
        panel.set_title(name, loc="left", fontsize=9, parse_math=False)
    for panel in list(figure.axes)[len(curves) :]:
        panel.set_visible(False)
    figure.savefig(path, format="png")


def curve_svgs(runs: Sequence[Curves]) -> dict[str, str]:
    """An SVG element a name, without title, with that curve of one run, or of two in --accent and --other of the page.

    Empty curves are left out.
    """
    names = [
        name
        for name in dict.fromkeys(name for curves in runs for name in curves)
        if any(value is not None for curves in runs for _, value in curves.get(name, []))
    ]
    if not names:
        return {}
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    svgs = {}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "stepfold"}):
        for name in names:
            figure = Figure(figsize=(4.4, 2.3), layout="constrained")
            figure.patch.set_visible(False)
            _draw(figure.add_subplot(), [curves.get(name, []) for curves in runs], _INK, (_ACCENT, _OTHER), _LINE)
            buffer = StringIO()
            figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
            svgs[name] = _inline(buffer.getvalue())
    return svgs


def _inline(svg: str) -> str:
    """A matplotlib SVG as an element of a page: no prolog, no namespaces, no repeated ids, the page's own colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| id="[A-Za-z0-9.]+_\d+"| (width|height)="[\d.]+pt"', "", svg)
    for drawn, themed in _THEME.items():
        svg = svg.replace(drawn, themed)
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)


def _draw(
    axes: "Axes", curves: Sequence[Sequence[Sequence[float | None]]], ink: str, accents: Sequence[str], line: str
) -> None:
    """Curves; where one has too many points, the mean of each bin with the band from its lowest to its highest."""
    every = [np.empty(0)]
    for points, accent in zip(curves, accents, strict=False):
        known = np.array([(x, y) for x, y in points if y is not None and math.isfinite(y)], dtype=float).reshape(-1, 2)
        bins = np.array_split(known, min(len(known), _MAX_BINS)) if len(known) else []
        x = [part[:, 0].mean() for part in bins]
        if len(known) > _MAX_BINS:
            low, high = [part[:, 1].min() for part in bins], [part[:, 1].max() for part in bins]
            axes.fill_between(x, low, high, color=accent, alpha=0.18, linewidth=0)
        marker = "o" if len(known) <= 24 else None
        axes.plot(x, [part[:, 1].mean() for part in bins], color=accent, linewidth=1.4, marker=marker, markersize=3)
        every.append(known[:, 1])
    values = np.concatenate(every)
    if len(values) and values.min() > 0 and values.max() > 200 * values.min():
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        axes.yaxis.get_offset_text().set(color=ink, fontsize=8)
    axes.set_facecolor("none")
    axes.grid(axis="y", color=line, linewidth=0.6)
    axes.tick_params(which="both", colors=ink, labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(line)
    axes.set_xlabel("step", color=ink, fontsize=8)
