"""Runs that the page plans, starts, stops and resumes: `stepfold` in processes of its own.

A browser chooses from lists that the command line made, and names a folder directly in that of the runs.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepfold.config import load_config, preset_names
from stepfold.errors import UserError
from stepfold.training.opening import check_run, is_running
from stepfold.training.runs import CONFIG, make_folder
from stepfold.web.runs import find_runs, read_run

LOOPBACK = ("127.0.0.1", "localhost", "::1")
STEPFOLD = (sys.executable, "-P", "-m", "stepfold")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
TEXTS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".gz")
"""Endings of prompts files; one that is not there is no hub id."""
NUMBER = re.compile(r"-?\d{1,12}(\.\d{1,12})?(e-?\d{1,2})?", re.ASCII)
LOGS = ".logs"
"""Folder in that of the runs, in which each process's own words are kept; no run's name begins with a dot."""
LAST_BYTES = 2**14
STOPPED = (0, 130, -signal.SIGTERM)
"""How a process ends that was done, was stopped after a step, or was stopped before its first one."""
BUNDLED = ""
"""Stands for the bundled teacher's own prompts."""


@dataclass(frozen=True)
class Wishes:
    """A run that somebody wants: names and choices that were looked up, and numbers in the words of settings."""

    name: str
    teacher: str
    prompts: str
    preset: str
    changes: tuple[str, ...]

    def options(self) -> list[str]:
        """The run as options of `stepfold distill` and `stepfold plan`."""
        prompts = ["--prompts", self.prompts] if self.prompts else []
        changes = [part for change in self.changes for part in ("--set", change)]
        return ["--preset", self.preset, "--teacher", self.teacher, *prompts, *changes]


@dataclass
class Training:
    """What the page may start, and what it has started.

    Attributes:
        root: the folder of the runs.
        teachers: sources that a run may have.
        prompts: files that a run may have, BUNDLED among them.
        program: the words before a command's.
        planned: what has been planned, and so may be started.
        processes: a run's name -> its process.
    """

    root: Path
    teachers: tuple[str, ...]
    prompts: tuple[str, ...]
    program: tuple[str, ...] = STEPFOLD
    planned: set[Wishes] = field(default_factory=set)
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)


def check_host(host: str) -> None:
    """Refuses an address that other machines reach.

    Raises:
        UserError: it is none of this machine's own.
    """
    if host not in LOOPBACK:
        raise UserError(
            f"--allow-training starts programs on this machine, so it is not for --host {host}; leave one of them out"
        )


