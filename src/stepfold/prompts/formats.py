"""What a file of prompts is, by its first bytes: its encoding, text or JSON or a table, and what parts its columns."""

import codecs
import csv
import gzip
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from stepfold.errors import UserError
from stepfold.prompts.files import kind_of

USUAL = ("prompt", "text", "caption", "prompts", "texts", "captions", "prompt_en")
"""Columns that are taken without being named, whatever their case."""
LONGEST_LINE = 2**24
"""Characters; a file of a single endless line, gzipped or not, does not fill the memory."""
HEAD = 2**16
"""Bytes that are looked at."""
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""What a file begins with -> its encoding."""
NO_PROMPTS = {
    b"PK\x03\x04": "a zip archive or an Excel workbook; unpack it, or save the sheet as csv",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it: unzstd",
    b"\xfd7zXZ\0": "packed by xz; unpack it: unxz",
    b"BZh91AY&SY": "packed by bzip2; unpack it: bunzip2",
    b"ARROW1": "an Arrow file; save it as parquet",
    b"SQLite format 3\0": "a database; save its table as csv",
    b"%PDF-": "a PDF; save it as text",
    b"{\\rtf": "rich text; save it as plain text",
    b"<!doctype html": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
    b"<?xml": "XML; save it as text, one prompt a line",
    b"version https://git-lfs.github.com": "the pointer of a file that was not downloaded; git lfs pull",
}
"""How other files begin -> what they are and the fix."""
_LIST = re.compile(r'\[\s*(?:\[\s*)*(?:"|\{\s*"|\]\s*(?:\n|$))')
_OBJECT = re.compile(r'\{\s*(?:"(?:[^"\\\n]|\\.)*"\s*:|\}\s*(?:\n|$))')
_NAME = re.compile(r"[\w .#-]{0,40}")
_ESCAPED = re.compile(r"[\udc80-\udcff]")  # bytes that are not UTF-8, as Python's `surrogateescape` keeps them

Kind = Literal["text", "json lines", "json list", "json object", "table", "parquet"]


@dataclass(frozen=True)
class Form:
    """What a file is.

    Attributes:
        kind: how prompts stand in it.
        encoding: of its characters.
        gzipped: whether it is.
        delimiter: what parts the columns of a table.
        skip: lines of a table before the names of its columns.
    """

    kind: Kind
    encoding: str = "utf-8-sig"
    gzipped: bool = False
    delimiter: str = ","
    skip: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether its lines are prompts as they lie on disk."""
        return self == Form("text")


def form_of(path: Path, column: str | None = None) -> Form:
    """What a file is, as its beginning says, and its suffix where that says nothing.

    Args:
        path: of the file.
        column: of a table, if it is known.

    Raises:
        UserError: it is of a kind that holds no prompts; the fix is named.
        OSError, EOFError, zlib.error: it cannot be read, or is not gzipped as its suffix says.
    """
    suffix, gzipped = kind_of(path), path.suffix.lower() == ".gz"
    with path.open("rb") as file:
        head = file.read(HEAD)
    if gzipped := gzipped or head.startswith(GZIP):
        with gzip.open(path) as unpacked:
            head = unpacked.read(HEAD)
    _refuse(path, suffix, head)
    if head.startswith(PARQUET) or suffix == ".parquet":
        return Form("parquet")
    encoding = next((name for mark, name in ENCODINGS.items() if head.startswith(mark)), "utf-8-sig")
    text = codecs.getincrementaldecoder(encoding)("replace").decode(head).lstrip()
    kind: Kind
    if suffix in (".json", ".jsonl", ".ndjson") or _LIST.match(text) or _OBJECT.match(text):
        kind = "json list" if text.startswith("[") else "json lines"
        if text.startswith("{") and suffix not in (".jsonl", ".ndjson") and "\n" in text and not _is_json(text):
            kind = "json object"
        return Form(kind, encoding, gzipped)
    first, _, rest = text.partition("\n")
    if suffix in (".csv", ".tsv", ".tab"):
        if told := re.fullmatch(r'"?sep=(.)"?\s*', first):  # so says Excel
            return Form("table", encoding, gzipped, told[1], skip=1)
        return Form("table", encoding, gzipped, _delimiter(first, "," if suffix == ".csv" else "\t", column))
    if delimiter := _of_header(first, rest):
        return Form("table", encoding, gzipped, delimiter)
    return Form("text", encoding, gzipped)


