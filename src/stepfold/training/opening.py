"""Opens a run folder: one that is free, or a run's own, with the same settings and prompts as it began with."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stepfold.config import Config, from_yaml, to_yaml
from stepfold.errors import UserError
from stepfold.training.runs import CONFIG, METRICS, clear_leftovers, holds_files, make_folder, writing

LOCK = ".lock"
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
    for name in (CONFIG, METRICS, "prompts.json"):
        if (folder / name).is_dir():
            raise UserError(f"{folder / name} is a folder and should be a file; put the run's own back")


def check_run(folder: Path, config: Config, resume: bool) -> None:
    """Checks that the run folder is free, or this run's own.

    Raises:
        UserError: the folder is a file, holds another run or holds other files.
    """
    config_file = folder / CONFIG
    if config_file.exists():
        refuse_ways_out(folder)
        if not resume:
            raise UserError(f"{folder} already holds a run; add --resume to continue it, or choose another --out")
        if from_yaml(config_file) != config:
            raise UserError(
                f"{folder} holds a run with other settings ({_difference(from_yaml(config_file), config)}); "
                "resume with the same ones or choose another --out"
            )
    elif folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --out")
    elif folder.exists() and holds_files(folder):
        raise UserError(f"{folder} is not empty and holds no run; choose another --out")


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


def remember_prompts(folder: Path, file: Path, num_prompts: int, sha256: str) -> None:
    """Notes which prompts a run uses, and refuses to go on with others.

    Raises:
        UserError: the file has changed since the run began.
    """
    note = folder / "prompts.json"
    if note.exists():
        try:
            noted = json.loads(note.read_text(encoding="utf-8"))["sha256"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"{note} is damaged ({error}); start a new run with another --out") from None
        if noted != sha256:
            raise UserError(
                f"{file} has changed since this run began; restore it or start a new run with another --out"
            )
        return
    with writing(note) as part:
        part.write_text(json.dumps({"file": str(file), "count": num_prompts, "sha256": sha256}, indent=2) + "\n")


def _difference(a: Config, b: Config) -> str:
    return ", ".join(f"{name} {x!r} there, {y!r} given" for name, (x, y) in differences(a, b).items())


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> both values, of the settings that differ."""

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        out = {}
        for key, value in values.items():
            out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return out

    x, y = flat(a.model_dump()), flat(b.model_dump())
    return {name: (x[name], y[name]) for name in x if x[name] != y[name]}
