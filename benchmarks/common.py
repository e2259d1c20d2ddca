"""What the benchmarks share: who measured, turns with medians, and peak memory in a process of its own."""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from stepfold.display import quiet_libraries
from stepfold.evaluation.report import versions
from stepfold.training.memory import peak_memory_gib, reset_peak_memory
from stepfold.training.stages import Stages

RESULTS = Path(__file__).parent / "results"
PRELOADED = [
    "stepfold.evaluation.pipelines",
    "stepfold.evaluation.report",
    "stepfold.export.onnx",
    "stepfold.export.single_file",
    "stepfold.prompts.conditions",
    "stepfold.teachers.licences",
    "stepfold.training.latents",
    "stepfold.training.steepness",
    "transformers.models.gemma2.modeling_gemma2",
]
WARM_UP = 2

console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def make_parser(description: str | None, name: str, device: bool) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have; `device` where there is a choice."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if device:
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (cpu)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"{name}.json", help=f"json file (benchmarks/results/{name}.json)"
    )
    return parser


def training_device() -> torch.device:
    """Where `stepfold distill` would train; CUDA_VISIBLE_DEVICES= hides a GPU from it."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on, and how busy it was."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)):
        cpu = found[1]
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "load_average": round(os.getloadavg()[0], 2),
    }


def open_record(name: str, argv: Sequence[str], device: torch.device) -> dict[str, Any]:
    """The part of a result that says how it came about; made before anything is timed."""
    quiet_libraries()
    return {
        "benchmark": name,
        "command": shlex.join(["python", f"benchmarks/{name}.py", *argv]),
        "machine": machine(device),
        "versions": versions(),
    }


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Writes a result and says where."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"written to {out}", soft_wrap=True)


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table: the first column is text, the others are numbers."""
    console.print(title)
    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


Run = Callable[[int, Stages], None]
"""(number of the turn, where the stages' seconds go): what is timed."""


@dataclass
class Timing:
    """Seconds of one run, turn by turn: whole, and by stage."""

    seconds: list[float] = field(default_factory=list)
    stages: list[dict[str, float]] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Of the whole."""
        return statistics.median(self.seconds)

    def by_stage(self) -> dict[str, float]:
        """Medians."""
        names = dict.fromkeys(name for stages in self.stages for name in stages)
        return {name: statistics.median(stages.get(name, 0.0) for stages in self.stages) for name in names}

    def ratio(self, other: "Timing") -> dict[str, float]:
        """This one's time over the other's in the same turn: median, lowest and highest."""
        ratios = [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]
        return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def take_turns(runs: dict[str, Run], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Times runs A B A B ..., so that a busy moment of the machine meets all of them; the first turns do not count.

    On a GPU the stages are timed in turns of their own, which wait after every stage; the whole is not.
    """
    timings = {name: Timing() for name in runs}
    for turn in range(WARM_UP + rounds):
        for name, run in runs.items():
            seconds, stages = timed(run, turn, device, Stages())
            if turn >= WARM_UP:
                timings[name].seconds.append(seconds)
                timings[name].stages.append(stages)
    if device.type != "cpu":
        for name, run in runs.items():
            timings[name].stages = [timed(run, turn, device, Stages(device))[1] for turn in range(min(3, rounds))]
    return timings


def timed(run: Run, turn: int, device: torch.device, stages: Stages) -> tuple[float, dict[str, float]]:
    """Seconds of one turn: whole, and by stage."""
    wait(device)
    began = time.perf_counter()
    run(turn, stages)
    wait(device)
    return time.perf_counter() - began, dict(stages.seconds)


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def in_child(task: Callable[..., Any], *args: Any) -> Any:
    """What `task` returns in a process of its own. It starts with the libraries loaded and nothing else."""
    if torch.cuda.is_available():  # the libraries touch it as they load, and it survives no fork
        context = multiprocessing.get_context("spawn")
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(task, *args).result()


class PeakMemory:
    """Peak GiB of a part of this process, to be used in a child: made before models and data are loaded.

    `above` is the peak less what the process held then: on a CPU that is python and its libraries, on a GPU nothing.
    Loading itself does not count where the system can restart its own count (Linux, CUDA).
    """

    def __init__(self, device: torch.device) -> None:
        quiet_libraries()
        self.device = device
        reset_peak_memory(device)
        self.before = peak_memory_gib(device)

    def start(self) -> None:
        """Counts from here, once everything is loaded."""
        gc.collect()
        reset_peak_memory(self.device)

    def read(self) -> dict[str, float]:
        """The peak since `start`."""
        wait(self.device)
        peak = peak_memory_gib(self.device)
        return {"peak_gib": peak, "before_gib": self.before, "above_gib": peak - self.before}
