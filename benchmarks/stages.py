"""Where a training step's time goes: data, text encoder, teacher, student forward (tangent), backward, optimiser.

    python benchmarks/stages.py                     the demo's own step on the bundled teacher, a minute or two

It runs `stepfold distill`'s own loop, with its own settings, for the continuous and the discrete objective, each with
the text encoder in the step and with conditions from a cache. The four take turns; shares are of the sum of the stages.
Previews and checkpoints are no part of a step.
"""

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from common import console, make_parser, open_record, show, training_device, write_record
from models import SIZES, Place, make_place, open_teacher

from stepfold.config import Config
from stepfold.students.whole import new_student
from stepfold.training.accelerators import make_accelerator
from stepfold.training.choices import choose_precision
from stepfold.training.distill import distill
from stepfold.training.looks import Progress
from stepfold.training.opening import open_run
from stepfold.training.stages import BESIDE_STEPS, Stages

WARM_UP = 2
ROWS = {
    f"{objective}, {text}": (objective, text == "conditions from a cache")
    for objective in ("continuous", "discrete")
    for text in ("text encoder in the step", "conditions from a cache")
}


def settings(place: Place, objective: str, steps: int, changes: Sequence[str]) -> Config:
    """The demo's, for so many steps after the first ones; a GPU is waited for after every stage."""
    return choose_precision(
        place.config(
            "demo",
            [
                *changes,
                f"objective={objective}",
                f"training.steps={WARM_UP + steps}",
                "training.look_every=1",
                "training.time_stages=true",
            ],
        )
    )


def seconds_by_stage(place: Place, config: Config, cached: bool, accelerator: Accelerator) -> dict[str, float]:
    """Of a step, in the mean over the steps after the first ones."""
    device = accelerator.device
    teacher, cache = open_teacher(place, with_encoders=not cached), place.cache
    stages, first, last = Stages(device), {}, {}

    def report(progress: Progress) -> None:
        if progress.step == WARM_UP:
            first.update(stages.seconds)
        last.update(stages.seconds)

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        open_run(Path(folder), config, resume=False)
        distill(
            config, Path(folder), teacher, new_student(teacher), place.prompts, [cache.black.to(device)], accelerator,
            conditions=(lambda index: cache.rows(index).to(device, teacher.dtype)) if cached else None,
            stages=stages, report=report,
        )  # fmt: skip
    names = [name for name in last if name not in BESIDE_STEPS]
    return {name: (last[name] - first.get(name, 0.0)) / (config.training.steps - WARM_UP) for name in names}


def medians(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Over the turns: seconds and shares by stage, and seconds of a step."""
    seconds = {name: statistics.median(of[name] for of in rounds) for name in rounds[0]}
    whole = sum(seconds.values())
    return {
        "sec_per_step": whole,
        "stages_sec": seconds,
        "shares": {name: sec / whole for name, sec in seconds.items()},
        "sec_per_step_of_turns": [sum(of.values()) for of in rounds],
    }


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measures, prints and writes."""
    parser = make_parser(__doc__, "stages", device=False)
    add = parser.add_argument
    add("--size", choices=SIZES, default="emoji", help="emoji is the bundled teacher")
    add("--steps", type=int, default=10, help="steps a turn, after two that do not count (10)")
    add("--rounds", type=int, default=3, help="turns (3)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting that differs from the demo's")
    args = parser.parse_args(argv)

    device = training_device()
    record = open_record("stages", argv, device)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS}
    with tempfile.TemporaryDirectory() as folder:
        place = make_place(args.size, device.type, Path(folder))
        configs = {name: settings(place, objective, args.steps, args.set) for name, (objective, _) in ROWS.items()}
        training = next(iter(configs.values())).training
        accelerator = make_accelerator(training.precision)
        for _ in range(args.rounds):
            for name, (_, cached) in ROWS.items():
                rounds[name].append(seconds_by_stage(place, configs[name], cached, accelerator))
    rows = {name: medians(of) for name, of in rounds.items()}

    names = list(dict.fromkeys(name for row in rows.values() for name, share in row["shares"].items() if share > 1e-4))
    lines = [
        [name, f"{1e3 * row['sec_per_step']:.0f}", *(f"{row['shares'].get(stage, 0):.1%}" for stage in names)]
        for name, row in rows.items()
    ]
    show(f"A step of {training.prompts_per_step} prompts, precision {training.precision}", ["", "ms", *names], lines)
    console.print("student forward: with the tangent, where the objective has one\n")
    work = {"size": args.size, "steps": args.steps, "rounds": args.rounds, "precision": training.precision}
    record |= {"work": work | {"prompts": training.prompts_per_step}, "rows": rows}
    write_record(args.out, record)
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
