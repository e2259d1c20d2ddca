"""`stepfold convert`: a checkpoint under its original names, one file, becomes a pipeline folder."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from stepfold.commands.options import refuse_existing
from stepfold.errors import UserError


def convert(
    file: Annotated[
        Path,
        typer.Argument(help="A .safetensors or .pth under original names, as model sites have it.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(help="Pipeline of the same kind (folder or hub id), for what the file lacks.", show_default=False),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="last or ema, where the file has both.", show_default=False)
    ] = None,
    network_only: Annotated[
        bool, typer.Option("--network-only", help="Autoencoder and text encoders of the base, whatever the file has.")
    ] = False,
    time_scale: Annotated[
        int, typer.Option(help="Range of a Sana's timesteps: 1000 (Sana), 1 (Sana-Sprint and its teacher).")
    ] = 1000,
    dtype: Annotated[
        Literal["bfloat16", "float16"] | None,
        typer.Option(help="Round network and text encoders. Default: each part's own precision.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a pipeline folder that is there.")] = False,
) -> None:
    """Make a pipeline folder of one file.

    It may be of Stable Diffusion 1, 2, XL, 3, FLUX.1, FLUX.2, Chroma, ERNIE-Image, Lumina 2, PixArt, Qwen-Image, Sana,
    Wan or Z-Image. Nothing in the file is run. It needs the file and the base without its network in RAM.

    stepfold convert my-sdxl.safetensors --base stabilityai/stable-diffusion-xl-base-1.0 --out my-sdxl

    stepfold convert Sana_600M_512px.pth --base Efficient-Large-Model/Sana_600M_512px_diffusers --out my-sana
    """
    from stepfold.display import quiet_libraries
    from stepfold.export.converting import convert as converted

    quiet_libraries()
    refuse_existing(out, force)
    if out.exists() and not (out / "model_index.json").is_file():
        raise UserError(f"{out} is no pipeline folder, so --force does not replace it; choose another --out")
    if time_scale not in (1, 1000):
        raise UserError(f"--time-scale is {time_scale}; give 1000 (Sana) or 1 (Sana-Sprint and its teacher)")
    if weights not in (None, "last", "ema"):
        raise UserError(f"--weights is {weights!r}; give last or ema")
    chosen: Any = weights
    typer.echo(f"{converted(file, base, out, time_scale, chosen, network_only, dtype)}: {out}")
