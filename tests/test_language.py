"""The pages are plain English: short sentences, the field's words, wrapped lines; CONTRIBUTING.md states the rules."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from stepfold.cli import app
from stepfold.config import preset_names, preset_purpose

ROOT = Path(__file__).parents[1]
LONGEST_SENTENCE, LONGEST_LINE = 25, 100
APART = {"lab-log.md"}
"""Pages that are not held to the rules: the log has the words of its days."""
LONG_SENTENCES: dict[str, int] = {}
"""Page -> how many of its sentences may be longer."""
OPENINGS = ("What", "Where", "Whoever", "Whatever", "Of")
"""No statement begins with these."""


def pages() -> list[Path]:
    """The hand-written pages that are held to the rules."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    found += sorted((ROOT / "docs" / "results").glob("*-discussion.md"))
    return [page for page in found if page.name not in APART]


def vocabulary() -> list[str]:
    """What not to write, lower case: the first column of CONTRIBUTING.md's table of words."""
    _, there = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n## Words\n")
    table = there.split("\n## ", 1)[0]
    cells = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", table, re.MULTILINE)
    assert cells[0] == "instead of"
    return [word.strip().strip("`*\"'").lower() for cell in cells[1:] for word in re.split(r"[,;]", cell)]


def prose(text: str) -> Iterator[tuple[int, str, str]]:
    """(line number, kind, line): "text", "item", "heading", "table", "code" or "" (what ends a paragraph)."""
    fenced = listed = False
    before = ""
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith("```"):
            fenced, kind = not fenced, "code"
        elif fenced or (line.startswith(" " * (6 if listed else 4)) and before in ("", "code")):
            kind = "code"
        elif stripped.startswith("#"):
            kind, listed = "heading", False
        elif stripped.startswith("|"):
            kind = "table"
        elif not stripped or stripped.startswith("<") or re.fullmatch(r"!\[.*\]\(.*\)", stripped):
            kind = ""
        elif re.match(r"([-*]|\d+\.) ", stripped):
            kind, listed = "item", True
        else:
            kind, listed = "text", listed and line.startswith(" ")
        yield number, kind, line
        before = kind


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """(number of the paragraph's first line, sentence), without markup; a code span is one word."""
    paragraphs: list[tuple[int, list[str]]] = []
    going = False
    for number, kind, line in prose(text):
        if kind == "text" and going:
            paragraphs[-1][1].append(line.strip())
        elif kind in ("text", "item", "heading"):
            paragraphs.append((number, [re.sub(r"^([-*]|\d+\.|#+) ", "", line.strip())]))
        going = kind in ("text", "item")
    for number, lines in paragraphs:
        joined = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(lines))
        joined = re.sub(r"`[^`]*`", "Code", joined).replace("*", "")
        for sentence in re.split(r"(?<=[.!?])[)\"]?\s+(?=[A-Z(\"]|stepfold\b)", joined):
            yield number, sentence


def num_words(sentence: str) -> int:
    """Those that have a letter or a digit."""
    return sum(any(c.isalnum() for c in word) for word in sentence.split())


def long_sentences(text: str) -> list[str]:
    """Sentences of more than 25 words."""
    return [f"{n}: {s}" for n, s in sentences(text) if num_words(s) > LONGEST_SENTENCE]


def bad_words(text: str) -> list[str]:
    """Words and openings that are not used, and chains of semicolons."""
    found = []
    wrong = re.compile(rf"\b({'|'.join(map(re.escape, vocabulary()))})(?![\w'])", re.IGNORECASE)
    opening = re.compile(rf"({'|'.join(OPENINGS)})\b")
    for number, sentence in sentences(text):
        open_text = re.sub(r"\((?:\w+ ){0,2}\w+\)", "", sentence)  # a word of ours, once, behind the field's
        found += [f"{number}: {word}: {sentence}" for word in wrong.findall(open_text)]
        if (start := opening.match(sentence)) and not sentence.endswith("?"):
            found.append(f"{number}: begins with {start[1]}: {sentence}")
        if sentence.count(";") > 1:
            found.append(f"{number}: semicolons: {sentence}")
    return found


