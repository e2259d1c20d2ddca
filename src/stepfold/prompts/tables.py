"""Prompts out of any usual file: text, jsonl, csv, tsv or parquet, gzipped or not; one at a time."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from stepfold.errors import UserError

USUAL = ("prompt", "text", "caption")
"""Columns that are taken without being named, whatever their case."""
TABLES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
LARGEST_BLOWN_UP, LARGEST_RATIO = 2**28, 1000
"""Bytes of one column of a row group of parquet that is so many times as large as it is in the file."""
LONGEST_LINE = 2**24
"""Characters; a file of a single endless line, gzipped or not, does not fill the memory."""
LONGEST_TEXT = 2**16
"""Characters of a text that are looked at: a prompt has 2,000, and a longer one's words take many times its room."""
csv.field_size_limit(LONGEST_LINE)


def kind_of(path: Path) -> str:
    """The suffix that says what a file is: `.csv` for `prompts.csv.gz`; `.txt` for any other."""
    name = path.name.removesuffix(".gz")
    suffix = Path(name).suffix.lower()
    return suffix if suffix in TABLES else ".txt"


def read_texts(path: Path, column: str | None = None) -> Iterator[str]:
    """Every prompt of a file, in its order, as it stands there, of a longer one the first LONGEST_TEXT characters.

    Args:
        path: of the file; a text file has one prompt a line.
        column: of a table; one of USUAL if None.

    Raises:
        UserError: no such file or column, or a line that cannot be read, named by its number.
    """
    return (text[:LONGEST_TEXT] for text in _texts(path, column))


def _texts(path: Path, column: str | None) -> Iterator[str]:
    """See `read_texts`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a file of prompts (txt, jsonl, csv, tsv or parquet)")
    kind = kind_of(path)
    try:
        if kind == ".parquet":
            yield from _parquet(path, column)
            return
        with _open(path) as file:
            if kind == ".txt":
                yield from (line.rstrip("\r\n") for line in _lines(path, file))
            elif kind in (".csv", ".tsv"):
                yield from _delimited(path, file, "," if kind == ".csv" else "\t", column)
            else:
                yield from _json_lines(path, file, column)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    except (OSError, EOFError, csv.Error, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); is it whole?") from None


def one_line(text: str) -> str:
    """Without line breaks and other runs of spaces."""
    return " ".join(text.split())


def _open(path: Path) -> TextIO:
    opened: Any = gzip.open if path.suffix == ".gz" else open
    return opened(path, "rt", encoding="utf-8-sig", newline="")


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    """The lines of a file, each of bounded length."""
    while line := file.readline(LONGEST_LINE):
        if len(line) == LONGEST_LINE and not line.endswith(("\n", "\r")):
            raise UserError(f"{path}: a line of more than {LONGEST_LINE:,} characters; put one prompt a line")
        yield line


def _chosen(path: Path, columns: Sequence[str], column: str | None) -> str:
    """The column to read."""
    if column is not None:
        if column not in columns:
            raise UserError(f"{path} has no column {column!r}; it has {', '.join(columns)}")
        return column
    found = [name for usual in USUAL for name in columns if name.lower() == usual]
    if not found:
        raise UserError(f"{path}: which column holds the prompts? Give --column; it has {', '.join(columns)}")
    return found[0]


def _delimited(path: Path, file: TextIO, delimiter: str, column: str | None) -> Iterator[str]:
    rows = csv.DictReader(_lines(path, file), delimiter=delimiter, strict=True)
    name, line = _chosen(path, rows.fieldnames or [], column), 1
    try:
        for row in rows:
            line = rows.line_num
            yield row[name] or ""
    except csv.Error as error:
        if "expected" not in str(error):  # neither a delimiter that is, nor an end that is not
            raise
        raise UserError(
            f"{path}, after line {line}: a quote opens a field and is not closed at its end ({error}); "
            'write "" for a quote in a quoted field, or save the file as jsonl'
        ) from None


def _json_lines(path: Path, file: TextIO, column: str | None) -> Iterator[str]:
    name = column
    for number, line in enumerate(_lines(path, file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); write one object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not an object; each line needs one, with the prompt under a key")
        name = name or _chosen(path, list(row), None)
        if name not in row:
            raise UserError(f"{path}, line {number}: has no {name!r}; it has {', '.join(row)}")
        yield _whole(str(row[name] or ""))


def _whole(text: str) -> str:
    """Halves of characters, which json can say and no file can hold, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parquet(path: Path, column: str | None) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError:
        raise UserError("parquet needs pyarrow: pip install pyarrow") from None
    try:
        schema = parquet.read_schema(path)
        name = _chosen(path, schema.names, column)
        kind = schema.field(name).type
        if types.is_nested(kind):  # of which a few hundred bytes become gigabytes
            raise UserError(f"{path}: the column {name!r} holds {kind}, not texts; give one of texts with --column")
        words = [name] if str(kind) in ("string", "large_string", "binary", "large_binary") else None
        file = parquet.ParquetFile(path, read_dictionary=words)  # a word that is repeated stays one
        _check_size(path, file, name)
        for batch in file.iter_batches(columns=[name], batch_size=8192):
            for value in batch.column(0):
                yield str(value.as_py() or "")
    except (ArrowException, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, UserError | UnicodeDecodeError):
            raise
        raise UserError(f"{path}: is no parquet file that can be read ({error}); is it whole?") from None


def _check_size(path: Path, file: Any, name: str) -> None:
    """Refuses a column that says of itself that it becomes far more than it is in the file."""
    for group in range(file.metadata.num_row_groups):
        columns = (file.metadata.row_group(group).column(i) for i in range(file.metadata.num_columns))
        for column in columns:
            small, large = column.total_compressed_size, column.total_uncompressed_size
            if column.path_in_schema == name and large > max(LARGEST_BLOWN_UP, LARGEST_RATIO * small):
                raise UserError(
                    f"{path}: {small:,} bytes of the column {name!r} become {large:,}; "
                    "write it again in smaller row groups, or as text, one prompt a line"
                )
