"""What to compare: the rows, their budget, and the distillations that they take."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field

from stepfold.config import Config, Section, load_config, phases_of, preset_names
from stepfold.errors import UserError
from stepfold.reproduction.experiments import Run, stretched

TIMING, SEARCH, METHODS = "timing", "learning rate", "methods"
"""The three parts of a comparison, as `Run.table`."""
SEARCH_SEED, SEARCH_SHARE = 1000, 0.25
"""The seed of the runs that choose a learning rate, and their share of the budget."""
USUAL_STEPS = (1, 2, 4)
MAY_DIFFER = ("teacher.max_tokens", "training.precision", "training.walk_precision")
"""Settings of all rows that a yaml file's own go before."""


class Row(Section):
    """A method.

    Attributes:
        preset: that its settings begin with.
        changes: `key=value` strings on top of the common ones.
        steps: sampling steps that its student is made for.
    """

    preset: str
    changes: tuple[str, ...] = ()
    steps: tuple[int, ...] = Field(min_length=1)

    def with_changes(self, changes: Sequence[str]) -> "Row":
        """The row with more settings on top."""
        return self.model_copy(update={"changes": (*self.changes, *changes)})


class Rows(Section):
    """All methods.

    Attributes:
        common: `key=value` strings of all rows.
        reference: the row whose steps a budget may count.
        rows: name -> row.
        left_out: preset -> why it is no row.
    """

    common: tuple[str, ...]
    reference: str
    rows: dict[str, Row]
    left_out: dict[str, str] = Field(default={})


@dataclass(frozen=True)
class Budget:
    """How long a row trains: so many minutes, or steps of the demo, of processor time (on a GPU: of time); or pairs."""

    kind: Literal["minutes", "demo steps", "pairs"]
    amount: float

    @property
    def words(self) -> str:
        """`for 5 minutes`, as the page says it."""
        amount = f"{self.amount:,.10g}"
        if self.kind == "pairs":
            return f"on {amount} pairs"
        if self.kind == "demo steps":
            return f"for the time of {amount} demo step{'s' * (self.amount != 1)}"
        return f"for {amount} minute{'s' * (self.amount != 1)}"


@dataclass(frozen=True)
class Cost:
    """Means over the steps of a short run: seconds, and pairs that the student is trained on."""

    spent_sec: float
    pairs: float


@dataclass(frozen=True)
class Comparison:
    """What is asked for.

    Attributes:
        rows: name -> row, the reference's among them only if it is compared.
        reference: the row whose steps a budget may count.
        common: `key=value` strings of all rows.
        budget: of each run.
        seeds: runs a row.
        rates: factors of the preset's learning rate, of which the best is searched; none for no search.
        steps: sampling steps that students are scored at.
        pictures: that a score is made from.
    """

    rows: Mapping[str, Row]
    reference: Row
    common: tuple[str, ...]
    budget: Budget
    seeds: int = 3
    rates: tuple[float, ...] = ()
    steps: tuple[int, ...] = (1, 2, 4, 8)
    pictures: int = 500


def load_rows() -> Rows:
    """The rows that ship with the package."""
    text = (resources.files("stepfold.comparison") / "rows.yaml").read_text(encoding="utf-8")
    return Rows.model_validate(yaml.safe_load(text))


def choose_rows(rows: Rows, names: Sequence[str], changes: Sequence[str] = ()) -> dict[str, Row]:
    """The rows of some names; all for none. Another preset, or a yaml file, is a row of its own.

    `changes` are `key=value` strings of every row, on top.

    Raises:
        UserError: no such row or preset, or one of another teacher, or without the images that it trains on.
    """
    chosen = {name: rows.rows.get(name) or Row(preset=name, steps=USUAL_STEPS) for name in names} or dict(rows.rows)
    for name, row in chosen.items():
        if name not in rows.rows and name.endswith("-lora-4step"):
            raise UserError(f"{name} is for a model of yours; the row of the bundled one is lora-4step")
        if name not in rows.rows and not name.endswith((".yaml", ".yml")) and name not in preset_names():
            raise UserError(f"no row {name!r}; there are {', '.join(rows.rows)}; or give a preset, or a yaml file")
        if name not in rows.rows:
            row = chosen[name] = row.model_copy(update={"steps": steps_of(name, rows)})
        if name not in rows.rows and name not in preset_names():
            row = chosen[name] = row.with_changes(own_of_file(name, (*rows.common, *changes)))
        config = load_config(row.preset, (*rows.common, *row.changes))
        source = config.teacher.source
        if any("images" in each.space.weights and not each.space.images for _, each in phases_of(config)):
            raise UserError(f"{name} trains on images; give a yaml file with the preset and their folder, space.images")
        if source != "emoji":
            raise UserError(
                f"{name} has the teacher {source!r}, but the evaluator knows the bundled one's images alone; "
                "write teacher.source=emoji into a yaml file with that preset"
            )
    return {name: row.with_changes(changes) for name, row in chosen.items()}


