"""Steps of objectives with a target time, for `step.py --maps`: what a pair costs in plain forward passes of a pair."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import Run, Timing, show, take_turns
from step_rows import Bench, Precision, Work, forward_of, open_bench, settings, unit_name
from torch.utils.flop_counter import FlopCounterMode

from stepfold.config import Config, load_config, to_yaml
from stepfold.objectives.contract import Networks
from stepfold.spaces.records import Pairs
from stepfold.students.whole import new_student
from stepfold.training.draws import draw
from stepfold.training.stages import Stages
from stepfold.training.states import collect
from stepfold.training.terms import add_gradients, terms_of

MIXED = "target.rule={uniform: 0.75, diagonal: 0.25}"
MAPS: dict[str, tuple[str, ...]] = {
    "TBCM": (),
    "continuous, target 0.75 below t, 0.25 at t": (MIXED,),
    "pair": ("objective=pair", "target.rule=later"),
    "semigroup, teacher and student": ("objective=semigroup", "target.rule=uniform"),
    "semigroup, student twice": (
        "objective=semigroup", "target.rule=uniform", "semigroup.first=student", "semigroup.alpha=0.5",
    ),
    "lagrange on walks": ("objective=lagrange", "target.rule=uniform"),
    "lagrange on the prior": ("objective=lagrange", "target.rule=uniform", "space.kind=prior"),
}  # fmt: skip
"""Row -> settings that differ from TBCM's."""

WALK, GRADIENT = 2, 3  # of a pair: the guided teacher's call at a state; a forward and a backward pass
TANGENT = {"one_pass": 1}  # its derivative beside the same forward pass; other backends take a pass of its own, so 2
EXPECTED: dict[str, tuple[float, float, float]] = {
    "TBCM": (WALK, GRADIENT, 1),
    "continuous, target 0.75 below t, 0.25 at t": (WALK, GRADIENT, 0.75),
    "pair": (WALK, GRADIENT, 0),
    "semigroup, teacher and student": (WALK, 1 + GRADIENT, 0),
    "semigroup, student twice": (WALK, 2 + GRADIENT, 0),
    "lagrange on walks": (WALK, 2 + GRADIENT, 1),
    "lagrange on the prior": (0, 2 + GRADIENT, 1),
}
"""Row -> forward passes of a pair that it should take, by reasoning: for the walk, for all else, and derivatives."""


@dataclass(frozen=True)
class Cost:
    """What a row costs.

    Attributes:
        sec: of a step, the walk and the gradient.
        pairs: of a step.
        units: of a pair, in plain forward passes of a pair without a graph.
        counted: the same from the operations of matrix products, attention and convolutions alone; no clock.
        expected: the same by reasoning, `EXPECTED` with the share of the walk's state that is no pair.
    """

    sec: float
    pairs: int
    units: float
    counted: float
    expected: float


def config_of(bench: Bench, changes: tuple[str, ...]) -> Config:
    """The settings of a row; on the prior there are as many prompts as the others have pairs."""
    plain = settings(bench.work, "float32")
    more = ["student.times=two", *changes]
    if "space.kind=prior" in changes:
        more.append(f"training.prompts_per_step={bench.work.prompts * (bench.work.states - 1)}")
    folder = bench.work.place.folder
    path = folder / "row.yaml"
    path.write_text(to_yaml(plain))
    return load_config(str(path), more)


def step_of_row(bench: Bench, config: Config, backend: str) -> Run:
    """The walk and the gradient of one step."""
    precision: Any = Precision(bench.device, bf16=False)

    def run(turn: int, stages: Stages) -> None:
        batch = draw(turn, bench.prompts, bench.teacher, config, bench.device)
        condition = bench.cache.rows(batch.index).to(bench.device, bench.teacher.dtype)
        networks = Networks(bench.student, bench.teacher, tangent=backend)
        with stages("teacher"):
            states = collect(config.space.weights, batch, condition, networks, config)
            bench.teacher.clear_prompt_cache()
        add_gradients(terms_of(config), networks, states, batch.draws, config, turn, precision, stages=stages)
        bench.student.zero_grad(set_to_none=True)

    return run


def open_maps(work: Work, backend: str) -> tuple[dict[str, Run], Run, Pairs, torch.device]:
    """The step of every row of MAPS, the unit, pairs of the size of a step's, and where all of it is."""
    bench = open_bench(work, ("ours",))
    bench = replace(bench, student=new_student(bench.teacher, two_times=True))
    configs = {name: config_of(bench, changes) for name, changes in MAPS.items()}
    batch = draw(0, bench.prompts, bench.teacher, configs["TBCM"], bench.device)
    condition = bench.cache.rows(batch.index).to(bench.device, bench.teacher.dtype)
    pairs = collect(["generation"], batch, condition, Networks(bench.student, bench.teacher), configs["TBCM"])
    example = pairs["generation"]
    assert isinstance(example, Pairs)
    runs = {name: step_of_row(bench, config, backend) for name, config in configs.items()}
    return runs, forward_of(bench, example, "float32"), example, bench.device


def convolution_backward(grad: Any, x: Any, weight: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    """Operations of a convolution's backward pass, one forward pass's for each gradient; torch's own forgets groups."""
    asked = rest[-1][:2]  # which of the gradients, of input and of weight, is wanted
    return sum(asked) * 2 * math.prod(grad) * math.prod(weight[1:])


class Untracked(nullcontext[None]):
    """In place of what tells the counter which module it is in: that fails in torch's forward-mode derivative."""

    parents = frozenset({"Global"})


BACKWARD: dict[Any, Any] = {torch.ops.aten.convolution_backward: convolution_backward}


def operations(run: Run) -> int:
    """Floating-point operations of matrix products, attention and convolutions in a run, whose first time is past."""
    run(0, Stages())
    counter: Any = FlopCounterMode(display=False, custom_mapping=BACKWARD)
    counter.mod_tracker = Untracked()
    with counter:
        run(0, Stages())
    return counter.get_total_flops()


def counted_units(runs: Mapping[str, Run], unit: Run) -> dict[str, float]:
    """Row -> its operations in those of the unit."""
    one = operations(unit)
    return {name: operations(run) / one for name, run in runs.items()}


def expected_units(states: int, backend: str) -> dict[str, float]:
    """Row -> `EXPECTED` where walks have so many states, of which all but the first are pairs."""
    each = TANGENT.get(backend, 2)
    return {
        name: walk * states / (states - 1) + rest + each * tangents for name, (walk, rest, tangents) in EXPECTED.items()
    }


def measure_maps(work: Work, backend: str, rounds: int) -> dict[str, Cost]:
    """Every row of MAPS, in turns; prints the table."""
    runs, unit, example, device = open_maps(work, backend)
    counted, expected = counted_units(runs, unit), expected_units(work.states, backend)
    timings: dict[str, Timing] = take_turns(runs | {unit_name("float32"): unit}, rounds, device)
    clock = timings[unit_name("float32")]
    found = {
        name: Cost(
            timings[name].median, len(example), timings[name].ratio(clock)["median"], counted[name], expected[name]
        )
        for name in MAPS
    }
    show(
        f"A step of {len(example)} pairs, in forward passes of a pair",
        ["", "ms", "measured", "counted", "expected"],
        [
            [name, f"{1e3 * cost.sec:.1f}", *(f"{value:.2f}" for value in (cost.units, cost.counted, cost.expected))]
            for name, cost in found.items()
        ],
    )
    return found
