"""`stepfold doctor`: is the teacher read correctly?"""

from typing import Annotated, Literal

import typer

from stepfold.commands.options import (
    DeviceOption,
    FramesOption,
    HeightOption,
    JsonOption,
    RevisionOption,
    SizeOption,
    TeacherLoraOption,
    VariantOption,
    WidthOption,
    pixels_of,
    teacher_settings,
    write_json,
)
from stepfold.errors import UserError
from stepfold.jobs.devices import usable_device

IN_DOCS = "docs/errors.md has the cause and the fix of each check, under 'stepfold doctor says LOOK'"


def doctor(
    teacher: Annotated[str, typer.Argument(help="`emoji`, a diffusers pipeline folder, or a hub id.")] = "emoji",
    teacher_lora: TeacherLoraOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    json_file: JsonOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    size: SizeOption = None,
    frames: FramesOption = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Precision of the teacher's weights.")
    ] = "float32",
    quantise: Annotated[
        Literal["none", "int8", "fp8", "nf4"],
        typer.Option(help="Keep the weights of its blocks in 8 or 4 bits, beneath a LoRA student."),
    ] = "none",
    quantise_encoders: Annotated[
        Literal["none", "int8", "fp8", "nf4"],
        typer.Option(help="Keep the weights of its text encoders in 8 or 4 bits."),
    ] = "none",
    lora: Annotated[int, typer.Option(min=0, help="Rank of a LoRA student; 0 for all weights.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Check that a teacher is read correctly before a run: each finding with a number and a verdict.

    A large teacher fits as it will be trained: in half precision, with a LoRA student that shares its weights.

    stepfold doctor emoji

    stepfold doctor black-forest-labs/FLUX.1-dev --dtype bfloat16 --lora 64

    stepfold doctor ./my-flux --size 256 --json findings.json
    """
    from rich.table import Table

    from stepfold.display import quiet_libraries, show_table
    from stepfold.training.doctor import examine

    if size:
        if height or width:
            raise UserError(f"--size {size} is height and width; leave out --height and --width, or --size")
        height, width = pixels_of(size)
    quiet_libraries()
    settings = teacher_settings(
        source=teacher,
        revision=revision,
        variant=variant,
        lora=teacher_lora,
        dtype=dtype,
        quantise=quantise,
        quantise_encoders=quantise_encoders,
        height=height,
        width=width,
        frames=frames,
        max_tokens=64,
    )
    findings = examine(settings, usable_device(device), lora)
    table = Table("check", "number", "want", "verdict", box=None)
    for f in findings:
        table.add_row(f.check, f.number, f.want, "[green]ok[/]" if f.ok else "[red]LOOK[/]")
    show_table(table)
    for f in findings:
        if not f.ok:
            typer.echo(f"LOOK, {f.check}: {f.fix or IN_DOCS}", err=True)
    write_json(json_file, [vars(f) for f in findings])
    if not all(f.ok for f in findings):
        raise typer.Exit(1)
