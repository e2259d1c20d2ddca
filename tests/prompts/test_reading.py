"""Prompt files in all the states that users leave them in, and the shuffle."""

import hashlib
import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from forms import cases
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from stepfold.errors import UserError
from stepfold.prompts.reading import MAX_CHARACTERS, open_prompts, shuffled_index
from stepfold.prompts.syntax import is_blank


@pytest.fixture
def write(tmp_path: Path):
    def save(content: bytes) -> Path:
        path = tmp_path / "prompts.txt"
        path.write_bytes(content)
        return path

    return save


def prompts_of(path: Path) -> list[str]:
    file = open_prompts(path)
    return [file.prompt(i) for i in range(len(file))]


def test_messy_but_valid_file(write):
    content = b"\xef\xbb\xbf  a cat\r\n\r\na d\xc3\xb6g \xf0\x9f\x90\xb6\t\r\n \t \na cat\nlast line, no newline"
    file = open_prompts(write(content))
    assert prompts_of(file.path) == ["a cat", "a dög 🐶", "last line, no newline"]
    assert (file.num_blank, file.num_duplicate) == (2, 1)
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert file.offsets.dtype == np.int64 and file.offsets.tolist() == [5, 14, content.index(b"last")]


@given(
    lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), max_size=30), max_size=40),
    ending=st.sampled_from(["\n", "\r\n"]),
)
def test_every_line_comes_back(tmp_path_factory, lines: list[str], ending: str):
    path = tmp_path_factory.mktemp("lines") / "prompts.txt"
    path.write_bytes(ending.join(lines).encode())
    if lines and lines[0].startswith("\ufeff"):
        lines[0] = lines[0][1:]
    expected = list(dict.fromkeys(line.strip() for line in lines if not is_blank(line)))
    if expected:
        assert prompts_of(path) == expected
    else:
        with pytest.raises(UserError, match="no prompts"):
            open_prompts(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no prompts in it .empty"),
        (b"\xef\xbb\xbf\r\n \n", "no prompts in it .2 blank lines"),
        (b"fine\n\x89PNG\x00\x01\n", "line 2: binary"),
        ("a cat\n".encode("utf-16-le"), "line 1: binary"),
        (b"one\ntwo\nthr\xe9\xe9\n", "line 3: not UTF-8 .byte 4"),
        (b"ok\n" + b"x" * (MAX_CHARACTERS + 1), "line 2: longer than 2,000"),
        (b"ok\nok2\n" + b"x" * 10**6, "line 3: longer than 2,000"),
        (b"ok\n" + "é".encode() * 10**6, "line 2: longer than 2,000"),
        (b"old\rmac\rfile", "line 1: a carriage return"),
    ],
)
def test_bad_content_names_the_line(write, content: bytes, message: str):
    path = write(content)
    with pytest.raises(UserError, match=message) as error:
        open_prompts(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_longest_allowed_line(write):
    longest = "\U0001f431" * MAX_CHARACTERS
    assert prompts_of(write(f"\ufeff {longest} \r\nshort\r\n".encode())) == [longest, "short"]


def test_bad_paths(tmp_path: Path):
    with pytest.raises(UserError, match="no such file of prompts"):
        open_prompts(tmp_path / "missing.txt")
    with pytest.raises(UserError, match="is a folder"):
        open_prompts(tmp_path)
    with pytest.raises(UserError, match="not a regular file"):
        open_prompts("/dev/null")


def test_file_changed_under_the_run(write):
    file = open_prompts(write(b"first\nsecond\n"))
    os.utime(file.path, ns=(1, 1))  # touched, or copied back: the content counts
    assert [file.prompt(1), file.prompt(0)] == ["second", "first"]
    for content in (b"first", b"", b"first\nsecond\nthird\n", b"first\nsecund\n"):
        file.path.write_bytes(content)
        with pytest.raises(UserError, match="changed during the run; put the old file back"):
            file.prompt(0)
    file.path.write_bytes(b"first\nsecond\n")
    assert file.prompt(1) == "second"
    file.path.unlink()
    with pytest.raises(UserError, match="changed or removed"):
        file.prompt(0)


@pytest.mark.long
def test_memory_per_line_is_small(write):
    num = 50_000
    path = write(b"".join(b"%06d %s\n" % (i % 40_000, b"x" * 300) for i in range(num)))
    tracemalloc.start()
    file = open_prompts(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(file), file.num_duplicate) == (40_000, 10_000)
    assert file.prompt(39_999).startswith("039999 ")
    assert peak / num < 100  # ten million lines stay under 1 GB


@given(size=st.integers(1, 700), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 10**6))
def test_shuffle_is_a_permutation(size: int, seed: int, epoch: int):
    indices = [shuffled_index(epoch * size + i, size, seed) for i in range(size)]
    assert sorted(indices) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1024, 1025, 4097])
def test_shuffle_is_a_permutation_at_the_edges(size: int):
    assert sorted(shuffled_index(i, size, 0) for i in range(size)) == list(range(size))


def test_shuffle_differs_by_epoch_and_seed():
    size = 1000
    orders = [[shuffled_index(e * size + i, size, s) for i in range(size)] for e in range(3) for s in range(3)]
    for a in range(len(orders)):
        for b in range(a):
            equal = sum(x == y for x, y in zip(orders[a], orders[b], strict=True))
            assert equal < 12  # one is expected between independent permutations
    assert all(abs(np.corrcoef(order, range(size))[0, 1]) < 0.13 for order in orders)  # 4 standard deviations


@pytest.mark.parametrize("size", cases([2, 3, 5, 7, 16, 20], short=[2, 3, 5, 7, 16]))
def test_shuffle_is_uniform(size: int):
    """Where each position goes, over epochs, against the uniform distribution: chi-square at 1e-4 on a fixed seed."""
    epochs = 200 * size
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        for i in range(size):
            counts[i, shuffled_index(epoch * size + i, size, 7)] += 1
    statistic = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
    assert statistic < chi2.ppf(1 - 1e-4, (size - 1) ** 2)


def test_shuffle_of_billions_and_its_fixed_values():
    size = 3 * 10**9
    sample = [shuffled_index(p, size, 1) for p in random.Random(0).sample(range(size), 2000)]
    assert len(set(sample)) == 2000 and abs(np.mean(sample) / size - 0.5) < 0.03
    # The order of a published run must not change: these values are frozen.
    assert [shuffled_index(p, 10, 0) for p in range(10)] == [1, 9, 5, 4, 0, 7, 3, 8, 2, 6]
