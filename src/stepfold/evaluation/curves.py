"""Curves of what a run logged, as SVG for pages and as a PNG, and what each of them is."""

import math
import re
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOGGED = {
    "latent_error": "error of one step against the teacher's long trajectory, on the preview prompts",
    "loss": "what is minimised",
    "squared_error": "the loss without its weights",
    "tangent_norm": "how far the student is from consistent",
    "tangent_norm_0": "tangent norm, first quarter of t: near the image",
    "tangent_norm_1": "tangent norm, second quarter of t",
    "tangent_norm_2": "tangent norm, third quarter of t",
    "tangent_norm_3": "tangent norm, last quarter of t: near noise",
    "w_phi": "learned log-weight of the adaptive weighting",
    "grad_norm": "size of the gradient, before clipping",
    "lr": "learning rate",
    "r": "warm-up of the tangent, from 0 to 1",
    "generator_loss": "adversarial loss of the student",
    "discriminator_loss": "loss of the heads; 2 is knowing nothing",
    "gap": "distance of the fake score to the teacher, in units of the image's; rising: late, or too much guidance",
    "cosine": "between the velocities of fake score and teacher; falling: the fake score is late",
    "miss": "how far the images have moved since the fake score saw them, in units of its distance to the teacher",
    "std": "contrast of the student's images; rising with the gap: too much guidance",
    "spread": "how far the images of a step lie apart; falling: collapse",
    "fisher": "squared distance of fake score and teacher, which SiD lowers",
    "guidance_share": "size of guidance's part, in units of matching's",
    "statistics": "divergence of an image's mean and contrast from the teacher's",
    "reward": "the score that the student raises",
    "fake/loss": "the fake score's own; level, or rising while it is late",
    "discriminator/loss": "of heads with updates of their own; 2 is knowing nothing",
    "roughness": "change of the heads' logits by a small noise",
    "kept": "share of the trajectories that the brightness filter kept",
    "skipped": "1 where the step was left out",
}
"""What the logged numbers are; docs/reading.md says more."""
_MAX_BINS = 240
# Colours drawn by matplotlib that are swapped for the page's own, so that a curve follows its light or dark theme.
_THEME = {
    "#010101": "currentColor",
    "#020202": "var(--accent)",
    "#030303": "var(--line)",
    "#040404": "var(--other)",
}
_INK, _ACCENT, _LINE, _OTHER = _THEME


def meaning(name: str) -> str:
    """What a logged number is; the same of every space, whose name stands before a slash."""
    return LOGGED.get(name, LOGGED.get(name.rsplit("/", 1)[-1], ""))


Curves = Mapping[str, Sequence[Sequence[float | None]]]
Quality = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]


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
            svgs[name] = _as_element(figure)
    return svgs


def quality_svgs(reports: Sequence[Quality]) -> dict[str, str]:
    """An SVG element a metric, over the network calls of an image: students solid, their teachers dashed.

    Args:
        reports: `verdict.curves_over_calls` of one report, or of two in --accent and --other of the page.
    """
    names = list(dict.fromkeys(name for report in reports for name in report))
    if not names:
        return {}
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    svgs = {}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "stepfold"}):
        for name in names:
            figure = Figure(figsize=(4.4, 2.5), layout="constrained")
            figure.patch.set_visible(False)
            _draw_quality(figure.add_subplot(), [report.get(name, {}) for report in reports])
            svgs[name] = _as_element(figure)
    return svgs


def _draw_quality(axes: "Axes", found: Sequence[Mapping[str, Sequence[tuple[int, float]]]]) -> None:
    """A teacher that both have is one curve, in the ink's colour, as that of a single report."""
    teachers = {tuple(curves.get("teacher", ())) for curves in found} - {()}
    drawn = set()
    for curves, accent in zip(found, (_ACCENT, _OTHER), strict=False):
        for who, colour, style in (("teacher", _INK if len(teachers) == 1 else accent, "--"), ("student", accent, "-")):
            points = tuple(curves.get(who, ()))
            if not points or (who == "teacher" and points in drawn):
                continue
            drawn.add(points)
            axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=1.4, marker="o", markersize=3)
            if len(found) == 1:
                axes.annotate(
                    who, points[-1], xytext=(4, 0), textcoords="offset points", color=colour, fontsize=8, va="center"
                )
    counts = sorted({calls for curves in found for points in curves.values() for calls, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(calls) for calls in counts])
    axes.minorticks_off()
    axes.margins(x=0.12)
    _plain_axes(axes, _INK, _LINE, "network calls an image")


def _as_element(figure: "Figure") -> str:
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(buffer.getvalue())


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
    _plain_axes(axes, ink, line, "step")


def _plain_axes(axes: "Axes", ink: str, line: str, label: str) -> None:
    """No frame, a light grid, and what runs along x."""
    axes.set_facecolor("none")
    axes.grid(axis="y", color=line, linewidth=0.6)
    axes.tick_params(which="both", colors=ink, labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(line)
    axes.set_xlabel(label, color=ink, fontsize=8)


def ordered(curves: Curves) -> dict[str, Sequence[Sequence[float | None]]]:
    """Curves in the order of LOGGED, then the others."""
    order = {name: place for place, name in enumerate(LOGGED)}
    return dict(sorted(curves.items(), key=lambda item: order.get(item[0], len(order))))


def moving(curves: Curves) -> dict[str, Sequence[Sequence[float | None]]]:
    """The curves with two different values, in the order of LOGGED: the others say nothing."""
    return ordered(
        {name: points for name, points in curves.items() if len({y for _, y in points if y is not None}) > 1}
    )
