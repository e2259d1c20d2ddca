"""A sweep from the first run to the page."""

from collections.abc import Iterator
from pathlib import Path

from stepfold.display import Display
from stepfold.reproduction.experiments import Experiments, Run, plan, plan_timing
from stepfold.reproduction.page import write_page
from stepfold.reproduction.pictures import draw_filter_examples, draw_grids
from stepfold.reproduction.records import SCORES
from stepfold.reproduction.runs import measure_figures, measure_solvers, plan_equal_time, reproduce


def listing(experiments: Experiments, planned: list[Run], root: Path) -> Iterator[tuple[Run, bool]]:
    """Every run of a sweep, and whether it is done."""
    for run in _with_short_and_equal_time(experiments, planned, root):
        yield run, (root / run.name / SCORES).exists()


def sweep(
    experiments: Experiments,
    planned: list[Run],
    root: Path,
    page: Path,
    display: Display,
    *,
    workers: int,
    extra: list[str],
    images: Path | None,
    page_only: bool = False,
) -> None:
    """Runs what is planned and not done, and writes the page of all tables, after an interruption too.

    Args:
        experiments: the tables.
        planned: the runs that are wanted.
        root: the sweep's folder.
        page: where to write.
        display: what the user sees.
        workers: runs at once.
        extra: as for `plan`, like images.
        images: folder for the rows that need one.
        page_only: run and measure nothing.
    """
    pictures = experiments.pictures
    try:
        if not page_only:
            measure_figures(experiments, root, display)
            reproduce([*planned, *plan_timing(experiments, planned)], root, display, pictures, workers)
            reproduce(plan_equal_time(experiments, planned, root), root, display, pictures, workers)
            measure_solvers(experiments, root, display)
            draw_filter_examples(experiments, page.parent / "figures", display)
        draw_grids(experiments, planned, page.parent / "figures", root, display)
    finally:
        # rows that need images are shown without them too, if they were run
        everything = plan(experiments, [], extra, images or Path("images"))
        everything = _with_short_and_equal_time(experiments, everything, root)
        write_page(experiments, everything, root, page, extra)


def _with_short_and_equal_time(experiments: Experiments, runs: list[Run], root: Path) -> list[Run]:
    return [*runs, *plan_timing(experiments, runs), *plan_equal_time(experiments, runs, root)]
