"""Options that several commands have, and what becomes of them."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer
from typer.core import TyperCommand
from typing_extensions import override

from stepfold.errors import UserError

if TYPE_CHECKING:
    from stepfold.config import Config, TeacherSettings

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only results and errors.")]
StudentArgument = Annotated[
    Path, typer.Argument(help="Folder of a finished run, or a student folder.", show_default=False)
]
TeacherOption = Annotated[
    str | None,
    typer.Option(help="`emoji` (bundled), a diffusers pipeline folder, or a hub id.", show_default=False),
]
TeacherLoraOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:SCALE]",
        help="A LoRA to merge into the teacher: safetensors file, folder or hub id. Once for each. emoji-fluent is "
        "bundled: a style of the bundled teacher.",
        show_default=False,
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Revision on the hub: branch, tag or commit.", show_default=False)
]
VariantOption = Annotated[
    str | None, typer.Option(help="Variant of the weight files, for example fp16.", show_default=False)
]
HeightOption = Annotated[
    int | None, typer.Option(min=1, help="Height in pixels. Default: the teacher's own.", show_default=False)
]
WidthOption = Annotated[
    int | None, typer.Option(min=1, help="Width in pixels. Default: the teacher's own.", show_default=False)
]
FramesOption = Annotated[
    int | None, typer.Option(min=1, help="Frames of a video. Default: the teacher's own.", show_default=False)
]
PromptsOption = Annotated[
    str | None,
    typer.Option(
        help="txt (one prompt a line), json, jsonl, csv, tsv or parquet, also gzipped; or a folder. "
        "Default: the bundled teacher's.",
        show_default=False,
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option(help="Settings to start from: a name that `stepfold presets` lists, or a yaml file."),
]
ScheduleOption = Annotated[
    Path | None,
    typer.Option(
        "--schedule",
        help="Levels that `stepfold schedule` found: the teacher is measured at them too.",
        show_default=False,
    ),
]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json", help="Write the result here too, as json. `-`: to standard output alone.", show_default=False
    ),
]
ChangesOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. training.steps=100.")
]


TeacherChangesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="As the run's, for settings of the teacher alone: --set teacher.guidance=classifier_free.",
        show_default=False,
    ),
]
TrainStepsOption = Annotated[
    int | None,
    typer.Option("--train-steps", min=1, help="Optimiser steps: `training.steps`.", show_default=False),
]
LoraOption = Annotated[
    int | None,
    typer.Option("--lora", min=0, help="Rank of a LoRA student; 0: all weights. `student.lora`.", show_default=False),
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="PIXELS|WIDTHxHEIGHT",
        help="Size of the images: `teacher.width` and `teacher.height`.",
        show_default=False,
    ),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option("--dtype", help="Precision of the teacher's weights: `teacher.dtype`.", show_default=False),
]
WishedStepsOption = Annotated[
    int | None,
    typer.Option(
        "--steps",
        help="Without --preset: sampling steps that the student is for, 1, 2, 4 or 8. Default: 4.",
        show_default=False,
    ),
]
HoursOption = Annotated[
    float | None,
    typer.Option(
        "--hours", help="Without --preset: hours that the run may take, by a trial of some steps.", show_default=False
    ),
]
LearningRateOption = Annotated[
    float | None, typer.Option("--lr", help="Learning rate: `optimiser.lr`.", show_default=False)
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", help="Seed of all random numbers: `seed`. Equal seeds repeat a run.", show_default=False),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="cpu, cuda or cuda:1. auto: cuda if there is one, else cpu.")
]

SETTINGS = {
    "teacher": ("teacher.source",),
    "teacher_lora": ("teacher.lora",),
    "prompts": ("prompts",),
    "init": ("student.init",),
    "train_steps": ("training.steps",),
    "lora": ("student.lora",),
    "size": ("teacher.height", "teacher.width"),
    "dtype": ("teacher.dtype",),
    "revision": ("teacher.revision",),
    "variant": ("teacher.variant",),
    "lr": ("optimiser.lr",),
    "seed": ("seed",),
}
"""Options that are short forms -> the settings that they stand for."""

STANDARD_OUTPUT = Path("-")
"""As a file's name."""
_stdout: ContextVar[TextIO | None] = ContextVar("stdout", default=None)
"""Standard output, while a command prints elsewhere."""


def config_of(preset: "str | Config | None", changes: Sequence[str] | None, **given: Any) -> "Config":
    """The settings of a distillation: the preset's, changed by `--set` and by short forms.

    Args:
        preset: as `chosen_preset`, or settings to change.
        changes: of `--set`, key=value.
        **given: short forms, by their names in SETTINGS; None for one that is not given.

    Raises:
        UserError: two options give one setting, a setting is wrong, or the preset of a model of the user's has none.
    """
    from stepfold.config import load_config

    keys = [change.partition("=")[0].strip() for change in changes or []]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"--set {twice[0]} is given {keys.count(twice[0])} times and has one value; give it once")
    top = {name.replace(".", "__"): value for name, value in short_forms(changes, **given).items()}
    start = chosen_preset(preset, given.get("teacher")) if preset is None or isinstance(preset, str) else preset
    config = load_config(start, changes or [], **top)
    told = given.get("teacher") is not None or "teacher.source" in keys
    if config.teacher.source == "emoji" and not told and isinstance(start, str) and start.endswith("lora-4step"):
        raise UserError(
            f"--preset {preset} is for a model of yours, and no --teacher is given; add --teacher FOLDER (--teacher "
            "emoji for the bundled model)"
        )
    return config


