"""Minutes until a one-step student of the bundled teacher is good enough: presets beside the plain practice of peers.

A preset's run is trained whole and resumably, and its checkpoints are measured in order until one has both FD and
accuracy; a peer's loop (practice.py) stops there. Only training counts: neither loading nor measuring, nor making the
clean latents that peers learn from. Minutes are the clock's and, since a busy machine stretches those, the processor's.

A row that is done stays in the json file; the same command goes on where it was. A row of other settings is refused.

    python benchmarks/time_to_quality.py --presets demo,lcm,tbcm --peers lcm,sana-sprint,dmd2 --work build/quality \\
      --out build/quality.json
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import make_parser, open_record, show, write_record
from practice import PEERS, Clean, Sprint
from safetensors.torch import load_file
from torch import Tensor

from stepfold import assets
from stepfold.config import Config, load_config
from stepfold.display import Display
from stepfold.evaluation.judge import Judge, load_judge
from stepfold.evaluation.measure import encode_distinct, evaluation_noise, measure, student_sampler
from stepfold.evaluation.protocol import EMOJI, Protocol
from stepfold.jobs.distilling import run_distill
from stepfold.prompts.reading import open_prompts, shuffled_index
from stepfold.sampling.recipe import Recipe, make_recipe
from stepfold.sampling.teacher import sample_teacher
from stepfold.students.starting import make_student
from stepfold.teachers.contract import Condition, Student
from stepfold.teachers.loading import load_teacher
from stepfold.training.runs import checkpoints
from stepfold.training.stages import spent_sec

GUIDANCE, TEACHER_STEPS, BATCH = 3.0, 20, 50
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """What all rows have in common.

    Attributes:
        teacher: the bundled one.
        judge: scores the pictures.
        protocol: prompts and noise of a check.
        fd, accuracy: that a student must have at one step, in the same check.
        every: steps between checks.
        seed: of the runs.
    """

    teacher: Any
    judge: Judge
    protocol: Protocol
    fd: float
    accuracy: float
    every: int
    seed: int

    def check(self, student: Student, recipe: Recipe) -> dict[str, float]:
        """FD and accuracy at one step."""
        samplers = {"student 1": student_sampler(student, recipe, 1, self.protocol.seed)}
        (scores,) = measure(self.judge, self.protocol, self.teacher, samplers, CPU).values()
        return {"fd": scores.fd, "accuracy": scores.accuracy}

    def passes(self, check: dict[str, float]) -> bool:
        """Whether a check has the quality."""
        return check["fd"] <= self.fd and check["accuracy"] >= self.accuracy


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the rows that have no result yet, one after the other, and prints all."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = parse(given)
    record = open_record("time_to_quality", given, CPU)
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else {}
    todo = [(f"preset {name}", name) for name in options.presets] + [(f"peer {name}", name) for name in options.peers]
    for row, _ in todo:
        if row in rows and rows[row]["settings"] != (asked := settings_of(row, options)):
            others = ", ".join(f"{key}={value}" for key, value in rows[row]["settings"].items() if asked[key] != value)
            sys.exit(f"error: {options.out} has {row!r} with {others}; give another --out")
    teacher = load_teacher(load_config("demo").teacher, CPU)
    judge = load_judge(assets.JUDGE, CPU)
    protocol = Protocol(**vars(EMOJI) | {"n": options.n, "guidance": GUIDANCE})
    setting = Setting(teacher, judge, protocol, options.fd, options.accuracy / 100, options.every, options.seed)
    for row, name in todo:
        if row in rows:
            continue
        if row.startswith("preset"):
            precision = [f"training.{part}precision={options.precision}" for part in ("", "walk_")]
            rows[row] = of_preset(name, setting, options.work / name, [*precision, *options.set])
        else:
            rows[row] = of_peer(name, setting, options)
        rows[row]["settings"] = settings_of(row, options)
        write_record(options.out, record | {"rows": rows})
    show("minutes to the quality", HEADS, [words(row, result) for row, result in rows.items()])


def settings_of(row: str, options: argparse.Namespace) -> dict[str, Any]:
    """The options that a row's result depends on."""
    names = ["fd", "accuracy", "n", "every", "seed", "precision"]
    names += ["set"] if row.startswith("preset") else ["minutes", "batch", "lr", "steps", "stock"]
    return {name: getattr(options, name) for name in names}


HEADS = ["row", "minutes", "processor minutes", "steps", "FD", "accuracy, %"]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__, "time_to_quality", device=False)
    names: Any = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    parser.add_argument("--presets", type=names, default=["demo"], help="of stepfold, for the bundled teacher (demo)")
    parser.add_argument("--peers", type=names, default=list(PEERS), help=f"loops of peers ({','.join(PEERS)})")
    parser.add_argument("--fd", type=float, default=0.02, help="FD at one step, at most (0.02)")
    parser.add_argument("--accuracy", type=float, default=85.0, help="accuracy at one step in per cent, at least (85)")
    parser.add_argument("--n", type=int, default=500, help="images of a check; FD depends on it (500)")
    parser.add_argument("--every", type=int, default=100, help="steps between checks (100)")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="processor minutes after which a peer gives up (60)"
    )
    parser.add_argument("--batch", type=int, default=72, help="images of a peer's step (72, the demo's pairs)")
    parser.add_argument("--lr", type=float, default=4e-4, help="learning rate of peers (4e-4, the demo's)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of a peer in which r warms up by a fifth (1000)")
    parser.add_argument("--stock", type=int, default=3000, help="clean latents that peers learn from (3000)")
    parser.add_argument("--seed", type=int, default=0, help="of all runs (0)")
    parser.add_argument(
        "--precision",
        choices=("no", "bf16"),
        default="no",
        help="of all rows: float32, or bf16, autocast with peers (no)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the presets' runs"
    )
    parser.add_argument("--work", type=Path, default=Path("build/time_to_quality"), help="run folders")
    options = parser.parse_args(argv)
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"no peer {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    return options


