"""What is in a file of prompts, and a better file made of it."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from stepfold.errors import UserError
from stepfold.prompts.lengths import Cut, Tokens, estimated, with_tokens
from stepfold.prompts.reading import MAX_CHARACTERS
from stepfold.prompts.syntax import (
    MOST_CHOICES,
    as_seen,
    count_foreign,
    count_hidden,
    expanded,
    has_wildcards,
    is_blank,
    notes_of,
    visible,
)
from stepfold.prompts.tables import one_line

NUM_HASHES, NUM_BANDS, HASH_SEED = 20, 5, 42  # more hashes are surer and take more memory
MAX_ALIKE = 8  # prompts with an equal band that a new one is compared with, for each band
MAX_SAMPLE = 20_000  # prompts whose language `stats` looks at


@dataclass(frozen=True)
class Rules:
    """What `clean` makes of wildcards and drops, in this order.

    Attributes:
        wildcards: `expand` makes every combination of {a|b}, `drop` drops prompts with {a|b} or __a__.
        min_words, max_words: shorter and longer prompts; None for no limit.
        languages: codes such as "en"; prompts in another; empty for any. Of a few words it is a guess.
        longest: prompts of more tokens; None for no limit.
        near: prompts that share at least this part of their three-letter pieces with an earlier one; None for none.
    """

    min_words: int = 1
    max_words: int | None = None
    languages: tuple[str, ...] = ()
    longest: int | None = None
    near: float | None = None
    wildcards: Literal["expand", "keep", "drop"] = "keep"


class Findings:
    """What is said of prompts once all of them are read: foreign syntax, hidden marks, those that are cut."""

    def __init__(self, tokens: Tokens | None = None) -> None:
        """`tokens` says how a prompt's are counted."""
        self.tokens, self.cut, self.foreign = tokens or estimated(), Cut(), Counter[str]()

    def notes(self) -> Iterator[str]:
        """A line each."""
        yield from notes_of(self.foreign)
        yield from self.cut.note(self.tokens)


def clean(texts: Iterable[str], rules: Rules, counts: Counter[str], findings: Findings | None = None) -> Iterator[str]:
    """The prompts that stay, on one line each, in their order.

    Line breaks become spaces, and invisible marks go. What the loop could not read (blank, longer than MAX_CHARACTERS)
    and repetitions always go, also those that differ only in what cannot be seen.

    Args:
        texts: prompts as they come.
        rules: what else goes.
        counts: gets the numbers: "read", "kept", one for every reason of dropping, and "added by wildcards".
        findings: gets what stays and is to be said.
    """
    language, findings = language_of() if rules.languages else None, findings or Findings()
    seen: set[int] = set()

    def first_time() -> Iterator[str]:
        for text in texts:
            counts["read"] += 1
            line = one_line(visible(text))
            prompts, hidden = combined(line, counts) if rules.wildcards == "expand" else [line], False
            for prompt in prompts:
                if reason := unfit(prompt, rules, language):
                    counts[reason] += 1
                    continue
                mark = number_of(as_seen(prompt))
                if mark in seen:
                    counts["repeated"] += 1
                    continue
                seen.add(mark)
                if not hidden:
                    count_hidden(text, findings.foreign)
                    hidden = True
                yield prompt

    short = first_time() if rules.longest is None else within(first_time(), findings.tokens, rules.longest, counts)
    kept = short if rules.near is None else without_near(short, rules.near, counts)
    for prompt, length in with_tokens(kept, findings.tokens):
        counts["kept"] += 1
        count_foreign(prompt, findings.foreign)
        if length > findings.tokens.most:
            findings.cut.add(prompt, length)
        yield prompt


def combined(prompt: str, counts: Counter[str]) -> list[str]:
    """Every combination of a prompt's {a|b}, MOST_CHOICES at most."""
    if "\0" in prompt:
        return [prompt]
    prompts, total = expanded(prompt)
    counts["added by wildcards"] += len(prompts) - 1
    counts[f"with more than {MOST_CHOICES} combinations, of which so many stay"] += total > len(prompts)
    return [one_line(each) for each in prompts]


def within(prompts: Iterable[str], tokens: Tokens, longest: int, counts: Counter[str]) -> Iterator[str]:
    """Those of `longest` tokens or fewer."""
    for prompt, length in with_tokens(prompts, tokens):
        if length > longest:
            counts[f"longer than {longest} tokens"] += 1
        else:
            yield prompt


def unfit(prompt: str, rules: Rules, language: Callable[[str], str] | None) -> str | None:
    """Why a prompt is dropped, or None."""
    words = len(prompt.split())
    if is_blank(prompt):
        return "blank"
    if len(prompt) > MAX_CHARACTERS:
        return f"longer than {MAX_CHARACTERS} characters"
    if "\0" in prompt:
        return "binary"
    if words < rules.min_words:
        return f"shorter than {rules.min_words} words"
    if rules.max_words is not None and words > rules.max_words:
        return f"longer than {rules.max_words} words"
    if rules.wildcards == "drop" and has_wildcards(prompt):
        return "with wildcards"
    if language is not None and language(prompt) not in rules.languages:
        return "in another language"
    return None