def short_forms(changes: Sequence[str] | None, **given: Any) -> dict[str, Any]:
    """The settings that short forms stand for; of those that are None, none.

    Raises:
        UserError: `--set` gives one of them as well.
    """
    keys = {change.partition("=")[0].strip() for change in changes or []}
    found: dict[str, Any] = {}
    for option, value in given.items():
        if value is None:
            continue
        if both := [name for name in SETTINGS[option] if name in keys]:
            raise UserError(f"--{option.replace('_', '-')} and --set {both[0]} are one setting; give one of them")
        found |= dict(zip(SETTINGS[option], pixels_of(value) if option == "size" else (value,), strict=True))
    return found


def pixels_of(size: str) -> tuple[int, int]:
    """(height, width) of `1024` or `WIDTHxHEIGHT`.

    Raises:
        UserError: it is neither.
    """
    found = re.fullmatch(r"(\d{1,5})(?:[x×](\d{1,5}))?", size.strip().lower())
    if not found:
        raise UserError(f"--size {size} is no size; give pixels, such as 1024, or WIDTHxHEIGHT, such as 1216x832")
    width, height = int(found[1]), int(found[2] or found[1])
    return height, width


class Command(TyperCommand):
    """A command that refuses what would go on silently, or end without a hint; `--json -` has standard output alone.

    Refused is an option that is given twice and has one value, of which the last would win; and `--steps` of a command
    that takes optimiser steps, since elsewhere it counts those of sampling.
    """

    @override
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the library's, after a look at which options there are.

        Raises:
            UserError: naming the option.
        """
        options = {name for parameter in self.params for name in parameter.opts}
        steps = next((word for word in args if word.partition("=")[0] == "--steps"), None)
        if steps and "--steps" not in options and "--train-steps" in options:
            raise UserError("--steps counts sampling steps, of sample and evaluate; optimiser steps are --train-steps")
        for word, key, value in zip(args, args[1:], args[2:], strict=False):
            if word == "--set" and "=" not in key and not value.startswith("-"):
                raise UserError(f"--set {key} is not key=value; write --set {key}={value}")
        *_, given = self.make_parser(ctx).parse_args(args=list(args))
        for option in given:
            switch = getattr(option, "is_flag", False) and not option.secondary_opts
            if option.param_type_name == "option" and not (option.multiple or switch) and given.count(option) > 1:
                raise UserError(
                    f"{option.opts[0]} is given {given.count(option)} times and has one value; give it once"
                )
        return super().parse_args(ctx, args)

    @override
    def invoke(self, ctx: Any) -> Any:
        """As the library's; with `--json -`, standard error gets all but the json."""
        if ctx.params.get("json_file") != STANDARD_OUTPUT:
            return super().invoke(ctx)
        before = _stdout.set(sys.stdout)
        try:
            with redirect_stdout(sys.stderr):
                return super().invoke(ctx)
        finally:
            _stdout.reset(before)


def teacher_settings(**given: Any) -> "TeacherSettings":
    """A command's options as settings of its teacher; None leaves a default.

    Raises:
        UserError: one is out of range.
    """
    from stepfold.config import validate

    chosen = {name: value for name, value in given.items() if value is not None}
    return validate({"prompts": "", "teacher": chosen, "student": {"lora": 1}}).teacher


def run_teacher(
    preset: str | None, changes: Sequence[str] | None, prompts: object, given: Mapping[str, object]
) -> "TeacherSettings":
    """The teacher of a run that a command prepares: of its preset, its `--set teacher.*` and the command's options.

    Args:
        preset: of the run; None for `default`.
        changes: of `--set`, key=value.
        prompts: their file; the settings ask for one.
        given: name -> setting of the teacher; None leaves it as it is.

    Raises:
        UserError: a change is not of the teacher, or a setting is out of range.
    """
    from stepfold.config import load_config

    top: dict[str, Any] = {f"teacher__{name}": value for name, value in given.items() if value is not None}
    for change in changes or []:
        if not change.startswith("teacher."):
            raise UserError(f"--set {change}: only settings of the teacher matter here; give teacher.KEY=VALUE")
    top |= {} if preset else {"student__lora": 1}  # what a quantised base takes; nothing here depends on it
    return load_config(preset or "default", changes or [], prompts=str(prompts), **top).teacher


def chosen_preset(preset: str | None, teacher: str | None) -> str:
    """The preset of a distillation that names none."""
    return preset or ("demo" if teacher in (None, "emoji") else "default")


def check_page(page: Path, command: str) -> None:
    """Refuses a page of another kind of file, and one of another command, whose numbers it would replace.

    Raises:
        UserError: naming the page.
    """
    if page.suffix != ".md":
        raise UserError(f"--page is {str(page)!r}; give the name of a .md file, for example runs/{command}/page.md")
    try:
        writer = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # there is none, or it is damaged, which is said elsewhere
    if writer != command:
        raise UserError(f"{page} is a page of stepfold {writer}; give another --page")


def write_json(path: Path | None, value: Any) -> None:
    """For `--json`: the file whole or not at all, or standard output; nothing where none is asked for."""
    from stepfold.training.runs import writing

    text = json.dumps(value, indent=2) + "\n"
    if path == STANDARD_OUTPUT:
        print(text, end="", file=_stdout.get() or sys.stdout)
    elif path:
        with writing(path) as part:
            part.write_text(text, encoding="utf-8")


def refuse_existing(path: Path, force: bool) -> None:
    """Nothing is overwritten unasked."""
    if path.exists() and not force:
        raise UserError(f"{path} is there already; choose another --out, or --force")