def is_foreign(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a browser says that a request comes from a page of another origin; programs say nothing."""
    origin, host = headers.get(b"origin"), headers.get(b"host", b"")
    elsewhere = headers.get(b"sec-fetch-site", b"same-origin") not in (b"same-origin", b"none")
    return elsewhere or (origin is not None and origin.partition(b"://")[2] != host)


def offered(root: Path, offers: Sequence[str]) -> Training:
    """What the form offers: the bundled teacher and its prompts, and what the command line names.

    Raises:
        UserError: something is neither a pipeline folder, a hub id nor a prompts file.
    """
    teachers, prompts = ["emoji"], [BUNDLED]
    for offer in offers:
        path = Path(offer)
        if path.is_file():
            prompts.append(offer)
        elif path.is_dir() or (HUB_ID.fullmatch(offer) and path.suffix not in TEXTS):
            teachers.append(offer)
        else:
            raise UserError(f"--offer {offer} is not there; give a pipeline folder, a hub id or a prompts file")
    return Training(root, tuple(teachers), tuple(prompts))


def wishes_of(
    training: Training, name: Any, teacher: Any, prompts: Any, preset: Any, steps: Any, rank: Any, size: Any, rate: Any
) -> Wishes:
    """What a form says, checked by the settings' own validation.

    Args:
        training: what may be chosen.
        name: of a new run folder.
        teacher: one of `training.teachers`.
        prompts: one of `training.prompts`.
        preset: name of a preset that comes with stepfold.
        steps: of the optimiser, in digits; empty for the preset's, as all that follow.
        rank: of a LoRA student; 0 for all weights.
        size: of its images, in pixels.
        rate: learning rate.

    Raises:
        UserError: one of them is not allowed, or the settings do not go together.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError("the run has no name of letters, digits, - and _; give it one")
    for what, value, known in (
        ("teacher", teacher, training.teachers), ("prompts", prompts, training.prompts),
        ("preset", preset, preset_names()),
    ):  # fmt: skip
        if value not in known:
            raise UserError(f"{str(value)[:100]!r} is none of the {what} that this page offers; choose one of the list")
    numbers = {
        "training.steps": steps, "student.lora": rank, "teacher.height": size, "teacher.width": size,
        "optimiser.lr": rate,
    }  # fmt: skip
    changes = []
    for setting, value in numbers.items():
        if isinstance(value, str) and not value.strip():
            continue
        if not isinstance(value, str) or not NUMBER.fullmatch(value.strip()):
            raise UserError(f"{setting} is {str(value)[:100]!r}; give a number")
        number = float(value)
        changes.append(f"{setting}={int(number) if number.is_integer() else number!r}")
    config = load_config(preset, changes, teacher__source=teacher, prompts=prompts or None)
    check_run(training.root / name, config, resume=False)
    if (training.root / name).is_symlink():
        raise UserError(f"{name} is a link; choose another name")
    return Wishes(name, teacher, prompts, preset, tuple(changes))


def plan(training: Training, wishes: Wishes) -> str:
    """What `stepfold plan` says of a run, which may be started then.

    Raises:
        UserError: as the command says.
    """
    refuse_a_second(training)
    done = subprocess.run(  # noqa: S603 - no shell; the words are checked
        [*training.program, "plan", "--quiet", *wishes.options()], stdin=subprocess.DEVNULL, capture_output=True
    )
    if done.returncode:
        raise UserError(last_line(done.stderr) or f"stepfold plan ended with {done.returncode}")
    training.planned.add(wishes)
    return done.stdout.decode(errors="replace")


def start(training: Training, wishes: Wishes) -> None:
    """Starts a run in a process of its own, which goes on when the page ends.

    Raises:
        UserError: it has not been planned, or another one goes on.
    """
    if wishes not in training.planned:
        raise UserError("this run is not planned with these settings; plan it first")
    launch(training, wishes.name, ["distill", *wishes.options(), "--out", str(training.root / wishes.name)])


def resume(training: Training, name: Any) -> None:
    """Continues a run with its own settings.

    Raises:
        UserError: there is no such run, or it goes on, or another one does.
    """
    run = read_run(training.root, name)
    if run.state in ("running", "finished"):
        raise UserError(f"{run.name} is {run.progress}; there is nothing to resume")
    settings = str(run.folder / CONFIG)
    launch(training, run.name, ["distill", "--preset", settings, "--out", str(run.folder), "--resume"])


def launch(training: Training, name: str, words: Sequence[str]) -> None:
    """Runs a command beside the page; it writes into a log of its own.

    Raises:
        UserError: a run of the page goes on already, or the log cannot be written.
    """
    refuse_a_second(training)
    log = log_of(training, name)
    if log.parent.is_symlink() or log.is_symlink():
        raise UserError(f"{log} is a link; remove it")
    make_folder(log.parent)
    try:
        with log.open("wb") as file:
            training.processes[name] = subprocess.Popen(  # noqa: S603 - no shell; the words are checked
                [*training.program, *words], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
    except OSError as error:
        raise UserError(f"cannot start a run ({error.strerror}); is there room in {training.root}?") from None


def refuse_a_second(training: Training) -> None:
    """One run at a time.

    Raises:
        UserError: one goes on.
    """
    if going := goes_on(training):
        raise UserError(f"{going[0]} goes on; wait for it or stop it first")


def goes_on(training: Training) -> list[str]:
    """Names of the runs that the page started and that have not ended."""
    return [name for name, process in training.processes.items() if process.poll() is None]


def stop(training: Training, name: Any) -> None:
    """Asks a run to stop after its step; it leaves a checkpoint.

    Raises:
        UserError: this page did not start it, or it has ended.
    """
    if name not in goes_on(training):
        raise UserError(f"{str(name)[:100]!r} does not run, or not from this page; stop others where they were started")
    training.processes[name].send_signal(signal.SIGTERM)


def states(training: Training) -> list[tuple[str, str]]:
    """Name of each run that the page started -> what it does, in a few words."""
    found, there = [], find_runs(training.root)
    for name, process in training.processes.items():
        code = process.poll()
        if name in there and (code is None or code in STOPPED):
            run = read_run(training.root, name)
            said = "starting" if code is None and not is_running(run.folder) else run.progress
        else:
            said = "starting" if code is None else f"failed: {said_last(training, name) or f'exit code {code}'}"
        found.append((name, said))
    return found


def log_of(training: Training, name: str) -> Path:
    """The file that a run's process writes its words into."""
    return training.root / LOGS / f"{name.replace('/', '--')}.log"


def said_last(training: Training, name: str) -> str:
    """The last line that a run's process wrote."""
    try:
        with log_of(training, name).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_BYTES))
            return last_line(file.read())
    except OSError:
        return ""


def last_line(written: bytes) -> str:
    """The last line with anything in it, without `error: `."""
    lines = written.decode(errors="replace").split("\n")
    return next((line.strip().removeprefix("error: ")[:500] for line in reversed(lines) if line.strip()), "")
