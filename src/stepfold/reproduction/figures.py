"""The paper's figures from our own numbers: measured into plain records first, then drawn from those alone."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepfold.config import SpaceSettings
from stepfold.errors import UserError
from stepfold.maths.filters import darkness
from stepfold.maths.formulations import data_prediction, equivalent_noise, interpolate
from stepfold.maths.routes import half_pi
from stepfold.randomness import normal
from stepfold.reproduction.experiments import EQUAL_TIME_ROW
from stepfold.spaces.generation import Trajectory, walk
from stepfold.teachers.contract import Condition, Teacher
from stepfold.training.draws import draw_route
from stepfold.training.runs import writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMES = ("reference", "logit_normal", "random")
ROUTE_STEPS = (4, 8, 16, 32)
NUM_BINS = 40
NUM_MAPS = 5
Rows = dict[str, list[dict[str, Any]]]
"""row -> the records of its seeds, see `runs.reproduce`."""


def route_numbers(space: SpaceSettings, sigma_data: float, num_routes: int = 2000) -> dict[str, Any]:
    """scheme -> where its times fall (share per bin of [0, pi/2], the fixed first time left out) and five routes."""
    numbers = {}
    for scheme in SCHEMES:
        settings = space.model_copy(update={"route": scheme, "route_per": "prompt"})
        routes = torch.stack([draw_route(settings, 0, 0, i, sigma_data) for i in range(num_routes)])
        shares = torch.histc(routes[:, 1:], NUM_BINS, 0, math.pi / 2) / routes[:, 1:].numel()
        numbers[scheme] = {"shares": shares.tolist(), "routes": routes[:5].tolist()}
    return numbers


@torch.no_grad()
def walk_numbers(
    teacher: Teacher, condition: Condition, guidance: Tensor, space: SpaceSettings, black: Tensor
) -> dict[str, Any]:
    """What a teacher's walks look like, one a row of `condition`.

    Returns:
        `schemes` and `counts`, by the scheme of the route and by its number of steps -> `t`, and at each of those mean
        times the cosine similarity of the equivalent noise (x_t - cos t x_0) / sin t to the noise that the walk began
        with (`noise_backward`), the same on the forward process, whose noise is its own (`noise_forward`), and the
        error of the one-step picture cos t x_t - sin t dx/dt against the end of the walk, in latent variances
        (`picture_error`). Under the settings' own route also `darkness`, each walk's mean squared distance to black;
        `maps`, one channel of the first walk's equivalent noise at some times; `tsne`, a plane embedding of all walks'
        equivalent noise at those times.

    Reference: arXiv:2511.20410, Eq. 8 and Figs. 3, 8, 9 and 10.
    """
    count, sigma_data = len(condition), teacher.sigma_data
    noise = sigma_data * torch.stack([normal(teacher.latent_shape, 0, "figure noise", i) for i in range(count)])
    noise = noise.to(condition.embeds.device)

    def walked(**changes: Any) -> Trajectory:
        settings = space.model_copy(update={"route_per": "step", **changes})
        route = draw_route(settings, 0, 0, 0, sigma_data).to(noise).expand(count, -1)
        return walk(teacher.velocity, noise, route, condition, guidance)

    path = walked()
    shown = [i * (len(path.t) - 1) // (NUM_MAPS - 1) for i in range(NUM_MAPS)]
    noises = [equivalent_noise(path.x[i], path.t[i], path.x0) for i in shown]
    again = [equivalent_noise(interpolate(path.x0, noise, path.t[i]), path.t[i], path.x0) for i in shown]
    times = [path.t[i].mean().item() for i in shown]
    return {
        "schemes": {scheme: _along(walked(route=scheme), noise, sigma_data) for scheme in SCHEMES},
        "counts": {str(n): _along(walked(route_steps=n), noise, sigma_data) for n in ROUTE_STEPS},
        "darkness": darkness(path.x0, black, sigma_data).tolist(),
        "maps": {
            "t": times,
            "backward": [n[0, 0].tolist() for n in noises],
            "forward": [n[0, 0].tolist() for n in again],
        },
        "tsne": {"t": times, "points": plane(noises)},
    }


def _along(path: Trajectory, noise: Tensor, sigma_data: float) -> dict[str, list[float]]:
    rows: dict[str, list[float]] = {"t": [], "noise_backward": [], "noise_forward": [], "picture_error": []}
    for x, t, dxdt in zip(path.x, path.t, path.dxdt, strict=True):
        again = interpolate(path.x0, noise, t)
        picture = data_prediction(x, t.clamp(max=half_pi(t.dtype)), dxdt)
        rows["t"].append(t.mean().item())
        rows["noise_backward"].append(_similarity(equivalent_noise(x, t, path.x0), noise))
        rows["noise_forward"].append(_similarity(equivalent_noise(again, t, path.x0), noise))
        rows["picture_error"].append((picture - path.x0).square().mean().item() / sigma_data**2)
    return rows


def plane(groups: list[Tensor]) -> list[list[list[float]]]:
    """Groups of vectors [B, ...] -> for each group, B points of one plane (t-SNE over all of them).

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError("the t-SNE figure needs scikit-learn; pip install scikit-learn") from None
    vectors = torch.cat([group.flatten(1) for group in groups]).cpu().numpy()
    embedding = TSNE(perplexity=min(30, (len(vectors) - 1) / 3), init="pca", random_state=0).fit_transform(vectors)
    points = torch.from_numpy(embedding).round(decimals=2).split([len(group) for group in groups])
    return [part.tolist() for part in points]


