"""`stepfold bank`: couplings of noise and the teacher's images on disk, for reflow without sampling again."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepfold.commands.options import (
    DeviceOption,
    DtypeOption,
    Quiet,
    RevisionOption,
    SizeOption,
    TeacherChangesOption,
    TeacherLoraOption,
    VariantOption,
    pixels_of,
    run_teacher,
)
from stepfold.errors import UserError
from stepfold.jobs.devices import usable_device

if TYPE_CHECKING:
    from torch import Tensor

    from stepfold.config import TeacherSettings

app = typer.Typer(
    no_args_is_help=True,
    help="Sample a teacher's images once and keep them with their noise, for reflow (`space.bank`)."
    "\n\n    stepfold bank make emoji --preset reflow --guidance 3 --count 4096 --out bank"
    "\n\n    stepfold distill --preset reflow --set space.bank=bank"
    "\n\nThe preset `reflow` is tuned for the bundled model. For your own, take the settings of `lora-4step` with "
    "`objective=velocity` and `space.kind=coupling`; the guidance scale is the bank's."
    "\n\n    stepfold bank make ./my-sd3 --preset sd3-lora-4step --prompts prompts.txt --guidance 7 --out bank"
    "\n\n    stepfold distill --preset sd3-lora-4step --teacher ./my-sd3 --prompts prompts.txt --set space.bank=bank "
    "--set space.kind=coupling --set objective=velocity --set 'space.guidance=[7]'",
)

Folder = Annotated[Path, typer.Argument(help="Folder of the bank.", show_default=False)]
SHOWN = 16


@app.command()
def make(
    teacher: Annotated[
        str, typer.Argument(help="`emoji` (bundled), a diffusers pipeline folder, or a hub id.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder of the bank.", show_default=False)],
    prompts: Annotated[
        str | None, typer.Option(help="Prompts, as of `distill`. Default: the bundled teacher's.", show_default=False)
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Couplings, one prompt after the other. Default: one of each.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of the teacher.")] = 25,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=1000, help="Scale. Default: the pipeline's own.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images that the network sees at once.")] = 8,
    part: Annotated[str, typer.Option(help="K/W: this process makes every W-th shard, from the K-th on.")] = "1/1",
    teacher_lora: TeacherLoraOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    size: SizeOption = None,
    dtype: DtypeOption = None,
    preset: Annotated[
        str | None,
        typer.Option(help="The preset of the run that will train on it: its teacher settings.", show_default=False),
    ] = None,
    changes: TeacherChangesOption = None,
    device: DeviceOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Sample the teacher's images and write them beside the numbers of their noise.

    A bank that was stopped goes on with the same command. Several machines share the work with --part. The run that
    trains on it needs the same teacher, with the same settings.

    stepfold bank make emoji --preset reflow --guidance 3 --count 4096 --out bank

    stepfold bank make ./my-sd3 --preset sd3-lora-4step --prompts prompts.txt --out bank --part 2/4
    """
    from stepfold.bank import make_bank
    from stepfold.display import Display, quiet_libraries

    quiet_libraries()
    display, place = Display(quiet), part_of(part)
    height, width = pixels_of(size) if size else (None, None)
    given = {
        "source": teacher, "lora": teacher_lora, "revision": revision, "variant": variant, "height": height,
        "width": width, "dtype": dtype,
    }  # fmt: skip
    settings = run_teacher(preset, changes, prompts, given)
    index, end_of = source(
        settings, prompts, count=count, steps=steps, guidance=guidance, seed=seed, device=usable_device(device)
    )
    with display.measuring({"couplings": index["count"] // place[1]}) as tick:
        make_bank(
            out, index, end_of, batch=batch, part=place, note=display.note,
            tick=lambda done: tick("couplings", done),
        )  # fmt: skip
    typer.echo(f"bank: {out}")


@app.command()
def check(
    folder: Folder,
    again: Annotated[
        bool, typer.Option("--again", help="Also sample eight images of each shard again, with the teacher.")
    ] = False,
    prompts: Annotated[
        str | None, typer.Option(help="The prompts of the bank, for --again.", show_default=False)
    ] = None,
    device: DeviceOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Read every byte of a bank, and compare its noise.

    stepfold bank check bank

    stepfold bank check bank --again --prompts prompts.txt
    """
    from stepfold.bank import flaws_of, read_index
    from stepfold.config import TeacherSettings
    from stepfold.display import Display

    index, remade = read_index(folder), None
    if again:
        settings = TeacherSettings.model_validate(index["settings"])
        made, remade = source(
            settings, prompts, count=index["count"], steps=index["steps"], guidance=index["guidance"],
            seed=index["seed"], device=usable_device(device),
        )  # fmt: skip
        if changed := [name for name in made if made[name] != index.get(name)]:
            raise UserError(f"the bank's {changed[0]} is another one than now; give its own prompts and teacher")
    with Display(quiet).measuring({"couplings": index["count"]}) as tick:
        flaws = flaws_of(folder, remade, tick=lambda done: tick("couplings", done))
    for flaw in flaws:
        typer.echo(flaw)
    if flaws:
        raise UserError(f"{folder} has {len(flaws)} flaws; delete these files and run stepfold bank make again")
    typer.echo(f"{folder}: {index['count']:,} couplings, no flaw")


@app.command()
def show(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="PNG of the first images. Default: in the bank.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Say what a bank holds, and decode its first images into one PNG.

    stepfold bank show bank

    stepfold bank show bank --out first.png
    """
    from stepfold.bank import open_bank, read_index
    from stepfold.config import TeacherSettings
    from stepfold.display import quiet_libraries
    from stepfold.evaluation.preview import save_grid
    from stepfold.teachers.loading import load_teacher
    from stepfold.training.runs import writing

    quiet_libraries()
    index = read_index(folder)
    for name in ("teacher", "guidance", "steps", "count", "prompts", "seed", "latent_shape"):
        typer.echo(f"{name:14} {index.get(name)}")
    bank = open_bank(folder, {})
    teacher = load_teacher(TeacherSettings.model_validate(index["settings"]), usable_device(device))
    images = teacher.decode(bank.rows(range(min(SHOWN, len(bank)))).x0.to(teacher.device))
    path = out or folder / "images.png"
    with writing(path) as part:
        save_grid({"bank": images[:8], **({"more": images[8:]} if len(images) > 8 else {})}, part)
    typer.echo(path)


def part_of(text: str) -> tuple[int, int]:
    """(K, W) of `K/W`.

    Raises:
        UserError: it is no such part.
    """
    first, _, of = text.partition("/")
    if not (first.isdecimal() and of.isdecimal() and 1 <= int(first) <= int(of)):
        raise UserError(f"--part {text!r} is no K/W with 1 <= K <= W; for example --part 1/4")
    return int(first), int(of)


def source(
    settings: "TeacherSettings",
    prompts: str | None,
    *,
    count: int | None,
    steps: int,
    guidance: float | None,
    seed: int,
    device: str,
) -> "tuple[dict[str, Any], Callable[[Sequence[int], Tensor], Tensor]]":
    """(index of a bank, what samples its ends) of a teacher and prompts.

    Raises:
        UserError: a teacher of one's own without prompts.
    """
    import torch

    from stepfold import assets
    from stepfold.prompts.reading import open_prompts
    from stepfold.sampling.teacher import sample_teacher
    from stepfold.teachers.fingerprints import teacher_fingerprint
    from stepfold.teachers.loading import load_teacher

    if prompts is None and settings.source != "emoji":
        raise UserError("a teacher of your own has no prompts here; give some with --prompts FILE")
    if settings.image_column:
        raise UserError("a bank is sampled from texts alone; leave teacher.image_column out")
    file = open_prompts(prompts or assets.PROMPTS)
    teacher = load_teacher(settings, device)
    scale = float(teacher.default_guidance if guidance is None else guidance)
    index: dict[str, Any] = {
        "teacher": settings.source, "fingerprint": teacher_fingerprint(settings, network_only=False),
        "settings": settings.model_dump(mode="json"), "guidance": scale, "steps": steps, "seed": seed,
        "latent_shape": list(teacher.latent_shape), "sigma_data": teacher.sigma_data,
        "prompts_sha256": file.sha256, "prompts": len(file), "count": count or len(file),
    }  # fmt: skip

    def end_of(samples: "Sequence[int]", noise: "Tensor") -> "Tensor":
        condition = teacher.encode([file.prompt(sample % len(file)) for sample in samples])
        scales = torch.full((len(samples),), scale, device=teacher.device)
        return sample_teacher(teacher, noise.to(teacher.device), condition, scales, steps, even=teacher.ode == "flow")

    return index, end_of
