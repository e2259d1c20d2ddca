"""A folder of pictures with captions, in the layout that the `datasets` library calls an image folder."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stepfold.errors import UserError, first_line
from stepfold.fingerprints import sampled_sha256
from stepfold.images.files import BROKEN, fitted

CAPTION = "text"
METADATA = "metadata.jsonl"


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Pictures and captions; both stay on disk. It also serves where prompts are read: a caption is a prompt.

    Attributes:
        path: the folder.
        rows: of the `datasets` library, with `image` and `text`.
        sha256: of the metadata file, in hexadecimal.
        num_blank, num_duplicate: 0; a caption may come as often as it likes.
    """

    path: Path
    rows: Any
    sha256: str
    num_blank: int = 0
    num_duplicate: int = 0

    @property
    def source(self) -> Path:
        """As of a `PromptFile`."""
        return self.path

    def __len__(self) -> int:
        return len(self.rows)

    def prompt(self, index: int) -> str:
        """The caption of picture `index`, 0 <= index < len(self)."""
        return self.rows[CAPTION][index]

    def picture(self, index: int, height: int, width: int) -> Tensor:
        """Picture `index` as `fitted`.

        Raises:
            UserError: the file is gone or is no picture.
        """
        try:
            return fitted(self.rows[index]["image"], height, width)
        except BROKEN as error:
            raise UserError(f"{self.path}: picture {index} cannot be read ({error}); replace it") from None

    def fingerprint(self) -> str:
        """Changes with the names, the sizes and, as good as surely, the contents of the files; see `sampled_sha256`."""
        files = (path for path in self.path.rglob("*") if path.is_file())
        return sampled_sha256(files, self.path, num_blocks=2)


def open_images(path: str | os.PathLike[str]) -> ImageFolder:
    """Opens a folder of pictures with a metadata.jsonl of `{"file_name": ..., "text": caption}` lines.

    Raises:
        UserError: no such folder, no metadata.jsonl in it, a row without picture or caption, or the `datasets` library
            is not installed.
    """
    path = Path(path)
    if not (path / METADATA).is_file():
        raise UserError(
            f"{path}: no folder with a {METADATA}; give one whose lines are "
            '{"file_name": "0001.png", "text": "the caption"}'
        )
    try:
        import datasets
    except ImportError:
        raise UserError("reading images needs the datasets library: pip install datasets") from None
    datasets.disable_progress_bars()
    try:
        rows: Any = datasets.load_dataset("imagefolder", data_dir=str(path), split="train")
    except Exception as error:  # the library's builders raise whatever their parsers do
        cause = error.__cause__ or error
        raise UserError(
            f"{path}: not readable as an image folder ({first_line(cause)}); docs/teachers.md shows one"
        ) from None
    if CAPTION not in rows.column_names or any(not isinstance(text, str) or not text for text in rows[CAPTION]):
        raise UserError(f"{path / METADATA}: a row has no caption; every line needs a `{CAPTION}`")
    if not len(rows):
        raise UserError(f"{path}: no pictures in it; give a folder of png, jpg or webp files")
    return ImageFolder(path, rows, hashlib.sha256((path / METADATA).read_bytes()).hexdigest())
