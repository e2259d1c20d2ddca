"""Curves, previews and scores of a run for tensorboard, wandb, trackio and mlflow, by accelerate's trackers."""

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import numpy as np
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image

from stepfold.errors import UserError, first_line
from stepfold.training.runs import writing

PROJECT = "stepfold"
RUNS = "trackers.json"
"""Which runs of its trackers a run folder belongs to: they go on with it."""

QUIET = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
"""Variables of the trackers that a run sets where the environment does not."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers that are not installed.

    Raises:
        UserError: naming the first of them.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"training.trackers has {name}, which is not installed; pip install {name}, or leave it out"
            )


class Trackers:
    """The trackers of a run; processes beside its first one have none."""

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> None:
        """Starts them, or goes on with those of a run that was stopped.

        Args:
            names: of `training.trackers`.
            folder: of the run.
            settings: of the run, in sections; a new run of a tracker gets them, except in tensorboard.

        Raises:
            UserError: one does not start.
        """
        threading.excepthook = quiet_about_disks  # tensorboard's thread would print what `_written` says
        self.folder = folder
        self.step = 0
        there = folder / RUNS
        known: dict[str, str] = json.loads(there.read_text(encoding="utf-8")) if there.is_file() else {}
        runs = dict(known)
        self.trackers: dict[str, Any] = {}
        for name in dict.fromkeys(names):
            tracker, run = self._written(name, lambda name=name: started(name, folder, known.get(name)))
            if run and name not in runs:
                tracker.store_init_configuration(dict(flat(settings)))
                runs[name] = run
            self.trackers[name] = tracker
        if runs != known:
            with writing(there) as part:
                part.write_text(json.dumps(runs) + "\n", encoding="utf-8")

    def add(self, row: Mapping[str, Any], step: int) -> None:
        """The numbers of a row of the metrics.

        Raises:
            UserError: they cannot be written.
        """
        self.step = step
        numbers = {name: value for name, value in row.items() if name != "step" and not isinstance(value, str)}
        for name, tracker in self.trackers.items():
            self._written(name, lambda tracker=tracker: tracker.log(numbers, step=step))

    def add_preview(self, path: Path, step: int) -> None:
        """A preview grid, a PNG.

        Raises:
            UserError: it cannot be written.
        """
        for name, tracker in self.trackers.items():
            self._written(name, lambda name=name, tracker=tracker: log_image(name, tracker, path, step))

    def add_scores(self, result: Mapping[str, Any]) -> None:
        """The scores of report.json, at the last step.

        Raises:
            UserError: they cannot be written.
        """
        if scores := scores_of(result):
            for name, tracker in self.trackers.items():
                self._written(name, lambda tracker=tracker: tracker.log(scores, step=self.step))

    def end(self) -> None:
        """Writes what is left.

        Raises:
            UserError: it cannot be written.
        """
        for name, tracker in self.trackers.items():
            self._written(name, tracker.finish)

    def _written(self, name: str, write: Callable[[], Any]) -> Any:
        try:
            return write()
        except OSError as error:
            where = self.folder / name if name == "tensorboard" else f"for {name}"
            raise UserError(
                f"cannot write {where}: {error.strerror or error}; free some space, then continue with --resume"
            ) from None


def started(name: str, folder: Path, run: str | None) -> tuple[GeneralTracker, str]:
    """A tracker, and the name by which it knows the run; tensorboard needs none.

    Nothing is sent that the environment does not ask for: wandb is offline, and the libraries report nothing home.

    Args:
        name: of the tracker.
        folder: of the run.
        run: the name that an earlier part of this run had; None for a new one.

    Raises:
        UserError: it does not start.
        OSError: the disk is full.
    """
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    new = f"{folder.resolve().name}-{uuid4().hex[:8]}"
    trackers: dict[str, Callable[[], GeneralTracker]] = {
        "tensorboard": lambda: TensorBoardTracker(name, folder),
        "wandb": lambda: WandBTracker(PROJECT, id=run or new, name=run or new, resume="allow"),
        "trackio": lambda: TrackioTracker(PROJECT, name=run or new, resume="allow"),
        "mlflow": lambda: MLflowTracker(PROJECT, run_id=run, run_name=new),
    }
    try:
        tracker = trackers[name]()
        tracker.start()
    except OSError:
        raise
    except Exception as error:  # each library has errors of its own
        raise UserError(
            f"training.trackers has {name}, which does not start ({first_line(error)}); set what it asks for, or leave "
            "it out"
        ) from None
    if name == "tensorboard":
        return tracker, ""
    return tracker, cast(Any, tracker).tracker.info.run_id if name == "mlflow" else run or new


def log_image(name: str, tracker: Any, path: Path, step: int) -> None:
    """A PNG, as a tracker takes images; accelerate has no call for trackio's."""
    if name == "mlflow":
        tracker.log_artifact(str(path), "previews")
        return
    if name == "trackio":
        import trackio  # type: ignore[import-not-found]

        tracker.log({"preview": trackio.Image(str(path))}, step=step)
        return
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    shape = {"dataformats": "NHWC"} if name == "tensorboard" else {}
    tracker.log_images({"preview": pixels[None]}, step=step, **shape)


def scores_of(result: Mapping[str, Any]) -> dict[str, float]:
    """The table of report.json: {"student/1 step/accuracy": 0.9}."""
    return {
        f"{who}/{steps} step{'' if steps == '1' else 's'}/{metric}": value
        for who in ("teacher", "student")
        for steps, row in result.get(who, {}).items()
        for metric, value in row.items()
        if isinstance(value, int | float)
    }


def flat(settings: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """[("training.steps", 20000)], of sections in sections."""
    found: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{before}{name}.")
        else:
            found.append((before + name, value if isinstance(value, int | float | str) else json.dumps(value)))
    return found


def quiet_about_disks(problem: threading.ExceptHookArgs) -> None:
    """tensorboard's thread tells whoever asked it to write of an OSError, and needs not print it besides."""
    if not (issubclass(problem.exc_type, OSError) and type(problem.thread).__name__ == "_AsyncWriterThread"):
        threading.__excepthook__(problem)