def _similarity(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.flatten(1), b.flatten(1)).mean().item()


def draw_routes(numbers: dict[str, Any]) -> "Figure":
    """Fig. 7: the density of the times of each scheme, and five routes of it."""
    figure, plots = new_plots(2, len(SCHEMES), "t, radians")
    for column, scheme in enumerate(SCHEMES):
        density, routes = plots[0][column], plots[1][column]
        centres = [(i + 0.5) * math.pi / 2 / NUM_BINS for i in range(NUM_BINS)]
        density.bar(centres, numbers["routes"][scheme]["shares"], width=math.pi / 2 / NUM_BINS)
        density.set(title=_plain(scheme), ylabel="share of the times")
        for row, route in enumerate(numbers["routes"][scheme]["routes"]):
            routes.plot(route, [row] * len(route), "o-", markersize=3, linewidth=0.7)
        routes.set(ylabel="route", yticks=range(5))
    return figure


def draw_noise_similarity(numbers: dict[str, Any]) -> "Figure":
    """Fig. 8: how like its first noise a state's equivalent noise is, on the forward and the backward process."""
    figure, plots = new_plots(1, 1, "t, radians")
    plot, schemes = plots[0][0], numbers["walks"]["schemes"]
    for scheme, rows in schemes.items():
        plot.plot(rows["t"], rows["noise_backward"], "o-", markersize=3, label=f"walk, {_plain(scheme)}")
    first = schemes[SCHEMES[0]]
    plot.plot(first["t"], first["noise_forward"], "k--", label="forward process")
    plot.set(ylabel="cosine similarity to the first noise")
    plot.legend()
    return figure


def draw_noise_plane(numbers: dict[str, Any]) -> "Figure":
    """Fig. 8: the equivalent noise of all walks at some times, embedded in a plane."""
    figure, plots = new_plots(1, 1, "")
    for t, points in zip(numbers["walks"]["tsne"]["t"], numbers["walks"]["tsne"]["points"], strict=True):
        plots[0][0].scatter(*zip(*points, strict=True), s=8, label=f"t = {t:.2f}")
    plots[0][0].set(xticks=[], yticks=[])
    plots[0][0].legend()
    return figure


