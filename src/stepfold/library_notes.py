"""What the model libraries warn of: dropped where it is known and harmless, a note of ours where it is not."""

import logging
import re
import sys

HARMLESS = {
    "should be kept in float32": "students are cast to float32, never below what the teacher's weights were loaded in",
    "requires torchvision": "no family reads pictures with these processors",
    "You have disabled the safety checker": "a pipeline is loaded as its folder says, and a student's folder has none",
    "Expected types for id2label": "a DiT's index has the classes' names as texts, and they are read as such",
    "part of your input was truncated": "prompts that are cut are counted at the start of a run",
    "An error occurred while trying to fetch": "an error of ours follows, with its fix",
    "Some weights of the model checkpoint": "weights that no layer takes are refused by name",
    "No LoRA keys associated to": "a LoRA is refused where a part that it names takes none of it",
}
"""Pattern of a message -> why it is not shown."""


class LibraryNotes(logging.Handler):
    """Prints each message that is not known to be harmless once, as one line on standard error."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """As `logging.Handler`'s."""
        text = " ".join(record.getMessage().split())
        if text not in self._said and not any(re.search(pattern, text) for pattern in HARMLESS):
            self._said.add(text)
            sys.stderr.write(f"note: {record.name.split('.')[0]} says: {text}\n")