def long_lines(text: str) -> list[str]:
    """Lines of prose over 100 columns that could be broken; where a link leads does not count."""
    found = []
    for number, kind, line in prose(text):
        shown = re.sub(r"\]\([^)]*\)", "]", line)
        parts = re.sub(r"`[^`]*`", "code", re.sub(r"^\s*([-*]|\d+\.) ", "", shown)).split()
        if kind in ("text", "item") and len(shown) > LONGEST_LINE and len(parts) > 1:
            found.append(f"{number}: {len(line)} columns")
    return found


def without_a_lead(text: str) -> list[str]:
    """Headings that no prose follows."""
    lines = [(number, kind, line) for number, kind, line in prose(text) if kind or line.strip().startswith("!")]
    following = [*lines[1:], (0, "", "")]
    return [
        f"{number}: {line}"
        for (number, kind, line), (_, after, _) in zip(lines, following, strict=True)
        if kind == "heading" and after != "text"
    ]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_a_page_keeps_to_the_rules(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert bad_words(text) == []
    assert long_lines(text) == []
    assert without_a_lead(text) == []
    assert len(found := long_sentences(text)) <= LONG_SENTENCES.get(page.name, 0), found


def test_no_page_is_held_in_vain() -> None:
    """Allowances are for pages that need them."""
    for name, allowed in LONG_SENTENCES.items():
        (page,) = (page for page in pages() if page.name == name)
        assert len(long_sentences(page.read_text(encoding="utf-8"))) == allowed


def helps(command: Any, name: str = "stepfold") -> Iterator[tuple[str, str]]:
    """(command, text) of every help text of a command: its own, its options', those of the commands below it."""
    yield name, command.help or ""
    yield from ((f"{name} {option.name}", option.help) for option in command.params if getattr(option, "help", None))
    for below, sub in getattr(command, "commands", {}).items():
        yield from helps(sub, f"{name} {below}")


def test_help_texts_keep_to_the_words() -> None:
    """Those of commands, options and presets; option texts may be lists of cases."""
    texts = [*helps(typer.main.get_command(app)), *((name, preset_purpose(name)) for name in preset_names())]
    found = {name: wrong for name, text in texts if (wrong := [*bad_words(text), *long_sentences(text)])}
    assert found == {} and len(texts) > 100


GOOD = """# Title

The teacher samples a trajectory (walk), and `a walk` in code is one word. (See [a page](walk.md).)

- An item with a formula:

      x = walk

```bash
what a walk
```

| picture | walk |
|---|---|

What is a step?
"""


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        (long_sentences, "word " * 26 + "."),
        (long_sentences, "It is short. " + "word " * 13 + "[" + "word " * 13 + "](x.md)."),
        (long_sentences, "- " + "word\n  " * 26),
        (bad_words, "The teacher is walked."),
        (bad_words, "A picture\nof a fox."),
        (bad_words, "Nothing is left of\nit."),
        (bad_words, "All work but for one."),
        (bad_words, "It ends. What comes next is a loss."),
        (bad_words, "Of the two, one is left."),
        (bad_words, "One; two; three."),
        (bad_words, "## Where time goes"),
        (long_lines, "word " * 21),
        (long_lines, "- " + "word " * 20),
        (without_a_lead, "## Title\n\n| a | b |\n|---|---|"),
        (without_a_lead, "## Title\n\n- an item"),
        (without_a_lead, "## Title\n\n```bash\nls\n```"),
        (without_a_lead, "## Title\n\n### Title below\n\nText."),
    ],
)
def test_each_rule_can_fail(rule: object, bad: str) -> None:
    assert callable(rule)
    assert rule(GOOD) == []
    assert len(rule(f"{GOOD}\n{bad}\n\nText.\n")) == 1
