"""Options that several commands have, and what becomes of them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand
from typing_extensions import override

from stepfold.errors import UserError, first_line

if TYPE_CHECKING:
    from stepfold.config import TeacherSettings

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only results and errors.")]
StudentArgument = Annotated[
    Path, typer.Argument(help="Student folder: OUT/student of a finished run.", show_default=False)
]
TeacherOption = Annotated[
    str | None,
    typer.Option(help="`emoji` (bundled), a diffusers pipeline folder, or a hub id.", show_default=False),
]
TeacherLoraOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:SCALE]",
        help="A LoRA to merge into the teacher: safetensors file, folder or hub id. Once for each.",
        show_default=False,
    ),
]
RevisionOption = Annotated[str | None, typer.Option(help="Of a hub id: branch, tag or commit.", show_default=False)]
VariantOption = Annotated[str | None, typer.Option(help="Of the weights' files, for example fp16.", show_default=False)]
HeightOption = Annotated[
    int | None, typer.Option(min=1, help="Pixels. Default: the teacher's own.", show_default=False)
]
WidthOption = Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default=False)]
FramesOption = Annotated[
    int | None, typer.Option(min=1, help="Of a video. Default: the teacher's own.", show_default=False)
]
PromptsOption = Annotated[
    str | None,
    typer.Option(
        help="txt (one prompt a line), json, jsonl, csv, tsv or parquet; .gz too; or a folder. "
        "Default: the bundled teacher's.",
        show_default=False,
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option(help="Settings to start from: a name that `stepfold presets` lists, or a yaml file."),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the result here too, as json.", show_default=False)
]
ChangesOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. training.steps=100.")
]


class Command(TyperCommand):
    """A command that refuses an option that is given twice and has one value: the last would win without a word."""

    @override
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the library's, after a look at which options there are.

        Raises:
            UserError: naming the option.
        """
        *_, given = self.make_parser(ctx).parse_args(args=list(args))
        for option in given:
            switch = getattr(option, "is_flag", False) and not option.secondary_opts
            if option.param_type_name == "option" and not (option.multiple or switch) and given.count(option) > 1:
                raise UserError(
                    f"{option.opts[0]} is given {given.count(option)} times and has one value; give it once"
                )
        return super().parse_args(ctx, args)


def teacher_settings(**given: Any) -> "TeacherSettings":
    """A command's options as settings of its teacher; None leaves a default.

    Raises:
        UserError: one is out of range.
    """
    from stepfold.config import validate

    chosen = {name: value for name, value in given.items() if value is not None}
    return validate({"prompts": "", "teacher": chosen}).teacher


def chosen_preset(preset: str | None, teacher: str | None) -> str:
    """The preset of a distillation that names none."""
    return preset or ("demo" if teacher in (None, "emoji") else "default")


def usable_device(name: str) -> str:
    """The device, if this machine has it."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        raise UserError(f"--device {name} cannot be used here ({reason}); cpu always can") from None
    return name


def write_json(path: Path | None, value: Any) -> None:
    """For `--json`: the file whole or not at all; nothing where none is asked for."""
    from stepfold.training.runs import writing

    if path:
        with writing(path) as part:
            part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def refuse_existing(path: Path, force: bool) -> None:
    """Nothing is overwritten unasked."""
    if path.exists() and not force:
        raise UserError(f"{path} is there already; choose another --out, or --force")
