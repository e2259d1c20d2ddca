"""Kills a run again and again, at random moments and in the middle of its writes, and compares what it ends with.

    python benchmarks/kills.py --kills 60

Each run is `stepfold distill` on a tiny Sana pipeline, killed with SIGKILL and resumed until it ends; then its weights,
its student and its metrics must be those of a run that was left alone, bit for bit. `stepfold prompts encode` likewise.
Processes are forked from one that has imported everything, so that a kill costs seconds; what starting a new process
costs is measured apart, as are SIGTERM and its exit code.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny import PROMPTS, make_sana  # noqa: E402

import stepfold.evaluation.preview  # noqa: E402 # what a run imports, here, so that no fork has to
import stepfold.export.single_file  # noqa: E402
import stepfold.prompts.conditions  # noqa: E402
import stepfold.training.latents  # noqa: E402
import stepfold.training.steepness  # noqa: E402, F401
from stepfold import cli  # noqa: E402
from stepfold.training.runs import checkpoints, read_metrics  # noqa: E402

STEPS = 12
SETTINGS = (
    f"training.steps={STEPS}", "training.checkpoint_every=3", "training.preview_every=12",
    "training.prompts_per_step=2",
    "training.precision=no", "training.walk_precision=no", "space.route_steps=4", "space.filter_rule=off",
    "teacher.max_tokens=32", "evaluation.n=0", "optimiser.lr=1e-3", "optimiser.name=adamw", "consistency.r_warmup=10",
)  # fmt: skip


class Place:
    """A folder with a teacher and prompts, and the commands that run on them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.teacher, self.prompts = folder, folder / "teacher", folder / "prompts.txt"
        make_sana().save_pretrained(self.teacher, safe_serialization=True)
        self.prompts.write_text("\n".join(PROMPTS[:6]) + "\n")

    def distill(self, out: Path) -> list[str]:
        changes = [part for setting in SETTINGS for part in ("--set", setting)]
        paths = ["--teacher", str(self.teacher), "--prompts", str(self.prompts), "--out", str(out)]
        return ["distill", "--preset", "default", *paths, *changes, *(["--resume"] if out.exists() else []), "--quiet"]

    def encode(self, out: Path) -> list[str]:
        return [
            "prompts", "encode", str(self.prompts), "--teacher", str(self.teacher), "--max-tokens", "32",
            "--batch", "1", "--out", str(out), "--quiet",
        ]  # fmt: skip


def start(command: list[str], log: Path) -> int:
    """Runs `stepfold COMMAND` in a fork of this process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["stepfold", *command]
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(code)


def ended(pid: int) -> int | None:
    """The exit code (negative: the signal) of a process, or None if it goes on."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def wait_until(pid: int, moment: Callable[[], bool]) -> int | None:
    """Waits for a moment; an exit code if the process ended before."""
    while (code := ended(pid)) is None and not moment():
        time.sleep(0.0005)
    return code


def half_written(folder: Path) -> list[Path]:
    """What a kill left of a write."""
    return [
        Path(at) / name
        for at, folders, files in os.walk(folder)
        for name in (*folders, *files)
        if name.endswith(".part")
    ]


