"""A file of prompts of any size: checked once from start to end, then read by seeking; tables are made text first."""

import gzip
import hashlib
import os
import shlex
import tempfile
import weakref
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from stepfold.errors import UserError
from stepfold.prompts.files import BETWEEN, parts_of
from stepfold.prompts.formats import WhichColumn, encoding_fix, form_of
from stepfold.prompts.syntax import count_foreign, count_hidden, is_blank
from stepfold.prompts.tables import one_line, read_texts

MAX_CHARACTERS = 2_000
# UTF-8 takes at most 4 bytes a character; the rest is for a BOM, CRLF and spaces around the prompt.
_MAX_LINE_BYTES = 4 * MAX_CHARACTERS + 64
_BOM = b"\xef\xbb\xbf"
_FEISTEL_ROUNDS = 6


class Prompts(Protocol):
    """What the loop reads prompts from: a file of them, or the captions of a folder of images."""

    def __len__(self) -> int: ...

    def prompt(self, index: int) -> str:
        """The prompt number `index`, 0 <= index < len(self)."""
        ...


@dataclass(frozen=True, eq=False)
class PromptFile:
    """Where every prompt of a file lies; the strings themselves stay on disk.

    Attributes:
        path: the text file, which may be a copy of a table's column, or of several files.
        source: the file, folder or pattern that was given.
        offsets: int64 [P], first byte of every kept line (after leading spaces and the BOM).
        lengths: int32 [P], bytes of every kept line (without trailing spaces and line end).
        num_blank: lines dropped in which nothing is to be seen.
        num_duplicate: lines dropped because the same line came before.
        images: the folder below which each prompt's image lies, of a table with a column of images; else None.
        foreign: how many lines hold each kind of foreign syntax or hidden mark, see `syntax.notes_of`.
        sha256: of the whole file, in hexadecimal.
        state: size in bytes and time of change in ns that the file had when its content was last known to be this.
    """

    path: Path
    source: Path
    offsets: np.ndarray
    lengths: np.ndarray
    num_blank: int
    num_duplicate: int
    foreign: Mapping[str, int]
    sha256: str
    state: list[tuple[int, int]]
    images: Path | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    def prompt(self, index: int) -> str:
        """The prompt number `index`, 0 <= index < len(self), read from the file.

        Raises:
            UserError: the file is gone or has changed since it was opened.
        """
        line = self._line(index)
        return line.partition(BETWEEN)[0] if self.images else line

    def image(self, index: int) -> Path:
        """The file of the image of prompt `index`, where there are `images`; raises as `prompt`."""
        assert self.images is not None
        return self.images / self._line(index).split(BETWEEN)[1]

    def _line(self, index: int) -> str:
        assert 0 <= index < len(self), f"prompt {index} of {len(self)}"
        length = int(self.lengths[index])
        try:
            with self.path.open("rb") as file:
                self._check_unchanged(file)
                file.seek(int(self.offsets[index]))
                return file.read(length).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: changed or removed during the run; put the old file back") from error

    def _check_unchanged(self, file: BinaryIO) -> None:
        """Reads the whole file again where its size or time is another: a copy of equal content will do."""
        now = _state(file)
        if now != self.state[-1]:
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
            if digest.hexdigest() != self.sha256:
                raise UserError(f"{self.path}: changed during the run; put the old file back")
            self.state.append(now)


