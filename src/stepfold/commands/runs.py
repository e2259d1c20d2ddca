"""`stepfold runs`: the runs in a folder."""

from pathlib import Path
from typing import Annotated

import typer

from stepfold.commands.options import JsonOption, write_json
from stepfold.errors import UserError


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder with runs in it, up to three folders deep.")] = Path("runs"),
    json_file: JsonOption = None,
) -> None:
    """List the runs in a folder: what became of them, how far they are, what their students score.

    stepfold runs

    stepfold runs /data/runs --json runs.json
    """
    from rich.markup import escape
    from rich.table import Table

    from stepfold.display import show_table
    from stepfold.web.runs import find_runs, read_run, scores_of

    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name the one that your runs are in (--out of stepfold distill)")
    found = [(run, *scores_of(run)) for run in (read_run(folder, name) for name in find_runs(folder))]
    rows = [
        {"name": run.name, "state": run.state, "step": run.step, "steps": run.steps, "problem": run.problem}
        | {"scores": {str(calls): scores} if scores else {}}
        for run, calls, scores in found
    ]
    write_json(json_file, rows)
    table = Table("run", "state", "steps done", "student", "accuracy", "FD", box=None)
    for run, calls, scores in found:
        steps = f"{run.step:,}" + (f" of {run.steps:,}" if run.steps and run.step < run.steps else "")
        told = (f"{calls} step{'s' * (calls > 1)}", f"{scores.get('accuracy', 0):.1%}", f"{scores.get('fd', 0):.4f}")
        table.add_row(escape(run.name), run.state, steps, *(told if scores else ("", escape(run.problem), "")))
    if found:
        show_table(table)
    else:
        typer.echo(f"no runs in {folder}")
