"""Prompts out of JSON: a list, an object a line, or one object; a piece of the file at a time."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from stepfold.errors import UserError
from stepfold.prompts.formats import LONGEST_LINE, Kind, checked, chosen, lines_of

PIECE = 2**16
_SPACE = re.compile(r"[ \t\r\n]*")


def json_texts(path: Path, file: TextIO, kind: Kind, column: str | None) -> Iterator[str]:
    """The prompts of a file of JSON.

    A value is a text, a list of texts, each of which is a prompt, null (a blank one), or an object that has one of
    these under a key, its column.

    Raises:
        UserError: the line that is not JSON, or holds something else.
    """
    values = {"json lines": _lines, "json list": _elements, "json object": _object}[kind]
    name = column
    for line, value in values(path, file):
        where = f"{path}, line {line}"
        if isinstance(value, dict):
            name = name or chosen(path, list(value), None)
            if name not in value:
                raise UserError(f"{where}: has no {name!r}; it has {', '.join(value)}")
            yield from _texts(value[name], f"{where}: {name!r}")
        else:
            yield from _texts(value, f"{where}: the value")


def _texts(value: Any, what: str) -> list[str]:
    """The prompts of a value; a blank one where it is nothing."""
    several = isinstance(value, list)
    texts: list[Any] = (value or [""]) if several else ["" if value is None else value]
    for each in texts:
        if not isinstance(each, str):
            raise UserError(
                f"{what} {'holds' if several else 'is'} {_in_words(each)}, which is no text; give a text in quotes, or "
                "a list of texts, each of which is one prompt"
            )
    return [_whole(each) for each in texts]


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object of {', '.join(value)}" if value else "an object"
    return "a list" if isinstance(value, list) else json.dumps(value)


def _whole(text: str) -> str:
    """Halves of characters, which json can say and no file can hold, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _lines(path: Path, file: TextIO) -> Iterator[tuple[int, Any]]:
    """A value a line."""
    for number, line in enumerate(lines_of(path, file), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _not_json(path, number, error) from None
            yield number, value


def _object(path: Path, file: TextIO) -> Iterator[tuple[int, Any]]:
    """One object, over several lines."""
    text = file.read(LONGEST_LINE + 1)
    if len(text) > LONGEST_LINE:
        raise UserError(f"{path}: one object of more than {LONGEST_LINE:,} characters; write one object a line")
    try:
        yield 1, json.loads(checked(text, path, 1))
    except json.JSONDecodeError as error:
        raise _not_json(path, error.lineno, error) from None
    except RecursionError as error:
        raise _not_json(path, 1, error) from None


def _elements(path: Path, file: TextIO) -> Iterator[tuple[int, Any]]:
    """Those of a list, or of several one after the other."""
    decode = json.JSONDecoder().raw_decode
    text, at, line = "", 0, 1

    def more() -> bool:
        nonlocal text, at
        if len(text) - at > LONGEST_LINE or not (piece := file.read(max(PIECE, len(text) - at))):
            return False
        text, at = text[at:] + checked(piece, path, line + text.count("\n", at)), 0
        return True

    def advance(end: int) -> None:
        nonlocal at, line
        line, at = line + text.count("\n", at, end), end

    def character() -> str:
        """The next one that is no space; nothing at the end."""
        while True:
            space = _SPACE.match(text, at)
            assert space is not None
            advance(space.end())
            if at < len(text) or not more():
                return text[at : at + 1]

    def taken(wanted: str) -> str:
        if (found := character()) not in wanted or not found:
            missing = f"expected {' or '.join(wanted)}"
            raise _not_json(path, line, ValueError(missing))
        advance(at + 1)
        return found

    while character():
        taken("[")
        ended = character() == "]" and taken("]")
        while not ended:
            character()
            while True:
                try:
                    value, end = decode(text, at)
                except (ValueError, RecursionError) as error:
                    if not more():
                        place = error.pos if isinstance(error, json.JSONDecodeError) else at
                        raise _not_json(path, line + text.count("\n", at, place), error) from None
                    continue
                if text[end : end + 1] in (*",] \t\r\n",) or not more():  # else a number may go on
                    break
            begun = line
            advance(end)
            yield begun, value
            ended = taken(",]") == "]"


def _not_json(path: Path, line: int, error: Exception) -> UserError:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return UserError(f"{path}, line {line}: not JSON ({reason}); write a list of texts, or one object a line")
