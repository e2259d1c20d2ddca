"""Which files a path of prompts stands for: itself, those of a folder or a pattern, or captions beside pictures."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stepfold.errors import UserError

KINDS = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Suffixes of files of prompts, in folders; `.gz` may follow. What is in a file, its content says."""
CAPTIONS = (".txt", ".caption")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl", ".mp4", ".webm", ".mov")
BETWEEN = "\t"
"""Parts a prompt, its image's path and that file's fingerprint in a line; it is in none of the three."""
ALLOWED = "text, one prompt a line, or json, jsonl, csv, tsv or parquet"


@dataclass(frozen=True)
class Part:
    """A file of prompts, or one that is a single prompt: the caption of the picture beside it."""

    path: Path
    is_caption: bool = False


def parts_of(path: Path) -> list[Part]:
    """The files of a path, sorted by name.

    Args:
        path: a file; a folder, of files of prompts of one kind, or of pictures with a caption beside each; or a
            pattern such as `shards/*.parquet` or `pictures/**/*.txt`.

    Raises:
        UserError: there is none, or a folder holds several kinds of files, of which one is to be named.
    """
    if path.is_dir():
        return _of_folder(path)
    if path.exists():
        if not path.is_file():
            raise UserError(f"{path}: is not a regular file (pipes cannot be shuffled); save the prompts to a file")
        return [Part(path)]
    if not glob.has_magic(str(path)):
        raise UserError(f"{path}: no such file of prompts; give {ALLOWED}")
    found = sorted(each for each in map(Path, glob.glob(str(path), recursive=True)) if each.is_file())
    if not found:
        raise UserError(
            f"{path}: no file is called like that; give a file, a folder or a pattern of files that are there"
        )
    return _with_captions(path, found, {each for place in {f.parent for f in found} for each in place.iterdir()})


def kind_of(path: Path) -> str:
    """The suffix, in small letters: `.csv` for `prompts.csv.gz`."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _of_folder(folder: Path) -> list[Part]:
    there = sorted(each for each in folder.iterdir() if each.is_file() and not each.name.startswith("."))
    found = [each for each in there if kind_of(each) in (*KINDS, *CAPTIONS)]
    if not found:
        raise UserError(
            f"{folder}: is a folder without files of prompts ({', '.join(KINDS)}); give one with, a file, or a pattern "
            f"such as '{folder}/**/*.txt'"
        )
    parts = _with_captions(folder, found, there)
    kinds = sorted({kind_of(part.path) for part in parts})
    if len(kinds) > 1:
        raise UserError(
            f"{folder}: holds {' and '.join(kinds)} files; which are the prompts? Give a pattern such as "
            f"'{folder}/*{kinds[0]}'"
        )
    return parts


def _with_captions(path: Path, found: Sequence[Path], there: Sequence[Path] | set[Path]) -> list[Part]:
    """The files found; only the captions, where pictures of the same names are beside them."""
    pictures = {each.with_suffix("") for each in there if each.suffix.lower() in PICTURES}
    texts = [each for each in found if each.suffix.lower() in CAPTIONS]
    captions = [each for each in texts if each.with_suffix("") in pictures]
    if captions and (alone := sorted(set(texts) - set(captions))):
        raise UserError(
            f"{path}: {captions[0].name} is the caption of a picture, but {alone[0].name} has none beside it; move "
            f"{'it' if len(alone) == 1 else f'those {len(alone)} files'} away, or give a pattern of the captions"
        )
    return [Part(each, is_caption=True) for each in captions] or [Part(each) for each in found]
