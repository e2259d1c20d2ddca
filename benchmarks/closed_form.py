"""The comparisons of `stepfold reproduce` on a teacher that is known exactly: which differences are the method's own?

A mixture of Gaussians in the plane, two labels. Its velocity is a formula, so where each noise belongs can be computed
as exactly as wanted, and a student's error has no judge in it. Settings are those of the preset `reproduce`, but for
sizes and rates. Runs take seconds, so there can be many seeds.

    python benchmarks/closed_form.py                the rows of the paper, one step each
    python benchmarks/closed_form.py --maps         every objective with a target time, at 1, 2, 4 and 8 steps

With --maps a run that was stopped goes on where it was: what is in the json file is not run again.
"""

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

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
    "T2: discrete, first state kept": ["objective=discrete", "space.keep_first=true"],
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
TWO, MIXED = "student.times=two", "target.rule={uniform: 0.5, zero: 0.25, diagonal: 0.25}"
GAP = "target.rule={gap: 0.5, zero: 0.25, diagonal: 0.25}"
PLAIN = ("consistency.r_schedule=warmup",)
AT_ONCE = ("consistency.r_schedule=none", "consistency.r_final=0.99")  # a warm-up would undo what is known already
PRIOR = ("space.kind=prior", "training.prompts_per_step=480")
MAPS: dict[str, list[str]] = {
    "velocity matching": ["objective=velocity"],
    "TBCM": [],
    "discrete consistency": ["objective=discrete"],
    "discrete, 1, 2, 4 and 8 segments": [
        TWO, "objective=discrete", "target.rule=edge", "target.segments={1: 0.5, 2: 0.1, 4: 0.2, 8: 0.2}",
        "target.draws=2", "discrete.huber_constant=10",  # squares
    ],
    "AYF, Eulerian": [TWO, GAP, *PLAIN, "consistency.r_final=0.99"],
    "MeanFlow's weight": [TWO, GAP, *PLAIN, "consistency.r_final=0.99", "consistency.tangent_weight=meanflow"],
    "AYF's weight": [
        TWO, "target.rule={gap: 0.75, zero: 0.25}", *PLAIN, "consistency.r_final=0.99",
        "consistency.tangent_weight=ayf",
    ],
    "FACM": [TWO, "target.rule={zero: 0.5, diagonal: 0.5}", *PLAIN, "consistency.r_final=1"],
    "pairs, the end alone": ["objective=pair"],
    "pairs": [TWO, "objective=pair", "target.rule={later: 0.75, zero: 0.25}"],
    "two legs, the teacher's first": [TWO, "objective=semigroup", MIXED],
    "shortcut": [
        TWO, "objective=semigroup", MIXED, "semigroup.alpha=0.5", "semigroup.first=average", "semigroup.second=average",
        "semigroup.huber_constant=10",
    ],
    "alpha from 1": [
        TWO, "objective=semigroup", MIXED, "semigroup.alpha=1", "semigroup.alpha_final=0.05",
        "semigroup.alpha_steps=200",
    ],
    "four segments": ["objective=semigroup", "target.rule=edge"],
    "Lagrange on walks": [TWO, "objective=lagrange", MIXED],
    "Lagrange on the prior": [TWO, "objective=lagrange", MIXED, *PRIOR],
    "BOOT": [
        TWO, "objective=semigroup", MIXED, *PRIOR, "semigroup.alpha=0.95", "semigroup.first=student",
        "semigroup.second=teacher",
    ],
    "pairs first, then AYF": [
        TWO, GAP, *AT_ONCE,
        "training.phases=[{steps: HALF, set: {objective: pair, target.rule: {later: 0.75, zero: 0.25}}}]",
    ],
    "two legs first, then AYF": [TWO, GAP, *AT_ONCE, "training.phases=[{steps: HALF, set: {objective: semigroup}}]"],
    "discrete first, then TBCM": [
        "consistency.r_schedule=none", "training.phases=[{steps: HALF, set: {objective: discrete}}]",
    ],
}  # fmt: skip
"""Row -> settings that differ from TBCM's; all of them keep the state at pi/2. HALF is half of the steps."""
STEPS = (1, 2, 4, 8)


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


