"""Prompts with an image each: a table with a column of paths beside that of prompts."""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from stepfold.errors import UserError
from stepfold.fingerprints import sampled_sha256
from stepfold.images.files import check_picture
from stepfold.prompts.files import BETWEEN, parts_of
from stepfold.prompts.formats import form_of
from stepfold.prompts.syntax import is_blank
from stepfold.prompts.tables import one_line, read_texts


def lines_with_images(path: Path, column: str) -> Iterator[str]:
    """A line for each row: prompt, path below the table's folder, fingerprint; nothing for a blank prompt.

    Args:
        path: of one table or file of JSON.
        column: of paths.

    Raises:
        UserError: it has no columns, no such column, a row without image, or an image that cannot be read.
    """
    parts = parts_of(path)
    if len(parts) > 1 or parts[0].is_caption or form_of(parts[0].path, column).kind == "text":
        raise UserError(
            f"{path}: teacher.image_column is {column!r}, and this is no table; write a file of lines "
            f'{{"prompt": "...", "{column}": "cat.png"}}, called .jsonl'
        )
    rows = zip_longest(read_texts(path), read_texts(path, column))
    for number, (prompt, image) in enumerate(rows, 1):
        where = f"{path}, prompt {number}"
        if prompt is None or image is None:
            raise UserError(f"{where}: there is not one {column!r} for each prompt; write one row for each image")
        if is_blank(prompt):
            yield ""
            continue
        if not image.strip() or any(mark in image for mark in "\t\r\n"):
            raise UserError(f"{where}: {column!r} is {image!r}, which is no path of an image; give one to each prompt")
        file = parts[0].path.parent / image
        check_picture(file, f"{where}: image {image!r}")
        yield BETWEEN.join((one_line(prompt), image, sampled_sha256([file], file.parent, 2)[:16]))
