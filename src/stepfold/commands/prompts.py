"""`stepfold prompts`: files of prompts described, cleaned, split and encoded."""

from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stepfold import assets
from stepfold.commands.options import (
    DeviceOption,
    DtypeOption,
    FramesOption,
    HeightOption,
    JsonOption,
    PresetOption,
    Quiet,
    RevisionOption,
    SizeOption,
    TeacherChangesOption,
    TeacherLoraOption,
    VariantOption,
    WidthOption,
    pixels_of,
    refuse_existing,
    run_teacher,
    write_json,
)
from stepfold.errors import UserError
from stepfold.jobs.devices import usable_device

if TYPE_CHECKING:
    from stepfold.config import TeacherSettings
    from stepfold.display import Display
    from stepfold.prompts.lengths import Tokens

app = typer.Typer(
    no_args_is_help=True,
    help="Describe, clean, split and encode files of prompts: txt, json, jsonl, csv, tsv or parquet, also gzipped. "
    "A folder or a quoted pattern works too, also of captions beside images."
    "\n\n    stepfold prompts clean PartiPrompts.tsv --out prompts.txt"
    "\n\n    stepfold prompts encode prompts.txt --teacher ./my-sana --out my-conditions",
)

PromptTable = Annotated[
    Path,
    typer.Argument(
        help="txt (one prompt a line), json, jsonl, csv, tsv or parquet, also gzipped; or a folder.", show_default=False
    ),
]
Column = Annotated[
    str | None,
    typer.Option(help="Column of the prompts. Default: prompt, text or caption.", show_default=False),
]

CountingTeacher = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        help="Count tokens with this teacher's tokenizer: `emoji`, a folder or a hub id. Default: words and marks.",
        show_default=False,
    ),
]


