"""Prompts come out of every usual file as they went in."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stepfold.errors import UserError
from stepfold.prompts.reading import open_prompts
from stepfold.prompts.tables import read_texts

TEXTS = ["a cat", 'say "hi", fox', "ünïcode 🦊", "two\nlines", "", "tab\there"]
PLAIN = [text for text in TEXTS if "\n" not in text]


def write(folder: Path, kind: str, column: str = "prompt") -> tuple[Path, list[str]]:
    path = folder / f"prompts.{kind}"
    if kind == "txt":
        path.write_text("\n".join(PLAIN) + "\n", encoding="utf-8-sig")
        return path, PLAIN
    if kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            rows.writerows([["id", column], *([i, text] for i, text in enumerate(TEXTS))])
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(TEXTS)))
    else:
        pq.write_table(pa.table({"id": list(range(len(TEXTS))), column: TEXTS}), path)
    return path, TEXTS


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl"])
def test_every_kind_comes_back(tmp_path: Path, kind: str, zipped: bool) -> None:
    path, texts = write(tmp_path, kind)
    if zipped:
        (packed := path.with_name(path.name + ".gz")).write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    assert list(read_texts(path)) == texts


def test_parquet_comes_back_and_is_not_read_whole(tmp_path: Path) -> None:
    path, texts = write(tmp_path, "parquet")
    assert list(read_texts(path)) == texts
    pq.write_table(pa.table({"caption": [f"prompt {i}" for i in range(30_000)]}), path)
    assert next(iter(read_texts(path))) == "prompt 0"
    assert sum(1 for _ in read_texts(path)) == 30_000


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_the_column_is_found_named_or_asked_for(tmp_path: Path, kind: str) -> None:
    path, texts = write(tmp_path, kind, "Prompt")  # as PartiPrompts.tsv has it
    assert list(read_texts(path)) == list(read_texts(path, "Prompt")) == texts
    with pytest.raises(UserError, match=r"no column 'prompt'|has no 'prompt'"):
        list(read_texts(path, "prompt"))
    path, _ = write(tmp_path, kind, "words")
    with pytest.raises(UserError, match=r"which column holds the prompts\? Give --column; it has id, words"):
        list(read_texts(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "x"}\nnot json\n', "line 2: not JSON"),
        ("a.jsonl", b'["prompt"]\n', "line 1: not an object"),
        ("a.jsonl", b'{"prompt": "x"}\n{"other": "y"}\n', "line 2: has no 'prompt'; it has other"),
        ("a.parquet", b"no parquet at all", "no parquet file"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.csv", b"prompt\n\xff\xfe\n", "not UTF-8"),
        ("a.csv", b"", "which column"),
    ],
)
def test_damaged_files_are_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_texts(tmp_path / name))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        list(read_texts(tmp_path / "nothing.csv"))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.txt.gz"])
def test_training_reads_text_and_says_how_to_make_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("prompt\nfox\n")
    with pytest.raises(UserError, match=r"make one of it with stepfold prompts clean .* --out prompts\.txt"):
        open_prompts(tmp_path / name)
