"""Opens a run folder: one that is free, or a run's own, with the same settings and prompts as it began with."""

import json
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stepfold.config import Config, from_yaml, phases_of, setting_names, to_yaml
from stepfold.errors import UserError
from stepfold.training.optimisers import learning_rate
from stepfold.training.runs import (
    CONFIG,
    METRICS,
    checkpoints,
    clear_leftovers,
    damage,
    holds_files,
    make_folder,
    read_metrics,
    remove_old_checkpoints,
    saved_step,
    set_aside_damaged,
    writing,
)

LOCK = ".lock"
KEPT = ("blacks.safetensors", "latents.safetensors")
"""Files of `training/latents.py`, which depend on the settings."""
RESULTS = ("student", "student.safetensors", "teacher", "report.json")
"""What ends a run: of a distillation, of a network of one's own, of a re-timing; after its last checkpoint."""
LOCK_SEC = 1.0  # to wait for a run's lock: `is_running`, in another process, holds it for an instant


def refuse_ways_out(folder: Path) -> None:
    """Refuses a run folder in which something leads elsewhere, or is neither file nor folder.

    A run that goes on writes into what is there, and deletes its old checkpoints. The folder itself may be a link.

    Raises:
        UserError: naming the first of them.
    """
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root) / name
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise UserError(f"{path} is a link, which a run does not follow; put there what it points to")
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise UserError(f"{path} is neither a file nor a folder; delete it")
    for name in (CONFIG, METRICS, "prompts.json", "teacher.json", "images.json"):
        if (folder / name).is_dir():
            raise UserError(f"{folder / name} is a folder and should be a file; put the run's own back")


def check_run(folder: Path, config: Config, resume: bool) -> None:
    """Checks that the run folder is free, or this run's own.

    A run that took no step may go on with other settings: after "out of memory" at its first one it must.

    Raises:
        UserError: the folder is a file, holds another run or holds other files, or its run has ended and its
            checkpoints are gone.
    """
    config_file = folder / CONFIG
    if config_file.exists():
        refuse_ways_out(folder)
        if not resume:
            raise UserError(f"{folder} already holds a run; add --resume (resume=True), or choose another --out")
        refuse_finished(folder)
        there = from_yaml(config_file)
        if took_a_step(folder) and there != config and not can_be_longer(folder, there, config):
            longer = with_steps(there, config.training.steps) == config and config.training.steps > there.training.steps
            fix = "a run can be made longer only until its learning rate falls (optimiser.decay)" if longer else ""
            raise UserError(
                f"{folder} holds a run with other settings ({_difference(there, config)}); "
                f"{fix or 'resume with the same ones'} or choose another --out"
            )
    elif folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --out")
    elif folder.exists() and holds_files(folder):
        raise UserError(f"{folder} is not empty and holds no run; choose another --out")


def refuse_finished(folder: Path) -> None:
    """Refuses to go on with a run that has ended and has no checkpoint: it would be made again, over its results.

    Raises:
        UserError: it is one.
    """
    found = next((name for name in RESULTS if (folder / name).exists()), None)
    if found and not checkpoints(folder):
        raise UserError(
            f"{folder} holds a run that has ended and no whole checkpoint of it, so it would begin again over what it "
            f"made; keep {folder / found}, and choose another --out to train again"
        )


def took_a_step(folder: Path) -> bool:
    """Whether a run has anything that other settings would have made otherwise."""
    return bool(checkpoints(folder) or read_metrics(folder))


def with_steps(config: Config, steps: int) -> Config:
    """The settings with another number of steps."""
    return config.model_copy(update={"training": config.training.model_copy(update={"steps": steps})})


def can_be_longer(folder: Path, there: Config, config: Config) -> bool:
    """Whether a run may go on to more steps: no step that is done would have been another one in the longer run."""
    old, new, done = there.training.steps, config.training.steps, saved_step(folder)
    if new <= old or with_steps(there, new) != config:
        return False
    phases = phases_of(there)
    ends = [*(first for first, _ in phases[1:]), old]
    for (first, each), end in zip(phases, ends, strict=True):
        last = min(end, done) - 1  # rates only rise before they fall
        if first <= last and learning_rate(last, old, each.optimiser) != learning_rate(last, new, each.optimiser):
            return False
    return True


def as_begun(folder: Path, config: Config) -> Config:
    """The settings with the run's own values where they ask for `auto`, which may be another one on this machine."""
    if not (folder / CONFIG).is_file():
        return config
    there, changes = from_yaml(folder / CONFIG), {}
    if config.objective == "auto":
        changes["objective"] = there.objective
    training = {
        name: getattr(there.training, name)
        for name in ("precision", "walk_precision")
        if getattr(config.training, name) == "auto"
    }
    return config.model_copy(update=changes | {"training": config.training.model_copy(update=training)})


