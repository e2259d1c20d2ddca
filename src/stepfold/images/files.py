"""One picture of a file, of bounded size, scaled and cropped to the size at hand."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from stepfold.errors import UserError, first_line

MOST_PIXELS = 2**26
"""Of a picture that is read."""
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow says of a file that is no picture; SyntaxError of a broken PNG."""


def check_picture(path: Path, what: str) -> None:
    """Looks at the head of a file.

    Args:
        path: of the file.
        what: names it in an error.

    Raises:
        UserError: there is none, it is no picture, or has more than MOST_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                width, height = image.size
    except BROKEN as error:
        raise UserError(f"{what} cannot be read ({first_line(error)}); give a png, jpg or webp file") from None
    if width * height > MOST_PIXELS:
        raise UserError(f"{what} has {width} x {height} pixels, more than {MOST_PIXELS:,}; make it smaller")


def read_picture(path: Path | Image.Image, height: int, width: int) -> Tensor:
    """The picture of a file, or one in memory, as `fitted`.

    Raises:
        UserError: as `check_picture`, or its end is missing.
    """
    if isinstance(path, Image.Image):
        return fitted(path, height, width)
    check_picture(path, f"image {path}")
    try:
        with Image.open(path) as image:
            return fitted(image, height, width)
    except BROKEN as error:
        raise UserError(f"image {path} cannot be read ({first_line(error)}); give the whole file") from None


def fitted(image: Image.Image, height: int, width: int) -> Tensor:
    """Float32 [3, height, width] in [0, 1]: scaled to cover, then cropped around the centre."""
    cut = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 255
