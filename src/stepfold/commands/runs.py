"""`stepfold runs`: the runs in a folder."""

from pathlib import Path
from typing import Annotated

import typer

from stepfold.commands.options import JsonOption, write_json
from stepfold.errors import UserError

FORMS = {"latent_error": "{:.3f}", "accuracy": "{:.1%}"}
HEADS = ("run", "state", "steps done", "method", "student", "sampled in", "latent error", "accuracy")


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder with runs, up to three deep; or a run.")] = Path("runs"),
    json_file: JsonOption = None,
) -> None:
    """List the runs in a folder: what became of them, how far they are, what their students score.

    Scores are those of the fewest sampling steps. FD compares at an equal number n of images only, so each n has a
    column. Below the table it says which runs with a fake score look late, over-guided or collapsed.

    stepfold runs

    stepfold runs /data/runs --json runs.json
    """
    from rich.markup import escape
    from rich.table import Table

    from stepfold.display import show_table
    from stepfold.evaluation.protocol import fd_title
    from stepfold.students.card import is_run
    from stepfold.web.runs import count_of, find_runs, method_of, read_run, scores_of, symptoms_in

    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name the one that your runs are in (--out of stepfold distill)")
    names = find_runs(folder)
    if not names and is_run(folder):
        folder, names = folder.resolve().parent, [folder.resolve().name]
    found = [read_run(folder, name) for name in names]
    counts = sorted({count_of(run) or 0 for run in found if "fd" in scores_of(run)[1]}, key=lambda n: n or float("inf"))
    rows, table = [], Table(*HEADS, *map(fd_title, counts), box=None)
    for run in found:
        (steps, scores), (method, student) = scores_of(run), method_of(run)
        rows.append(
            {"name": run.name, "state": run.state, "step": run.step, "steps": run.steps, "problem": run.problem}
            | {"method": method, "student": student, "n": count_of(run) if scores else None}
            | {"scores": {str(steps): scores} if scores else {}, "looks": symptoms_in(run)}
        )
        done = f"{run.step:,}" + (f" of {run.steps:,}" if run.steps and run.step < run.steps else "")
        told = [form.format(scores[key]) if key in scores else "" for key, form in FORMS.items()]
        told += [f"{scores['fd']:.4f}" if "fd" in scores and (count_of(run) or 0) == n else "" for n in counts]
        at = str(steps) if scores else escape(run.problem)
        table.add_row(escape(run.name), run.state, done, method, student, at, *told)
    write_json(json_file, rows)
    if found:
        show_table(table)
        for row in rows:
            for sentence in row["looks"]:
                typer.echo(f"{row['name']}: {sentence}")
    else:
        typer.echo(f"no runs in {folder}")
