"""Cases of a matrix that are long forms: for `make test-long`, not for `make test`, as all that is marked `long`."""

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
