"""The errors that users see: one line that says what was given, what is allowed and the usual fix."""


class UserError(ValueError):
    """A mistake in what the user gave (a file, an option, a folder). The command line prints it and exits with 2."""


class NonFiniteError(RuntimeError):
    """A loss, gradient or model output is no longer finite. The run stops and keeps its last good checkpoint."""
