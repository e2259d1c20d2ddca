"""What a run with a fake score logs when it is well, when the fake score is late, and when guidance is too strong.

The teacher is a mixture of Gaussians in the plane under guidance, whose velocity is a formula. Student and fake score
are small networks that begin as the teacher. They learn by the package's own losses, in turn as in a run, which takes
some seconds each.

Writes the figure of docs/reading.md, and prints what `stepfold runs` would say of each run.

    python benchmarks/score_curves.py --figure docs/images/curves_scores.png
"""

import argparse
import copy
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from stepfold.evaluation.symptoms import FIRST, PARTS, symptoms_of
from stepfold.maths.closed_form import MixtureTeacher
from stepfold.maths.formulations import data_prediction, guide, interpolate
from stepfold.maths.routes import level_times
from stepfold.objectives.denoising import denoising_error
from stepfold.objectives.matching import Predictions, along, figures, matching_direction
from stepfold.teachers.contract import Condition
from stepfold.training.step_log import Metrics, means

SIGMA_DATA = 0.5
PETALS, LABELS = 5, 2
RADII, STD = (1.0, 1.0, 0.6), 0.3
"""Of the petals, with either label and without."""
SHOWN = ("gap", "cosine", "miss", "std", "spread", "fake/loss")
COLOURS, SMOOTHED = ("#2f6f8f", "#c0632f", "#7a4fa3"), 15


@dataclass(frozen=True)
class Run:
    """What runs differ in.

    Attributes:
        w: of the teacher's guidance.
        updates: of the fake score before each of the student's.
        lr_factor: of the fake score, in the student's rate.
    """

    w: float = 2.0
    updates: int = 5
    lr_factor: float = 3.0


RUNS = {
    "healthy": Run(),
    "late fake score": Run(updates=1, lr_factor=0.03),
    "guidance too strong": Run(w=7.0),
}
RATE, HEAD_START, BATCH = 3e-4, 40, 64


def mixture() -> MixtureTeacher:
    """Petals around the middle; the second label's are turned by half a petal.

    Without a label there are all, nearer to the middle: guidance pushes outwards, and further with its scale.
    """
    angles = torch.arange(2 * PETALS) * math.pi / PETALS
    centres = torch.stack([angles.cos(), angles.sin()], 1)[:, None] * torch.tensor(RADII)[:, None]
    odd = (torch.arange(2 * PETALS) % 2).float()
    weights = torch.stack([1 - odd, odd, torch.ones_like(odd)], 1)
    return MixtureTeacher(centres, torch.full((2 * PETALS, LABELS + 1), STD), weights, SIGMA_DATA)


class Small(nn.Module):
    """F of (x / sigma_data, t, condition): what student and fake score are made of."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4 + LABELS, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width),
            nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x_unit: Tensor, t: Tensor, condition: Condition, *rest: Any) -> Tensor:
        return self.net(torch.cat([x_unit, t.cos()[:, None], t.sin()[:, None], condition.embeds[:, 0]], 1))


def told(label: Tensor) -> Condition:
    """Labels [B] as vectors."""
    return Condition.whole(nn.functional.one_hot(label, LABELS).float()[:, None])


def fitted(steps: int, batch: int = 256) -> Small:
    """A network that says what the teacher says, with a label: where student and fake score begin."""
    network, data = Small(), mixture()
    optimiser = torch.optim.AdamW(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for _ in range(steps):
        label, t = torch.randint(LABELS, (batch,)), torch.rand(batch) * math.pi / 2
        x0 = data.sample(label, torch.rand(batch), torch.randn(batch, 2))
        optimiser.zero_grad()
        noise = SIGMA_DATA * torch.randn(batch, 2)
        denoising_error(network, x0, noise, t, told(label), t, SIGMA_DATA).mean().backward()
        optimiser.step()
        schedule.step()
    return network


def pictures(student: Small, label: Tensor) -> Tensor:
    """The student's one step from pure noise [B, 2]."""
    noise, t = SIGMA_DATA * torch.randn(len(label), 2), torch.full((len(label),), math.pi / 2)
    return data_prediction(noise, t, SIGMA_DATA * student(noise / SIGMA_DATA, t, told(label)))


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Labels [B], times of renoising [B], noise [B, 2]."""
    t = level_times(torch.rand(BATCH), 1.0, 0.02, 0.98)
    return torch.randint(LABELS, (BATCH,)), t, SIGMA_DATA * torch.randn(BATCH, 2)


def predictions(data: MixtureTeacher, fake: Small, x: Tensor, t: Tensor, label: Tensor, w: float) -> Predictions:
    """Both scores' predictions from x, and their velocities."""
    without, with_label = data.velocity(x, t, torch.full_like(label, LABELS)), data.velocity(x, t, label)
    v_real, v_fake = guide(without, with_label, w), SIGMA_DATA * fake(x / SIGMA_DATA, t, told(label))
    return Predictions(data_prediction(x, t, v_real), data_prediction(x, t, v_fake), v_real, v_fake)


