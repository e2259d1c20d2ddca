"""The run folder: settings, metrics, checkpoints. A file is written whole or not at all; none can execute code."""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepfold.errors import UserError
from stepfold.training.processes import gathered, placed, placed_state

STEP = re.compile("[0-9]{6,18}")  # what a checkpoint is called
CONFIG, METRICS, CHECKSUMS = "config.yaml", "metrics.jsonl", "checksums.json"
UMASK = os.umask(0o077)  # it can be read by setting it alone
os.umask(UMASK)
ASIDE = ".aside.part"  # how the name of a folder ends whose successor is being put in its place


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well; a folder only a folder's.

    A folder in its place is renamed aside first and deleted last, so that whenever a kill comes one of them is whole.

    Raises:
        UserError: the disk is full, the folder cannot be written to, or `path` is a folder and a file was to go there.
    """
    part, aside = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}{ASIDE}")
    try:
        _remove(part)  # of a run that was killed
        _put_back(aside, path)
        yield part
        if path.is_dir():
            if not part.is_dir():
                raise UserError(f"{path} is a folder; give the name of a file")
            if path.is_symlink():
                raise UserError(f"{path} is a link to a folder, which is not replaced; give the folder's own name")
            os.replace(path, aside)
        _readable(part)
        os.replace(part, path)
    except Exception as error:
        if not isinstance(error, OSError) and "(os error " not in str(error):  # safetensors' and tokenizers' own
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        fix = (
            f"make the folder {path.parent} first"
            if not path.parent.exists()
            else "free some space or choose another --out"
        )
        raise UserError(f"cannot write {path}: {reason}; {fix}") from None
    finally:
        with suppress(OSError):
            _put_back(aside, path)
            _remove(part)


def _readable(part: Path) -> None:
    """Gives files of weights, which safetensors keeps to their owner, the mode of any other new file."""
    for file in part.rglob("*.safetensors") if part.is_dir() else [part]:
        if file.is_file():
            file.chmod(0o666 & ~UMASK)


def _put_back(aside: Path, path: Path) -> None:
    """Ends what a write began: the folder that it renamed aside goes back if nothing took its place, else away."""
    if aside.is_dir() and not aside.is_symlink() and not os.path.lexists(path):
        os.replace(aside, path)
    else:
        _remove(aside)


def clear_leftovers(folder: Path) -> None:
    """Removes what kills left of a run's writes; see `_put_back`."""
    for part in sorted(folder.rglob(".*.part")):
        with suppress(OSError):
            if part.name.endswith(ASIDE):
                _put_back(part, part.with_name(part.name[1:].removesuffix(ASIDE)))
            else:
                _remove(part)


def holds_files(folder: Path) -> bool:
    """Whether there is anything in a folder but what a killed `writing` left of a first file."""
    return any(not (path.name.startswith(".") and path.name.endswith(".part")) for path in folder.iterdir())


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, if they are not there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}; choose another --out") from None


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.unlink()


class BackgroundWrites(AbstractContextManager["BackgroundWrites"]):
    """Writes beside the training, one at a time, in a thread; what goes wrong in one is raised by the next call."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._write: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Begins a write, once the one before is done."""
        self.finish()
        self._write = self._thread.submit(write)

    def look(self) -> None:
        """Raises the error of a write that ended with one; waits for none."""
        if self._write and self._write.done():
            self.finish()

    def finish(self) -> None:
        """Waits for the write that is going on."""
        write, self._write = self._write, None
        if write:
            write.result()

    def __exit__(self, *error: object) -> None:
        """Waits, whatever ends the block."""
        try:
            self.finish()
        finally:
            self._thread.shutdown()


