"""`stepfold compare`: all methods side by side on the bundled teacher."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepfold.commands.options import Quiet, ScheduleOption, check_page
from stepfold.errors import UserError

if TYPE_CHECKING:
    from stepfold.comparison.rows import Budget, Comparison

USUAL_MINUTES = 5.0


def compare(
    presets: Annotated[
        list[str] | None,
        typer.Option(
            "--preset",
            help="A row: its name, another preset or a yaml file; again for more. Default: all rows.",
            show_default=False,
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            help="Budget of a run: minutes of training, in processor time on a CPU, so that other work does not "
            f"matter. Default: {USUAL_MINUTES:g}.",
            show_default=False,
        ),
    ] = None,
    demo_steps: Annotated[
        int | None,
        typer.Option(
            "--steps-of-demo", min=1, help="Budget: the time that so many steps of the demo take.", show_default=False
        ),
    ] = None,
    pairs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Budget: equal training states (pairs) in place of equal time, for example 36000.",
            show_default=False,
        ),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(
            help="Search each row's learning rate among these factors of the preset's, for example 0.5,1,2. Each takes "
            "a quarter of the budget. Default: no search.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of a row. A verdict needs two or more.")] = 3,
    steps: Annotated[str, typer.Option(help="Sampling steps that students are scored at.")] = "1,2,4,8",
    n: Annotated[int, typer.Option("--n", min=2, help="Images that a score is made from.")] = 500,
    schedule: ScheduleOption = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of every run, e.g. space.route_steps=12."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs at once, each with its share of the cores.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the runs; finished ones in it are not run again.")] = Path(
        "runs/compare"
    ),
    page: Annotated[
        Path,
        typer.Option(help="Page to write. Its numbers go beside it as json; what that file holds is not run again."),
    ] = Path("runs/compare/methods.md"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs, which are done and the hours to go, and stop.")
    ] = False,
    page_only: Annotated[
        bool, typer.Option("--page-only", help="Run nothing: write the page of what is known by now.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train the bundled teacher with every method for equal time, and write a page that compares them.

    Short runs measure each method's step first; the budget then gives its number of steps. The page has quality at
    each number of sampling steps with a verdict, costs and figures. Stop it whenever you like: started again, it goes
    on where it was.

    stepfold compare --minutes 5 --rates 0.5,1,2 --workers 2 --dry-run

    stepfold compare --preset demo --preset dmd --steps-of-demo 120 --seeds 2

    stepfold compare --preset my-method.yaml --preset demo --pairs 36000
    """
    from stepfold.comparison.page import SEARCHED
    from stepfold.comparison.rows import Budget
    from stepfold.comparison.sweep import compare as run
    from stepfold.display import Display, quiet_libraries
    from stepfold.levels.record import read_schedule
    from stepfold.reproduction.kept import recall

    check_page(page, "compare")
    given = {"minutes": minutes, "demo steps": demo_steps, "pairs": pairs}
    budgets = [Budget(kind, amount) for kind, amount in given.items() if amount is not None]  # type: ignore[arg-type]
    if len(budgets) > 1:
        raise UserError("--minutes, --steps-of-demo and --pairs are three kinds of budget; give one of them")
    if minutes is not None and not 0 < minutes < float("inf"):
        raise UserError(f"--minutes is {minutes:g}; a budget is above 0, for example --minutes {USUAL_MINUTES:g}")
    asked = asked_for(
        presets or [], budgets[0] if budgets else Budget("minutes", USUAL_MINUTES), changes or [],
        seeds=seeds, rates=numbers("--rates", rates or "", "0.5,1,2"), steps=counts(steps), pictures=n,
    )  # fmt: skip
    if schedule:
        read_schedule(schedule)
    display = Display(quiet)
    if known := recall(page.with_suffix(".json"), out, (SEARCHED,)):
        display.note(f"{known} runs are known from {page.with_suffix('.json')}")
    if dry_run:
        show_plan(asked, out, workers)
        return
    quiet_libraries()
    try:
        run(asked, out, page, display, workers=workers, schedule=schedule, page_only=page_only)
    except KeyboardInterrupt:
        display.note("stopped; start it again to go on")
        raise typer.Exit(130) from None
    typer.echo(f"page: {page}")


def asked_for(
    presets: list[str],
    budget: "Budget",
    changes: list[str],
    *,
    seeds: int,
    rates: tuple[float, ...],
    steps: tuple[int, ...],
    pictures: int,
) -> "Comparison":
    """The comparison of some rows, all for none, with `changes` of every run's settings.

    Raises:
        UserError: no such row, or a bad setting.
    """
    from stepfold.comparison.rows import Comparison, check_changes, choose_rows, load_rows

    check_changes(changes)
    rows = load_rows()
    return Comparison(
        rows=choose_rows(rows, presets, changes),
        reference=rows.rows[rows.reference].with_changes(changes),
        common=rows.common,
        budget=budget,
        seeds=seeds,
        rates=rates,
        steps=steps,
        pictures=pictures,
    )


def numbers(option: str, text: str, example: str) -> tuple[float, ...]:
    """Numbers above 0 between commas; none of an empty text.

    Raises:
        UserError: they are no such list.
    """
    try:
        found = tuple(dict.fromkeys(float(part) for part in text.split(",") if text))
    except ValueError:
        found = (0.0,)
    if not all(0 < number < float("inf") for number in found):
        raise UserError(f"{option} {text!r} is no list of numbers above 0; for example {option} {example}")
    return found


def counts(text: str) -> tuple[int, ...]:
    """Whole numbers of sampling steps, the lowest first.

    Raises:
        UserError: they are no such list.
    """
    found = numbers("--steps", text, "1,2,4,8")
    if not found or any(number != int(number) for number in found):
        raise UserError(f"--steps {text!r} is no list of whole numbers; for example --steps 1,2,4,8")
    return tuple(sorted(map(int, found)))


def show_plan(asked: "Comparison", out: Path, workers: int) -> None:
    """Prints the runs that can be planned by now, and how long the rest takes."""
    import torch

    from stepfold.comparison.stage import listing

    lines, left = listing(asked, out)
    for line in lines:
        steps = f"{line.run.config.training.steps} steps"
        took = f", about {line.sec / 60:.1f} min" if line.sec is not None else ""
        state = "done" if line.done else "to do"
        typer.echo(f"{state:6} {line.run.table}: {line.run.row}, seed {line.run.config.seed}, {steps}{took}")
    planned = len(asked.rows) * (1 + len(asked.rates) + asked.seeds)
    rows = f"{len(asked.rows)} row{'s' * (len(asked.rows) != 1)}"
    typer.echo(f"{rows}, each trained {asked.budget.words} a run, {planned} runs in all")
    if left is None:
        typer.echo("hours: not known before the first short runs have timed the rows; start it, or give --minutes")
        return
    kind, at_once = "time on the GPU", 1
    if not torch.cuda.is_available():
        kind, at_once = "processor time", workers * max(1, torch.get_num_threads() // workers)
    typer.echo(
        f"training to do: {left / 3600:.1f} hours of {kind}, about {left / 3600 / at_once:.1f} by the clock with "
        f"--workers {workers}; scores come on top"
    )
