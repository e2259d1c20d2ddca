"""Processes that fork from one which has imported what a run imports: a new interpreter takes 10 s for that.

For tests of what processes do, not of how they are launched. The server that forks is multiprocessing's; it ends with
the tests.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

IMPORTED = (
    "forked", "diffusers.guiders", "matplotlib.backends.backend_svg", "matplotlib.figure", "onnxruntime",
    "stepfold.cli", "stepfold.evaluation.measure", "stepfold.evaluation.preview", "stepfold.evaluation.report",
    "stepfold.export.pipeline", "stepfold.export.single_file", "stepfold.prompts.conditions",
    "stepfold.students.starting", "stepfold.training.critics", "stepfold.training.distill", "stepfold.training.latents",
    "stepfold.training.opening", "stepfold.training.steepness", "stepfold.training.tracking",
    "torch.utils.tensorboard",
)  # fmt: skip
"""What a run imports, much of it only when it is needed; a name that is not there is left out."""
OURS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
GRACE_SEC = 20.0  # for the other processes of a run once one has failed


@cache
def server() -> Any:
    """A context of multiprocessing whose processes fork from one that has imported everything, in one thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OURS.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def short_ends(patch: pytest.MonkeyPatch) -> None:
    """Lets runs end in previews of two pictures, the teacher's in two steps, and one curve."""
    from stepfold.evaluation import latents, preview
    from stepfold.jobs import finishing

    of_teacher, report_of = preview.teacher_sampler, finishing.report_of

    def with_one_curve(*args: Any) -> dict[str, Any]:
        report = report_of(*args)
        return report | {"curves": dict(list(report["curves"].items())[:1])}

    patch.setattr(preview, "NUM_PREVIEWS", 2)
    patch.setattr(latents, "NUM_PROMPTS", 2)
    patch.setattr(preview, "teacher_sampler", lambda teacher, steps: of_teacher(teacher, min(steps, 2)))
    patch.setattr(finishing, "report_of", with_one_curve)


class Forked:
    """The processes of one run, with one thread each and the variables that torchrun gives them."""

    def __init__(self, arguments: Sequence[str], log: Path, *, count: int = 1, program: Sequence[str] = ()) -> None:
        """`program`: a file and its first arguments; `stepfold` by default. All write their stderr into `log`."""
        self.log = log
        log.write_text("")
        launches: list[dict[str, str]] = [{}]
        if count > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            place |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            launches = [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        self.processes = [
            server().Process(target=_run, args=(arguments, log, program, os.environ | OURS | launch), daemon=True)
            for launch in launches
        ]
        for process in self.processes:
            process.start()

    def running(self) -> list[int]:
        """The numbers of those that go on."""
        return [number for number, process in enumerate(self.processes) if process.exitcode is None]

    def send_signal(self, number: signal.Signals) -> None:
        """To all of them."""
        for process in self.processes:
            assert process.pid is not None
            os.kill(process.pid, number)

    def finish(self, seconds: float = 150) -> tuple[int, str]:
        """Exit code (negative: a signal) and what was written to stderr; the code of one that failed, if any did.

        Those that go on after `seconds`, or GRACE_SEC after another one failed, are killed.
        """
        until = time.monotonic() + seconds
        while (going := self.running()) and (left := until - time.monotonic()) > 0:
            wait([self.processes[number].sentinel for number in going], left)
            if any(process.exitcode for process in self.processes):
                until = min(until, time.monotonic() + GRACE_SEC)
        failed = [process.exitcode for process in self.processes if process.exitcode]
        for process in self.processes:
            process.kill()
            process.join()
        words = self.log.read_text() + (f"processes {going} went on and were killed\n" if going else "")
        return (failed[0] if failed else -signal.SIGKILL if going else 0), words


def _run(arguments: Sequence[str], log: Path, program: Sequence[str], environment: dict[str, str]) -> None:
    """In the fork."""
    from stepfold.cli import main

    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in ((1, Path(os.devnull)), (2, log)):
        with path.open("a") as file:
            os.dup2(file.fileno(), descriptor)
    short_ends(pytest.MonkeyPatch())
    if program:
        sys.argv = [*program, *arguments]
        runpy.run_path(program[0], run_name="__main__")
    else:
        sys.argv = ["stepfold", *arguments]
        main()