def draw_noise_maps(numbers: dict[str, Any]) -> "Figure":
    """Fig. 3: one channel of one walk's equivalent noise at some times, on the forward and the backward process."""
    maps = numbers["walks"]["maps"]
    figure, plots = new_plots(2, len(maps["t"]), "", size=1.7)
    for row, process in enumerate(("forward", "backward")):
        for plot, t, values in zip(plots[row], maps["t"], maps[process], strict=True):
            plot.imshow(values, cmap="gray", vmin=-1.5, vmax=1.5)
            plot.set(xticks=[], yticks=[], title=f"{process}, t = {t:.2f}")
    return figure


def draw_picture_error(numbers: dict[str, Any]) -> "Figure":
    """Fig. 9: how far the teacher's one-step picture is from the end of the walk, by scheme and by steps."""
    figure, plots = new_plots(1, 2, "t, radians")
    for plot, curves in zip(plots[0], (numbers["walks"]["schemes"], numbers["walks"]["counts"]), strict=True):
        for name, rows in curves.items():
            label = f"N = {name}" if name.isdigit() else _plain(name)
            plot.plot(rows["t"], rows["picture_error"], "o-", markersize=3, label=label)
        plot.set(ylabel="error, in latent variances", yscale="log", ylim=(1e-4, None))
        plot.legend()
    return figure


def draw_darkness(numbers: dict[str, Any]) -> "Figure":
    """Fig. 10: the distance of walks' ends to black, and where the brightness filter begins to drop them."""
    figure, plots = new_plots(1, 1, "mean squared distance to black")
    plots[0][0].hist(numbers["walks"]["darkness"], bins=30)
    plots[0][0].axvline(numbers["threshold"], color="black", linestyle="--", label="threshold of the filter")
    plots[0][0].set(ylabel="walks")
    plots[0][0].legend()
    return figure


def draw_quality_and_cost(rows: Rows) -> "Figure":
    """FD at one step against the time that training took, mean and standard deviation over the seeds.

    A method has one colour, filled at equal pairs and hollow at equal time.
    """
    figure, plots = new_plots(1, 1, "training, minutes", size=8)
    colours = {row: f"C{i}" for i, row in enumerate(dict.fromkeys(row.removesuffix(EQUAL_TIME_ROW) for row in rows))}
    for row, records in rows.items():
        timed = [r for r in records if r.get("sec_per_step") is not None]
        if timed:
            fd = torch.tensor([r["student"]["1"]["fd"] for r in timed])
            minutes = torch.tensor([r["steps"] * r["sec_per_step"] / 60 for r in timed])
            plots[0][0].errorbar(
                minutes.mean(), fd.mean(), yerr=fd.std(correction=1) if len(fd) > 1 else None, fmt="o", label=row,
                color=colours[row.removesuffix(EQUAL_TIME_ROW)],
                markerfacecolor="white" if row.endswith(EQUAL_TIME_ROW) else None,
            )  # fmt: skip
    plots[0][0].set(ylabel="FD at one step", ylim=(0, None))
    plots[0][0].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_stages(rows: Rows) -> "Figure":
    """Fig. 4: what a step's time goes to, of the rows that train on as many pairs as the first."""
    figure, plots = new_plots(1, 1, "milliseconds a step", size=8)
    timed = {row: [r for r in records if r.get("stages_sec")] for row, records in rows.items()}
    timed = {row: records for row, records in timed.items() if records}
    pairs = next(iter(timed.values()))[0]["pairs_per_step"]
    shown = {row: records for row, records in timed.items() if records[0]["pairs_per_step"] == pairs}
    left = [0.0] * len(shown)
    for stage in dict.fromkeys(name for records in shown.values() for r in records for name in r["stages_sec"]):
        widths = [
            sum(1000 * r["stages_sec"].get(stage, 0) for r in records) / len(records) for records in shown.values()
        ]
        plots[0][0].barh(list(shown), widths, left=left, label=stage)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    plots[0][0].invert_yaxis()
    plots[0][0].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_memory(rows: Rows) -> "Figure":
    """Fig. 1: peak memory against the pairs of a step. What stands before a row's `;` is its method."""
    figure, plots = new_plots(1, 1, "pairs a step", size=5)
    curves: dict[str, list[tuple[float, float]]] = {}
    for row, records in rows.items():
        of_row = [r for r in records if r.get("peak_memory_gib") is not None]
        if of_row:
            memory = sum(r["peak_memory_gib"] for r in of_row) / len(of_row)
            curves.setdefault(row.split(";")[0], []).append((of_row[0]["pairs_per_step"], memory))
    for method, points in curves.items():
        plots[0][0].plot(*zip(*sorted(points), strict=True), "o-", markersize=4, label=method)
    plots[0][0].set(ylabel="peak GiB while training", ylim=(0, None))
    plots[0][0].legend(fontsize=7)
    return figure