def logged(settings: Run, begin: Small, steps: int, seed: int = 0) -> dict[str, list[list[float]]]:
    """The curves of a run, name -> [[step, value], ...], as `stepfold distill` logs them."""
    torch.manual_seed(seed)
    data, student, fake = mixture(), copy.deepcopy(begin), copy.deepcopy(begin)
    rates = ((student, RATE), (fake, settings.lr_factor * RATE))
    own, theirs = (torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.0, 0.999)) for network, rate in rates)
    curves: dict[str, list[list[float]]] = {name: [] for name in SHOWN}
    for step in range(steps):
        losses = []
        for _ in range(settings.updates):
            label, t, noise = drawn()
            loss = denoising_error(fake, pictures(student, label), noise, t, told(label), t, SIGMA_DATA).mean()
            theirs.zero_grad()
            loss.backward()
            theirs.step()
            losses.append(loss.item())
        if step < HEAD_START:
            continue
        label, t, noise = drawn()
        x0 = pictures(student, label)
        with torch.no_grad():
            found = predictions(data, fake, interpolate(x0, noise, t), t, label, settings.w)
        direction = matching_direction(x0, found.real, found.fake, t, "dmd", SIGMA_DATA)
        own.zero_grad()
        along(direction, x0, SIGMA_DATA, "mean").mean().backward()
        own.step()
        row = means(Metrics(label, figures(x0, found, SIGMA_DATA), BATCH, BATCH)) | {"fake/loss": fmean(losses)}
        for name in SHOWN:
            curves[name].append([step, row[name]])
    return curves


def draw(curves: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """A panel for each number with the curves of all runs, smoothed over SMOOTHED steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 2.7), dpi=90, layout="constrained")
    for panel, name in zip(figure.subplots(1, len(SHOWN)), SHOWN, strict=True):
        for colour, (run_name, of) in zip(COLOURS, curves.items(), strict=True):
            steps, values = zip(*of[name], strict=True)
            smooth = [fmean(values[max(0, i - SMOOTHED + 1) : i + 1]) for i in range(len(values))]
            panel.plot(steps, smooth, color=colour, linewidth=1.3, label=run_name)
        panel.set_title(name, loc="left", fontsize=9)
        panel.tick_params(labelsize=8, length=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.set_xlabel("step", fontsize=8)
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, format="png")


def parts(points: list[list[float]]) -> str:
    """Means of a curve over the part that `symptoms` compares with, and over the last one."""
    values, count = [value for _, value in points], len(points)
    found = [fmean(values[i * count // PARTS : (i + 1) * count // PARTS]) for i in (FIRST, PARTS - 1)]
    return ", ".join(f"{value:.2f}" for value in found)


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Runs, prints, draws and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=340, help="of each run (340)")
    parser.add_argument("--fit", type=int, default=800, help="steps of fitting what student and fake begin as (800)")
    parser.add_argument("--figure", type=Path, help="PNG with the curves of all runs")
    parser.add_argument("--out", type=Path, help="json file with the curves")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the networks are tiny
    torch.manual_seed(0)
    begin = fitted(args.fit)
    curves = {name: logged(settings, begin, args.steps) for name, settings in RUNS.items()}
    said = {name: symptoms_of(of) for name, of in curves.items()}
    for name, of in curves.items():
        print(name, *(f"{key} {parts(points)}" for key, points in of.items()), *said[name], sep="\n  ")
    if args.figure:
        draw(curves, args.figure)
    record = {"steps": args.steps, "said": said, "curves": curves}
    if args.out:
        args.out.write_text(json.dumps(record) + "\n")
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
