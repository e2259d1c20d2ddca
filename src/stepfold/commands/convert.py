"""`stepfold convert`: a Sana checkpoint under its original names becomes a pipeline folder."""

from pathlib import Path
from typing import Annotated

import typer

from stepfold.commands.options import refuse_existing
from stepfold.errors import UserError


def convert(
    file: Annotated[Path, typer.Argument(help="A .pth or .safetensors under original names.", show_default=False)],
    base: Annotated[
        str, typer.Option(help="Sana pipeline of the same size (folder or hub id), for all else.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    time_scale: Annotated[
        int, typer.Option(help="What its time counts to: 1000 (Sana), 1 (Sana-Sprint and its teacher).")
    ] = 1000,
    force: Annotated[bool, typer.Option("--force", help="Replace a pipeline folder that is there.")] = False,
) -> None:
    """Make a pipeline folder of a Sana checkpoint under its original names; nothing in the file is run.

    stepfold convert Sana_600M_512px.pth --base Efficient-Large-Model/Sana_600M_512px_diffusers --out my-sana

    stepfold convert sprint_teacher.pth --base ./sana-1600m --out teacher --time-scale 1
    """
    from stepfold.display import quiet_libraries
    from stepfold.export.converting import convert as converted

    quiet_libraries()
    refuse_existing(out, force)
    if out.exists() and not (out / "model_index.json").is_file():
        raise UserError(f"{out} is no pipeline folder, so --force does not replace it; choose another --out")
    if time_scale not in (1, 1000):
        raise UserError(f"--time-scale is {time_scale}; give 1000 (Sana) or 1 (Sana-Sprint and its teacher)")
    typer.echo(f"{converted(file, base, out, time_scale)}: {out}")