def of_preset(name: str, setting: Setting, folder: Path, changes: Sequence[str]) -> dict[str, Any]:
    """Trains a preset, or goes on, and measures its checkpoints until one has the quality."""
    every = [f"training.checkpoint_every={setting.every}", "training.keep_checkpoints=1000000", "evaluation.n=0"]
    config = load_config(name, [f"seed={setting.seed}", *every, *changes])
    result = run_distill(
        config,
        folder,
        resume=(folder / "config.yaml").exists(),
        display=Display(quiet=False),
        command="time_to_quality",
    )
    student = make_student(setting.teacher, config.student, config.teacher)
    recipe = recipe_of(config, setting.teacher)
    checks = []
    for checkpoint in checkpoints(folder):
        student.load_state_dict(load_file(checkpoint / "average.safetensors"), strict=False)
        steps = json.loads((checkpoint / "state.json").read_text())["step"]
        spent = {"sec": steps * result["step_sec"]["mean"], "spent_sec": steps * result["step_cost"]["spent_sec"]}
        checks.append({"steps": steps} | spent | setting.check(student, recipe))
        if setting.passes(checks[-1]):
            break
    return outcome(checks, setting)


def recipe_of(config: Config, teacher: Any) -> Recipe:
    """How a student of these settings is sampled."""
    scales = config.space.guidance or (teacher.default_guidance,)
    return make_recipe(config, teacher, scales, scales[0])


def of_peer(name: str, setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Trains a peer until a check has the quality, or its minutes are over."""
    config, teacher = load_config("demo", [f"seed={setting.seed}"]), setting.teacher
    torch.manual_seed(setting.seed)
    student = make_student(teacher, config.student, config.teacher)
    more = {"steps": options.steps} if PEERS[name] is Sprint else {}
    peer, recipe = PEERS[name](teacher, student, options.lr, **more), recipe_of(config, teacher)
    stock = clean_latents(teacher, options.stock, setting.seed, options.work)
    checks: list[dict[str, Any]] = []
    sec = spent = 0.0
    for step, batch in enumerate(batches(*stock, options.batch, setting.seed), 1):
        began, before = time.perf_counter(), spent_sec(CPU)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            peer.update(batch)
        sec, spent = sec + time.perf_counter() - began, spent + spent_sec(CPU) - before
        over = spent >= 60 * options.minutes
        if step % setting.every and not over:
            continue
        checks.append({"steps": step, "sec": sec, "spent_sec": spent} | setting.check(peer.average, recipe))
        print(f"{name}: {checks[-1]}", flush=True)
        if over or setting.passes(checks[-1]):
            break
    return outcome(checks, setting)


def clean_latents(teacher: Any, count: int, seed: int, work: Path) -> tuple[Tensor, Condition]:
    """The teacher's own clean latents of the bundled prompts, kept in `work`, and their conditions."""
    from safetensors.torch import save_file

    prompts = open_prompts(assets.PROMPTS)
    texts = [prompts.prompt(shuffled_index(i, len(prompts), seed)) for i in range(count)]
    condition, kept = encode_distinct(teacher, texts), work / f"clean_{count}_{seed}.safetensors"
    if not kept.exists():
        parts = []
        for start in range(0, count, BATCH):
            numbers = range(start, min(start + BATCH, count))
            noise = evaluation_noise(seed + 1, numbers, teacher, CPU)
            scales = torch.full((len(numbers),), GUIDANCE)
            part = condition.rows(slice(numbers.start, numbers.stop)).trimmed()
            parts.append(sample_teacher(teacher, noise, part, scales, TEACHER_STEPS, even=True))
        work.mkdir(parents=True, exist_ok=True)
        save_file({"x0": torch.cat(parts)}, kept)
    return load_file(kept)["x0"], condition


def batches(x0: Tensor, condition: Condition, size: int, seed: int) -> Iterator[Clean]:
    """Batches of the stock without end, each with its own random numbers."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(x0), (size,), generator=generator)
        yield Clean(x0[rows], condition.rows(rows).trimmed(), torch.full((size,), GUIDANCE), generator)


def outcome(checks: list[dict[str, Any]], setting: Setting) -> dict[str, Any]:
    """A row's result: its checks, and the one that has the quality, None where none has."""
    return {"reached": checks[-1] if checks and setting.passes(checks[-1]) else None, "checks": checks}


def words(row: str, result: dict[str, Any]) -> list[str]:
    """A line of the table; of a row that did not get there its last check, in brackets."""
    if not result["checks"]:
        return [row, *["-"] * 5]
    last = result["checks"][-1]
    cells = [
        f"{last['sec'] / 60:.1f}", f"{last['spent_sec'] / 60:.1f}", str(last["steps"]), f"{last['fd']:.4f}",
        f"{100 * last['accuracy']:.1f}",
    ]  # fmt: skip
    return [row, *(cells if result["reached"] else [f"({cell})" for cell in cells])]


if __name__ == "__main__":
    main()
