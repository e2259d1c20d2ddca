"""A run from the command line: stopped and continued, in one process or several."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer


def typed() -> str:
    """The command of this process, as it can be typed again."""
    return "stepfold " + shlex.join(sys.argv[1:])


@contextmanager
def continued_by(folder: Path, resume: bool, note: Callable[[str], None]) -> Iterator[str]:
    """Around a run; yields its command. If it is stopped, says what continues it, and exits with 130."""
    command = typed()
    try:
        yield command
    except KeyboardInterrupt:
        note(f"{stopped(folder)} Continue with: {command}{'' if resume else ' --resume'}")
        raise typer.Exit(130) from None


def stopped(folder: Path) -> str:
    """What a run that was stopped is left with."""
    from stepfold.training.runs import read_metrics, saved_step

    done = max((int(row["step"]) + 1 for row in read_metrics(folder) if "step" in row), default=0)
    if saved_step(folder) >= done > 0:
        return "stopped; the state is saved."
    saved = saved_step(folder)
    return f"stopped; it goes on from step {saved}, the last checkpoint." if saved else "stopped before a checkpoint."


def other_process() -> int:
    """This process's number among those of a launcher, as torchrun and accelerate say it; 0 is the one that shows."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def leave() -> None:
    """Ends one of several processes that has done all its work, without the interpreter's own end.

    In that, threads of torch's collectives aborted 2 of about 20 finished runs (torch 2.13, gloo, sharded weights), and
    the launcher took the run for a failed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
