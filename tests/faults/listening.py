"""`stepfold`, one of several processes, with an ear for what it changes on the disk.

    torchrun ... tests/faults/listening.py FOLDER distill ...

Below FOLDER, that is; each line of FOLDER/heard_RANK says what was done and, below FOLDER, where. First of all it
writes FOLDER/hello_RANK, so that silence means something.
"""

import os
import sys
from pathlib import Path
from typing import Any

import safetensors.torch

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod")


def listen(inside: Path, note: int) -> None:
    """Writes into an open file what this process changes below a folder, from now on."""

    def hear(what: str, *paths: Any) -> None:
        for path in paths:
            where = inside if isinstance(path, int | None) else Path(os.path.abspath(os.fsdecode(path)))
            if where != inside and where.is_relative_to(inside):
                os.write(note, f"{what} {where.relative_to(inside)}\n".encode())

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGES:
            hear(event, *args[:2])
        elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            hear(event, args[0])

    def save_file(tensors: Any, filename: str | Path, *args: Any, **named: Any) -> None:
        hear("save_file", filename)  # which writes without telling Python
        save(tensors, filename, *args, **named)

    save = safetensors.torch.save_file
    for module in list(sys.modules.values()):  # in a fork those of stepfold have it already
        if vars(module).get("save_file") is save:
            vars(module)["save_file"] = save_file
    sys.addaudithook(hook)


if __name__ == "__main__":
    folder, rank = Path(sys.argv.pop(1)), os.environ["RANK"]
    listen(folder, os.open(folder / f"heard_{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
    (folder / f"hello_{rank}").write_text("hello")
    from stepfold.cli import main  # only now, so that it gets the save_file from above

    main()
