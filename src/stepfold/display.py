"""What a person sees while something runs: a live display in a terminal, plain lines elsewhere."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from stepfold.library_notes import LibraryNotes

if TYPE_CHECKING:
    from stepfold.training.looks import Progress

WIDE = 160  # columns of a table that is piped or written to a file


def quiet_libraries() -> None:
    """No progress bars of the model libraries between our lines, and of their warnings those that tell something."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_warning()
        library.disable_progress_bar()
        root = library.get_logger(library.__name__.split(".")[0])
        if not any(isinstance(handler, LibraryNotes) for handler in root.handlers):
            library.disable_default_handler()
            library.add_handler(LibraryNotes())


PLAIN_EVERY = 25  # steps between lines when the output is no terminal


class Display:
    """Writes to standard error, so that standard output stays clean for results."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._bars: Bars | None = None
        self._task, self._total = None, 0
        self._pairs_per_sec = 0.0

    def note(self, text: str) -> None:
        """One line."""
        with suppress(OSError):  # a full disk behind standard error ends no run
            self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def _open(self) -> Iterator[Bars]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Bars(
            *columns, console=self.console, speed_estimate_period=120, disable=not self.console.is_terminal
        ) as bars:
            yield bars

    @contextmanager
    def training(self, steps: int) -> Iterator[None]:
        """Shows `step` calls as one bar."""
        with self._open() as bars:
            self._bars, self._task, self._total = bars, bars.add_task("distil", total=steps), steps
            yield
        self._bars = None

    def step(self, progress: "Progress") -> None:
        """One optimiser step is done."""
        row, waits = progress.row, "head_start" in progress.row
        if not waits:
            rate = row["pairs"] / row["sec"]
            self._pairs_per_sec = 0.95 * self._pairs_per_sec + 0.05 * rate if self._pairs_per_sec else rate
        text = "head start: the student waits" if waits else f"{self._pairs_per_sec:.0f} pairs/s"
        if "loss" in row:
            text = (
                f"loss {row['loss']:+.3f}  "
                + (f"w_phi {row['w_phi']:+.2f}  tangent {row['tangent_norm']:.3f}  " if "w_phi" in row else "")
                + f"grad {row['grad_norm']:.2f}  {text}"
            )
        if self._bars is not None:
            self._bars.update(self._task, completed=progress.step, description=text)  # type: ignore[arg-type]
        if not self.console.is_terminal and (progress.step % PLAIN_EVERY == 0 or progress.step in (1, self._total)):
            left = f"  about {(self._total - progress.step) * row['sec'] / 60:.1f} min left"
            self.note(f"step {progress.step}/{self._total}  {text}{'' if waits else left}")

    @contextmanager
    def measuring(self, totals: dict[str, int]) -> Iterator[Callable[[str, int], None]]:
        """Bars for the samplers of an evaluation; yields the function that moves them."""
        with self._open() as bars:
            tasks = {name: bars.add_task(f"measure {name}", total=total) for name, total in totals.items()}

            def tick(name: str, count: int) -> None:
                bars.advance(tasks[name], count)
                if bars.tasks[list(tasks).index(name)].finished and not self.console.is_terminal:
                    self.note(f"measured {name}")

            yield tick

    @contextmanager
    def searching(self, totals: dict[str, int]) -> Iterator[Callable[..., None]]:
        """Bars of searches, by the most calls that each may take; yields the function that moves or ends them."""
        with self._open() as bars:
            tasks = {name: bars.add_task(f"search {name}", total=total) for name, total in totals.items()}

            def tick(name: str, count: int, done: bool = False) -> None:
                bars.advance(tasks[name], count)
                if done:
                    bars.update(tasks[name], completed=totals[name])
                    if not self.console.is_terminal:
                        self.note(f"searched {name}")

            yield tick


def show_table(table: Table) -> None:
    """A result, on standard output, whether quiet or not; where that is no terminal, wide enough not to be folded."""
    fits = sys.stdout.isatty() or "COLUMNS" in os.environ
    Console(highlight=False, markup=True, width=None if fits else WIDE).print(table)


CELLS = {
    "latent_error": ("latent error", "{:.3f}"),
    "change": ("change", "{:.3f}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "clip_score": ("CLIP score", "{:.1f}"),
    "fd": ("FD", "{:.4f}"),
    "fd_imagenet": ("FD-ImageNet", "{:.2f}"),
    "diversity": ("diversity", "{:.3f}"),
    "agreement": ("latent MSE", "{:.3f}"),
    "images_per_sec": ("images/s", "{:.1f}"),
}
"""What a row of results may hold -> its head and its format in the terminal."""


def results_table(result: dict) -> Table:
    """The rows of a report as a table for the terminal."""
    # imported late: --help has no use for torch
    from stepfold.evaluation.protocol import counted, fd_title, teachers_of
    from stepfold.evaluation.verdict import noisy_note

    groups = {who: result[who] for who in (*teachers_of(result), "student") if who in result}
    groups |= result.get("pipelines", {})
    rows = [row for group in groups.values() for row in group.values()]
    keys = [key for key in CELLS if any(row.get(key) is not None for row in rows)]
    n, names = result.get("protocol", {}).get("n"), {key: CELLS[key][0] for key in keys}
    heads = [fd_title(n, name) if key.startswith("fd") else name for key, name in names.items()]
    caption = noisy_note(result, keys) or None
    table = Table("sampler", *heads, box=None, caption=caption, caption_justify="left")
    for who, group in groups.items():
        for steps, row in group.items():
            cells = ["-" if row.get(key) is None else CELLS[key][1].format(row[key]) for key in keys]
            table.add_row(f"{who} {counted(int(steps))}", *cells)
    return table


def mjhq_table(result: dict) -> Table:
    """The rows of an MJHQ result as a table for the terminal."""
    table = Table("pipeline", "steps", "FID", "CLIP score", "pictures", box=None)
    for folder, rows in result["pipelines"].items():
        for steps, s in rows.items():
            table.add_row(folder, steps, f"{s['fid']:.2f}", f"{s['clip_score']:.2f}", str(s["n"]))
    return table
