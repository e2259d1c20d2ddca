"""The errors that users see: one line that says what was given, what is allowed and the usual fix."""

LONGEST = 4000
"""Characters of an error; what a file holds may be quoted in it."""


class UserError(ValueError):
    """A mistake in what the user gave (a file, an option, a folder). The command line prints it and exits with 2."""

    def __init__(self, message: object = "") -> None:
        text = str(message)
        half = LONGEST // 2
        super().__init__(text if len(text) <= LONGEST else f"{text[:half]} [...] {text[-half:]}")


class NonFiniteError(RuntimeError):
    """A loss, gradient or model output is no longer finite. The run stops and keeps its last good checkpoint."""