def steps_of(name: str, rows: Rows) -> tuple[int, ...]:
    """The sampling steps that another preset, or a yaml file, is made for.

    They are its own `evaluation.steps`, or those of its rollouts, or those of the row that it builds on.
    """
    config, (said, base) = load_config(name), said_in(name)
    if "evaluation.steps" in said and config.evaluation.steps:
        return tuple(sorted(config.evaluation.steps))
    if config.space.kind == "rollout" and config.rollout.lengths == "fixed":
        return (config.rollout.steps,)
    known = {row.preset: row.steps for row in rows.rows.values()} | {each: row.steps for each, row in rows.rows.items()}
    return known.get(base, USUAL_STEPS)


def said_in(path: str) -> tuple[set[str], str]:
    """The settings that a yaml file and those that it builds on give, and the preset at their end."""
    said, file = set[str](), path
    while Path(file).is_file():
        read = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        said |= {f"{name}.{key}" for name, part in read.items() if isinstance(part, dict) for key in part}
        file = str(read.get("preset", ""))
    return said, file


def own_of_file(path: str, common: Sequence[str]) -> list[str]:
    """`key=value` of the settings in a yaml file, and in those that it builds on, which `common` would replace.

    Raises:
        UserError: it has a guidance scale of its own; a comparison scores all rows at one.
    """
    config = load_config(path)  # which refuses what is no such file
    said, _ = said_in(path)
    shared = load_config(path, common).space.guidance
    if "space.guidance" in said and config.space.guidance != shared:
        raise UserError(
            f"space.guidance is {list(config.space.guidance or ())} in {path}, and a comparison scores all rows at "
            f"{list(shared or ())}; leave it out of the file, or give --set 'space.guidance=...' for all rows"
        )
    values = {key: config.model_dump()[key.split(".")[0]][key.split(".")[1]] for key in MAY_DIFFER}
    return [f"{key}={json.dumps(values[key])}" for key in MAY_DIFFER if key in said]


def scaled(config: Config, steps: int) -> list[str]:
    """The settings that make a run `steps` long, and stretch with it all else that is counted in steps.

    These are the course of r, the learning rate's warm-up, the average's window, the phases, the fake score's head
    start, the annealed coupling, the semigroup's alpha and a reward's beginning.
    """
    factor = steps / config.training.steps
    ends = [round(factor * end) for end in accumulate((p.steps for p in config.training.phases), initial=0)]
    phases: list[dict[str, Any]] = []
    for phase, (begin, end) in zip(config.training.phases, pairwise(ends), strict=True):
        counted = {key: max(1, round(factor * value)) for key, value in phase.set.items() if key in COUNTED and value}
        phases += [{"steps": end - begin, "set": phase.set | counted}] if end > begin else []
    return [
        *stretched(config, steps),
        f"optimiser.warmup={round(factor * config.optimiser.warmup)}",
        f"training.ema={max(0.0, 1 - (1 - config.training.ema) / factor):.6g}",
        f"training.phases={json.dumps(phases)}",
        f"fake.head_start={round(factor * config.fake.head_start)}",
        f"space.anneal_steps={round(factor * config.space.anneal_steps)}",
        *_beginnings(config, factor),
        f"training.checkpoint_every={math.ceil(steps / 4)}",
        f"training.preview_every={steps}",
    ]


