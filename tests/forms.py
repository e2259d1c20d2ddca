"""Cases of a matrix that are long forms: for `make test-long`, not for `make test`, as all that is marked `long`."""

import zlib
from collections.abc import Iterable
from typing import Any

import pytest


def cases(values: Iterable[Any], short: Iterable[Any]) -> list[Any]:
    """Values for `parametrize`, tuples where it has several names; those that are not `short` are long forms."""
    values, short = list(values), list(short)
    assert all(value in values for value in short), "a short case is none of the values"
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=[] if value in short else pytest.mark.long
        )
        for value in values
    ]


def in_part(file: str, name: str, part: str) -> bool:
    """Whether a long form belongs to part K of N (`K/N`); each belongs to one.

    Forms of one file and one first parameter, such as a family, stay together: they share what takes long to make.

    Raises:
        ValueError: `part` is no K/N with 1 <= K <= N.
    """
    k, _, n = part.partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise ValueError(f"part {part!r} is no K/N, such as 1/3")
    parameter = name.partition("[")[2].rstrip("]").partition("-")[0]
    return zlib.crc32(f"{parameter}|{file}".encode()) % int(n) == int(k) - 1