def number_of(prompt: str, key: str = "") -> int:
    """A 64-bit number of a prompt, the same everywhere."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8, key=key.encode()).digest(), "little")


def language_of() -> Callable[[str], str]:
    """prompt -> code of its likeliest language.

    Raises:
        UserError: py3langid is not installed, or the temporary folder has no room for its model.
    """
    try:
        from py3langid import classify

        classify("")  # unpacks its model
    except ImportError:
        raise UserError("languages need py3langid: pip install py3langid") from None
    except OSError as error:
        fix = "make room, name another folder in TMPDIR, or leave languages out"
        raise UserError(f"py3langid cannot unpack its model in the temporary folder: {error.strerror}; {fix}") from None
    return lambda prompt: classify(prompt)[0]


def without_near(prompts: Iterable[str], share: float, counts: Counter[str]) -> Iterator[str]:
    """Drops near repetitions: MinHash signatures of three-letter pieces, found by bands of them (LSH).

    The share is estimated from NUM_HASHES hashes, to about 0.1. The signatures are rensa's; its own index of them keeps
    a KiB for each prompt, this one a third.

    Raises:
        UserError: rensa is not installed.
    """
    try:
        from rensa import RMinHash  # type: ignore[attr-defined]
    except ImportError:
        raise UserError("near repetitions need rensa: pip install rensa") from None
    signatures, newest = array("I"), {}  # of the prompts that stay; key of a band -> the last of them that has it
    before = [array("i") for _ in range(NUM_BANDS)]  # of each of them, the one before it with the same key
    rows = NUM_HASHES // NUM_BANDS
    for prompt in prompts:
        hashes, text = RMinHash(NUM_HASHES, HASH_SEED), f" {prompt.lower()} "
        hashes.update([text[i : i + 3] for i in range(len(text) - 2)])
        signature = array("I", hashes.digest())
        keys = [hash((band, *signature[band * rows : (band + 1) * rows])) for band in range(NUM_BANDS)]
        alike = set()
        for key, links in zip(keys, before, strict=True):
            number = newest.get(key, -1)
            for _ in range(MAX_ALIKE):
                if number < 0:
                    break
                alike.add(number)
                number = links[number]
        if any(_shared(signature, signatures, number) >= share for number in alike):
            counts["nearly repeated"] += 1
            continue
        for key, links in zip(keys, before, strict=True):
            links.append(newest.get(key, -1))
            newest[key] = len(links) - 1
        signatures.extend(signature)
        yield prompt


def _shared(signature: array, signatures: array, number: int) -> float:
    """The part of a signature that is the same in that of prompt `number`."""
    other = signatures[number * NUM_HASHES : (number + 1) * NUM_HASHES]
    return sum(a == b for a, b in zip(signature, other, strict=True)) / NUM_HASHES


def statistics(texts: Iterable[str], with_languages: bool = True, findings: Findings | None = None) -> dict[str, Any]:
    """Numbers of a file: prompts, blank, repeated, too long; words, tokens, characters; languages of MAX_SAMPLE.

    Args:
        texts: prompts as they come.
        with_languages: whether to guess those of the first MAX_SAMPLE.
        findings: gets what is to be said.

    Raises:
        UserError: there is no prompt in it.
    """
    words: Counter[int] = Counter()
    characters: Counter[int] = Counter()
    languages: Counter[str] = Counter()
    seen: set[int] = set()
    num: Counter[str] = Counter()
    language, findings = language_of() if with_languages else None, findings or Findings()
    tokens: Counter[int] = Counter()

    def lines() -> Iterator[str]:
        for text in texts:
            if is_blank(prompt := one_line(text)):
                num["blank"] += 1
            else:
                count_foreign(prompt, findings.foreign)
                count_hidden(text, findings.foreign)
                yield prompt

    for prompt, length in with_tokens(lines(), findings.tokens):
        num["prompts"] += 1
        num["too long"] += len(prompt) > MAX_CHARACTERS
        tokens[length] += 1
        if length > findings.tokens.most:
            findings.cut.add(prompt, length)
        mark = number_of(as_seen(prompt))
        num["repeated"] += mark in seen
        seen.add(mark)
        words[len(prompt.split())] += 1
        characters[len(prompt)] += 1
        if language and num["prompts"] <= MAX_SAMPLE:
            languages[language(prompt)] += 1
    if not num["prompts"]:
        raise UserError("there are no prompts in it; is it the right file, and the right --column?")
    return {
        "prompts": num["prompts"],
        "different": len(seen),
        "blank": num["blank"],
        "repeated": num["repeated"],
        f"longer than {MAX_CHARACTERS} characters": num["too long"],
        f"longer than {findings.tokens.most} tokens": findings.cut.num,
        "words": spread(words),
        "tokens": spread(tokens),
        "characters": spread(characters),
        "languages": dict(languages.most_common(8)),
    }


def spread(counted: Counter[int]) -> dict[str, float]:
    """Mean, median, 95th percentile and maximum of counted whole numbers."""
    total = counted.total()
    ranks = {"median": 0.5 * total, "95%": 0.95 * total, "most": total}
    found: dict[str, float] = {"mean": sum(value * count for value, count in counted.items()) / total}
    below = 0
    for value in sorted(counted):
        below += counted[value]
        found |= {name: value for name, rank in ranks.items() if name not in found and below >= rank}
    return found


def side(prompt: str, share: float, seed: int) -> bool:
    """Whether a prompt belongs to the part that gets `share` of all; equal prompts always fall on the same side."""
    return number_of(as_seen(prompt), f"split {seed}") < share * 2**64
