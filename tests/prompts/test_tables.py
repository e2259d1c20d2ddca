"""Prompts come out of every usual file as they went in."""

import csv
import gc
import gzip
import json
import re
import shlex
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forms import cases

from stepfold.errors import UserError
from stepfold.prompts.reading import open_prompts
from stepfold.prompts.tables import LONGEST_TEXT, read_texts

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
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": 3}\n', "line 2: 'prompt' is 3, which is no text"),
        ("a.jsonl", b'{"prompt": ["x", null]}\n', "line 1: 'prompt' holds null, which is no text"),
        ("a.jsonl", b'{"prompt": {"en": "x"}}\n', "line 1: 'prompt' is an object of en, which is no text"),
        ("a.json", b'["x",\n [["y"]]]\n', "line 2: the value holds a list, which is no text"),
        ("a.json", b'["x",\n\n "y" "z"]\n', "line 3: not JSON .expected , or \\]"),
        ("a.json", b'["x",\n "y', "line 2: not JSON .Unterminated string"),
        ("a.json", b'[\n"a \xe9"]', "line 2: not UTF-8"),
        ("a.json", b'["x"] y', "line 1: not JSON .expected \\["),
        ("a.jsonl", b'{"prompt": "x"}\n{"other": "y"}\n', "line 2: has no 'prompt'; it has other"),
        ("a.parquet", b"no parquet at all", "no parquet file"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.csv", b"prompt\n\xff\xfe\n", "not UTF-8"),
        ("a.csv", b"", "which column"),
        ("a.tsv", b'prompt\nfox\n"cat\nowl\n', "after line 2: a quote opens a field and is not closed"),
        ("a.csv", b'prompt\n"red" fox\ncat\n', "after line 1: a quote opens a field and is not closed at its end"),
        ("a.tsv", b'prompt\tn\n"cat\t1\nowl\t2\nfox"\t3\n', "line 2: a quote opens a text that ends on a later line"),
        ("a.csv", b"prompt,n\ncat,1\nred, owl,2\n", "line 3: has 3 columns, but the first line names 2; put a text"),
        ("a.csv", b"n,prompt\n1,cat\nowl\n", "line 3: has 1 of 2 columns and none for 'prompt'"),
        ("a.csv", b'prompt\n"red, owl", fox\n', "line 2: has 2 columns, but the first line names 1"),
        ("a.tsv", b'prompt\tn\n"red" owl\t1\ncat\tand\tdog\n', "line 3: has 3 columns, .* with a tab in it"),
        ("a.csv", b"prompt,prompt\nx,y\n", "which column holds the prompts, prompt or prompt. Name each column once"),
        ("a.csv", b"text,caption\nx,y\n", "which column holds the prompts, text or caption. Give --column"),
        ("a.csv", b'prompt,n\n"a cat,1\nthe "owl",2\n', "after line 1: a quote opens a field"),
        ("a.csv", b"prompt\n" + b"x" * (2**24 + 9) + b"\n", "a line of more than"),
        ("a.csv", b'prompt\n"' + b"x\n" * 2**23 + b'x"\n', "field larger than field limit"),
    ],
)
def test_damaged_files_are_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_texts(tmp_path / name))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        list(read_texts(tmp_path / "nothing.csv"))


@pytest.mark.parametrize(
    ("kind", "gzipped"),
    cases(
        [
            ("csv", False),
            ("csv", True),
            ("tsv", False),
            ("jsonl", False),
            ("jsonl", True),
            ("parquet", False),
            ("txt", True),
        ],
        short=[("csv", True), ("jsonl", False), ("parquet", False)],
    ),
)
def test_training_reads_tables_as_it_reads_text(tmp_path: Path, kind: str, gzipped: bool) -> None:
    path, texts = write(tmp_path, kind, "prompt")
    if gzipped:
        path = path.rename(path.with_name(path.name + ".gz"))
        path.write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "same.txt").write_text("".join(" ".join(text.split()) + "\n" for text in texts))
    wanted, found = open_prompts(tmp_path / "same.txt"), open_prompts(path)
    assert [found.prompt(i) for i in range(len(found))] == [wanted.prompt(i) for i in range(len(wanted))]
    assert found.sha256 == wanted.sha256  # so that prompts encoded from the one serve the other
    made = found.path
    assert made.exists()
    del found
    gc.collect()
    assert not made.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "words\nfox\n",
            "which column holds the prompts.* call the file .txt; stepfold prompts clean PATH --column",
        ),
        ("a.csv", "prompt\n", "no prompts in it .empty.; write one prompt a line$"),
        (
            "a b.csv",
            f"prompt\nfox\n{'x' * 2001}\n",
            "line 2: longer than 2,000 characters.*stepfold prompts clean PATH",
        ),
        ("a.txt", f"{'x' * 2001}\n", "line 1: longer than 2,000 characters.*stepfold prompts clean PATH --out"),
        ("a.jsonl", "{", "line 1: not JSON"),
        ("a.txt.gz", "no gzip", "cannot be read"),
    ],
)
def test_what_cannot_be_trained_on_names_its_own_fix(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    place = re.escape(shlex.quote(str(tmp_path / name)))
    with pytest.raises(
        UserError, match=f"^{re.escape(str(tmp_path / name))}.*{message.replace('PATH', place)}"
    ) as caught:
        open_prompts(tmp_path / name)
    assert "\n" not in str(caught.value) and ("prompts clean" in str(caught.value)) == ("prompts clean" in message)


def test_no_room_for_the_text_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("prompt\nfox\n")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"a\.csv: its text cannot be kept in the temporary folder .*TMPDIR"):
        open_prompts(tmp_path / "a.csv")


@pytest.mark.long
def test_a_word_that_is_repeated_in_parquet_takes_its_memory_once(tmp_path: Path) -> None:
    """A file of 25 KB would become half a gigabyte."""
    pq.write_table(pa.table({"prompt": ["x" * 2**19] * 1024}), tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    before = psutil.Process().memory_info().rss
    assert sum(len(text) for text in read_texts(tmp_path / "bomb.parquet")) == 1024 * LONGEST_TEXT
    assert psutil.Process().memory_info().rss - before < 2**28


def test_a_run_notes_the_table_not_its_copy(tmp_path: Path) -> None:
    path, _ = write(tmp_path, "csv")
    assert open_prompts(path).source == path
