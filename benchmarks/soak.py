"""Watches one long run: does its memory, its step time or the number of its open files grow?

    python benchmarks/soak.py --minutes 60

`stepfold distill` on the bundled teacher runs by itself and is stopped after so many minutes (SIGTERM: it saves).
Every few seconds its memory, open files, threads, steps and checkpoints are noted. What counts is the slope over the
run, its first part left out, beside its standard error: a slope within two of them is noise. Resident memory also holds
what the C library keeps for the next step; what the program itself holds is `handed_out`, by glibc's own count: the
least between two looks, since it breathes with every step.
"""

import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from common import make_parser, open_record, show, write_record
from scipy.stats import linregress

from stepfold.config import last_of_each
from stepfold.training.runs import METRICS, checkpoints

SETTINGS = (
    "training.steps=1000000", "training.checkpoint_every=50", "training.preview_every=100", "evaluation.n=0",
)  # fmt: skip
LEFT_OUT = 0.2  # of the run, at its beginning: caches fill
INSIDE = """
import ctypes, sys, threading, time

class Counts(ctypes.Structure):  # glibc's struct mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]

def note(path, window, count):
    while True:
        until, least = time.monotonic() + window, sys.maxsize
        while time.monotonic() < until:
            now = count()
            least = min(least, now.uordblks + now.hblkhd)
            time.sleep(0.05)
        with open(path, "w") as file:
            file.write(str(least))

path, window = sys.argv.pop(1), float(sys.argv.pop(1))
count = getattr(ctypes.CDLL(None), "mallinfo2", None)  # since glibc 2.33
if count:
    count.restype = Counts
    threading.Thread(target=note, args=(path, window, count), daemon=True).start()
from stepfold.cli import main
main()
"""
"""`stepfold`, in a process that notes into a file the least that malloc has handed out in so many seconds, in bytes."""


def look(process: psutil.Process, out: Path, handed_out: Path, began: float) -> dict[str, float]:
    """What the process holds now."""
    with process.oneshot():
        row: dict[str, float] = {
            "minute": (time.monotonic() - began) / 60,
            "memory_gib": process.memory_info().rss / 2**30,
            "files": process.num_fds(),
            "threads": process.num_threads(),
        }
    with suppress(OSError, ValueError):  # not yet, or just being written
        row["handed_out_gib"] = int(handed_out.read_text()) / 2**30
    metrics = out / METRICS
    steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    return row | {"steps": steps, "checkpoints": len(checkpoints(out)) if out.exists() else 0}


def watch(out: Path, minutes: float, every_sec: float, changes: Sequence[str]) -> tuple[list[dict[str, float]], int]:
    """Runs the distillation and looks at it; returns what was seen, and its exit code."""
    words = [word for change in last_of_each((*SETTINGS, *changes)) for word in ("--set", change)]
    handed_out = out.with_name("handed_out")
    command = [
        sys.executable, "-c", INSIDE, str(handed_out), str(every_sec),
        "distill", "--preset", "demo", *words, "--out", str(out), "--quiet",
    ]  # fmt: skip
    began, rows = time.monotonic(), []
    with subprocess.Popen(command) as running:
        process = psutil.Process(running.pid)
        while running.poll() is None and time.monotonic() - began < 60 * minutes:
            rows.append(look(process, out, handed_out, began))
            time.sleep(every_sec)
        running.send_signal(signal.SIGTERM)
        return rows, running.wait()


def step_times(rows: Sequence[dict[str, float]]) -> list[tuple[float, float]]:
    """(minute, seconds a step) between two looks."""
    return [
        (later["minute"], 60 * (later["minute"] - earlier["minute"]) / (later["steps"] - earlier["steps"]))
        for earlier, later in pairwise(rows)
        if later["steps"] > earlier["steps"]
    ]


def slope(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """How a number changes per hour, the standard error of that, and whether it is within noise (two of them)."""
    fit: Any = linregress([at for at, _ in points], [value for _, value in points])
    per_hour, error = 60 * float(fit.slope), 60 * float(fit.stderr) if fit.slope else 0.0  # of a constant it is 0/0
    mean = statistics.mean(value for _, value in points)
    within = abs(per_hour) <= 2 * error
    return {"mean": mean, "per_hour": per_hour, "error": error, "within_noise": within, "looks": len(points)}


def main(argv: list[str] | None = None) -> None:
    """Watches a run and says what grew."""
    given = sys.argv[1:] if argv is None else argv
    parser = make_parser(__doc__, "soak", device=False)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (60)")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two looks (10)")
    parser.add_argument("--set", action="append", default=[], help="a setting of the run, as for stepfold distill")
    options = parser.parse_args(given)
    record = open_record("soak", given, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        rows, code = watch(Path(folder) / "run", options.minutes, options.every, options.set)
    rows = [row for row in rows if row["steps"] and row["minute"] >= LEFT_OUT * options.minutes]
    slopes = {
        name: slope([(row["minute"], row[name]) for row in rows if name in row])
        for name in ("memory_gib", "handed_out_gib", "files", "threads")
        if sum(name in row for row in rows) > 2
    }
    slopes["step_sec"] = slope(step_times(rows))
    table = [
        [name, f"{s['mean']:.4g}", f"{s['per_hour']:+.3g}", f"{s['error']:.2g}", "yes" if s["within_noise"] else "NO"]
        for name, s in slopes.items()
    ]
    show(
        f"{rows[-1]['steps']} steps, exit code {code}, checkpoints kept {rows[-1]['checkpoints']}",
        ["", "mean", "change an hour", "its error", "within noise"], table,
    )  # fmt: skip
    most = max(row["checkpoints"] for row in rows)
    write_record(options.out, record | {"exit_code": code, "most_checkpoints": most, "slopes": slopes, "looks": rows})


if __name__ == "__main__":
    main()
