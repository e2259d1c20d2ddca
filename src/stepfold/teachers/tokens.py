"""How many tokens of a prompt a pipeline reads; past them its tokenizer cuts."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepfold.teachers.family import Family


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


def usual_tokens(pipe: Any) -> int:
    """How long a prompt may be unless it is said."""
    length = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    return int(pipe.tokenizer.model_max_length if length is None else length.default)


def text_reader(family: "type[Family]", pipe: Any, max_tokens: int) -> TextReader | None:
    """What reads the prompts of a pipeline; None where they are no texts, but classes.

    Args:
        family: of the pipeline.
        pipe: the pipeline; its networks are not needed.
        max_tokens: what it is told to read, where it can be told.
    """
    there = [part for part in family.readers if getattr(pipe, part) is not None]
    if not there:
        return None
    tokenizer: Any = getattr(pipe, there[0])
    told = "max_sequence_length" in inspect.signature(type(pipe).__call__).parameters and there[0] == family.readers[0]
    before, free = family.before_prompts(pipe)
    return TextReader(tokenizer, max_tokens if told else tokenizer.model_max_length, before, free, family.lowers)
