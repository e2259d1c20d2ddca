"""Prompts out of any usual file: text, json, jsonl, csv, tsv or parquet, gzipped or not; one at a time."""

import csv
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepfold.errors import UserError
from stepfold.prompts.files import Part, parts_of
from stepfold.prompts.formats import LONGEST_LINE, Form, chosen, encoding_fix, form_of, lines_of, opened
from stepfold.prompts.jsons import json_texts

LARGEST_BLOWN_UP, LARGEST_RATIO = 2**28, 1000
"""Bytes of one column of a row group of parquet that is so many times as large as it is in the file."""
LONGEST_TEXT = 2**16
"""Characters of a text that are looked at: a prompt has 2,000, and a longer one's words take many times its room."""
HEADLESS = "; if these are prompts and no names, write prompt in a line above them, or call the file .txt"
csv.field_size_limit(LONGEST_LINE)


def read_texts(path: Path, column: str | None = None) -> Iterator[str]:
    """Every prompt of a path, in its order, as it stands there, of a longer one the first LONGEST_TEXT characters.

    Args:
        path: of a file, a folder or a pattern, see `parts_of`. What a file is, its content says; a text file has one
            prompt a line.
        column: of a table; a usual one if None.

    Raises:
        UserError: no such file or column, or a line that cannot be read, named by its number.
    """
    return (text[:LONGEST_TEXT] for part in parts_of(path) for text in _texts(part, column))


def _texts(part: Part, column: str | None) -> Iterator[str]:
    """Those of one file."""
    path = part.path
    try:
        form = form_of(path, column)
        if part.is_caption:
            with opened(path, Form("text", form.encoding)) as file:
                yield one_line(" ".join(lines_of(path, file))[:LONGEST_TEXT])
            return
        if form.kind == "parquet":
            yield from _parquet(path, column)
            return
        with opened(path, form) as file:
            if form.kind == "text":
                yield from (line.rstrip("\r\n") for line in lines_of(path, file))
            elif form.kind == "table":
                yield from _delimited(path, form, column)
            else:
                yield from json_texts(path, file, form.kind, column)
    except UnicodeError as error:
        raise UserError(f"{path}: not the text that it says it is ({error}); {encoding_fix(path)}") from None
    except (OSError, EOFError, csv.Error, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); is it whole?") from None


def one_line(text: str) -> str:
    """Without line breaks and other runs of spaces."""
    return " ".join(text.split())


def _rows(path: Path, form: Form, quoted: bool) -> Iterator[tuple[int, list[str], str]]:
    """Of a table: the line on which a row begins, its cells, and the row as it stands there."""
    raw: list[str] = []

    def noted() -> Iterator[str]:
        for line in lines:
            raw.append(line)
            yield line

    with opened(path, form) as file:
        lines, number = lines_of(path, file), 1
        for _ in range(form.skip):
            next(lines, "")
            number += 1
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        for cells in csv.reader(noted(), delimiter=form.delimiter, strict=True, quoting=quoting):
            yield number, cells, "".join(raw).rstrip("\r\n")
            number += len(raw)
            raw.clear()


def _delimited(path: Path, form: Form, column: str | None) -> Iterator[str]:
    """The prompts of a table whose first row names its columns.

    Raises:
        UserError: a row has more cells than the first, or ends before its prompt, or a quote is not closed.
    """
    quoted = form.delimiter != "\t" or _quotes_enclose(path, form)
    rows = ((line, cells, raw) for line, cells, raw in _rows(path, form, quoted) if cells)
    line, columns, _ = next(rows, (1, list[str](), ""))
    name = chosen(path, columns, column, HEADLESS)
    index, width = columns.index(name), len(columns)
    named = {"\t": "tab"}.get(form.delimiter, repr(form.delimiter))
    try:
        for line, cells, raw in rows:
            if any(cell.strip() for cell in cells[width:]):
                if width > 1 or form.delimiter.join(cells) != raw:
                    raise UserError(
                        f"{path}, line {line}: has {len(cells)} columns, but the first line names {width}; put a text "
                        f"with a {named} in it in double quotes, or put one prompt a line in a .txt file"
                    )
                yield raw  # one column, in which nobody quotes
            elif index >= len(cells):
                raise UserError(
                    f"{path}, line {line}: has {len(cells)} of {width} columns and none for {name!r}; fill the row up"
                )
            else:
                yield cells[index]
    except csv.Error as error:
        if "expected" not in str(error):  # neither a delimiter that is, nor an end that is not
            raise
        raise UserError(
            f"{path}, after line {line}: a quote opens a field and is not closed at its end ({error}); "
            'write "" for a quote in a quoted field, or save the file as jsonl'
        ) from None


def _quotes_enclose(path: Path, form: Form) -> bool:
    """Whether the quotes in a tsv enclose its cells, as programs write it; else they are text, as people write it.

    Raises:
        UserError: either may be.
    """
    plain, width, fits, begin = 0, 0, True, False
    for _, cells, _ in _rows(path, form, quoted=False):
        if cells:
            plain, width = plain + 1, width or len(cells)
            fits &= len(cells) == width
            begin |= any(cell.startswith('"') for cell in cells)
    if not begin:
        return False
    enclosed, over = 0, 0
    try:
        for line, cells, raw in _rows(path, form, quoted=True):
            enclosed += bool(cells)
            over = over or (line if "\n" in raw or "\r" in raw else 0)
    except csv.Error as error:
        return "expected after" not in str(error)  # a text goes on after its quote
    if fits and enclosed != plain:
        raise UserError(
            f"{path}, line {over}: a quote opens a text that ends on a later line, or is part of a text; "
            "save the file as csv or jsonl"
        )
    return True


def _parquet(path: Path, column: str | None) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError("parquet needs pyarrow: pip install pyarrow") from None
    try:
        schema = parquet.read_schema(path)
        name = chosen(path, schema.names, column)
        kind = schema.field(name).type
        words = [name] if str(kind) in ("string", "large_string", "binary", "large_binary") else None
        if not words and not str(kind).startswith("dictionary<values=string") and str(kind) != "string_view":
            # numbers, and nested columns, of which a few hundred bytes become gigabytes
            raise UserError(f"{path}: the column {name!r} holds {kind}, not texts; give one of texts with --column")
        file = parquet.ParquetFile(path, read_dictionary=words)  # a word that is repeated stays one
        _check_size(path, file, name)
        for batch in file.iter_batches(columns=[name], batch_size=8192):
            for value in batch.column(0):
                text = value.as_py() or ""
                yield text.decode() if isinstance(text, bytes) else text
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