def opened(path: Path, form: Form) -> TextIO:
    """A file, to be read as text; bytes that are not UTF-8 become what `lines_of` and `checked` refuse."""
    by: Any = gzip.open if form.gzipped else open
    errors = "surrogateescape" if form.encoding == "utf-8-sig" else "strict"
    return by(path, "rt", encoding=form.encoding, errors=errors, newline="")


def lines_of(path: Path, file: TextIO) -> Iterator[str]:
    """The lines of a file, each of bounded length.

    Raises:
        UserError: one is too long or not UTF-8.
    """
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE and not line.endswith(("\n", "\r")):
            raise UserError(f"{path}: a line of more than {LONGEST_LINE:,} characters; put one prompt a line")
        yield checked(line, path, number)


def checked(text: str, path: Path, line: int) -> str:
    """The text, which begins in this line, unless it is not UTF-8.

    Raises:
        UserError: it is not.
    """
    if not text.isascii() and (found := _ESCAPED.search(text)):
        raise UserError(f"{path}, line {line + text.count(chr(10), 0, found.start())}: not UTF-8; {encoding_fix(path)}")
    return text


def encoding_fix(path: Path) -> str:
    """What to do with a file that is not UTF-8."""
    name = shlex.quote(str(path))
    return f"save the file as UTF-8 (one from Windows: iconv -f CP1252 -t UTF-8 {name} > utf8{kind_of(path)})"


def _refuse(path: Path, suffix: str, head: bytes) -> None:
    """Files that hold no prompts, or none that are read."""
    if head[257:262] == b"ustar":
        raise UserError(f"{path}: a tar archive; unpack it (tar -xf) into a folder, and give the folder")
    beginning = head.lstrip()[:64]
    for start, said in NO_PROMPTS.items():
        if head.startswith(start) or (start.startswith(b"<") and beginning.lower().startswith(start)):
            what, _, fix = said.partition("; ")
            raise UserError(f"{path}: is {what}; {fix}")
    if suffix in (".yaml", ".yml", ".toml", ".xlsx", ".xls", ".docx"):
        raise UserError(f"{path}: a {suffix} file is not read; save it as text, one prompt a line, or as json or csv")


def _is_json(text: str) -> bool:
    """Whether the first line is whole by itself."""
    try:
        json.loads(text.partition("\n")[0])
    except (ValueError, RecursionError):
        return False
    return True


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line.rstrip("\r\n")], delimiter=delimiter), [])
    except csv.Error:
        return []


def _delimiter(first: str, own: str, column: str | None) -> str:
    """What parts the columns of a table: that which gives it a column of prompts, else what its suffix says."""
    wanted = (column.lower(),) if column else USUAL
    for delimiter in sorted(",\t;|", key=lambda each: each != own):
        if any(cell.strip().lower() in wanted for cell in _cells(first, delimiter)):
            return delimiter
    return own


def _of_header(first: str, rest: str) -> str | None:
    """What parts the columns of a text file, if its first line names columns, one of them that of prompts."""
    second = rest.lstrip().partition("\n")[0]
    for delimiter in "\t,;|":
        cells = _cells(first, delimiter)
        named = len(cells) > 1 and all(cell == cell.strip() and _NAME.fullmatch(cell) for cell in cells)
        if named and any(cell.lower() in USUAL for cell in cells) and (not second or delimiter in second):
            return delimiter
    return None


def chosen(path: Path, columns: Sequence[str], column: str | None, hint: str = "") -> str:
    """The column to read.

    Raises:
        UserError: there is none of that name, or none or several of the usual ones.
    """
    there = ", ".join(columns)
    if column is not None:
        if column not in columns:
            raise UserError(f"{path} has no column {column!r}; it has {there}")
        found = [name for name in columns if name == column]
    else:
        found = [name for name in columns if name.strip().lower() in USUAL]
    if not found:
        raise WhichColumn(f"{path}: which column holds the prompts? Give --column; it has {there}{hint}")
    if len(found) > 1:
        fix = "Give --column" if len({*found}) > 1 else "Name each column once"
        raise WhichColumn(f"{path}: which column holds the prompts, {' or '.join(found)}? {fix}; it has {there}")
    return found[0]


class WhichColumn(UserError):
    """Raised where the column has to be named."""
