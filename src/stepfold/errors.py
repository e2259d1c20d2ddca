"""The errors that users see: one line that says what was given, what is allowed and the usual fix."""

LONGEST = 4000
"""Characters of an error; what a file holds may be quoted in it."""


class UserError(ValueError):
    """A mistake in what the user gave (a file, an option, a folder). The command line prints it and exits with 2."""

    def __init__(self, message: object = "") -> None:
        text = str(message)
        half = LONGEST // 2
        super().__init__(text if len(text) <= LONGEST else f"{text[:half]} [...] {text[-half:]}")


def first_line(error: BaseException) -> str:
    """What an error says first; the name of its class where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


class Caution(UserWarning):
    """Something that a user should know and that stops nothing; the command line says it in one line."""


class NonFiniteError(RuntimeError):
    """A loss, gradient or model output is no longer finite. The run stops and keeps its last good checkpoint."""


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no memory, of a GPU or of the machine."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
