"""Fingerprints of files: what a run or a result was made from, known again wherever a copy of it lies."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

BLOCK, NUM_BLOCKS = 4096, 1024
"""Bytes that are read at a time, and how many times in a large file."""


def listing_sha256(folder: Path) -> str:
    """Changes with any file of a folder: its names, sizes and times. Nothing is read."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{path.relative_to(folder)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sampled_sha256(files: Iterable[Path], root: Path, num_blocks: int = NUM_BLOCKS) -> str:
    """Changes with the names below `root`, the sizes and the contents of files; copies of them have the same.

    Of a file of more than `num_blocks` blocks so many are read, at even distances, the first and the last among them:
    gigabytes of weights take milliseconds, and training changes a weight in every block. One byte may go unseen.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            if size <= num_blocks * BLOCK:
                digest.update(file.read())
                continue
            for block in range(num_blocks):
                file.seek(block * (size - BLOCK) // (num_blocks - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()
