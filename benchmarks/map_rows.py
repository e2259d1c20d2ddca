"""Steps of objectives with a target time, for `step.py --maps`: what a pair costs in plain forward passes of a pair."""

from dataclasses import dataclass, replace
from typing import Any

from common import Run, Timing, show, take_turns
from step_rows import Bench, Precision, Work, forward_of, open_bench, settings, unit_name

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


@dataclass(frozen=True)
class Cost:
    """What a row costs.

    Attributes:
        sec: of a step, the walk and the gradient.
        pairs: of a step.
        units: of a pair, in plain forward passes of a pair without a graph.
    """

    sec: float
    pairs: int
    units: float


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


def measure_maps(work: Work, backend: str, rounds: int) -> dict[str, Cost]:
    """Every row of MAPS, in turns; prints the table."""
    bench = open_bench(work, ("ours",))
    bench = replace(bench, student=new_student(bench.teacher, two_times=True))
    configs = {name: config_of(bench, changes) for name, changes in MAPS.items()}
    batch = draw(0, bench.prompts, bench.teacher, configs["TBCM"], bench.device)
    condition = bench.cache.rows(batch.index).to(bench.device, bench.teacher.dtype)
    pairs = collect(["generation"], batch, condition, Networks(bench.student, bench.teacher), configs["TBCM"])
    example = pairs["generation"]
    assert isinstance(example, Pairs)
    runs = {name: step_of_row(bench, config, backend) for name, config in configs.items()}
    timings: dict[str, Timing] = take_turns(
        runs | {unit_name("float32"): forward_of(bench, example, "float32")}, rounds, bench.device
    )
    unit = timings[unit_name("float32")]
    found = {name: Cost(timings[name].median, len(example), timings[name].ratio(unit)["median"]) for name in MAPS}
    show(
        f"A step of {len(example)} pairs, in forward passes of a pair",
        ["", "ms", "units a pair"],
        [[name, f"{1e3 * cost.sec:.1f}", f"{cost.units:.2f}"] for name, cost in found.items()],
    )
    return found