class Embedding(nn.Module):
    """What students are made of that may be told where to jump to: their time has an embedding."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Linear(4, width)
        self.rest = nn.Sequential(
            nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x_unit: Tensor, t: Tensor, condition: Condition) -> Tensor:
        times = self.embed(torch.stack([t.cos(), t.sin()], 1))
        return self.rest(self.first(torch.cat([x_unit, condition.embeds[:, 0]], 1)) + times)


Made = Small | Embedding


def fitted(seed: int, steps: int = 1500, batch: int = 512, kind: type[Made] = Small) -> Made:
    """A network that says what the teacher says: where distillation begins."""
    torch.manual_seed(seed)
    network, exact, data = kind(), Exact(), mixture()
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


def errors(row: Sequence[str], steps: int, seed: int, begin: Made, counts: Sequence[int] = (1,)) -> list[float]:
    """Root mean square distances of samples to where they belong, in standard deviations of the data.

    Args:
        row: settings that differ.
        steps: of training.
        seed: of the run.
        begin: what the student starts as.
        counts: numbers of steps that it is sampled in, by its own sampler; of one that adds fresh noise the first
            alone, since its samples have no one place where they belong.
    """
    part = "embed" if isinstance(begin, Embedding) else None
    teacher = ModuleTeacher(Exact(), encode, (2,), "trigflow", time_part=part)
    start = ModuleTeacher(begin, encode, (2,), "trigflow", time_part=part)
    torch.manual_seed(seed)  # the second embedder's initial values
    student = new_student(start, two_times=TWO in row)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "prompts.txt").write_text("\n".join(LABELS) + "\n")
        own = [change.replace("HALF", str(steps // 2)) for change in row]
        changes = [*settings(steps), *own, f"seed={seed}"]
        student = distill_module(
            teacher, Path(folder) / "prompts.txt", Path(folder) / "run", changes, student=student, quiet=True
        )
    prompts = list(LABELS) * (PICTURES // len(LABELS))
    wanted = belongs(tuple(prompts), JUDGED)
    counts = counts[:1] if student.sampler == "consistency" else counts
    found = [draw(teacher, student.eval(), prompts, seed=JUDGED, steps=count).double() for count in counts]
    return [(each - wanted).square().sum(1).mean().sqrt().item() for each in found]


def measure_maps(options: Any, record: dict[str, Any]) -> None:
    """Every row of MAPS with every seed at all of STEPS, written after each; what is there already is kept."""
    settings_of_all = {"steps": options.steps, "fit": options.fit}
    found: dict[str, dict[str, list[float]]] = {}
    if options.out.is_file():
        before = json.loads(options.out.read_text())
        if {name: before.get(name) for name in settings_of_all} == settings_of_all:
            found = before["errors"]
    for seed in range(options.seeds):
        left = [name for name in MAPS if str(seed) not in found.get(name, {})]
        begin = fitted(seed, options.fit, kind=Embedding) if left else None
        for name in left:
            assert begin is not None
            row = [*MAPS[name], "space.keep_first=true"]
            found.setdefault(name, {})[str(seed)] = errors(row, options.steps, seed, begin, STEPS)
            console.print(f"seed {seed}, {name}: {', '.join(f'{e:.3f}' for e in found[name][str(seed)])}")
            write_record(options.out, record | settings_of_all | {"counts": STEPS, "errors": found})
    rows = []
    for name in MAPS:
        means = [spread(of) for of in zip(*found[name].values(), strict=True)]
        rows.append([name, *means, *[""] * (len(STEPS) - len(means)), str(len(found[name]))])
    show("error against the exact map", ["row", *(f"{count} steps" for count in STEPS), "seeds"], rows)


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation over seeds where there are several."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def main(argv: list[str] | None = None) -> None:
    """Runs every row with every seed."""
    given = sys.argv[1:] if argv is None else argv
    parser = make_parser(__doc__, "closed_form", device=False)
    parser.add_argument("--seeds", type=int, default=5, help="runs of every row (5)")
    parser.add_argument("--steps", type=int, default=400, help="of training (400)")
    parser.add_argument("--fit", type=int, default=1500, help="steps of fitting what students start as (1500)")
    parser.add_argument("--maps", action="store_true", help="the objectives with a target time instead")
    options = parser.parse_args(given)
    if options.maps and options.out == parser.get_default("out"):
        options.out = options.out.with_name("closed_form_maps.json")
    torch.set_num_threads(1)  # the network is tiny
    record, found = open_record("closed_form", given, torch.device("cpu")), {name: [] for name in ROWS}
    if options.maps:
        measure_maps(options, record)
        return
    for seed in range(options.seeds):
        begin = fitted(seed, options.fit)
        for name, changes in ROWS.items():
            found[name] += errors(changes, options.steps, seed, begin)
            console.print(f"seed {seed}, {name}: {found[name][-1]:.3f}")
    rows = [
        [name, f"{statistics.mean(of):.3f}", f"{statistics.stdev(of):.3f}" if len(of) > 1 else "", str(len(of))]
        for name, of in found.items()
    ]
    show("one step against the exact map", ["row", "error", "deviation", "seeds"], rows)
    write_record(options.out, record | {"steps": options.steps, "one_step_error": found})


if __name__ == "__main__":
    main()