def moments(out: Path, seconds: float, rng: random.Random) -> dict[str, Callable[[], Callable[[], bool]]]:
    """Name -> a function that starts to wait and says when the moment has come."""

    def anywhere() -> Callable[[], bool]:
        until = time.monotonic() + rng.random() * seconds
        return lambda: time.monotonic() > until

    def in_checkpoint() -> Callable[[], bool]:
        late = rng.random() * 0.01  # the write of a tiny checkpoint takes some milliseconds

        def moment() -> bool:
            if not list((out / "checkpoints").glob(".*.part")):
                return False
            time.sleep(late)
            return True

        return moment

    def in_report() -> Callable[[], bool]:
        late = rng.random() * 0.3

        def moment() -> bool:
            rows = (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0
            if rows < STEPS or not (out / "checkpoints" / f"{STEPS:06d}").exists():
                return False
            time.sleep(late)
            return True

        return moment

    def in_student_or_report() -> Callable[[], bool]:
        late, names = rng.random() * 0.01, rng.choice([".student.part", ".report.*.part"])

        def moment() -> bool:
            if not list(out.glob(names)):
                return False
            time.sleep(late)
            return True

        return moment

    return {
        "anywhere": anywhere,
        "checkpoint": in_checkpoint,
        "after the last step": in_report,
        "student or report": in_student_or_report,
    }


def contents(folder: Path) -> dict[str, bytes | dict[str, torch.Tensor]]:
    """What must be equal: metrics, weights and the student, but for the notes of names and times."""
    files = [folder / "metrics.jsonl", *sorted((folder / "checkpoints").rglob("*.safetensors"))]
    students = (folder / "student").rglob("*.safetensors")
    files += [*sorted(students), *sorted(shards(folder)), folder / "extras.safetensors"]
    found: dict[str, bytes | dict[str, torch.Tensor]] = {}
    found["previews"] = " ".join(sorted(path.name for path in (folder / "previews").glob("*"))).encode()
    for file in files:
        if file.exists():
            found[str(file.relative_to(folder))] = (
                load_file(file) if file.suffix == ".safetensors" else file.read_bytes()
            )
    return found


def equal(a: Path, b: Path) -> list[str]:
    """The names of files that differ."""
    x, y = contents(a), contents(b)
    differing = sorted(x.keys() ^ y.keys())
    for name in x.keys() & y.keys():
        p, q = x[name], y[name]
        same = (
            p.keys() == q.keys() and all(torch.equal(p[key], q[key]) for key in p)
            if isinstance(p, dict) and isinstance(q, dict)
            else p == q
        )  # fmt: skip
        differing += [] if same else [name]
    return differing


def kill_distill(place: Place, kills: int, rng: random.Random) -> dict[str, object]:
    """Runs that are killed until there were that many kills; all end, and equal the one that was left alone."""
    straight, whole_sec = place.folder / "straight", 0.0
    for out in (straight, place.folder / "again"):  # the second one tells how long a run takes
        began = time.monotonic()
        assert wait_until(start(place.distill(out), place.folder / "straight.log"), lambda: False) == 0
        whole_sec = time.monotonic() - began
    assert not equal(straight, place.folder / "again")
    done, by_moment, in_write, lost = 0, Counter[str](), Counter[str](), []
    runs, differing = 0, []
    while done < kills:
        out = place.folder / f"run{runs}"
        runs += 1
        while True:
            pid = start(place.distill(out), place.folder / f"run{runs}.log")
            choices = moments(out, whole_sec, rng)
            name = rng.choice(sorted(choices)) if done < kills else ""
            moment = choices[name]() if name else lambda: False
            code = wait_until(pid, moment)
            if code is not None:
                assert code == 0, (code, (place.folder / f"run{runs}.log").read_text()[-2000:])
                break
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            done += 1
            by_moment[name] += 1
            saved_steps = int(steps[-1].name) if (steps := checkpoints(out)) else 0
            lost.append(len(read_metrics(out)) - saved_steps)
            for path in half_written(out):
                in_write[path.parent.name if path.parent.name == "checkpoints" else path.name] += 1
        differing += [f"run{runs - 1}/{name}" for name in equal(straight, out)]
        differing += [f"{path} is left over" for path in half_written(out)]
        sys.stderr.write(f"{done} kills, {runs} runs, {len(differing)} differences\n")
    return {
        "kills": done, "runs": runs, "at": dict(by_moment), "in the middle of a write": dict(in_write),
        "differences": differing, "steps lost": summary(lost), "checkpoint every": 3,
        "whole run, sec": round(whole_sec, 2),
    }  # fmt: skip


def shards(folder: Path) -> list[Path]:
    """The whole shards of encoded prompts."""
    return list(folder.glob("conditions_*"))


def kill_encode(place: Place, kills: int, rng: random.Random) -> dict[str, object]:
    """`stepfold prompts encode`, killed at random moments and started again until it ends."""
    from stepfold.prompts import cache

    cache.SHARD = 1  # six shards
    straight = place.folder / "encoded"
    began = time.monotonic()
    assert wait_until(start(place.encode(straight), place.folder / "encoded.log"), lambda: False) == 0
    whole_sec, done, runs, differing, in_write = time.monotonic() - began, 0, 0, [], 0
    while done < kills:
        out = place.folder / f"encoded{runs}"
        runs += 1
        while True:
            pid = start(place.encode(out), place.folder / f"encoded{runs}.log")
            until = time.monotonic() + (rng.random() * whole_sec if done < kills else 1e9)
            event = rng.choice([None, half_written, shards])  # at any moment, in a write, when one more shard is whole
            there = len(shards(out))

            def moment(until: float = until, event: Any = event, there: int = there, out: Path = out) -> bool:
                if event is None:
                    return time.monotonic() > until
                return len(event(out)) > (there if event is shards else 0)

            code = wait_until(pid, moment if done < kills else lambda: False)
            if code is not None:
                assert code == 0, (place.folder / f"encoded{runs}.log").read_text()[-2000:]
                break
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            done, in_write = done + 1, in_write + bool(half_written(out))
        differing += [f"encoded{runs - 1}/{name}" for name in equal(straight, out)]
    return {"kills": done, "runs": runs, "in the middle of a write": in_write, "differences": differing}


def terminate(place: Place, times: int, rng: random.Random) -> dict[str, object]:
    """SIGTERM in the middle of the steps: how long until it has saved and ended, and with what code."""
    codes, seconds, kept = Counter[str](), [], []
    for number in range(times):
        out = place.folder / f"term{number}"
        pid = start(place.distill(out), place.folder / f"term{number}.log")
        after = rng.randrange(1, STEPS - 2)
        code = wait_until(pid, lambda out=out, after=after: len(read_metrics(out)) >= after)
        assert code is None, "it was too quick"
        began = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        _, status = os.waitpid(pid, 0)
        seconds.append(time.monotonic() - began)
        codes[str(os.waitstatus_to_exitcode(status))] += 1
        kept.append(len(read_metrics(out)) - int(checkpoints(out)[-1].name))
    return {"times": times, "exit codes": dict(codes), "sec": summary(seconds), "steps lost": summary(kept)}


def new_process(place: Place, times: int) -> dict[str, object]:
    """From the command line to the first new step of a resumed run, imports and all."""
    seconds = []
    for number in range(times):
        out = place.folder / f"new{number}"
        pid = start(place.distill(out), place.folder / f"new{number}.log")
        wait_until(pid, lambda out=out: len(read_metrics(out)) >= 5)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        saved = int(checkpoints(out)[-1].name)
        began = time.monotonic()
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        process = subprocess.Popen(
            [sys.executable, "-m", "stepfold", *place.distill(out)], env=environment, stdout=subprocess.DEVNULL
        )
        rewound = False
        while process.poll() is None:
            rows = len(read_metrics(out))
            rewound = rewound or rows == saved
            if rewound and rows > saved:
                break
            time.sleep(0.005)
        seconds.append(time.monotonic() - began)
        assert process.wait() == 0
    return {"times": times, "sec": summary(seconds)}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    if not values:
        return {}
    return {"median": round(statistics.median(values), 2), "min": round(min(values), 2), "max": round(max(values), 2)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60, help="of distill; half as many of encode")
    parser.add_argument("--only", nargs="*", choices=["distill", "SIGTERM", "new process", "encode"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="json file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name))
        kinds: dict[str, Callable[[], dict[str, object]]] = {
            "distill": lambda: kill_distill(place, options.kills, rng),
            "SIGTERM": lambda: terminate(place, max(1, options.kills // 5), rng),
            "new process": lambda: new_process(place, max(1, options.kills // 20)),
            "encode": lambda: kill_encode(place, max(1, options.kills // 2), rng),
        }
        result = {kind: kinds[kind]() for kind in options.only or kinds}
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    differing = [name for kind in result.values() for name in kind.get("differences", [])]  # type: ignore[attr-defined]
    if differing:
        sys.exit(f"{len(differing)} files differ from those of the runs that were left alone")


if __name__ == "__main__":
    main()
