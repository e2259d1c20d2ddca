"""How many tokens of a prompt a pipeline reads; past them its tokenizer cuts."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import ProcessorMixin


@dataclass(frozen=True)
class TextReader:
    """The tokenizer that reads the most of a prompt.

    Attributes:
        tokenizer: of the pipeline.
        most: tokens that are read, with those that begin and end a prompt.
        before: text that the pipeline puts before each prompt.
        free: tokens of it that do not count to `most`.
        lowers: whether prompts are read in small letters.
    """

    tokenizer: Any
    most: int
    before: str = ""
    free: int = 0
    lowers: bool = False

    def count(self, prompts: Sequence[str]) -> list[int]:
        """The tokens of each prompt, as they would count to `most`."""
        texts = [self.before + (prompt.lower() if self.lowers else prompt).strip() for prompt in prompts]
        return [len(ids) - self.free for ids in self.tokenizer(texts, verbose=False).input_ids]


def tokenizer_in(part: Any) -> Any:
    """A pipeline's tokenizer, or that of its processor."""
    return part.tokenizer if isinstance(part, ProcessorMixin) else part


def usual_tokens(pipe: Any) -> int:
    """How long a prompt may be unless it is said; what the pipeline has no argument for, it or its tokenizer says."""
    length = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    own = getattr(pipe, "tokenizer_max_length", None) or tokenizer_in(pipe.tokenizer).model_max_length
    return int(own if length is None else length.default)
