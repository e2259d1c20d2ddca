"""The command line: argv -> settings -> one call."""

import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from stepfold.errors import NonFiniteError, UserError

ClickException: type[Exception] = typer.BadParameter.__mro__[2]  # type: ignore[assignment] # typer's own, or click's
app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Distil a diffusion or flow model into a one-step student, from prompts alone.

    stepfold distill --preset demo --out runs/demo

    stepfold demo runs/demo/student
    """,
)


def usable_device(name: str) -> str:
    """The device, if this machine has it."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); cpu always can") from None
    return name


Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only results and errors.")]
StudentArgument = Annotated[
    Path, typer.Argument(help="Student folder: OUT/student of a finished run.", show_default=False)
]
TeacherOption = Annotated[
    str | None,
    typer.Option(help="`emoji` (bundled), a diffusers pipeline folder, or a hub id.", show_default=False),
]
TeacherLoraOption = Annotated[
    str | None,
    typer.Option(help="A LoRA to merge into the teacher: safetensors file, folder or hub id.", show_default=False),
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
        help="txt (one prompt a line), jsonl, csv, tsv or parquet; .gz too. Default: the bundled teacher's.",
        show_default=False,
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        help="Settings to start from: demo, emoji-long, default, paper, released, reproduce, scm, scm-endpoints, "
        "sana-sprint, sana-sprint-endpoints, lcm, or a yaml file."
    ),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the result here too, as json.", show_default=False)
]
ChangesOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. training.steps=100.")
]


def chosen_preset(preset: str | None, teacher: str | None) -> str:
    """The preset of a distillation that names none."""
    return preset or ("demo" if teacher in (None, "emoji") else "default")


@app.command()
def distill(
    teacher: TeacherOption = None,
    teacher_lora: TeacherLoraOption = None,
    prompts: PromptsOption = None,
    preset: PresetOption = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/PRESET.", show_default=False)] = None,
    changes: ChangesOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that --out holds.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings and stop.")] = False,
    quiet: Quiet = False,
) -> None:
    """Distil a teacher into a one-step student.

    Writes checkpoints, previews, report.html and report.json into the run folder, and the student into its `student`
    folder, which plain diffusers loads.

        stepfold distill

        stepfold distill --teacher ./my-sana --prompts prompts.txt --out runs/mine --set training.steps=2000
    """
    from stepfold.config import load_config, to_yaml

    name = chosen_preset(preset, teacher)
    config = load_config(name, changes or [], teacher__source=teacher, teacher__lora=teacher_lora, prompts=prompts)
    if dry_run:
        typer.echo(to_yaml(config), nl=False)
        return
    from stepfold.display import Display, quiet_libraries, results_table, show_table
    from stepfold.jobs import run_distill

    quiet_libraries()
    folder = out or Path("runs") / Path(name).stem
    display = Display(quiet or bool(other_process()))
    with continued_by(folder, resume, display.note) as command:
        result = run_distill(config, folder, resume=resume, display=display, command=command)
    if not other_process():
        if result["teacher"]:
            show_table(results_table(result))
        typer.echo(f"student: {folder / 'student'}\nreport:  {folder / 'report.html'}")
    if "WORLD_SIZE" in os.environ:
        leave()


@app.command()
def sample(
    student: StudentArgument,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One picture each.", show_default=False)],
    steps: Annotated[int, typer.Option(min=1, max=64, help="Network calls per picture.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Noise. Equal seeds give equal pictures.")] = 0,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=1000, help="Scale that the student was told. Default: the run's.")
    ] = None,
    out: Annotated[Path, typer.Option(help="PNG to write; several prompts go side by side.")] = Path("sample.png"),
    device: Annotated[str, typer.Option(help="torch device.")] = "cpu",
) -> None:
    """Draw pictures with a student.

    stepfold sample runs/demo/student "red heart on blue background"

    stepfold sample emoji-student "pizza" "fox" --steps 2 --seed 3 --out two.png
    """
    from PIL import Image

    from stepfold.display import quiet_libraries
    from stepfold.jobs import run_sample
    from stepfold.training.runs import writing

    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out} is no PNG; give a name that ends in .png")
    quiet_libraries()
    pictures = run_sample(student, prompts, steps=steps, seed=seed, guidance=guidance, device=usable_device(device))
    strip = Image.new("RGB", (sum(p.width for p in pictures), pictures[0].height))
    left = 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width
    with writing(out) as part:
        strip.save(part, format="PNG")
    typer.echo(out)


