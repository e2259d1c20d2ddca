"""Prompts are counted, cleaned and split as the rules say."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from stepfold.cli import app
from stepfold.prompts.cleaning import Rules, clean, side, spread, statistics
from stepfold.prompts.reading import open_prompts

MESSY = ["a cat", "", "a  cat ", "two\nlines here", "x" * 3000, "one", "nul\0byte here", "a cat"]


def cleaned(texts: list[str], **rules: Any) -> tuple[list[str], dict[str, int]]:
    counts: Counter[str] = Counter()
    return list(clean(texts, Rules(**rules), counts)), dict(counts)


def test_what_the_loop_cannot_read_and_repetitions_go() -> None:
    kept, counts = cleaned(MESSY)
    assert kept == ["a cat", "two lines here", "one"]
    assert counts == {
        "read": 8, "blank": 1, "repeated": 2, "longer than 2000 characters": 1, "binary": 1, "kept": 3,
    }  # fmt: skip
    kept, counts = cleaned(MESSY, min_words=2, max_words=2)
    assert kept == ["a cat"] and counts["shorter than 2 words"] == counts["longer than 2 words"] == 1


def test_languages() -> None:
    texts = ["a photograph of an old wooden house by the river", "ein altes Haus aus Holz am Ufer des Flusses im Wald"]
    kept, counts = cleaned(texts, languages=("en",))
    assert kept == texts[:1] and counts["in another language"] == 1


def test_near_repetitions() -> None:
    texts = [
        "a red heart on a blue background, digital art", "a green apple in the rain",
        "a red heart on a blue background, digital art, 4k", "A red heart on a blue background, digital art!",
    ]  # fmt: skip
    kept, counts = cleaned(texts, near=0.7)
    assert kept == texts[:2] and counts["nearly repeated"] == 2
    assert cleaned(texts)[0] == texts


@given(st.lists(st.text(max_size=60), max_size=20))
def test_what_is_kept_is_a_prompts_file_and_stays_as_it_is(texts: list[str]) -> None:
    kept, counts = cleaned(texts)
    assert counts.get("read", 0) == len(texts) == sum(counts.values()) - counts.get("read", 0)
    assert cleaned(kept)[0] == kept and len(set(kept)) == len(kept)
    assert all(prompt and prompt == " ".join(prompt.split()) for prompt in kept)


def test_statistics() -> None:
    numbers = statistics(["a cat", "a cat", "", "a big dog runs", "y" * 2001])
    assert (numbers["prompts"], numbers["different"], numbers["blank"], numbers["repeated"]) == (4, 3, 1, 1)
    assert numbers["longer than 2000 characters"] == 1 and sum(numbers["languages"].values()) == 4
    assert numbers["words"] == {"mean": 9 / 4, "median": 2, "95%": 4, "most": 4}
    assert spread(Counter(range(1, 101))) == {"mean": 50.5, "median": 50, "95%": 95, "most": 100}


def test_a_split_is_of_the_right_size_and_does_not_depend_on_the_rest() -> None:
    prompts = [f"prompt {i}" for i in range(5000)]
    held = [prompt for prompt in prompts if side(prompt, 0.1, 0)]
    assert 400 < len(held) < 600
    assert held == [prompt for prompt in held if side(prompt, 0.2, 0)]  # a larger share only adds
    assert held != [prompt for prompt in prompts if side(prompt, 0.1, 1)]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["prompts", *arguments], catch_exceptions=True)


def test_the_commands(tmp_path: Path) -> None:
    table, out = tmp_path / "table.tsv", tmp_path / "prompts.txt"
    table.write_text("Prompt\tCategory\n" + "".join(f"{text}\tx\n" for text in ("a cat", "a cat", "a dog", "fox")))
    result = run("stats", str(table), "--json", str(tmp_path / "stats.json"))
    assert result.exit_code == 0 and json.loads((tmp_path / "stats.json").read_text())["different"] == 3
    result = run("clean", str(table), "--out", str(out), "--min-words", "2", "--json", str(tmp_path / "clean.json"))
    counts = json.loads((tmp_path / "clean.json").read_text())
    assert list(counts) == ["read", "repeated", "shorter than 2 words", "kept"] and counts["kept"] == 2
    assert result.exit_code == 0 and out.read_text() == "a cat\na dog\n" and "repeated" in result.output
    assert len(open_prompts(out)) == 2
    before = out.read_text()
    assert "is there already" in str(run("clean", str(table), "--out", str(out)).exception)
    assert "no prompt of" in str(run("clean", str(table), "--out", str(out), "--force", "--min-words", "9").exception)
    assert out.read_text() == before  # nothing is lost
    result = run(
        "split", str(table), "--out", str(tmp_path / "split"), "--test", "0.5", "--json", str(tmp_path / "split.json")
    )
    parts = [(tmp_path / "split" / name).read_text().split("\n")[:-1] for name in ("train.txt", "test.txt")]
    assert result.exit_code == 0 and sorted([*parts[0], *parts[1]]) == ["a cat", "a cat", "a dog", "fox"]
    assert not set(parts[0]) & set(parts[1])
    assert json.loads((tmp_path / "split.json").read_text()) == {"train": len(parts[0]), "test": len(parts[1])}
