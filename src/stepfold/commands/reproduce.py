"""`stepfold reproduce`: the paper's comparisons, run again."""

from pathlib import Path
from typing import Annotated, Any

import typer

from stepfold.commands.options import Quiet, check_page, write_json
from stepfold.errors import UserError


def reproduce(
    tables: Annotated[
        list[str] | None, typer.Option("--table", help="T2, T4, ...; again for more. Default: all.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs; finished ones in it are not run again.")] = Path(
        "runs/reproduce"
    ),
    images: Annotated[
        Path | None,
        typer.Option(
            help="Image folder for rows that need one (recipes/emoji_teacher/render.py); else they are left out.",
            show_default=False,
        ),
    ] = None,
    page: Annotated[
        Path,
        typer.Option(help="Page to write. Its numbers go beside it as json; what that file holds is not run again."),
    ] = Path("runs/reproduce/paper.md"),
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of every run, e.g. training.steps=500."),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(min=1, help="Runs at once, each with its share of the cores. Those whose times count go alone."),
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and which are done, and stop.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="With --dry-run: write the list here too.", show_default=False)
    ] = None,
    page_only: Annotated[
        bool, typer.Option("--page-only", help="Run nothing: write the page of what is known by now.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Run the paper's comparisons again and write a page with a verdict on each claim.

    Stop it whenever you like: started again, it goes on where it was.

    stepfold reproduce --table T4

    stepfold reproduce --table T6 --table T7 --dry-run
    """
    from stepfold.display import Display, quiet_libraries
    from stepfold.reproduction.experiments import load_experiments, plan
    from stepfold.reproduction.kept import recall
    from stepfold.reproduction.sweep import listing, sweep

    if json_file and not dry_run:
        raise UserError(
            f"--json goes with --dry-run; the numbers of a sweep are written to {page.with_suffix('.json')}"
        )
    check_page(page, "reproduce")
    if images and not images.is_dir():
        raise UserError(
            f"--images {images} is no folder; make it with recipes/emoji_teacher/render.py, or leave it out"
        )
    experiments, display, extra = load_experiments(), Display(quiet), changes or []
    planned = plan(experiments, tables or [], extra, images)
    if known := recall(page.with_suffix(".json"), out):
        display.note(f"{known} runs are known from {page.with_suffix('.json')}")
    if dry_run:
        rows: list[dict[str, Any]] = []
        for run, done in listing(experiments, planned, out):
            settings = " ".join(run.changes)
            typer.echo(f"{'done' if done else 'to do':6} {run.table} {run.row}: --preset {run.preset} {settings}")
            row = {"table": run.table, "row": run.row, "preset": run.preset, "changes": run.changes}
            rows.append(row | {"folder": str(out / run.name), "done": done})
        write_json(json_file, rows)
        return
    quiet_libraries()
    try:
        sweep(
            experiments, planned, out, page, display,
            workers=workers, extra=extra, images=images, page_only=page_only,
        )  # fmt: skip
    except KeyboardInterrupt:
        display.note("stopped; start it again to go on")
        raise typer.Exit(130) from None
    typer.echo(f"page: {page}")
