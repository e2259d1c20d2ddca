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


def usual_tokens(pipe: Any, argument: str = "max_sequence_length") -> int:
    """How long a prompt may be unless it is said by that argument; what it does not say, pipeline or tokenizer does."""
    length = inspect.signature(type(pipe).__call__).parameters.get(argument)
    own = getattr(pipe, "tokenizer_max_length", None) or tokenizer_in(pipe.tokenizer).model_max_length
    return int(own if length is None or length.default is None else length.default)


def chat_opening(tokenizer: Any, **options: Any) -> str:
    """What a tokenizer's chat template puts before the text of a first message from the user."""
    message = [{"role": "user", "content": "\0"}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, **options).split("\0")[0]
