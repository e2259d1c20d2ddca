"""The conditions of a run: encoded by its teacher, or read from a folder where they were encoded before."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stepfold.config import Config, TeacherSettings
from stepfold.images.files import read_picture
from stepfold.images.reading import ImageFolder
from stepfold.prompts.cache import ConditionCache, open_conditions
from stepfold.prompts.lengths import Tokens, cut_by
from stepfold.prompts.reading import PromptFile, Prompts
from stepfold.prompts.syntax import count_foreign, count_hidden, notes_of
from stepfold.randomness import send
from stepfold.teachers.contract import Condition
from stepfold.teachers.fingerprints import encoder_fingerprint
from stepfold.teachers.loading import place_of
from stepfold.teachers.pipeline import PipelineTeacher

MOST_COUNTED = 20_000
FEW = 100
"""Prompts below which a run says that there are few."""


def cache_of(config: Config, prompts: PromptFile | ImageFolder) -> ConditionCache | None:
    """The encoded prompts that the settings name; None where they name none.

    Raises:
        UserError: they are those of another teacher or other prompts, or damaged.
    """
    if not config.conditions:
        return None
    return open_conditions(Path(config.conditions), conditions_key(config.teacher, prompts.sha256), len(prompts))


def conditions_from(
    cache: ConditionCache | None, teacher: PipelineTeacher, prompts: Prompts
) -> Callable[[Sequence[int]], Condition]:
    """Numbers of B prompts -> what the teacher encodes them to, from a cache if there is one."""

    def conditions(index: Sequence[int]) -> Condition:
        if cache:
            return cache.rows(index).each(partial(send, device=teacher.device)).to(teacher.device, teacher.work_dtype)
        return encoded(teacher, prompts, index)

    return conditions


def encoded(teacher: PipelineTeacher, prompts: Prompts, index: Sequence[int]) -> Condition:
    """What the teacher encodes the prompts of these numbers to, with their images where they have some."""
    texts = [prompts.prompt(i) for i in index]
    if not (isinstance(prompts, PromptFile) and prompts.images):
        return teacher.encode(texts)
    return teacher.encode(texts, [read_picture(prompts.image(i), teacher.height, teacher.width) for i in index])


def notes_on(prompts: Prompts, teacher: PipelineTeacher) -> Iterator[str]:
    """What a run says of its prompts before it begins, a line each: how few, foreign syntax, what its teacher cuts off.

    Of very many prompts, the first MOST_COUNTED are counted in tokens, and so are captions of pictures.
    """
    if len(prompts) < FEW:
        yield f"few prompts ({len(prompts)}): the student may be worse at others; a few thousand are usual"
    some = min(len(prompts), MOST_COUNTED)
    of = "" if some == len(prompts) else f", of the first {some:,} prompts"
    reader, foreign = teacher.text_reader(), Counter[str]()
    if isinstance(prompts, PromptFile):
        foreign.update(prompts.foreign)  # found when it was opened
    else:
        for i in range(some):
            count_foreign(prompts.prompt(i), foreign)
            count_hidden(prompts.prompt(i), foreign)
    yield from notes_of(foreign)
    if reader:
        tokens = Tokens(reader.count, reader.most, f"stepfold prompts clean --longest leaves them out{of}")
        yield from cut_by((prompts.prompt(i) for i in range(some)), tokens).note(tokens)


def conditions_key(settings: TeacherSettings, prompts_sha256: str) -> dict[str, Any]:
    """What encoded prompts depend on."""
    return {
        "teacher": settings.source,
        "lora": ", ".join(map(str, settings.lora)) or None,
        "encoder": encoder_fingerprint(place_of(settings)),
        "quantise_encoders": None if settings.quantise_encoders == "none" else settings.quantise_encoders,
        "max_tokens": settings.max_tokens,
        "height": settings.height,  # of the black picture
        "width": settings.width,
        "frames": settings.frames,
        "prompts": prompts_sha256,
    }
