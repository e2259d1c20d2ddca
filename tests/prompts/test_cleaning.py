"""Prompts are counted, cleaned and split as the rules say."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from stepfold.cli import app
from stepfold.errors import UserError
from stepfold.prompts.cleaning import Findings, Rules, clean, side, spread, statistics
from stepfold.prompts.reading import open_prompts
from stepfold.prompts.syntax import notes_of

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


def test_without_the_package_languages_are_left_out_unless_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pip install stepfold[lora]` has no py3langid, and a page's second command ended in an error there."""
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\n")
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.setattr("stepfold.commands.prompts.find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["prompts", "stats", str(file)])
    assert done.exit_code == 0 and "languages are not guessed; pip install py3langid" in done.output
    asked = CliRunner().invoke(app, ["prompts", "stats", str(file), "--languages"])
    assert isinstance(asked.exception, UserError) and "languages need py3langid" in str(asked.exception)


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
    few = run("split", str(table), "--out", str(tmp_path / "few"), "--test", "0")
    assert few.exit_code == 0 and "test.txt is empty: 4 prompts are few for --test 0; give another" in few.output


BORROWED = [
    "(a fox:1.3), [snow], masterpiece <lora:foxStyle:0.8> BREAK night sky",
    "a {red|green|blue} door, __weather__",
    "a cat --n blurry --w 512 --h 768 --d 1 --s 28 --l 7.5",
    "Negative prompt: lowres, bad hands",
    "Steps: 28, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x768",
    "# style prompts",
]


def test_syntax_of_other_programs_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join([*BORROWED, *tiny.PROMPTS]) + "\n")
    wanted = (
        "note: 6 prompts hold syntax of other programs, which is read as plain text: weights or brackets such as "
        "(a:1.3), [a], {a} 1, <lora:a:1> and the like 1, BREAK or AND 1, choices {a|b} 1, __wildcards__ 1, flags such "
        "as --ar 16:9 1, settings such as Negative prompt: or Steps: 2, comments (#, //) 1"
    )
    result = run("stats", str(tmp_path / "a.txt"), "--json", str(tmp_path / "stats.json"))
    assert wanted in result.output.splitlines()
    assert json.loads((tmp_path / "stats.json").read_text())["notes"] == [wanted.removeprefix("note: ")]
    assert wanted in run("clean", str(tmp_path / "a.txt"), "--out", str(tmp_path / "b.txt")).output.splitlines()
    assert list(notes_of(open_prompts(tmp_path / "a.txt").foreign)) == [wanted.removeprefix("note: ")]
    assert (tmp_path / "b.txt").read_text() == (tmp_path / "a.txt").read_text()


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("a ((fox)) at night", "weights or brackets such as (a:1.3), [a], {a}"),
        (r"saber \(fate\), smiling", "weights or brackets such as (a:1.3), [a], {a}"),
        ("a photo of <cat-toy>", "<lora:a:1> and the like"),
        ("a fox AND a hound", "BREAK or AND"),
        ("a fox in snow --ar 16:9", "flags such as --ar 16:9"),
        ("a fox —ar 16:9", "flags such as --ar 16:9"),
        ("- a fox", "marks of lists (-, 1.)"),
        ("12. a fox", "marks of lists (-, 1.)"),
        ('"a fox",', "quotes around the whole"),
        ("https://a.org/b.png a fox", "addresses"),
        ('{"prompt": "a fox"', "JSON"),
        ("cinematic {prompt}, film", "weights or brackets such as (a:1.3), [a], {a}"),
        ("a fox\ta cat", "a tab inside"),
        ("a caf\u00c3\u00a9", "characters such as Ã© or U+FFFD"),
        ("a fo\u200bx", "invisible marks"),
        ("a fox\x85a cat", "a line separator (U+2028 or the like) inside"),
    ],
)
def test_each_kind_is_known(prompt: str, kind: str) -> None:
    findings = Findings()
    statistics([prompt], False, findings)
    assert findings.foreign[kind] == 1 and len(list(findings.notes())) == 1


@pytest.mark.parametrize(
    "prompt",
    [
        "a fox (orange) and a hound, 3:2 and 16:9", "SALT AND PEPPER SHAKERS", "a sign that says \"STOP\" in rain",
        "a well-lit room - a 5-year-old's drawing", "C++ code, 100% #1", "10 foxes. 3 hounds", "x < y > z",
        "a time: noon", "café à la crème", "\U0001f468\u200d\U0001f469\u200d\U0001f467 at the sea \u2764\ufe0f",
    ],
)  # fmt: skip
def test_plain_prose_is_none_of_it(prompt: str) -> None:
    findings = Findings()
    assert list(clean([prompt], Rules(), Counter(), findings)) == [prompt]
    assert list(findings.notes()) == []