def save_checkpoint(
    folder: Path,
    step: int,
    modules: dict[str, torch.nn.Module],
    optimiser: torch.optim.Optimizer,
    keep: int,
    shared: Mapping[str, frozenset[str]] = MappingProxyType({}),
    *,
    write: bool = True,
    background: BackgroundWrites | None = None,
) -> None:
    """Writes `folder/checkpoints/NNNNNN` in one piece, without each module's `shared` tensors, and removes the oldest.

    Sharded tensors are written whole, so that any number of processes can go on. All processes call this, so that they
    are; one of them with `write`. With `background` this only copies the tensors to the CPU's memory.
    """
    if background:
        background.finish()  # before there are two copies
    states = {
        name: gathered({k: v for k, v in module.state_dict().items() if k not in shared.get(name, ())}, keep=write)
        for name, module in modules.items()
    }
    tensors, rest = split_state(optimiser.state_dict())
    tensors = gathered(tensors, keep=write)
    if not write:
        return
    states["optimiser"] = tensors
    state_json = json.dumps({"step": step, "optimiser": rest})
    if background:
        states = {
            name: {key: value.to("cpu", copy=True) for key, value in state.items()} for name, state in states.items()
        }

    def write_files() -> None:
        root = folder / "checkpoints"
        make_folder(root)
        with writing(root / f"{step:06d}") as part:
            part.mkdir()
            for name, state in states.items():
                save_file(state, part / f"{name}.safetensors")
            (part / "state.json").write_text(state_json)
            (part / CHECKSUMS).write_text(json.dumps({file.name: checksum(file) for file in sorted(part.iterdir())}))
            for file in part.iterdir():
                with open(file, "r+b") as handle:  # Windows flushes nothing that is open for reading alone
                    os.fsync(handle.fileno())
        remove_old_checkpoints(folder, keep)

    if background:
        background.start(write_files)
    else:
        write_files()


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    named = [(int(path.name), path) for path in (folder / "checkpoints").glob("[0-9]*") if STEP.fullmatch(path.name)]
    return [path for _, path in sorted(named) if path.is_dir()]


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep`; each is renamed first, so that a kill leaves none with files missing."""
    for old in checkpoints(folder)[:-keep]:
        part = old.with_name(f".{old.name}.part")
        with suppress(OSError):
            os.replace(old, part)
            _remove(part)


def saved_step(folder: Path) -> int:
    """The step that a run would go on from; 0 where there is no checkpoint."""
    saved = checkpoints(folder)
    return int(saved[-1].name) if saved else 0


def checksum(file: Path) -> int:
    """CRC-32 of a file's content."""
    total = 0
    with file.open("rb") as handle:
        while block := handle.read(2**20):
            total = zlib.crc32(block, total)
    return total


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None; one without checksums is taken as it is."""
    try:
        if not (checkpoint / CHECKSUMS).exists():
            return None
        for name, expected in json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8")).items():
            if Path(name).name != name:
                return f"{name!r} is no file of it"
            if checksum(checkpoint / name) != expected:
                return f"{name} is not as it was written"
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return str(error)
    return None


def set_aside_damaged(folder: Path) -> list[str]:
    """Renames the newest checkpoints to `damaged_NNNNNN` until one is whole; says of each what is wrong with it."""
    found = []
    for path in reversed(checkpoints(folder)):
        reason = damage(path)
        if reason is None:
            break
        endings = chain([""], (f"_{n}" for n in count(2)))
        names = (path.with_name(f"damaged_{path.name}{ending}") for ending in endings)
        aside = path.rename(next(name for name in names if not name.exists()))
        found.append(f"checkpoint {path.name} is damaged ({reason}); it is now {aside}")
    return found


def load_checkpoint(
    path: Path,
    modules: dict[str, torch.nn.Module],
    optimiser: torch.optim.Optimizer,
    shared: Mapping[str, frozenset[str]] = MappingProxyType({}),
) -> int:
    """Puts a checkpoint's state into the modules and the optimiser; returns the number of steps done.

    Raises:
        UserError: a file is not as it was written, or the checkpoint is another network's.
    """
    if reason := damage(path):
        raise damaged(path, reason)
    try:
        for name, module in modules.items():
            there = {k: v for k, v in module.state_dict().items() if k in shared.get(name, ())}
            module.load_state_dict(there | placed_state(load_file(path / f"{name}.safetensors"), module))
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        tensors = {
            name: placed(value, parameters[int(name.split(".")[0])]) if value.dim() else value
            for name, value in load_file(path / "optimiser.safetensors").items()
        }
        names = [group.get("name") for group in optimiser.param_groups]
        optimiser.load_state_dict(join_state(tensors, state["optimiser"]))
        for group, group_name in zip(optimiser.param_groups, names, strict=True):
            if group_name:
                group["name"] = group_name  # checkpoints of version 0.1.0 have none
        if type(state["step"]) is not int or state["step"] < 0:
            raise ValueError(f"its step is {state['step']!r}")
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()  # torch's first line says nothing
        whole = (path / CHECKSUMS).exists()
        if not whole and not isinstance(error, RuntimeError):  # what torch raises where names or shapes differ
            raise damaged(path, reason) from None
        raise UserError(
            f"checkpoint {path} was made with another network ({reason}); resume with the one that it was made with, "
            "or start a new run in another folder"
        ) from None
    return state["step"]


def damaged(path: Path, reason: str) -> UserError:
    """The error for a checkpoint whose files are not as they were written."""
    return UserError(f"checkpoint {path} is damaged ({reason}); delete that folder to resume from the one before")


def split_state(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state_dict as tensors for safetensors and the rest for json."""
    tensors, rest = {}, {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                rest[f"{index}.{key}"] = value
    return tensors, {"values": rest, "param_groups": state["param_groups"]}


def join_state(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split_state`."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *rest["values"].items()]:
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": rest["param_groups"]}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of the metrics file; one that is not whole, such as a last row that a kill cut short, is left out."""
    path = folder / METRICS
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append(row)
    return rows


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    """Adds a row.

    Raises:
        UserError: the disk is full or the folder is gone.
    """
    try:
        with open(folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write {folder / METRICS}: {error.strerror}; free some space, then continue with --resume"
        ) from None


def rewind_metrics(folder: Path, step: int) -> None:
    """Drops the rows of steps that are about to be done again."""
    rows = [row for row in read_metrics(folder) if row["step"] < step]
    with writing(folder / METRICS) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))
