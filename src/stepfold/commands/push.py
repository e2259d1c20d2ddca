"""`stepfold push`: a student goes to the Hugging Face hub."""

from typing import Annotated

import typer

from stepfold.commands.options import JsonOption, StudentArgument, write_json


def push(
    student: StudentArgument,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the hub; made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create it as private; refuse a public one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and the card, and stop.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Upload a student to the Hugging Face hub, with a card: licences, recipe, what was measured, how to use it.

    Log in first, with `hf auth login`. No licence stops it: look at what the card says about the teacher's.

    stepfold push runs/mine/student you/my-student --dry-run

    stepfold push runs/mine/student you/my-student --private
    """
    from stepfold.display import quiet_libraries
    from stepfold.export import hub
    from stepfold.students.card import student_folder

    quiet_libraries()
    student = student_folder(student)
    card = hub.hub_card(student, repo)
    if teacher := hub.teacher_of_nobody_else(student):
        typer.echo(f"note: the card loads the teacher from {teacher}, which nobody else has; push that too", err=True)
    if dry_run:
        files = sorted(path for path in student.rglob("*") if path.is_file())
        sizes = {path.relative_to(student).as_posix(): path.stat().st_size for path in files}
        for name, size in sizes.items():
            typer.echo(f"{size / 2**20:10.3f} MiB  {name}")
        typer.echo(f"\nREADME.md for {repo}:\n\n{card}", nl=False)
        write_json(json_file, {"repo": repo, "bytes": sizes, "card": card})
        return
    page = hub.push(student, repo, private=private)
    typer.echo(f"page: {page}")
    write_json(json_file, {"repo": repo, "page": page})
