"""What a prompt may hold beside its words: the syntax of other programs, and marks that nobody sees."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import count

MOST_CHOICES = 64
"""Prompts that are made of one with wildcards."""
_MARKS = "\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"  # no script needs them for its words
_JOINERS = "\u034f\u180b-\u180f\u200c\u200d\ufe00-\ufe0f\U000e0000-\U000e0fff"  # emoji and some scripts need them
_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"
_SEEN = re.compile(rf"[^\s\x01-\x1f\x7f-\x9f{_MARKS}{_JOINERS}{_FILLERS}]")
_MARK, _UNSEEN = re.compile(f"[{_MARKS}]"), re.compile(f"[{_MARKS}{_JOINERS}]")
_CHOICE = re.compile(r"\{([^{}$]*\|[^{}$]*)\}")
_ODDS = re.compile(r"^\s*\d*\.?\d+::")
_HELD = re.compile("\0(\\d+)\0")

FOREIGN = {
    "weights or brackets such as (a:1.3), [a], {a}": r"\([^()]*:\s*-?\d*\.?\d+\s*\)|\(\(|\[[^\[\]]+\]|\{[^{}|]*\}"
    r"|\)\d\.\d|\)(?:\+|--)|::-?\d|\\[()]",
    "<lora:a:1> and the like": r"<[^<>\s][^<>]*>|\b(?:embedding|lora):\w",
    "BREAK or AND": r"\b(?:BREAK|ADD(?:COMM|BASE|ROW|COL))\b|[a-z,.)] AND [a-z(]",
    "choices {a|b}": r"\{[^{}]*\|[^{}]*\}",
    "__wildcards__": r"__[\w/*.-]+?__",
    "flags such as --ar 16:9": r"(?:^|\s)(?:--[A-Za-z]\w*|—(?:ar|no|v|q|s|niji|seed|stylize|chaos)\b)",
    "settings such as Negative prompt: or Steps:": r"(?i)^\s*(?:(?:negative|positive)[ _]prompt|prompt|steps|sampler"
    r"|cfg[ _]scale|seed|size|model)\s*:",
    "comments (#, //)": r"^\s*(?:#|//|;)",
    "marks of lists (-, 1.)": r"^\s*(?:[-*•]|\d{1,6}[.)])\s",
    "JSON": r'^\s*(?:[\[\]{}]+,?\s*$|\{?\s*"[^"]*"\s*:)',
    "quotes around the whole": r"^\s*(?:\"[^\"]*\"|'[^']*'|“[^”]*”),?\s*$",
    "addresses": r"https?://",
}
"""What it looks like -> a pattern of it. Encoders know none of it."""
HIDDEN = {
    "a line separator (U+2028 or the like) inside": (
        "\\S\\s*[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]\\s*\\S",
        "and stays one prompt; put a line break in its place where prompts end",
    ),
    "a tab inside": (
        r"\S\t+ *\S",
        "and stays one prompt; if tabs part columns, name these in the first line, prompt among them",
    ),
    "invisible marks": (f"[{_MARKS}]", "which encoders may read; stepfold prompts clean takes them out"),
    "characters such as Ã© or U+FFFD": (
        "\ufffd|Ã[\x80-\xbf]|â€",
        "as of a file read in a wrong encoding; save it as UTF-8 anew",
    ),
}
"""What a line may hold unseen -> a pattern of it, and what is said of it."""
_PATTERNS = {name: re.compile(pattern) for name, pattern in FOREIGN.items()}
_HIDDEN = {name: re.compile(pattern) for name, (pattern, _) in HIDDEN.items()}
_ANY = "foreign syntax"
_SIGN = re.compile(r"[()\[\]{}<>|\\_#*•:;/—]")
_BEGINNING = re.compile(r"\s*(?:[-\"'“]|\d+[.)])")
_WORDS = ("--", "AND", "BREAK", "ADD")
_ODD = re.compile(f"[\t\x0b\x0c\x1c-\x1e\x85\u2028\u2029Ãâ\ufffd{_MARKS}]")


def is_blank(text: str) -> bool:
    """Whether there is nothing to be seen in it: spaces, control characters, zero-width and directional marks."""
    return _SEEN.search(text) is None


def visible(text: str) -> str:
    """A prompt in NFC, without marks that no script needs for its words."""
    return text if text.isascii() else unicodedata.normalize("NFC", _MARK.sub("", text))


def as_seen(text: str) -> str:
    """Equal for prompts that look alike but for what cannot be seen: to compare them, not to write."""
    return text if text.isascii() else unicodedata.normalize("NFC", _UNSEEN.sub("", text))


def count_foreign(prompt: str, counts: Counter[str]) -> None:
    """Adds 1 for each kind of foreign syntax that a prompt holds; plain prose is known at once."""
    if _SIGN.search(prompt) or _BEGINNING.match(prompt) or any(word in prompt for word in _WORDS):
        found = [name for name, pattern in _PATTERNS.items() if pattern.search(prompt)]
        counts.update([*found, _ANY] if found else [])


def count_hidden(line: str, counts: Counter[str]) -> None:
    """Adds 1 for each kind of hidden mark in a line, as it was read."""
    if _ODD.search(line):
        counts.update(name for name, pattern in _HIDDEN.items() if pattern.search(line))


def notes_of(counts: Mapping[str, int]) -> Iterator[str]:
    """What is said of what `count_foreign` and `count_hidden` have found, a line each."""

    def hold(name: str) -> str:
        return "1 prompt holds" if counts[name] == 1 else f"{counts[name]:,} prompts hold"

    if counts.get(_ANY):
        kinds = ", ".join(f"{name} {counts[name]:,}" for name in FOREIGN if counts.get(name))
        yield f"{hold(_ANY)} syntax of other programs, which is read as plain text: {kinds}"
    for name, (_, what) in HIDDEN.items():
        if counts.get(name):
            yield f"{hold(name)} {name}, {what}"


def has_wildcards(prompt: str) -> bool:
    """Whether it holds {a|b} or __a__."""
    return any(_PATTERNS[name].search(prompt) is not None for name in ("choices {a|b}", "__wildcards__"))


def expanded(prompt: str, most: int = MOST_CHOICES) -> tuple[list[str], int]:
    """Every combination of the choices {a|b} of a prompt, which may be nested; the same ones each time.

    Args:
        prompt: without NUL. Weights of choices (`{0.5::a|b}`) are left out; `{2$$a|b}` and `__a__` stay as they are.
        most: of more combinations so many, spread over all.

    Returns:
        The prompts, and how many combinations there are.
    """
    groups: list[list[str]] = []
    sizes: list[int] = []

    def size(text: str) -> int:
        return math.prod(sizes[int(number)] for number in _HELD.findall(text))

    def hold(match: re.Match[str]) -> str:
        groups.append([_ODDS.sub("", choice).strip() for choice in match[1].split("|")])
        sizes.append(sum(map(size, groups[-1])))
        return f"\0{len(groups) - 1}\0"

    def combination(text: str, number: int) -> str:
        """Number 0 <= number < size(text); the first choice changes fastest."""

        def pick(match: re.Match[str]) -> str:
            nonlocal number
            group = int(match[1])
            number, within = divmod(number, sizes[group])
            for choice in groups[group]:
                if within < size(choice):
                    return combination(choice, within)
                within -= size(choice)
            raise AssertionError("a number beyond the choices")

        return _HELD.sub(pick, text)

    while (held := _CHOICE.sub(hold, prompt)) != prompt:
        prompt = held
    total, stride = size(prompt), 1
    if total > most:  # steps of the golden section, which pass by none of the choices
        stride = next(step for step in count(int(0.618 * total)) if math.gcd(step, total) == 1)
    return [combination(prompt, i * stride % total) for i in range(min(total, most))], total
