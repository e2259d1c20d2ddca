"""The report of a run: report.json for programs and a self-contained report.html for people."""

import base64
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from stepfold import __version__
from stepfold.errors import UserError
from stepfold.evaluation.curves import curve_svgs, meaning, moving, quality_svgs
from stepfold.evaluation.protocol import counted, fd_title, teachers_of
from stepfold.evaluation.verdict import (
    METRICS,
    best_steps,
    by_steps,
    calls,
    curves_over_calls,
    figures,
    noisy_note,
    number,
    sentences,
)
from stepfold.training.runs import writing

LEAST_SEC = 0.05  # of a stage that is shown
STRIP, STRIP_WIDTH = 4, 720  # earlier previews, and their width in pixels


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
            "images": {caption: path of a PNG, the last one leads}, "facts": [str], "use": [[what, command]],
            "next_command": str, "teacher_calls_per_step": int, "preset": str, "changed": {setting: value}}. Only the
            title is needed. Numbers that are not finite become null.

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
    previews = [(caption, folder / path) for caption, path in report.get("images", {}).items()]
    columns = columns_of(report)
    return environment.get_template(
        "report.html.jinja"
    ).render(
        title=report["title"],
        facts=[fact for fact in report.get("facts", []) if fact],
        command=report.get("command"),
        figures=figures(report),
        sentences=sentences(report),
        next_command=report.get("next_command"),
        use=report.get("use", []),
        columns=[replace(METRICS[key], label=title(report, key)) for key in columns],
        groups=_table(report, columns),
        quality=[
            (title(report, key), Markup(svg))  # noqa: S704 - matplotlib drew it from numbers
            for key, svg in quality_svgs([curves_over_calls(report)]).items()
        ],
        noisy_note=noisy_note(report, columns),
        lead=(previews[-1][0], _embedded_png(previews[-1][1])) if previews else None,
        strip=[(caption, _embedded_png(path, STRIP_WIDTH)) for caption, path in spread(previews[:-1], STRIP)],
        curves=[
            (name, meaning(name), Markup(svg))  # noqa: S704 - matplotlib drew it from numbers
            for name, svg in curve_svgs([moving(report.get("curves", {}))]).items()
        ],
        stages=_stages(report.get("stages_sec", {})),
        peak_memory_gib=report.get("peak_memory_gib"),
        preset=report.get("preset"),
        changed=_flat(report.get("changed", {})),
        details=[
            (name, _flat(report[key]))
            for key, name in (("config", "All settings"), ("protocol", "Protocol"), ("versions", "Versions"))
            if report.get(key)
        ],
    )


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of a list, at even distances, with both ends."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def columns_of(report: Mapping[str, Any]) -> list[str]:
    """The metrics that some row has."""
    rows = [row for who in ("student", *teachers_of(report)) for row in by_steps(report, who).values()]
    return [key for key in METRICS if any(row.get(key) is not None for row in rows)]


def title(report: Mapping[str, Any], key: str) -> str:
    """A metric's label; that of a Frechet distance has the number of images."""
    label = METRICS[key].label
    return fd_title(report.get("protocol", {}).get("n"), label) if key.startswith("fd") else label


@dataclass(frozen=True)
class Line:
    """A row of the table: its head, whether it is the student's, and its cells, each with whether it is the best."""

    label: str
    is_student: bool
    cells: list[tuple[str, bool]]


def _table(report: Mapping[str, Any], columns: Sequence[str]) -> list[list[Line]]:
    """Rows in groups of one number of steps, fewest first: the student, then the teacher; last the real images."""
    noisy = {"latent_error"} if report.get("fresh_noise") else set[str]()  # whose steps do not compare
    best = {key: None if key in noisy else best_steps(report, key) for key in columns}
    students = {who: by_steps(report, who) for who in ("student", *teachers_of(report))}
    counts = sorted({steps for rows in students.values() for steps in rows})
    groups = []
    for steps in counts:
        lines = []
        for who, rows in students.items():
            if steps in rows:
                taken = calls(report, who, steps)
                cells = [("–" if taken is None else str(taken), False)]
                cells += [
                    (number(rows[steps].get(key), METRICS[key].digits), who == "student" and best[key] == steps)
                    for key in columns
                ]
                label = f"{who.capitalize()}, {counted(steps)}"
                is_reference = rows[steps].get("latent_error", 0) is None and who == "teacher"
                lines.append(Line(label + " (reference)" * is_reference, who == "student", cells))
        groups.append(lines)
    if reals := report.get("reals"):
        cells = [(number(reals.get(key), METRICS[key].digits), False) for key in columns]
        groups.append([Line("Real images", False, [("–", False), *cells])])
    return groups if counts else []


def _stages(stages_sec: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """(stage, duration in words, percentage of the longest)."""
    longest = max(stages_sec.values(), default=0) or 1
    shown = {stage: seconds for stage, seconds in stages_sec.items() if seconds >= LEAST_SEC}
    return [(stage, duration(seconds), 100 * seconds / longest) for stage, seconds in shown.items()]


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


def _embedded_png(path: Path, width: int | None = None) -> str:
    """A PNG as a data address, made smaller where it is wider than `width` pixels."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: image of the report is not readable ({error.strerror}); make it first") from error
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise UserError(f"{path}: image of the report is not a PNG; save it as PNG")
    if width:
        data = _narrowed(data, width)
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _narrowed(data: bytes, width: int) -> bytes:
    with Image.open(BytesIO(data)) as image:
        if image.width <= width:
            return data
        size = (width, round(image.height * width / image.width))
        buffer = BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
