"""The comparisons of `stepfold reproduce` on a teacher that is known exactly: which differences are the method's own?

A mixture of Gaussians in the plane, two labels. Its velocity is a formula, so where each noise belongs can be computed
as exactly as wanted, and a student's error has no judge in it. Settings are those of the preset `reproduce`, but for
sizes and rates. Runs take seconds, so there can be many seeds.
"""

import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from common import console, make_parser, open_record, show, write_record
from torch import Tensor, nn

from stepfold.api import distill_module, draw
from stepfold.maths.closed_form import MixtureTeacher
from stepfold.maths.formulations import euler_step, interpolate
from stepfold.randomness import normal
from stepfold.students.whole import new_student
from stepfold.teachers.contract import Condition
from stepfold.teachers.module import ModuleTeacher
from stepfold.teachers.pipeline import SIGMA_DATA

PICTURES, JUDGED = 2000, 1234  # samples that a student is judged by, and the seed of their noise
LABELS = ("flower", "turned flower")
ROWS: dict[str, list[str]] = {
    "TBCM": [],
    "T2: sCM over teacher endpoints": ["space.kind=endpoints", "space.route=logit_normal"],
    "T2: discrete consistency on the walk": ["objective=discrete"],
    "T4: random route": ["space.route=random"],
    "T4: logit-normal route": ["space.route=logit_normal"],
    "T6: r_final = 0.25": ["consistency.r_final=0.25"],
    "T6: r_final = 0.5": ["consistency.r_final=0.5"],
    "T6: r_final = 1.0": ["consistency.r_final=1.0"],
    "T7: no warm-up": ["consistency.r_schedule=none"],
    "T7: warm-up to r_final": ["consistency.r_schedule=warmup"],
    "T8: no prior weight": ["consistency.prior_weight=none"],
    "T8: first state kept": ["space.keep_first=true"],
}
"""Row -> settings that differ from TBCM's."""


def settings(steps: int) -> list[str]:
    """Settings of every row."""
    r = {"r_warmup": 0.2, "r_cooldown_start": 0.75, "r_cooldown_steps": 0.1}
    return [
        "objective=continuous", "space.route_per=prompt", "optimiser.name=adamw", "optimiser.lr=1e-3",
        "optimiser.decay=0.8", "optimiser.clip=1.0", "optimiser.warmup=10", "training.prompts_per_step=32",
        "training.ema=0.96", "training.tangent=two_pass", f"training.steps={steps}",
        f"training.checkpoint_every={steps}", *(f"consistency.{name}={round(steps * at)}" for name, at in r.items()),
    ]  # fmt: skip


def mixture(dtype: torch.dtype = torch.float32) -> MixtureTeacher:
    """Five petals around the middle; the second label's are turned by half a petal."""
    angles = (torch.arange(5, dtype=dtype)[:, None] + torch.tensor([0, 0.5], dtype=dtype)) * 2 * math.pi / 5
    means = torch.stack([angles.cos(), angles.sin()], -1)
    return MixtureTeacher(means, torch.full((5, 2), 0.12, dtype=dtype), torch.ones(5, 2, dtype=dtype), SIGMA_DATA)


def labels_of(condition: Condition) -> Tensor:
    """The label of each row [B]."""
    return condition.embeds[:, 0].argmax(1)


def encode(prompts: Sequence[str]) -> Condition:
    """One row a prompt: its label as a vector."""
    labels = torch.tensor([LABELS.index(prompt) for prompt in prompts])
    return Condition.whole(nn.functional.one_hot(labels, len(LABELS)).float()[:, None])


class Exact(nn.Module):
    """The mixture's F."""

    def forward(self, x_unit: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return mixture().velocity(SIGMA_DATA * x_unit, t, labels_of(condition)) / SIGMA_DATA


class Small(nn.Module):
    """What students are made of."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x_unit: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.net(torch.cat([x_unit, t.cos()[:, None], t.sin()[:, None], condition.embeds[:, 0]], 1))


def fitted(seed: int, steps: int = 1500, batch: int = 512) -> Small:
    """A network that says what the teacher says: where distillation begins."""
    torch.manual_seed(seed)
    network, exact, data = Small(), Exact(), mixture()
    optimiser = torch.optim.AdamW(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for _ in range(steps):
        label, t = torch.randint(len(LABELS), (batch,)), torch.rand(batch) * math.pi / 2
        x0 = data.sample(label, torch.rand(batch), torch.randn(batch, 2))
        x = interpolate(x0, SIGMA_DATA * torch.randn(batch, 2), t) / SIGMA_DATA
        condition = encode([LABELS[i] for i in label])
        optimiser.zero_grad()
        (network(x, t, condition) - exact(x, t, condition)).square().mean().backward()
        optimiser.step()
        schedule.step()
    return network


@cache
def belongs(prompts: tuple[str, ...], seed: int, steps: int = 400) -> Tensor:
    """Where the ODE carries the noise that `draw` starts from, of unit variance, in float64."""
    x = SIGMA_DATA * torch.stack([normal((2,), seed, "draw", 0, i) for i in range(len(prompts))]).double()
    label, times = labels_of(encode(prompts)), torch.linspace(math.pi / 2, 0, steps + 1, dtype=torch.float64)
    exact = mixture(torch.float64)
    for i in range(steps):  # Heun's method
        t, s = times[i].expand(len(x)), times[i + 1].expand(len(x))
        v = exact.velocity(x, t, label)
        x = euler_step(x, t, s, (v + exact.velocity(x + (s - t)[:, None] * v, s, label)) / 2)
    return x / SIGMA_DATA


def error(row: Sequence[str], steps: int, seed: int, begin: Small) -> float:
    """Root mean square distance of one-step samples to where they belong, in standard deviations of the data."""
    teacher = ModuleTeacher(Exact(), encode, (2,), "trigflow")
    student = new_student(ModuleTeacher(begin, encode, (2,), "trigflow"))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "prompts.txt").write_text("\n".join(LABELS) + "\n")
        changes = [*settings(steps), *row, f"seed={seed}"]
        student = distill_module(
            teacher, Path(folder) / "prompts.txt", Path(folder) / "run", changes, student=student, quiet=True
        )
    prompts = list(LABELS) * (PICTURES // len(LABELS))
    found = draw(teacher, student.eval(), prompts, seed=JUDGED)
    return (found.double() - belongs(tuple(prompts), JUDGED)).square().sum(1).mean().sqrt().item()


def main(argv: list[str] | None = None) -> None:
    """Runs every row with every seed."""
    given = sys.argv[1:] if argv is None else argv
    parser = make_parser(__doc__, "closed_form", device=False)
    parser.add_argument("--seeds", type=int, default=5, help="runs of every row (5)")
    parser.add_argument("--steps", type=int, default=400, help="of training (400)")
    options = parser.parse_args(given)
    torch.set_num_threads(1)  # the network is tiny
    record, errors = open_record("closed_form", given, torch.device("cpu")), {name: [] for name in ROWS}
    for seed in range(options.seeds):
        begin = fitted(seed)
        for name, changes in ROWS.items():
            errors[name].append(error(changes, options.steps, seed, begin))
            console.print(f"seed {seed}, {name}: {errors[name][-1]:.3f}")
    rows = [
        [name, f"{statistics.mean(of):.3f}", f"{statistics.stdev(of):.3f}" if len(of) > 1 else "", str(len(of))]
        for name, of in errors.items()
    ]
    show("one step against the exact map", ["row", "error", "deviation", "seeds"], rows)
    write_record(options.out, record | {"steps": options.steps, "one_step_error": errors})


if __name__ == "__main__":
    main()