def open_prompts(path: str | os.PathLike[str], image_column: str | None = None) -> PromptFile:
    """Checks a file of prompts in one streaming pass and notes where each prompt lies.

    CRLF, a BOM, blank lines and spaces around a prompt are accepted; a line that came before is dropped. Lines are
    compared by 8-byte hashes, so that memory is about 40 bytes a line; among ten million different lines the chance
    that any two are taken for duplicates is 3e-6.

    Args:
        path: a text file with one prompt a line, or a table or JSON (jsonl, json, csv, tsv, parquet) with a column
            `prompt`, `text` or `caption`, gzipped or not; or a folder or pattern of such files, or of captions beside
            pictures, see `parts_of`. UTF-8, or UTF-16 with its mark. At most MAX_CHARACTERS characters a prompt.
        image_column: of a table, the column with the path of each prompt's image, from the table's folder.

    Raises:
        UserError: no such file, not a regular file, unreadable, no prompts in it, no such column, or a line (named by
            its number) that is binary, is not UTF-8, is too long or holds a carriage return.
    """
    path = Path(path)
    try:
        if image_column is not None:
            return _from_table(path, image_column)
        parts = parts_of(path)
        if len(parts) == 1 and not parts[0].is_caption and _is_plain(parts[0].path):
            with parts[0].path.open("rb") as file:
                return replace(_scan(parts[0].path, file), source=path)
        return _from_table(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _is_plain(path: Path) -> bool:
    """Whether a file is text of one prompt a line, in UTF-8 and not gzipped."""
    try:
        return form_of(path).is_plain
    except (EOFError, zlib.error, gzip.BadGzipFile):  # whoever reads it says so
        return False


def _from_table(path: Path, image_column: str | None = None) -> PromptFile:
    """Of what is not plain text, by way of text with a line for every prompt, which is deleted when the result is."""
    text = opened = None
    try:
        handle, name = tempfile.mkstemp(prefix="stepfold-", suffix=".txt")
        text = Path(name)
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(line + "\n" for line in _lines(path, image_column))
        with text.open("rb") as file:
            folder = None if image_column is None else parts_of(path)[0].path.parent
            opened = replace(_scan(path, file, image_column is not None), path=text, images=folder)
        weakref.finalize(opened, text.unlink, missing_ok=True)
        return opened
    except WhichColumn as error:
        command = f"stepfold prompts clean {shlex.quote(str(path))} --column NAME --out prompts.txt"
        raise UserError(f"{error}; {command} makes text of one") from None
    except OSError as error:
        fix = "make room, or name another folder in TMPDIR"
        raise UserError(f"{path}: its text cannot be kept in the temporary folder ({error.strerror}); {fix}") from error
    finally:
        if text is not None and opened is None:
            text.unlink(missing_ok=True)


def _lines(path: Path, image_column: str | None) -> Iterator[str]:
    """A line for every prompt of a table, with its image if there is a column of them."""
    if image_column is None:
        return map(one_line, read_texts(path))
    from stepfold.prompts.pictures import lines_with_images  # torch takes seconds

    return lines_with_images(path, image_column)


def _state(file: BinaryIO) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns of an open file."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _scan(path: Path, file: BinaryIO, with_images: bool = False) -> PromptFile:
    """The streaming pass of `open_prompts`; a line is read in bounded pieces, whatever the file holds."""
    digest, state = hashlib.sha256(), _state(file)
    offsets, lengths, hashes = array("q"), array("i"), array("Q")
    position = line = num_blank = 0
    foreign: Counter[str] = Counter()
    while raw := file.readline(_MAX_LINE_BYTES):
        line += 1
        digest.update(raw)
        skipped = len(_BOM) if line == 1 and raw.startswith(_BOM) else 0
        text = _checked(raw[skipped:], path, line)
        if not is_blank(text):
            prompt = text.strip().encode()
            seen = text.partition(BETWEEN)[0] if with_images else text
            count_foreign(seen, foreign)
            count_hidden(seen, foreign)
            skipped += len(text[: len(text) - len(text.lstrip())].encode())
            offsets.append(position + skipped)
            lengths.append(len(prompt))
            hashes.append(int.from_bytes(hashlib.blake2b(prompt, digest_size=8).digest(), "little"))
        else:
            num_blank += 1
        position += len(raw)
    if not offsets:
        what = f"{line} blank lines" if line else "empty"
        raise UserError(f"{path}: no prompts in it ({what}); write one prompt a line")
    first = np.sort(np.unique(np.frombuffer(hashes, np.uint64), return_index=True)[1])
    return PromptFile(
        path=path,
        source=path,
        offsets=_frozen(np.frombuffer(offsets, np.int64)[first]),
        lengths=_frozen(np.frombuffer(lengths, np.int32)[first]),
        num_blank=num_blank,
        num_duplicate=len(offsets) - len(first),
        foreign=foreign,
        sha256=digest.hexdigest(),
        state=[state],
    )


def _checked(raw: bytes, path: Path, line: int) -> str:
    """One line as text, or the error that says what is wrong with it."""
    where = f"{path}, line {line}"
    if b"\0" in raw:
        raise UserError(f"{where}: binary data (a NUL byte); give plain text, saved as UTF-8")
    too_long = UserError(
        f"{where}: longer than {MAX_CHARACTERS:,} characters; shorten it or put one prompt a line; "
        f"stepfold prompts clean {shlex.quote(str(path))} --out prompts.txt leaves such lines out"
    )
    if len(raw) >= _MAX_LINE_BYTES - len(_BOM) and not raw.endswith(b"\n"):
        raise too_long
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start + 1} of the line); {encoding_fix(path)}") from error
    if len(text.strip()) > MAX_CHARACTERS:
        raise too_long
    if "\r" in text.strip():
        raise UserError(f"{where}: a carriage return inside the line; end lines with LF or CRLF")
    return text


def _frozen(values: np.ndarray) -> np.ndarray:
    values.setflags(write=False)
    return values


def shuffled_index(position: int, size: int, seed: int) -> int:
    """The prompt that sample number `position` uses: every prompt once an epoch, each epoch in an order of its own.

    A balanced Feistel network keyed by (seed, epoch) permutes the smallest power of four, 16 or more, that holds
    `size`; results outside are fed back in until one falls inside (cycle walking), which keeps it a permutation. Memory
    is O(1), and no position needs the ones before it, so resumed runs and many processes agree without shared state.

    Args:
        position: global sample number, >= 0; its epoch is position // size.
        size: number of prompts, >= 1.
        seed: any integer.

    Returns:
        The prompt's index, 0 <= index < size.

    Reference: Black and Rogaway, "Ciphers with arbitrary finite domains" (2002), Feistel and cycle-walking ciphers.
    """
    assert position >= 0 and size >= 1, f"position {position}, size {size}"
    epoch, index = divmod(position, size)
    key = hashlib.blake2b(f"prompts {seed} {epoch}".encode(), digest_size=32).digest()
    half_bits = max(2, ((size - 1).bit_length() + 1) // 2)
    index = _feistel(index, half_bits, key)
    while index >= size:
        index = _feistel(index, half_bits, key)
    return index


def _feistel(value: int, half_bits: int, key: bytes) -> int:
    """A keyed permutation of 0 .. 4**half_bits - 1."""
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for turn in range(_FEISTEL_ROUNDS):
        message = bytes([turn]) + right.to_bytes(8, "little")
        mixed = int.from_bytes(hashlib.blake2b(message, key=key, digest_size=8).digest(), "little")
        left, right = right, left ^ (mixed & mask)
    return left << half_bits | right
