"""How long prompts are in tokens, and which of them a text encoder cuts."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

USUAL_TOKENS = 77
"""What CLIP reads, the encoder of Stable Diffusion 1, 2 and XL."""
AT_ONCE = 1_000
_PIECE = re.compile(r"[A-Za-z]+|[^\sA-Za-z]")


@dataclass(frozen=True)
class Tokens:
    """How a text encoder's tokens are counted.

    Attributes:
        count: prompts -> tokens of each, with those that begin and end it.
        most: that it reads; what comes after them is cut off.
        how: the count is made, for people.
    """

    count: Callable[[list[str]], list[int]]
    most: int
    how: str


@dataclass
class Cut:
    """The prompts that are longer than what an encoder reads.

    Attributes:
        num: how many.
        first: of them; `tokens`, its length.
    """

    num: int = 0
    first: str = ""
    tokens: int = 0

    def add(self, prompt: str, tokens: int) -> None:
        """Counts one more."""
        if not self.num:
            self.first, self.tokens = prompt, tokens
        self.num += 1

    def note(self, tokens: Tokens) -> Iterator[str]:
        """What is said of them, in one line; nothing if there are none."""
        if self.num:
            what = "1 prompt is" if self.num == 1 else f"{self.num:,} prompts are"
            yield (
                f"{what} longer than the {tokens.most} tokens that the text encoder reads, and the rest of each is cut "
                f"off; the first, of {self.tokens}: {shortened(self.first)} ({tokens.how})"
            )


def estimate(prompts: list[str]) -> list[int]:
    """A token for each word of a to z and each other character, and two for start and end; about as CLIP has them."""
    return [2 + len(_PIECE.findall(prompt)) for prompt in prompts]


def estimated(most: int | None = None) -> Tokens:
    """Where no tokenizer is at hand."""
    how = "words and marks counted; --teacher counts with its tokenizer"
    return Tokens(estimate, USUAL_TOKENS if most is None else most, how)


def with_tokens(prompts: Iterable[str], tokens: Tokens) -> Iterator[tuple[str, int]]:
    """Prompts, each with its number of tokens; many are counted at once, none is kept longer."""
    rest = iter(prompts)
    while some := list(islice(rest, AT_ONCE)):
        yield from zip(some, tokens.count(some), strict=True)


def cut_by(prompts: Iterable[str], tokens: Tokens) -> Cut:
    """Those that are too long."""
    cut = Cut()
    for prompt, length in with_tokens(prompts, tokens):
        if length > tokens.most:
            cut.add(prompt, length)
    return cut


def shortened(text: str, most: int = 60) -> str:
    """A prompt for a message."""
    return repr(text if len(text) <= most else f"{text[:most]}...")
