"""Commands whose files find no room: one error, nothing half-written, and the same files when there is room.

A limit on the size of files (RLIMIT_FSIZE) plays the disk: it also stops what writes past Python. For runs see
tests/training/test_distill.py.
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from forms import cases
from typer.testing import CliRunner

from stepfold.cli import app
from stepfold.errors import UserError

COMMANDS = {
    "clean": ["prompts", "clean", "PROMPTS", "--out", "OUT/prompts.txt"],
    "clean of a table": ["prompts", "clean", "TABLE", "--out", "OUT/prompts.txt"],
    "stats": ["prompts", "stats", "PROMPTS", "--json", "OUT/stats.json"],
    "split": ["prompts", "split", "PROMPTS", "--out", "OUT"],
    "encode": ["prompts", "encode", "PROMPTS", "--teacher", "TEACHER", "--max-tokens", "32", "--out", "OUT"],
    "sample": ["sample", "emoji-student", "red heart", "--out", "OUT/picture.png"],
    "pipeline": ["export", "emoji-student", "--to", "pipeline", "--out", "OUT/student"],
    "single file": ["export", "emoji-student", "--to", "single-file", "--out", "OUT/student.safetensors"],
}


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", cases(COMMANDS, short=["clean", "split", "single file"]))
def test_no_room_for_a_file_of_a_command(name: str, tiny_sana: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"a cat with {i} hats\n" for i in range(40)))
    (tmp_path / "table.csv").write_text("prompt\n" + "".join(f"a cat with {i} hats\n" for i in range(40)))
    places = {"PROMPTS": tmp_path / "prompts.txt", "TABLE": tmp_path / "table.csv", "TEACHER": tiny_sana}

    def run(out: Path) -> BaseException | None:
        out.mkdir(exist_ok=True)
        words = []
        for word in COMMANDS[name]:
            place, _, rest = word.partition("/")
            words.append(str((places | {"OUT": out}).get(place, place) / rest) if place in {*places, "OUT"} else word)
        return CliRunner().invoke(app, words).exception

    out, refused = tmp_path / "out", 0
    for power in count():
        with room_for(0 if not power else 32**power):
            error = run(out)
        if error is None:
            break
        refused += 1
        assert isinstance(error, UserError) and "File too large" in str(error), repr(error)
        assert not [path for path in out.rglob("*") if path.name.endswith(".part")]
    assert refused
    assert run(tmp_path / "with room") is None
    assert files(out) == files(tmp_path / "with room")