@app.command("stats")
def stats(
    file: PromptTable,
    column: Column = None,
    longest: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="TOKENS",
            help="Say which prompts are longer. Default: what the teacher reads, or 77, as Stable Diffusion.",
            show_default=False,
        ),
    ] = None,
    teacher: CountingTeacher = None,
    languages: Annotated[
        bool | None,
        typer.Option(
            "--languages/--no-languages",
            help="Guess the languages. Default: yes where py3langid is installed (extra prompts).",
            show_default=False,
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """How many prompts, how long, how many repeated, in which languages; what in them is no plain text.

    stepfold prompts stats prompts.txt

    stepfold prompts stats PartiPrompts.tsv --column Prompt --json stats.json
    """
    from stepfold.prompts.cleaning import Findings, statistics
    from stepfold.prompts.tables import read_texts

    findings = Findings(tokens_of(teacher, longest))
    known = languages is None and find_spec("py3langid") is not None
    numbers = statistics(read_texts(file, column), known or bool(languages), findings)
    for name, value in numbers.items():
        many = isinstance(value, dict)
        text = ", ".join(f"{key} {number:.4g}" for key, number in value.items()) if many else f"{value:,}"
        typer.echo(f"{name:28} {text or '-'}")
    if languages is None and not known:
        typer.echo("note: languages are not guessed; pip install py3langid", err=True)
    write_json(json_file, numbers | {"notes": said(findings.notes())})


def tokens_of(teacher: str | None, most: int | None) -> "Tokens":
    """How tokens are counted: with a teacher's tokenizer, or by words."""
    from stepfold.prompts.lengths import Tokens, estimated

    if teacher is None:
        return estimated(most)
    from stepfold.config import TeacherSettings
    from stepfold.display import quiet_libraries
    from stepfold.teachers.loading import load_text_reader

    quiet_libraries()
    if (reader := load_text_reader(TeacherSettings(source=teacher))) is None:
        raise UserError(f"the prompts of teacher {teacher!r} are classes, not texts; leave --teacher out")
    return Tokens(reader.count, most or reader.most, f"counted with the tokenizer of {teacher}")


def said(notes: Iterable[str]) -> list[str]:
    """Notes, shown a line each."""
    there = list(notes)
    for note in there:
        typer.echo(f"note: {note}")
    return there


@app.command("clean")
def clean(
    file: PromptTable,
    out: Annotated[Path, typer.Option(help="Text file to write, one prompt a line.")] = Path("prompts.txt"),
    column: Column = None,
    min_words: Annotated[int, typer.Option(min=1, help="Drop shorter prompts.")] = 1,
    max_words: Annotated[int | None, typer.Option(min=1, help="Drop longer prompts.", show_default=False)] = None,
    longest: Annotated[
        int | None,
        typer.Option(min=2, metavar="TOKENS", help="Drop prompts of more tokens, e.g. 77.", show_default=False),
    ] = None,
    teacher: CountingTeacher = None,
    wildcards: Annotated[
        Literal["expand", "keep", "drop"],
        typer.Option(
            help="For {a|b}: every combination, 64 a prompt at most, the text as it is, or no such prompt "
            "(and none with __a__)."
        ),
    ] = "keep",
    languages: Annotated[
        str | None,
        typer.Option(
            help="Keep these only, e.g. en,de (extra prompts). Short prompts are a guess.", show_default=False
        ),
    ] = None,
    near: Annotated[
        float | None,
        typer.Option(min=0.1, max=1, help="Drop near repetitions, e.g. 0.8 (extra prompts).", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Make a clean text file of prompts: blank, overlong and repeated ones go; line breaks become spaces.

    Invisible marks go too, and characters are written in NFC. The command
    counts what is no plain text, and what a text encoder would cut.

    stepfold prompts clean DiffusionDB.parquet --column prompt --out prompts.txt --near 0.8 --languages en

    stepfold prompts clean mine.txt --out prompts.txt --min-words 3

    stepfold prompts clean mine.txt --longest 77 --teacher ./my-sdxl --wildcards expand
    """
    from collections import Counter

    from stepfold.prompts.cleaning import Findings, Rules
    from stepfold.prompts.cleaning import clean as cleaned
    from stepfold.prompts.tables import read_texts
    from stepfold.training.runs import writing

    refuse_existing(out, force)
    counts: Counter[str] = Counter()
    chosen = tuple(code.strip().lower() for code in (languages or "").split(",") if code.strip())
    rules = Rules(min_words, max_words, chosen, longest, near, wildcards)
    findings = Findings(tokens_of(teacher, longest))
    with writing(out) as part, part.open("w", encoding="utf-8") as target:
        for prompt in cleaned(read_texts(file, column), rules, counts, findings):
            target.write(prompt + "\n")
        if not counts["kept"]:
            dropped = ", ".join(f"{name} {count}" for name, count in counts.items() if name != "read")
            raise UserError(f"no prompt of {file} is left of {counts['read']} ({dropped}); loosen what dropped them")
    names = ("read", *(name for name in counts if name not in ("read", "kept")), "kept")
    numbers = {name: counts[name] for name in names if counts[name]}
    for name, count in numbers.items():
        typer.echo(f"{name:32} {count:,}")
    said(findings.notes())
    typer.echo(f"prompts: {out}")
    write_json(json_file, numbers)


@app.command("split")
def split(
    file: PromptTable,
    test: Annotated[float, typer.Option(min=0, max=1, help="Share of the test part.")] = 0.05,
    out: Annotated[Path, typer.Option(help="Folder for train.txt and test.txt.")] = Path("."),
    column: Column = None,
    seed: Annotated[int, typer.Option(help="Another seed, another split.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Write over files that are there.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Split prompts into train.txt and test.txt; equal prompts stay together, also across files.

    stepfold prompts split prompts.txt --test 0.1 --out split

    stepfold prompts split DiffusionDB.parquet --column prompt --test 0.01 --out split
    """
    from stepfold.prompts.cleaning import one_line, side
    from stepfold.prompts.tables import read_texts
    from stepfold.training.runs import writing

    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "train.txt", out / "test.txt"]
    for path in paths:
        refuse_existing(path, force)
    counts = [0, 0]
    with (
        writing(paths[0]) as first,
        writing(paths[1]) as second,
        first.open("w", encoding="utf-8") as train,
        second.open("w", encoding="utf-8") as held,
    ):
        for text in read_texts(file, column):
            if prompt := one_line(text):
                chosen = side(prompt, test, seed)
                (held if chosen else train).write(prompt + "\n")
                counts[chosen] += 1
    typer.echo(f"{paths[0]}: {counts[0]:,}\n{paths[1]}: {counts[1]:,}")
    for path, count in zip(paths, counts, strict=True):
        if not count:
            typer.echo(f"{path} is empty: {sum(counts):,} prompts are few for --test {test:g}; give another", err=True)
    write_json(json_file, {"train": counts[0], "test": counts[1]})


@app.command("encode")
def encode(
    prompts: Annotated[
        Path | None,
        typer.Argument(
            help="txt (one prompt a line), json, jsonl, csv, tsv or parquet, also gzipped; or a folder. "
            "Default: the bundled teacher's.",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        str, typer.Option(help="`emoji` (bundled), a diffusers pipeline folder, or a hub id.")
    ] = "emoji",
    teacher_lora: TeacherLoraOption = None,
    preset: PresetOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/conditions"),
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="As teacher.max_tokens of the run. Default: the pipeline's.", show_default=False),
    ] = None,
    size: SizeOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    frames: FramesOption = None,
    dtype: DtypeOption = None,
    image_column: Annotated[
        str | None,
        typer.Option(help="As teacher.image_column of the run: a table's column of images.", show_default=False),
    ] = None,
    changes: TeacherChangesOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 64,
    device: DeviceOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Encode prompts once, so that training needs neither text encoder nor autoencoder in memory.

    Stopped, it goes on where it was. Then train with --set conditions=FOLDER and the same teacher, LoRA, size, frames
    and teacher.max_tokens. `--preset` takes size and dtype from the preset of the run.

    stepfold prompts encode --max-tokens 32 --out runs/conditions

    stepfold prompts encode prompts.txt --teacher ./my-sdxl --preset sdxl-lora-4step --out my-conditions
    """
    from stepfold.display import Display, quiet_libraries

    if teacher != "emoji" and prompts is None:
        raise UserError("give a file of prompts; only the bundled teacher has prompts of its own")
    quiet_libraries()
    if size and (height or width):
        raise UserError("--size gives height and width; leave out --height and --width")
    height, width = pixels_of(size) if size else (height, width)
    given = {
        "source": teacher, "revision": revision, "variant": variant, "lora": teacher_lora, "max_tokens": max_tokens,
        "height": height, "width": width, "frames": frames, "dtype": dtype, "image_column": image_column,
    }  # fmt: skip
    settings = run_teacher(preset, changes, prompts, given)
    run_encode(settings, prompts, out, batch=batch, display=Display(quiet), device=usable_device(device))
    typer.echo(f"conditions: {out}")


def run_encode(
    settings: "TeacherSettings",
    prompts: Path | str | None,
    folder: Path,
    *,
    batch: int,
    display: "Display",
    device: str,
) -> None:
    """Encodes a file of prompts into a folder that `conditions=FOLDER` trains from.

    Raises:
        UserError: see `encode_prompts`.
    """
    from stepfold.prompts.cache import encode_prompts
    from stepfold.prompts.conditions import conditions_from, conditions_key, notes_on
    from stepfold.prompts.reading import open_prompts
    from stepfold.teachers.loading import load_teacher

    file = open_prompts(prompts or assets.PROMPTS, settings.image_column)
    teacher = load_teacher(settings, device, encodes_only=True)
    for note in notes_on(file, teacher):
        display.note(note)
    key = conditions_key(settings, file.sha256)
    black = teacher.black_latent(teacher.latent_shape)
    with display.measuring({"prompts": len(file)}) as tick:
        encode_prompts(
            folder, key, file, conditions_from(None, teacher, file), teacher.null_condition, black, batch=batch,
            precision=settings.dtype, note=display.note, tick=partial(tick, "prompts"),
        )  # fmt: skip
