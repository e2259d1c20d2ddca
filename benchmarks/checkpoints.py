"""What a checkpoint costs: written while the training waits, or copied and written beside the next steps.

    python benchmarks/checkpoints.py                             the bundled teacher, two minutes or so
    python benchmarks/checkpoints.py --size sana-0.6b            on a GPU

It runs `stepfold distill`'s own loop, with a checkpoint after every step, with and without
training.background_checkpoints, and once with no checkpoint but the last. The three take turns.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from common import Run, make_parser, open_record, show, take_turns, training_device, write_record
from models import SIZES, Place, make_place, open_teacher

from stepfold.config import Config
from stepfold.students.whole import new_student
from stepfold.training.accelerators import make_accelerator
from stepfold.training.choices import choose_precision
from stepfold.training.distill import distill
from stepfold.training.opening import open_run
from stepfold.training.runs import checkpoints
from stepfold.training.stages import Stages

ROWS = {
    "the last one alone": ("training.checkpoint_every=100000",),
    "waited for": ("training.checkpoint_every=1", "training.background_checkpoints=false"),
    "in the background": ("training.checkpoint_every=1", "training.background_checkpoints=true"),
}


def some_steps(place: Place, config: Config, accelerator: Accelerator, sizes: list[int]) -> Run:
    """Trains for the steps of `config`; notes how large a checkpoint is."""

    def run(turn: int, stages: Stages) -> None:
        torch.manual_seed(0)
        teacher, cache, device = open_teacher(place, with_encoders=False), place.cache, accelerator.device
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            open_run(folder, config, resume=False)
            distill(
                config, folder, teacher, new_student(teacher), place.prompts, [cache.black.to(device)], accelerator,
                conditions=lambda index: cache.rows(index).to(device, teacher.dtype), stages=stages,
            )  # fmt: skip
            sizes.append(sum(file.stat().st_size for file in checkpoints(folder)[-1].iterdir()))

    return run


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measures, prints and writes."""
    parser = make_parser(__doc__, "checkpoints", device=False)
    add = parser.add_argument
    add("--size", choices=SIZES, default="emoji", help="emoji is the bundled teacher")
    add("--steps", type=int, default=11, help="steps a turn (11)")
    add("--rounds", type=int, default=5, help="turns (5)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting that differs from the demo's")
    args = parser.parse_args(argv)

    device = training_device()
    record, sizes = open_record("checkpoints", argv, device), list[int]()
    with tempfile.TemporaryDirectory() as folder:
        place = make_place(args.size, device.type, Path(folder))
        configs = {
            name: choose_precision(place.config("demo", [*args.set, f"training.steps={args.steps}", *changes]))
            for name, changes in ROWS.items()
        }
        accelerator = make_accelerator(next(iter(configs.values())).training.precision)
        runs = {name: some_steps(place, config, accelerator, sizes) for name, config in configs.items()}
        timings = take_turns(runs, args.rounds, device)

    alone = timings["the last one alone"]
    rows, lines = {}, []
    for name, timing in timings.items():
        times = 1 if timing is alone else args.steps
        waits = timing.by_stage().get("checkpoint", 0.0) / times
        more = (timing.median - alone.median) / (args.steps - 1)
        rows[name] = {"sec": timing.seconds, "sec_waited_for_each": waits, "sec_more_for_each": more}
        rows[name]["of_the_last_one_alone"] = timing.ratio(alone)
        lines.append([name, f"{timing.median:.2f}", f"{1e3 * more:.0f}", f"{1e3 * waits:.0f}"])
    title = f"{args.steps} steps, checkpoints of {sizes[-1] / 2**20:.0f} MiB"
    show(title, ["", "s in all", "ms more a checkpoint", "ms the loop waits for each"], lines)
    work = {"size": args.size, "steps": args.steps, "rounds": args.rounds, "checkpoint_bytes": sizes[-1]}
    record |= {"work": work, "rows": rows}
    write_record(args.out, record)
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
