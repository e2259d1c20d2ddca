"""`stepfold demo`: the page in the browser."""

from pathlib import Path
from typing import Annotated

import typer

from stepfold.commands.options import DeviceOption, usable_device


def demo(
    student: Annotated[Path, typer.Argument(help="Folder of a run or a student, or `emoji-student` (bundled).")] = Path(
        "emoji-student"
    ),
    teacher: Annotated[
        str | None,
        typer.Option(help="`emoji`, a pipeline folder, or a hub id. Default: the student's own.", show_default=False),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder whose run folders the second tab shows.")] = Path("runs"),
    host: Annotated[
        str, typer.Option(help="Address to serve at. 0.0.0.0 lets everyone in who reaches this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: 7860, or the next free one.", show_default=False)
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Play with a student beside its teacher, and look at runs, in the browser (extra web).

    A page at 127.0.0.1 that works offline: type a prompt, see the student's one step and the teacher's twenty from the
    same noise. It reads run folders, also while they grow, and sends nothing anywhere.

        stepfold demo

        stepfold demo runs/mine/student --runs runs --port 8000
    """
    from stepfold.display import quiet_libraries
    from stepfold.web.drawing import load_models, warm_up
    from stepfold.web.page import build, serve

    quiet_libraries()
    models = load_models(student, teacher, usable_device(device))
    warm_up(models)
    page = build(models, runs)
    typer.echo(f"page: {serve(page, host, port)} (Ctrl+C ends it)")
    page.block_thread()