WALK_FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], "Figure"]]] = {
    "routes": ("Times of the three routes, and five routes of each (paper, Fig. 7).", draw_routes),
    "noise_maps": (
        "Equivalent noise of one walk: constant on the forward process, changing on the backward one (paper, Fig. 3).",
        draw_noise_maps,
    ),
    "noise_similarity": (
        "Equivalent noise against the noise that the walk began with (paper, Fig. 8).",
        draw_noise_similarity,
    ),
    "noise_plane": ("Equivalent noise of all walks, t-SNE (paper, Fig. 8).", draw_noise_plane),
    "picture_error": (
        "The teacher's one-step picture along its walk, against the walk's end (paper, Fig. 9).",
        draw_picture_error,
    ),
    "darkness": ("Distance of the walks' ends to black, and the filter's threshold (paper, Fig. 10).", draw_darkness),
}
"""name -> caption and how it is drawn from what `measure_figures` kept."""

TABLE_FIGURES: dict[str, tuple[str, str, Callable[[Rows], "Figure"]]] = {
    "quality_and_cost": ("Quality against the cost of training; hollow: at equal time.", "T2", draw_quality_and_cost),
    "stages": ("What a training step's time goes to (paper, Fig. 4).", "T3", draw_stages),
    "memory": ("Memory against the pairs of a step (paper, Fig. 1).", "T3", draw_memory),
}
"""name -> caption, table, and how it is drawn from the table's records."""


def draw_all(numbers: dict[str, Any], tables: dict[str, Rows], folder: Path) -> dict[str, str]:
    """Every figure that there are numbers for, as svg and png: name -> caption."""
    figures = {name: (caption, draw(numbers)) for name, (caption, draw) in WALK_FIGURES.items() if numbers}
    for name, (caption, table, draw) in TABLE_FIGURES.items():
        rows = {row: [r for r in records if not r["diverged"]] for row, records in tables.get(table, {}).items()}
        if any(r["sec_per_step"] is not None for records in rows.values() for r in records):
            figures[name] = (caption, draw(rows))
    return save_figures(figures, folder)


def save_figures(
    figures: dict[str, tuple[str, "Figure"]], folder: Path, suffixes: tuple[str, ...] = ("svg", "png")
) -> dict[str, str]:
    """Writes figures, each by its name with its caption, into a folder; equal ones are equal files: name -> caption."""
    from matplotlib import rc_context

    drawn = {}
    for name, (caption, figure) in figures.items():
        folder.mkdir(parents=True, exist_ok=True)
        for suffix in suffixes:
            with writing(folder / f"{name}.{suffix}") as part, rc_context({"svg.hashsalt": name}):  # equal, equal file
                figure.savefig(part, format=suffix, dpi=120, metadata={"Date": None} if suffix == "svg" else {})
        drawn[name] = caption
    return drawn


def _plain(scheme: str) -> str:
    return scheme.replace("_", "-")


def new_plots(rows: int, columns: int, label: str, size: float = 3.2) -> tuple["Figure", Any]:
    """A figure, and its rows x columns of axes, whose x is `label`; one of many columns takes `size` inches each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5, size * columns), (3 if size >= 3 else size + 0.3) * rows), layout="constrained")
    plots = figure.subplots(rows, columns, squeeze=False)
    for plot in plots.flat:
        plot.set(xlabel=label)
    return figure, plots
