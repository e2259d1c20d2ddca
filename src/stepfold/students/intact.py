"""A student's own files of weights: refused where they are cut, or hold other tensors than they should."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from stepfold.errors import UserError, first_line

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a tensor -> its shape."""
AGAIN = "copy the student folder again"


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        UserError: it is damaged, or holds numbers that are not finite.
    """
    try:
        weights = load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(file, error) from None
    for name, value in weights.items():
        if not value.isfinite().all():
            raise UserError(f"{file} is damaged ({name} is not finite); {AGAIN}")
    return weights


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a file's tensors, which are not read.

    Raises:
        UserError: it is damaged, such as cut short.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(file, error) from None


def damaged(file: Path, error: Exception) -> UserError:
    """The error for a file that does not load."""
    return UserError(f"{file} is damaged ({first_line(error)}); {AGAIN}")


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of tensors."""
    return {name: tuple(value.shape) for name, value in weights.items()}


def check_shapes(file: Path, found: Shapes, expected: Shapes) -> None:
    """Refuses a file that lacks a tensor of the student's, has one more, or one of another shape.

    Raises:
        UserError: how many, and the first of them.
    """
    lacking = [f"lacks {name}" for name in expected if name not in found]
    strange = [f"has {name}, which no layer takes" for name in found if name not in expected]
    shapes = [
        f"has {name} as {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if wrong := [*strange, *lacking, *shapes]:
        raise UserError(
            f"{file} is not this student's: it {wrong[0]} ({len(wrong)} differences, {len(expected)} tensors "
            f"expected); {AGAIN}"
        )


def digest_of(shapes: Shapes) -> str:
    """A fingerprint of names and shapes."""
    rows = "\n".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
    return hashlib.sha256(rows.encode()).hexdigest()


def digests_in(folder: Path) -> dict[str, str]:
    """Name -> fingerprint of the files of weights that lie directly in a student's folder."""
    return {file.name: digest_of(shapes_in(file)) for file in sorted(folder.glob("*.safetensors"))}


def check_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Refuses a folder whose files of weights are not those that its card was written with.

    Args:
        folder: the student's.
        digests: of its card.

    Raises:
        UserError: one of them is gone, damaged, or holds other tensors.
    """
    found = digests_in(folder)  # of cards without digests too, which finds the damaged ones
    for name, digest in digests.items():
        if name not in found:
            raise UserError(f"{folder} lacks {name}; {AGAIN}")
        if found[name] != digest:
            raise UserError(f"{folder / name} holds other tensors than this student's; {AGAIN}")