@app.command()
def demo(
    student: Annotated[Path, typer.Argument(help="Student folder, or `emoji-student`, the bundled one.")] = Path(
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
    device: Annotated[str, typer.Option(help="torch device.")] = "cpu",
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


@app.command()
def export(
    student: StudentArgument,
    to: Annotated[str, typer.Option("--to", help="pipeline, lora, single-file or onnx.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File or folder to write. Default: beside the student, e.g. student-onnx.", show_default=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write a student as a pipeline, a LoRA file, a single file for ComfyUI, or an onnx graph.

    - `pipeline`: a folder for plain diffusers; a LoRA student is merged into its teacher's network.

    - `lora`: the one file of a LoRA student, for `load_lora_weights`.

    - `single-file`: the network under the names of its original checkpoint, for ComfyUI's Load Diffusion Model.

    - `onnx`: the network as a graph, for onnxruntime (extra onnx).

    stepfold export runs/mine/student --to pipeline

    stepfold export runs/mine/student --to single-file --out models/diffusion_models/mine.safetensors
    """
    from stepfold.display import quiet_libraries
    from stepfold.jobs import run_export

    quiet_libraries()
    typer.echo(f"{to}: {run_export(student, to, out, force=force)}")
    if to in ("lora", "single-file"):
        typer.echo(f"the file has no scheduler and no times in it: {student / 'README.md'} says how to sample with it")


@app.command()
def push(
    student: StudentArgument,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the hub; made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="A new one is for you alone.")] = False,
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

    quiet_libraries()
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


@app.command()
def evaluate(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="OUT/student of a finished run, or any diffusers text-to-image pipeline.",
            show_default=False,
        ),
    ],
    protocol: Annotated[
        str,
        typer.Option(
            help="emoji: the bundled teacher's judge. mjhq30k: FID, CLIP score. geneval: pictures for its scorer."
        ),
    ] = "emoji",
    steps: Annotated[
        str | None,
        typer.Option(
            help="Step counts, comma-separated. Default: 1,2,4 for students (geneval: 1), else the pipeline's own.",
            show_default=False,
        ),
    ] = None,
    n: Annotated[
        int | None, typer.Option(min=2, help="Pictures per row. Default: 2000; mjhq30k: 30000.", show_default=False)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1000,
            help="Scale for teacher and students. Default: the teacher's own, and what a student was taught.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="evaluation_metadata.jsonl of GenEval (geneval).", show_default=False)
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="MJHQ-30k's folder, with meta_data.json (mjhq30k).", show_default=False)
    ] = None,
    inception: Annotated[Path, typer.Option(help="Weights of the 2015 Inception network (mjhq30k).")] = Path(
        "inception.safetensors"
    ),
    clip: Annotated[
        str, typer.Option(help="Folder or hub id of the CLIP (mjhq30k).")
    ] = "openai/clip-vit-large-patch14",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures. Default: runs/PROTOCOL.", show_default=False)
    ] = None,
    json_file: JsonOption = None,
    device: Annotated[str, typer.Option(help="torch device.")] = "cpu",
    quiet: Quiet = False,
) -> None:
    """Measure students and other pipelines side by side, the bundled teacher beside them: same prompts, same judge.

    Students of the bundled teacher also start from its noise, which the column agreement needs.

    stepfold evaluate runs/demo/student

    stepfold evaluate runs/a/student runs/b/student ./my-sana --steps 1,2 --n 500 --json scores.json

    stepfold evaluate runs/mine/student ./my-sana --protocol mjhq30k --images MJHQ-30K --steps 1 --device cuda

    stepfold evaluate ./my-sana --protocol geneval --prompts evaluation_metadata.jsonl
    """
    from stepfold.display import Display, mjhq_table, quiet_libraries, results_table, show_table
    from stepfold.jobs import run_evaluate, run_geneval, run_mjhq

    try:
        counts = sorted({int(part) for part in steps.split(",")}, reverse=True) if steps else None
    except ValueError:
        raise UserError(f"--steps {steps!r} is no list of numbers; for example --steps 1,2,4") from None
    if protocol not in ("emoji", "mjhq30k", "geneval"):
        raise UserError(f"no protocol {protocol!r}; there are emoji, mjhq30k and geneval")
    quiet_libraries()
    pictures = out or Path("runs") / protocol
    display = Display(quiet)
    if protocol == "geneval":
        if prompts is None or len(folders) != 1 or (counts and len(counts) != 1):
            raise UserError("--protocol geneval takes one folder, one step count and --prompts FILE")
        run_geneval(
            folders[0], prompts, pictures, steps=counts[0] if counts else None, guidance=guidance, display=display,
            device=usable_device(device),
        )  # fmt: skip
        typer.echo(f"pictures: {pictures}")
        return
    if protocol == "mjhq30k":
        if images is None:
            raise UserError("--protocol mjhq30k takes --images FOLDER, where MJHQ-30k's meta_data.json is")
        result = run_mjhq(
            folders, images, inception, clip, pictures, steps=counts, n=n or 30_000, guidance=guidance, display=display,
            device=usable_device(device),
        )  # fmt: skip
        table = mjhq_table(result)
    else:
        result = run_evaluate(
            folders, steps=counts, n=n or 2000, guidance=guidance, display=display, device=usable_device(device)
        )
        table = results_table(result)
    write_json(json_file, result)
    show_table(table)


@app.command()
def doctor(
    teacher: Annotated[str, typer.Argument(help="`emoji`, a diffusers pipeline folder, or a hub id.")] = "emoji",
    teacher_lora: TeacherLoraOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    json_file: JsonOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    frames: FramesOption = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the teacher's weights.")] = "float32",
    lora: Annotated[int, typer.Option(min=0, help="Of the student: rank of a LoRA; 0 for all weights.")] = 0,
    device: Annotated[str, typer.Option(help="torch device.")] = "cpu",
) -> None:
    """Check that a teacher is understood before a run: each finding with a number and a verdict.

    A large teacher fits as it will be trained: in half precision, with a LoRA student that shares its weights.

    stepfold doctor emoji

    stepfold doctor black-forest-labs/FLUX.1-dev --dtype bfloat16 --lora 64 --device cuda

    stepfold doctor ./my-flux --height 256 --width 256 --json findings.json
    """
    from rich.table import Table

    from stepfold.config import TeacherSettings
    from stepfold.display import quiet_libraries, show_table
    from stepfold.doctor import examine

    quiet_libraries()
    settings = TeacherSettings(
        source=teacher,
        revision=revision,
        variant=variant,
        lora=teacher_lora,
        dtype=dtype,
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
    write_json(json_file, [vars(f) for f in findings])
    if not all(f.ok for f in findings):
        raise typer.Exit(1)


@app.command()
def plan(
    teacher: TeacherOption = None,
    teacher_lora: TeacherLoraOption = None,
    prompts: PromptsOption = None,
    preset: PresetOption = None,
    changes: ChangesOption = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps to time; the first one is start-up.")] = 12,
    json_file: JsonOption = None,
    quiet: Quiet = False,
) -> None:
    """Say what a distillation will take before you start it: time of a step, hours, peak memory.

    It runs a few steps of the real thing in a folder that is thrown away. Options are those of `stepfold distill`.

    stepfold plan

    stepfold plan --teacher ./my-sana --prompts prompts.txt --set training.prompts_per_step=4
    """
    from rich.table import Table

    from stepfold.config import load_config
    from stepfold.display import Display, quiet_libraries, show_table
    from stepfold.planning import make_plan, plan_rows

    config = load_config(
        chosen_preset(preset, teacher),
        changes or [],
        teacher__source=teacher,
        teacher__lora=teacher_lora,
        prompts=prompts,
    )
    quiet_libraries()
    found = make_plan(config, steps, Display(quiet))
    table = Table("what", "prediction", box=None)
    for row in plan_rows(found):
        table.add_row(*row)
    show_table(table)
    write_json(json_file, vars(found))


@app.command()
def reproduce(
    tables: Annotated[
        list[str] | None, typer.Option("--table", help="T2, T4, ...; again for more. Default: all.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs; finished ones in it are not run again.")] = Path(
        "runs/reproduce"
    ),
    images: Annotated[
        Path | None,
        typer.Option(
            help="Image folder for rows that need one (recipes/emoji_teacher/render.py); else they are left out.",
            show_default=False,
        ),
    ] = None,
    page: Annotated[
        Path,
        typer.Option(help="Page to write. Its numbers go beside it as json; what that file holds is not run again."),
    ] = Path("runs/reproduce/paper.md"),
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of every run, e.g. training.steps=500."),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(min=1, help="Runs at once, each with its share of the cores. Those whose times count go alone."),
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and which are done, and stop.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="With --dry-run: write the list here too.", show_default=False)
    ] = None,
    page_only: Annotated[
        bool, typer.Option("--page-only", help="Run nothing: write the page of what is known by now.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Run the paper's comparisons again and write a page with a verdict on each claim.

    Stop it whenever you like: started again, it goes on where it was.

    stepfold reproduce --table T4

    stepfold reproduce --table T6 --table T7 --dry-run
    """
    from stepfold.display import Display, quiet_libraries
    from stepfold.reproduction.experiments import load_experiments, plan
    from stepfold.reproduction.kept import recall
    from stepfold.reproduction.sweep import listing, sweep

    if json_file and not dry_run:
        raise UserError(
            f"--json goes with --dry-run; the numbers of a sweep are written to {page.with_suffix('.json')}"
        )
    experiments, display, extra = load_experiments(), Display(quiet), changes or []
    planned = plan(experiments, tables or [], extra, images)
    if known := recall(page.with_suffix(".json"), out):
        display.note(f"{known} runs are known from {page.with_suffix('.json')}")
    if dry_run:
        rows: list[dict[str, Any]] = []
        for run, done in listing(experiments, planned, out):
            settings = " ".join(run.changes)
            typer.echo(f"{'done' if done else 'to do':6} {run.table} {run.row}: --preset {run.preset} {settings}")
            row = {"table": run.table, "row": run.row, "preset": run.preset, "changes": run.changes}
            rows.append(row | {"folder": str(out / run.name), "done": done})
        write_json(json_file, rows)
        return
    quiet_libraries()
    try:
        sweep(
            experiments, planned, out, page, display,
            workers=workers, extra=extra, images=images, page_only=page_only,
        )  # fmt: skip
    except KeyboardInterrupt:
        display.note("stopped; start it again to go on")
        raise typer.Exit(130) from None
    typer.echo(f"page: {page}")


prompts_app = typer.Typer(
    no_args_is_help=True,
    help="Look at files of prompts, clean, split and encode them: txt, jsonl, csv, tsv or parquet, gzipped too."
    "\n\n    stepfold prompts clean PartiPrompts.tsv --out prompts.txt"
    "\n\n    stepfold prompts encode prompts.txt --teacher ./my-sana --out my-conditions",
)
app.add_typer(prompts_app, name="prompts")


PromptTable = Annotated[
    Path, typer.Argument(help="txt (one prompt a line), jsonl, csv, tsv or parquet; .gz too.", show_default=False)
]
Column = Annotated[
    str | None,
    typer.Option(help="Column of the prompts. Default: prompt, text or caption.", show_default=False),
]


@prompts_app.command("stats")
def stats(
    file: PromptTable,
    column: Column = None,
    languages: Annotated[bool, typer.Option(help="Guess the languages (extra prompts).")] = True,
    json_file: JsonOption = None,
) -> None:
    """How many prompts, how long, how many repeated, in which languages.

    stepfold prompts stats prompts.txt

    stepfold prompts stats PartiPrompts.tsv --column Prompt --json stats.json
    """
    from stepfold.prompts.cleaning import statistics
    from stepfold.prompts.tables import read_texts

    numbers = statistics(read_texts(file, column), languages)
    for name, value in numbers.items():
        many = isinstance(value, dict)
        text = ", ".join(f"{key} {number:.4g}" for key, number in value.items()) if many else f"{value:,}"
        typer.echo(f"{name:28} {text or '-'}")
    write_json(json_file, numbers)


@prompts_app.command("clean")
def clean(
    file: PromptTable,
    out: Annotated[Path, typer.Option(help="Text file to write, one prompt a line.")] = Path("prompts.txt"),
    column: Column = None,
    min_words: Annotated[int, typer.Option(min=1, help="Drop shorter prompts.")] = 1,
    max_words: Annotated[int | None, typer.Option(min=1, help="Drop longer prompts.", show_default=False)] = None,
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

    stepfold prompts clean DiffusionDB.parquet --column prompt --out prompts.txt --near 0.8 --languages en

    stepfold prompts clean mine.txt --out prompts.txt --min-words 3
    """
    from collections import Counter

    from stepfold.prompts.cleaning import Rules
    from stepfold.prompts.cleaning import clean as cleaned
    from stepfold.prompts.tables import read_texts
    from stepfold.training.runs import writing

    refuse_existing(out, force)
    counts: Counter[str] = Counter()
    chosen = tuple(code.strip().lower() for code in (languages or "").split(",") if code.strip())
    with writing(out) as part, part.open("w", encoding="utf-8") as target:
        for prompt in cleaned(read_texts(file, column), Rules(min_words, max_words, chosen, near), counts):
            target.write(prompt + "\n")
        if not counts["kept"]:
            raise UserError(f"no prompt of {file} is left; {dict(counts)}")
    numbers = {name: counts[name] for name in ("read", *(n for n in counts if n not in ("read", "kept")), "kept")}
    for name, count in numbers.items():
        typer.echo(f"{name:32} {count:,}")
    typer.echo(f"prompts: {out}")
    write_json(json_file, numbers)


@prompts_app.command("split")
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
    write_json(json_file, {"train": counts[0], "test": counts[1]})


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


@prompts_app.command("encode")
def encode(
    prompts: Annotated[
        Path | None,
        typer.Argument(
            help="txt (one prompt a line), jsonl, csv, tsv or parquet; .gz too. Default: the bundled teacher's.",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        str, typer.Option(help="`emoji` (bundled), a diffusers pipeline folder, or a hub id.")
    ] = "emoji",
    teacher_lora: TeacherLoraOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/conditions"),
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="As teacher.max_tokens of the run. Default: the pipeline's.", show_default=False),
    ] = None,
    height: HeightOption = None,
    width: WidthOption = None,
    frames: FramesOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 64,
    device: Annotated[str, typer.Option(help="torch device.")] = "cpu",
    quiet: Quiet = False,
) -> None:
    """Encode prompts once, so that training needs neither text encoder nor autoencoder in memory.

    Stopped, it goes on where it was. Then train with --set conditions=FOLDER and the same teacher.max_tokens, height,
    width and frames.

    stepfold prompts encode --max-tokens 32 --out runs/conditions

    stepfold prompts encode prompts.txt --teacher ./my-sana --device cuda --out my-conditions
    """
    from stepfold.config import TeacherSettings
    from stepfold.display import Display, quiet_libraries
    from stepfold.jobs import run_encode

    if teacher != "emoji" and prompts is None:
        raise UserError("give a file of prompts; only the bundled teacher has prompts of its own")
    quiet_libraries()
    settings = TeacherSettings(
        source=teacher,
        revision=revision,
        variant=variant,
        lora=teacher_lora,
        max_tokens=max_tokens,
        height=height,
        width=width,
        frames=frames,
    )
    run_encode(settings, prompts, out, batch=batch, display=Display(quiet), device=usable_device(device))
    typer.echo(f"conditions: {out}")


@app.command()
def retime(
    teacher: Annotated[str, typer.Argument(help="A Sana, SD3 or FLUX pipeline: folder or hub id.", show_default=False)],
    prompts: Annotated[
        str, typer.Option(help="txt (one prompt a line), jsonl, csv, tsv or parquet; .gz too.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Run folder; the new teacher is its `teacher` folder.")] = Path(
        "runs/retimed"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 1000,
    changes: ChangesOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that --out holds.")] = False,
    json_file: JsonOption = None,
    quiet: Quiet = False,
) -> None:
    """Re-time a Sana, SD3 or FLUX teacher whose time counts to 1000 to [0, 1], from its own walks, without images.

    Continuous consistency wants it: its tangent contains dF/dt. Discrete consistency does without. All of the network
    is trained, in float32; the result is a pipeline of the same class.

    stepfold retime ./my-sana --prompts prompts.txt --out runs/retimed

    stepfold retime ./my-sana --prompts prompts.txt --steps 5000 --set optimiser.lr=1e-5 --out runs/long --resume

    stepfold distill --teacher runs/retimed/teacher --prompts prompts.txt
    """
    from stepfold.display import Display, quiet_libraries
    from stepfold.retiming import run_retime

    quiet_libraries()
    changes = [f"training.steps={steps}", *(changes or [])]
    display = Display(quiet)
    with continued_by(out, resume, display.note):
        found = run_retime(teacher, prompts, out, changes, resume=resume, display=display)
    for name, number in found.items():
        typer.echo(f"{name:32} {number:.4g}")
    write_json(json_file, found)
    typer.echo(f"teacher: {out / 'teacher'}")


@app.command()
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
    from stepfold.converting import convert as converted
    from stepfold.display import quiet_libraries

    quiet_libraries()
    refuse_existing(out, force)
    if out.exists() and not (out / "model_index.json").is_file():
        raise UserError(f"{out} is no pipeline folder, so --force does not replace it; choose another --out")
    if time_scale not in (1, 1000):
        raise UserError(f"--time-scale is {time_scale}; give 1000 (Sana) or 1 (Sana-Sprint and its teacher)")
    typer.echo(f"{converted(file, base, out, time_scale)}: {out}")


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Folder with runs in it, up to three folders deep.")] = Path("runs"),
    json_file: JsonOption = None,
) -> None:
    """List the runs in a folder: what became of them, how far they are, what their students score.

    stepfold runs

    stepfold runs /data/runs --json runs.json
    """
    from rich.markup import escape
    from rich.table import Table

    from stepfold.display import show_table
    from stepfold.web.runs import find_runs, read_run, scores_of

    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name the one that your runs are in (--out of stepfold distill)")
    found = [(run, *scores_of(run)) for run in (read_run(folder, name) for name in find_runs(folder))]
    rows = [
        {"name": run.name, "state": run.state, "step": run.step, "steps": run.steps, "problem": run.problem}
        | {"scores": {str(calls): scores} if scores else {}}
        for run, calls, scores in found
    ]
    write_json(json_file, rows)
    table = Table("run", "state", "steps done", "student", "accuracy", "FD", box=None)
    for run, calls, scores in found:
        steps = f"{run.step:,}" + (f" of {run.steps:,}" if run.steps and run.step < run.steps else "")
        told = (f"{calls} step{'s' * (calls > 1)}", f"{scores.get('accuracy', 0):.1%}", f"{scores.get('fd', 0):.4f}")
        table.add_row(escape(run.name), run.state, steps, *(told if scores else ("", escape(run.problem), "")))
    if found:
        show_table(table)
    else:
        typer.echo(f"no runs in {folder}")


@app.command()
def presets(json_file: JsonOption = None) -> None:
    """List the presets, and what each is for; `stepfold distill --preset NAME --dry-run` prints one whole.

    stepfold presets

    stepfold presets --json presets.json
    """
    from stepfold.config import preset_names, preset_purpose

    purposes = {name: preset_purpose(name) for name in preset_names()}
    width = max(map(len, purposes))
    write_json(json_file, purposes)
    typer.echo("\n".join(f"{name:{width}}  {purpose}" for name, purpose in purposes.items()))


def main() -> None:
    """Runs the command line; a user's mistake is one line and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # diffusers, with torch 2.15
    try:
        sys.exit(app(prog_name="stepfold", standalone_mode=False) or 0)
    except ClickException as error:
        context = getattr(error, "ctx", None)
        if "NoArgsIsHelp" in type(error).__name__:
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        said: str = error.format_message()  # type: ignore[attr-defined]
        said = said.rstrip(".").replace("Possible options: --help, ", "Possible options: ")
        fail(f"{said}; {context.command_path if context else 'stepfold'} --help says what it takes", 2)
    except UserError as error:
        fail(error, 2)
    except NonFiniteError as error:
        fail(error, 3)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:  # a path that no file can have, a full disk behind standard output
        with suppress(OSError):
            fail(f"{error.strerror or error}{f': {str(error.filename)[:200]}' if error.filename else ''}", 2)
        os._exit(2)


@contextmanager
def continued_by(folder: Path, resume: bool, note: Callable[[str], None]) -> Iterator[str]:
    """Around a run; yields its command. If it is stopped, says what continues it, and exits with 130."""
    command = "stepfold " + shlex.join(sys.argv[1:])
    try:
        yield command
    except KeyboardInterrupt:
        note(f"{stopped(folder)} Continue with: {command}{'' if resume else ' --resume'}")
        raise typer.Exit(130) from None


def stopped(folder: Path) -> str:
    """What a run that was stopped is left with."""
    from stepfold.training.runs import read_metrics, saved_step

    done = max((int(row["step"]) + 1 for row in read_metrics(folder) if "step" in row), default=0)
    if saved_step(folder) >= done > 0:
        return "stopped; the state is saved."
    saved = saved_step(folder)
    return f"stopped; it goes on from step {saved}, the last checkpoint." if saved else "stopped before a checkpoint."


def other_process() -> int:
    """This process's number among those of a launcher, as torchrun and accelerate say it; 0 is the one that shows."""
    return int(os.environ.get("RANK", "0"))


def leave() -> None:
    """Ends one of several processes that has done all its work, without the interpreter's own end.

    In that, threads of torch's collectives aborted 2 of about 20 finished runs (torch 2.13, gloo, sharded weights), and
    the launcher took the run for a failed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def fail(error: Any, code: int) -> None:
    """Prints an error as one line and exits."""
    rank = other_process()
    print((f"process {rank}: error: " if rank else "error: ") + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
