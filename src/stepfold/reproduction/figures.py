"""The paper's figures from our own numbers: measured into plain records first, then drawn from those alone."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepfold.config import SpaceSettings
from stepfold.maths.filters import darkness
from stepfold.maths.formulations import data_prediction, expand, interpolate
from stepfold.maths.routes import half_pi
from stepfold.randomness import normal
from stepfold.spaces.generation import walk
from stepfold.teachers.contract import Condition, Teacher
from stepfold.training.distill import draw_route
from stepfold.training.runs import writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMES = ("reference", "logit_normal", "random")
NUM_BINS = 40


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
        scheme -> `t`, and at each of those mean times the cosine similarity of the equivalent noise (x_t - cos t x_0) /
        sin t to the noise that the walk began with (`noise_backward`), the same on the forward process, whose noise is
        its own (`noise_forward`), and the error of the one-step picture cos t x_t - sin t dx/dt against the end of the
        walk, in latent variances (`picture_error`); and `darkness`, each walk's mean squared distance to black, under
        the reference route.

    Reference: arXiv:2511.20410, Eq. 8 and Figs. 8, 9 and 10.
    """
    count, sigma_data = len(condition), teacher.sigma_data
    noise = sigma_data * torch.stack([normal(teacher.latent_shape, 0, "figure noise", i) for i in range(count)])
    noise = noise.to(condition.embeds.device)
    numbers: dict[str, Any] = {}
    for scheme in SCHEMES:
        settings = space.model_copy(update={"route": scheme, "route_per": "step"})
        route = draw_route(settings, 0, 0, 0, sigma_data).to(noise).expand(count, -1)
        path = walk(teacher.velocity, noise, route, condition, guidance)
        rows: dict[str, list[float]] = {"t": [], "noise_backward": [], "noise_forward": [], "picture_error": []}
        for x, t, dxdt in zip(path.x, path.t, path.dxdt, strict=True):
            again = interpolate(path.x0, noise, t)
            picture = data_prediction(x, t.clamp(max=half_pi(t.dtype)), dxdt)
            rows["t"].append(t.mean().item())
            rows["noise_backward"].append(_similarity(_equivalent_noise(x, t, path.x0), noise))
            rows["noise_forward"].append(_similarity(_equivalent_noise(again, t, path.x0), noise))
            rows["picture_error"].append((picture - path.x0).square().mean().item() / sigma_data**2)
        numbers[scheme] = rows
        if scheme == "reference":
            numbers["darkness"] = darkness(path.x0, black, sigma_data).tolist()
    return numbers


def _equivalent_noise(x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    return (x - expand(t.cos(), x) * x0) / expand(t.sin(), x)


def _similarity(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.flatten(1), b.flatten(1)).mean().item()


def draw_routes(numbers: dict[str, Any]) -> "Figure":
    """Fig. 7: the density of the times of each scheme, and five routes of it."""
    figure, plots = _plots(2, len(SCHEMES), "t, radians")
    for column, scheme in enumerate(SCHEMES):
        density, routes = plots[0][column], plots[1][column]
        centres = [(i + 0.5) * math.pi / 2 / NUM_BINS for i in range(NUM_BINS)]
        density.bar(centres, numbers[scheme]["shares"], width=math.pi / 2 / NUM_BINS)
        density.set(title=scheme.replace("_", "-"), ylabel="share of the times")
        for row, route in enumerate(numbers[scheme]["routes"]):
            routes.plot(route, [row] * len(route), "o-", markersize=3, linewidth=0.7)
        routes.set(ylabel="route", yticks=range(5))
    return figure


def draw_equivalent_noise(numbers: dict[str, Any]) -> "Figure":
    """Fig. 8: how like its first noise a state's equivalent noise is, on the forward and the backward process."""
    figure, plots = _plots(1, 1, "t, radians")
    plot = plots[0][0]
    for scheme in SCHEMES:
        plot.plot(numbers[scheme]["t"], numbers[scheme]["noise_backward"], "o-", markersize=3, label=f"walk, {scheme}")
    plot.plot(numbers[SCHEMES[0]]["t"], numbers[SCHEMES[0]]["noise_forward"], "k--", label="forward process")
    plot.set(ylabel="cosine similarity to the first noise")
    plot.legend()
    return figure


def draw_picture_error(numbers: dict[str, Any]) -> "Figure":
    """Fig. 9: how far the teacher's one-step picture is from the end of the walk, along the walk."""
    figure, plots = _plots(1, 1, "t, radians")
    for scheme in SCHEMES:
        plots[0][0].plot(numbers[scheme]["t"], numbers[scheme]["picture_error"], "o-", markersize=3, label=scheme)
    plots[0][0].set(ylabel="error of the picture, in latent variances")
    plots[0][0].legend()
    return figure


def draw_darkness(numbers: dict[str, Any], threshold: float) -> "Figure":
    """Fig. 10: the distance of walks' ends to black, and where the brightness filter begins to drop them."""
    figure, plots = _plots(1, 1, "mean squared distance to black")
    plots[0][0].hist(numbers["darkness"], bins=30)
    plots[0][0].axvline(threshold, color="black", linestyle="--", label="threshold of the filter")
    plots[0][0].set(ylabel="walks")
    plots[0][0].legend()
    return figure


FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], "Figure"]]] = {
    "routes": (
        "Times of the three routes, and five routes of each (paper, Fig. 7).",
        lambda n: draw_routes(n["routes"]),
    ),
    "equivalent_noise": (
        "Equivalent noise: constant on the forward process, drifting on the backward one (paper, Fig. 8).",
        lambda n: draw_equivalent_noise(n["walks"]),
    ),
    "picture_error": (
        "The teacher's one-step picture along its walk, against the walk's end (paper, Fig. 9).",
        lambda n: draw_picture_error(n["walks"]),
    ),
    "darkness": (
        "Distance of the walks' ends to black, and the filter's threshold (paper, Fig. 10).",
        lambda n: draw_darkness(n["walks"], n["threshold"]),
    ),
}
"""name -> caption and how it is drawn from the saved numbers."""


def draw_all(numbers: dict[str, Any], folder: Path) -> None:
    """Every figure as svg and png."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, draw) in FIGURES.items():
        figure = draw(numbers)
        for suffix in ("svg", "png"):
            with writing(folder / f"{name}.{suffix}") as part:
                figure.savefig(part, format=suffix, dpi=120, metadata={"Date": None} if suffix == "svg" else {})


def _plots(rows: int, columns: int, label: str) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5, 3.2 * columns), 3 * rows), layout="constrained")
    plots = figure.subplots(rows, columns, squeeze=False)
    for plot in plots.flat:
        plot.set(xlabel=label)
    return figure, plots
