"""`stepfold demo`: the page in the browser."""

from pathlib import Path
from typing import Annotated

import typer

from stepfold.commands.options import DeviceOption
from stepfold.errors import UserError
from stepfold.jobs.devices import usable_device


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
    allow_training: Annotated[
        bool, typer.Option("--allow-training", help="Let the second tab plan, start, stop and resume runs.")
    ] = False,
    offer: Annotated[
        list[str] | None,
        typer.Option(
            help="A teacher (pipeline folder or hub id) or a prompts file that runs may have; with --allow-training. "
            "Once for each.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Play with a student beside its teacher, and look at runs, in the browser (extra web).

    A page at 127.0.0.1 that works offline: type a prompt, see the student's one step and the teacher's twenty from the
    same noise. It reads run folders, also while they grow, and sends nothing anywhere.

        stepfold demo

        stepfold demo runs/mine/student --runs runs --port 8000

    With --allow-training the tab Runs has a form that starts runs, at 127.0.0.1 alone. It offers the bundled teacher
    and what --offer names.

        stepfold demo --allow-training --offer ./my-sdxl --offer prompts.txt
    """
    from stepfold.web.training import check_host, goes_on, log_of, offered

    if offer and not allow_training:
        raise UserError("--offer is for --allow-training; give both or neither")
    if allow_training:
        check_host(host)
    training = offered(runs, offer or []) if allow_training else None
    from stepfold.display import quiet_libraries
    from stepfold.students.card import read_card

    quiet_libraries()
    read_card(student).check_texts()
    from stepfold.web.drawing import load_models, warm_up
    from stepfold.web.page import build, serve

    models = load_models(student, teacher, usable_device(device))
    warm_up(models)
    page = build(models, runs, training)
    typer.echo(f"page: {serve(page, host, port, own_alone=allow_training)} (Ctrl+C ends it)")
    page.block_thread()
    if training:
        for name in goes_on(training):
            typer.echo(f"{name} goes on; its words are in {log_of(training, name)}")