def as_started(folder: Path, config: Config, resume: bool) -> Config:
    """The settings by which a run's student is made: a run that goes on needs no earlier student that is gone."""
    init = config.student.init
    if not resume or init is None or Path(init).exists() or all(damage(path) for path in checkpoints(folder)):
        return config
    return config.model_copy(update={"student": config.student.model_copy(update={"init": None})})


def open_run(folder: Path, config: Config, resume: bool) -> FileLock:
    """Makes the run folder and notes the settings in it, or checks that the one there is this run's.

    What kills left half-written in it is removed.

    Returns:
        A lock that no other process can take while it is held; it ends with this process at the latest.

    Raises:
        UserError: as `check_run`, the folder cannot be written to, or another process runs in it.
    """
    check_run(folder, config, resume)
    make_folder(folder)
    if not (folder / CONFIG).exists():
        with writing(folder / CONFIG) as part:
            part.write_text(to_yaml(config), encoding="utf-8")
    lock = FileLock(folder / LOCK, timeout=LOCK_SEC, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process is running in {folder}; wait for it or stop it, or choose another --out"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another --out") from None
    clear_leftovers(folder)
    if from_yaml(folder / CONFIG) != config:  # the run is made longer, or took no step
        if not took_a_step(folder):
            for name in KEPT:
                (folder / name).unlink(missing_ok=True)
        with writing(folder / CONFIG) as part:
            part.write_text(to_yaml(config), encoding="utf-8")
    return lock


def is_running(folder: Path) -> bool:
    """Whether a process holds the run's lock. Probes by briefly acquiring it."""
    if not (folder / LOCK).is_file():
        return False
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


@dataclass(frozen=True)
class Source:
    """Something that a run is made from, and by what it is known again.

    Attributes:
        kind: `prompts`, `teacher`, `images` or `reading`; the note in the run folder is called so.
        place: the file, the folder or the hub id.
        sha256: a fingerprint of the content.
        count: of prompts.
    """

    kind: str
    place: str
    sha256: str
    count: int | None = None


def remember(folder: Path, source: Source) -> None:
    """Notes what a run is made from, and refuses to go on with another one.

    Raises:
        UserError: it has changed since the run began, or the note is damaged.
    """
    note = folder / f"{source.kind}.json"
    if note.exists():
        try:
            noted = json.loads(note.read_text(encoding="utf-8"))["sha256"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"{note} is damaged ({error}); start a new run with another --out") from None
        if noted != source.sha256:
            what = {
                "prompts": source.place,
                "reading": f"what ModuleTeacher is told of the network (now {source.place})",
            }.get(source.kind, f"the content of {source.place} ({source.kind})")
            raise UserError(
                f"{what} has changed since this run began; restore it or start a new run with another --out"
            )
        return
    record = {"file": source.place, "count": source.count, "sha256": source.sha256}
    with writing(note) as part:
        part.write_text(json.dumps({key: value for key, value in record.items() if value is not None}, indent=2) + "\n")


def prepare_run(
    folder: Path, config: Config, resume: bool, sources: Sequence[Source], note: Callable[[str], None]
) -> FileLock:
    """Makes the run folder, or puts the one there in order; whoever trains comes through here.

    Args:
        folder: of the run.
        config: its settings.
        resume: continue the run that is there.
        sources: what it is made from.
        note: shows a line.

    Returns:
        The lock on the folder, see `open_run`.

    Raises:
        UserError: as `open_run` and `remember`.
    """
    there = from_yaml(folder / CONFIG).training.steps if resume and (folder / CONFIG).is_file() else None
    lock = open_run(folder, config, resume)
    if there and config.training.steps > there:
        note(f"the run is made longer: training.steps was {there:,} and is {config.training.steps:,}")
    for source in sources:
        remember(folder, source)
    for finding in set_aside_damaged(folder):
        note(finding)
    refuse_finished(folder)  # of damaged checkpoints alone
    remove_old_checkpoints(folder, config.training.keep_checkpoints)  # a kill may have come before that
    if resume and not checkpoints(folder):
        note(f"{folder} holds no checkpoint yet: starting from the teacher")
    return lock


def _difference(a: Config, b: Config) -> str:
    return ", ".join(f"{name} {x!r} there, {y!r} given" for name, (x, y) in differences(a, b).items())


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> both values, of the settings that differ."""

    def value(of: dict[str, Any], name: str) -> Any:
        section, dot, below = name.partition(".")
        return value(of[section], below) if dot else of[name]

    x, y = a.model_dump(), b.model_dump()
    both = {name: (value(x, name), value(y, name)) for name in setting_names()}
    return {name: (ours, theirs) for name, (ours, theirs) in both.items() if ours != theirs}