def _beginnings(config: Config, factor: float) -> list[str]:
    """Counts that most methods have at 0, where they stay: with the setting, earlier runs had other names."""
    counted = {"semigroup.alpha_steps": config.semigroup.alpha_steps, "reward.from_step": config.reward.from_step}
    return [f"{name}={max(1, round(factor * value))}" for name, value in counted.items() if value]


COUNTED = (
    "consistency.r_warmup", "consistency.r_cooldown_start", "consistency.r_cooldown_steps", "semigroup.alpha_steps",
    "reward.from_step",
)  # fmt: skip
"""Settings of a phase that are counted in steps."""
OWN = ("training.steps", "seed", "training.checkpoint_every", "training.preview_every")
"""Settings that the budget and the number of seeds give."""


def check_changes(changes: Sequence[str]) -> None:
    """Refuses changes of what a comparison sets itself.

    Raises:
        UserError: naming the setting.
    """
    for change in changes:
        if (name := change.split("=")[0].strip()) in ("teacher.source", "prompts"):
            raise UserError(
                f"--set {name} is not for compare, whose evaluator knows images of the bundled teacher's prompts "
                "alone; leave it out"
            )
        if name in OWN:
            raise UserError(
                f"--set {name} is not for compare, whose budget and --seeds give each run its length, seed and "
                "checkpoints; use --minutes, --steps-of-demo or --pairs, and --seeds"
            )


def make_run(
    asked: Comparison, table: str, name: str, row: Row, length: int, *, seed: int = 0, rate: float = 1, **rest: Any
) -> Run:
    """A distillation of a row, `length` steps long, with its learning rate times `rate`."""
    given = (*asked.common, *row.changes)
    config = load_config(row.preset, given)
    changes = (*given, *scaled(config, length), f"optimiser.lr={rate * config.optimiser.lr:.6g}", f"seed={seed}")
    return Run(table, name, row.preset, changes, load_config(row.preset, changes), **rest)


def plan_timing(asked: Comparison) -> list[Run]:
    """A short run of every row, and of the reference where the budget counts its steps.

    All of a run is in it, phases and head start shortened alike, so that its mean step is that of the whole.
    """
    rows = dict(asked.rows)
    if asked.budget.kind == "demo steps":
        rows.setdefault(REFERENCE, asked.reference)
    runs = []
    for name, row in rows.items():
        config = load_config(row.preset, (*asked.common, *row.changes))
        steps = TIMED_STEPS * (2 if config.fake.updates or config.training.phases else 1)
        on_cpu = not torch.cuda.is_available()
        runs.append(make_run(asked, TIMING, name, row, steps, costs=True, beside=on_cpu))
    return runs


REFERENCE = "(the demo)"
"""The row of the timing run of the reference, where that is not compared."""
TIMED_STEPS = 8


def steps_for(budget: Budget, cost: Cost, reference: Cost | None = None) -> int:
    """How many steps of a row its budget gives; `reference` is what a step of the demo costs."""
    if budget.kind == "pairs":
        return max(1, round(budget.amount / cost.pairs))
    assert reference or budget.kind == "minutes", "a budget of the demo's steps needs its time"
    sec = 60 * budget.amount if reference is None or budget.kind == "minutes" else budget.amount * reference.spent_sec
    return max(1, round(sec / cost.spent_sec))


def plan_search(asked: Comparison, steps: Mapping[str, int]) -> list[Run]:
    """The runs that choose a learning rate, of the rows whose number of `steps` is known."""
    return [
        make_run(
            asked, SEARCH, searched_name(name, rate), row, max(1, round(SEARCH_SHARE * steps[name])),
            seed=SEARCH_SEED, rate=rate, steps=(min(row.steps),),
        )
        for rate in asked.rates
        for name, row in asked.rows.items()
        if name in steps
    ]  # fmt: skip


def searched_name(name: str, rate: float) -> str:
    """Of the run that tries a factor of the learning rate."""
    return f"{name} x {rate:g}"


def plan_methods(asked: Comparison, steps: Mapping[str, int], rates: Mapping[str, float]) -> list[Run]:
    """The runs that are compared, of the rows whose `steps` and rate are known; seed 0 of all rows first."""
    return [
        make_run(asked, METHODS, name, row, steps[name], seed=seed, rate=rates[name])
        for seed in range(asked.seeds)
        for name, row in asked.rows.items()
        if name in steps and name in rates
    ]
