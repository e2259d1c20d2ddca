"""A folder that is written over, killed at every change that this makes to the disk."""

import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from stepfold.config import load_config
from stepfold.errors import UserError
from stepfold.training.opening import open_run
from stepfold.training.runs import checkpoints, remove_old_checkpoints, writing

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def killed(at: int, do: Callable[[], None]) -> bool:
    """Runs `do` in a fork that is killed just before its change number `at` of the disk; False if it made fewer."""
    pid = os.fork()
    if not pid:
        changes = count()

        def hook(event: str, args: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            if (event in CHANGES or writes) and next(changes) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            do()
        finally:
            os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def write(folder: Path, content: str) -> None:
    with writing(folder) as part:
        part.mkdir()
        for name in ("card", "weights"):
            (part / name).write_text(content)


def write_in_vain(run: Path) -> None:
    with pytest.raises(RuntimeError, match="no numbers"), writing(run / "student"):
        raise RuntimeError("no numbers")


NEXT: dict[str, Callable[[Path], Any]] = {
    "a write that fails": write_in_vain,
    "the run, resumed": lambda run: open_run(run, load_config("demo"), resume=True).release(force=True),
}


@pytest.mark.parametrize("what", NEXT)
def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path: Path, what: str) -> None:
    """Whole: in its place, or back there by whatever comes next, which leaves nothing else; and written over again."""
    found = []
    for at in count():
        run = tmp_path / f"run{at}"
        open_run(run, load_config("demo"), resume=False).release(force=True)
        write(run / "student", "old")
        (run / "checkpoints" / "000001").mkdir(parents=True)  # without one, a run that has ended is not resumed
        if not killed(at, lambda run=run: write(run / "student", "new")):
            break
        there = (run / "student").is_dir()
        NEXT[what](run)
        content = {path.name: path.read_text() for path in (run / "student").iterdir()}
        assert content in ({"card": word, "weights": word} for word in ("old", "new"))
        found.append((there, content["card"]))
        assert sorted(set(os.listdir(run)) - {".lock"}) == ["checkpoints", "config.yaml", "student"]
        write(run / "student", "newest")
        assert {path.read_text() for path in (run / "student").iterdir()} == {"newest"}
        assert sorted(set(os.listdir(run)) - {".lock"}) == ["checkpoints", "config.yaml", "student"]
    made = 4  # the new folder, its two files, and the first rename: until then the old one is in its place
    assert found == [(True, "old")] * made + [(False, "old")] + [(True, "new")] * 3, "two files and the folder go last"


def test_a_kill_at_any_moment_of_the_rotation_leaves_whole_checkpoints(tmp_path: Path) -> None:
    """And what it left to remove goes when the run goes on, which may have no checkpoint to write any more."""
    found = []
    for at in count():
        run = tmp_path / f"run{at}"
        open_run(run, load_config("demo"), resume=False).release(force=True)
        for step in range(1, 5):
            (run / "checkpoints").mkdir(exist_ok=True)
            write(run / "checkpoints" / f"{step:06d}", str(step))
        if not killed(at, lambda run=run: remove_old_checkpoints(run, 2)):
            break
        found.append([path.name for path in checkpoints(run)])
        assert all(len(os.listdir(path)) == 2 for path in checkpoints(run))
        open_run(run, load_config("demo"), resume=True).release(force=True)
        remove_old_checkpoints(run, 2)
        assert sorted(os.listdir(run / "checkpoints")) == ["000003", "000004"]
    assert found[0] == ["000001", "000002", "000003", "000004"] and found[-1] == ["000003", "000004"]


@pytest.mark.parametrize("moment", ["between the renames", "after both"])
def test_a_write_that_follows_a_kill(tmp_path: Path, moment: str) -> None:
    write(tmp_path / "student", "old")
    (tmp_path / "student").rename(tmp_path / ".student.aside.part")
    if moment == "after both":
        write(tmp_path / "other", "new")
        (tmp_path / "other").rename(tmp_path / "student")
    write(tmp_path / "student", "newest")
    assert os.listdir(tmp_path) == ["student"]
    assert {path.read_text() for path in (tmp_path / "student").iterdir()} == {"newest"}


def test_a_new_folder_that_cannot_be_put_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one comes back at once."""
    write(tmp_path / "student", "old")
    rename = os.replace

    def refuse_the_new(source: Path, target: Path) -> None:
        if source.name == ".student.part":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse_the_new)
    with pytest.raises(UserError, match="No space left on device"):
        write(tmp_path / "student", "new")
    assert os.listdir(tmp_path) == ["student"]
    assert {path.read_text() for path in (tmp_path / "student").iterdir()} == {"old"}


def test_a_link_to_a_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "thesis.tex").write_text("years")
    (tmp_path / "student").symlink_to(tmp_path / "disk")
    with pytest.raises(UserError, match="student is a link to a folder, which is not replaced"):
        write(tmp_path / "student", "new")
    assert sorted(os.listdir(tmp_path)) == ["disk", "student"] and os.listdir(tmp_path / "disk") == ["thesis.tex"]


def test_leftovers_of_a_run_go_when_it_is_opened(tmp_path: Path) -> None:
    """A checkpoint that was killed at a signal's step is never written again."""
    run = tmp_path / "run"
    open_run(run, load_config("demo"), resume=False).release(force=True)
    for path in (run / "checkpoints" / ".000017.part" / "state.json", run / ".report.json.part"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{")
    write(run / "checkpoints" / ".000003.aside.part", "old")
    open_run(run, load_config("demo"), resume=True).release(force=True)
    assert sorted(set(os.listdir(run)) - {".lock"}) == ["checkpoints", "config.yaml"]
    assert os.listdir(run / "checkpoints") == ["000003"]
