"""Fingerprints change with what they are of, and with nothing else."""

import os
from pathlib import Path

from stepfold.fingerprints import BLOCK, listing_sha256, sampled_sha256


def fingerprint(folder: Path, num_blocks: int = 4) -> str:
    return sampled_sha256(folder.iterdir(), folder, num_blocks)


def test_names_sizes_and_contents_count_and_times_do_not(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    file = folder / "weights"
    file.write_bytes(bytes(range(256)) * 10)
    before = fingerprint(folder)
    os.utime(file, (1, 1))
    assert fingerprint(folder) == before
    (tmp_path / "one").rename(tmp_path / "two")
    folder, file = tmp_path / "two", tmp_path / "two" / "weights"
    assert fingerprint(folder) == before
    content = bytearray(file.read_bytes())
    content[1234] ^= 1
    file.write_bytes(content)
    assert fingerprint(folder) != before
    content[1234] ^= 1
    file.write_bytes(content)
    assert fingerprint(folder) == before
    file.rename(folder / "other")
    assert fingerprint(folder) != before


def test_a_large_file_is_read_in_places_its_ends_among_them(tmp_path: Path) -> None:
    size = 100 * BLOCK + 5
    file = tmp_path / "large"
    file.write_bytes(bytes(size))
    before = fingerprint(tmp_path)
    for place in (0, size - 1, (size - BLOCK) // 3):
        content = bytearray(size)
        content[place] = 1
        file.write_bytes(content)
        assert fingerprint(tmp_path) != before
    file.write_bytes(bytes([1]) * size)  # as training changes a file: everywhere
    assert fingerprint(tmp_path) != before
    file.write_bytes(bytes(size + 1))
    assert fingerprint(tmp_path) != before


def test_a_listing_reads_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    os.utime(tmp_path / "a", (1, 1))
    before = listing_sha256(tmp_path)
    (tmp_path / "a").write_bytes(b"two")
    assert listing_sha256(tmp_path) != before
    os.utime(tmp_path / "a", (1, 1))
    assert listing_sha256(tmp_path) == before