def test_what_cannot_be_seen(tmp_path: Path) -> None:
    texts = [
        "a fox", "a fox\u200b", "\u200b", "\ufeffa fox", "a\u00a0fox", "\u202ea fox\u202c", "\u2028", "cafe\u0301",
        "caf\u00e9", "\u200d\u2060", "a red\u00ad door", "\u2800", "\u2764\ufe0f", "\u2764",
    ]  # fmt: skip
    kept, counts = cleaned(texts)
    assert kept == ["a fox", "café", "a red door", "\u2764\ufe0f"]
    assert counts == {"read": 14, "blank": 4, "repeated": 6, "kept": 4}
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n")
    opened = open_prompts(tmp_path / "a.txt")
    assert opened.num_blank == 4 and len(opened) == 10  # a run reads what is there
    assert list(notes_of(opened.foreign)) == [
        "4 prompts hold invisible marks, which encoders may read; stepfold prompts clean takes them out"
    ]
    assert statistics(texts, False)["different"] == 4
    (tmp_path / "a.txt").write_text("\u200b\n\ufeff\n")
    with pytest.raises(UserError, match=r"no prompts in it .2 blank lines"):
        open_prompts(tmp_path / "a.txt")


def test_separators_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a fox\u2028a red door\u2028a cat\nan owl\u2028\n")
    note = "1 prompt holds a line separator (U+2028 or the like) inside, and stays one prompt; put a line break in its"
    assert f"note: {note}" in run("clean", str(tmp_path / "a.txt"), "--out", str(tmp_path / "b.txt")).output
    assert (tmp_path / "b.txt").read_text() == "a fox a red door a cat\nan owl\n"
    assert f"note: {note}" in run("stats", str(tmp_path / "a.txt")).output
    assert next(notes_of(open_prompts(tmp_path / "a.txt").foreign)).startswith(note)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a {red|green} door", ["a red door", "a green door"]),
        ("a {red|{dark|light} hue} {on|in}",
         ["a red on", "a dark hue on", "a light hue on", "a red in", "a dark hue in", "a light hue in"]),
        ("a {|red} door", ["a door", "a red door"]),
        ("a {0.5::red|2::blue} door", ["a red door", "a blue door"]),
        ("a {2$$red|blue} {x} __y__ {a|", ["a {2$$red|blue} {x} __y__ {a|"]),
    ],
)  # fmt: skip
def test_wildcards(prompt: str, wanted: list[str]) -> None:
    kept, counts = cleaned([prompt, "a cat"], wildcards="expand")
    assert kept == [*wanted, "a cat"] and counts["read"] + counts["added by wildcards"] == counts["kept"] == len(kept)
    assert cleaned([prompt, "a cat"])[0] == [prompt, "a cat"]
    assert cleaned([prompt, "a cat"], wildcards="drop")[0] == ["a cat"]
    assert cleaned(["a __wild/card__ fox", "a cat"], wildcards="drop")[0] == ["a cat"]


def test_many_combinations_are_spread_over_all() -> None:
    kept, counts = cleaned(["{a|b|c|d|e} {f|g|h|i} {j|k|l|m} {n|o}"], wildcards="expand")
    assert len(kept) == 64 and counts["with more than 64 combinations, of which so many stay"] == 1
    assert all(
        {prompt.split()[i] for prompt in kept} == set(letters)
        for i, letters in enumerate(("abcde", "fghi", "jklm", "no"))
    )
    assert cleaned(["{a|b|c|d|e} {f|g|h|i} {j|k|l|m} {n|o}"], wildcards="expand")[0] == kept
    assert len(cleaned([f"{'{a|b}' * 400}"], wildcards="expand")[0]) == 64


def test_what_an_encoder_cuts_is_said_and_dropped(tmp_path: Path, tiny_sana: Path) -> None:
    long = f"a fox {'in deep snow under a cold sky with tall trees ' * 12}".strip()
    (tmp_path / "a.txt").write_text(f"a cat\n{long}\n{long} too\n")
    result = run("stats", str(tmp_path / "a.txt"), "--json", str(tmp_path / "stats.json"))
    assert "2 prompts are longer than the 77 tokens that the text encoder reads" in result.output
    assert (
        "the first, of 124: 'a fox in deep snow" in result.output
        and "words and marks counted; --teacher" in result.output
    )
    assert json.loads((tmp_path / "stats.json").read_text())["longer than 77 tokens"] == 2
    out = ("--out", str(tmp_path / "b.txt"), "--force")
    assert "2 prompts are longer than the 77 tokens" in run("clean", str(tmp_path / "a.txt"), *out).output
    assert (tmp_path / "b.txt").read_text().count("\n") == 3
    result = run("clean", str(tmp_path / "a.txt"), *out, "--longest", "124", "--json", str(tmp_path / "c.json"))
    assert json.loads((tmp_path / "c.json").read_text()) == {"read": 3, "longer than 124 tokens": 1, "kept": 2}
    assert "note" not in result.output
    result = run("clean", str(tmp_path / "a.txt"), *out, "--longest", "60", "--teacher", str(tiny_sana))
    assert (tmp_path / "b.txt").read_text() == "a cat\n"
    (tmp_path / "a.txt").write_text(f"a cat\n{'? ' * 130}\n{'? ' * 160}\n")
    result = run("stats", str(tmp_path / "a.txt"), "--teacher", str(tiny_sana))
    assert "1 prompt is longer than the 300 tokens" in result.output
    assert f"counted with the tokenizer of {tiny_sana}" in result.output
