"""Curves of a run for tensorboard."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stepfold.errors import UserError


class Tracker:
    """Curves for tensorboard, in the run folder."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder / "tensorboard"
        threading.excepthook = quiet_about_disks  # its thread would print what `_written` says
        self.writer = self._written(lambda: SummaryWriter(self.folder))

    def add(self, row: Mapping[str, Any], step: int) -> None:
        """The numbers of a row of the metrics.

        Raises:
            UserError: they cannot be written.
        """
        for name, value in row.items():
            if name != "step" and not isinstance(value, str):
                self._written(lambda name=name, value=value: self.writer.add_scalar(name, value, step))

    def close(self) -> None:
        """Writes what is left.

        Raises:
            UserError: it cannot be written.
        """
        self._written(self.writer.close)

    def _written(self, write: Callable[[], Any]) -> Any:
        try:
            return write()
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder}: {error.strerror or error}; free some space, then continue with --resume"
            ) from None


def quiet_about_disks(problem: threading.ExceptHookArgs) -> None:
    """tensorboard's thread tells whoever asked it to write of an OSError, and needs not print it besides."""
    if not (issubclass(problem.exc_type, OSError) and type(problem.thread).__name__ == "_AsyncWriterThread"):
        threading.__excepthook__(problem)
