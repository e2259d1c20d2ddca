"""`stepfold evaluate`: students and other pipelines under one protocol."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepfold import assets
from stepfold.commands.launching import typed
from stepfold.commands.options import DeviceOption, JsonOption, Quiet, ScheduleOption, write_json
from stepfold.errors import UserError
from stepfold.jobs.devices import usable_device

if TYPE_CHECKING:
    from stepfold.config import TeacherSettings
    from stepfold.display import Display
    from stepfold.evaluation.judge import Judge
    from stepfold.evaluation.protocol import Protocol
    from stepfold.sampling.recipe import Recipe
    from stepfold.students.card import Card
    from stepfold.teachers.contract import Student

CLIP = "openai/clip-vit-large-patch14"
PROTOCOLS = ("auto", "teacher", "emoji", "mjhq30k", "geneval")


def evaluate(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...", help="A run, a student, or any diffusers text-to-image pipeline.", show_default=False
        ),
    ],
    protocol: Annotated[
        str,
        typer.Option(
            help="`teacher`: latent error against the student's own teacher. `emoji`: the bundled teacher's evaluator. "
            "`mjhq30k`: FID, CLIP score. `geneval`: images for its scorer. Both load pipelines in float32. `auto`: "
            "teacher, or emoji for the bundled one."
        ),
    ] = "auto",
    steps: Annotated[
        str | None,
        typer.Option(
            help="Sampling steps, such as 1,4. Default: 1,2,4 for students (8 too: flow maps, teacher; geneval: 1).",
            show_default=False,
        ),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Images per row. Default: 2000, with a teacher of your own 64 prompts, with mjhq30k 30000.",
            show_default=False,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1000,
            help="Scale for teacher and students. Default: the student's own, or another pipeline's.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts to evaluate on (teacher; default: those of the run that it did not train on), or GenEval's "
            "evaluation_metadata.jsonl.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="MJHQ-30k's folder, with meta_data.json (mjhq30k).", show_default=False)
    ] = None,
    inception: Annotated[Path, typer.Option(help="Weights of the 2015 Inception network (mjhq30k).")] = Path(
        "inception.safetensors"
    ),
    clip: Annotated[
        str | None,
        typer.Option(
            help=f"Folder or hub id of a CLIP. Default: none (teacher); {CLIP} (mjhq30k).", show_default=False
        ),
    ] = None,
    schedule: ScheduleOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for images. teacher writes a report there too; default: none. mjhq30k and geneval: "
            "runs/PROTOCOL.",
            show_default=False,
        ),
    ] = None,
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Measure a student against its teacher, or students and other pipelines side by side.

    A student of any teacher gets a latent error for each number of steps; no images are needed. The bundled teacher has
    an evaluator of its own, which scores other pipelines too.

    stepfold evaluate runs/mine --out runs/mine-report

    stepfold evaluate runs/demo/student

    stepfold evaluate runs/a/student runs/b/student ./my-sana --steps 1,2 --n 500 --json scores.json

    stepfold evaluate runs/mine/student ./my-sana --protocol mjhq30k --images MJHQ-30K --steps 1

    stepfold evaluate ./my-sana --protocol geneval --prompts evaluation_metadata.jsonl
    """
    from stepfold.commands.own_teacher import NUM_PROMPTS, is_own, run_own
    from stepfold.commands.protocols import run_geneval, run_mjhq
    from stepfold.display import Display, mjhq_table, quiet_libraries, results_table, show_table
    from stepfold.evaluation.verdict import headline

    try:
        counts = sorted({int(part) for part in steps.split(",")}, reverse=True) if steps else None
    except ValueError:
        raise UserError(f"--steps {steps!r} is no list of numbers; for example --steps 1,2,4") from None
    if protocol not in PROTOCOLS:
        raise UserError(f"no protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
    if protocol == "auto":
        protocol = "teacher" if any(map(is_own, folders)) else "emoji"
    quiet_libraries()
    pictures = out or Path("runs") / protocol
    display = Display(quiet)
    if protocol == "teacher":
        found = run_own(
            folders, steps=counts, n=n or NUM_PROMPTS, guidance=guidance, prompts=prompts, clip=clip, out=out,
            display=display, device=usable_device(device), schedule=schedule, command=typed(),
        )  # fmt: skip
        write_json(json_file, next(iter(found.values())) if len(found) == 1 else {"students": found})
        for name, row in found.items():
            typer.echo(f"{name}: {row['protocol']['prompts']}")
            show_table(results_table(row))
        typer.echo(f"report: {out}" if out else "images and a report: add --out FOLDER")
        return
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
            folders, images, inception, clip or CLIP, pictures, steps=counts, n=n or 30_000, guidance=guidance,
            display=display, device=usable_device(device),
        )  # fmt: skip
        table = mjhq_table(result)
    else:
        check_unread(prompts=prompts, clip=clip, images=images, out=out)
        result = run_evaluate(
            folders, steps=counts, n=n or 2000, guidance=guidance, display=display, device=usable_device(device),
            schedule=schedule,
        )  # fmt: skip
        table = results_table(result)
    write_json(json_file, result)
    show_table(table)
    if result.get("student"):
        typer.echo(f"\n{headline(result)}")


def check_unread(**given: object) -> None:
    """Refuses options that the bundled teacher's evaluator has no use for.

    Raises:
        UserError: naming the first that is given.
    """
    for name, value in given.items():
        if value is not None:
            raise UserError(
                f"--{name} is not for --protocol emoji, which has prompts and an evaluator of its own; leave it out, "
                "or give --protocol teacher"
            )


def run_evaluate(
    folders: Sequence[Path],
    *,
    steps: Sequence[int] | None,
    n: int,
    guidance: float | None,
    display: "Display",
    device: str,
    schedule: Path | None = None,
) -> dict[str, Any]:
    """Students and any other diffusers pipelines under the bundled teacher's protocol, beside that teacher.

    Students start from the noise of their teacher, and so have an agreement with it; those of other settings (a size,
    a LoRA) stand beside theirs. Without `steps`, they take 1, 2 and 4, flow maps 8 too, and others their own default.

    Raises:
        UserError: a folder is no pipeline; a student's teacher is not the bundled one, so there is no judge for it.
    """
    from stepfold.commands.protocols import open_drawer
    from stepfold.config import load_config
    from stepfold.evaluation.judge import load_judge
    from stepfold.evaluation.pipelines import measure_pipeline
    from stepfold.evaluation.protocol import protocol_record, rows_by_steps, teacher_of
    from stepfold.evaluation.report import versions

    names = list(dict.fromkeys(map(str, folders)))
    students = open_students(names, device)
    drawers = {name: open_drawer(Path(name), device) for name in names if name not in students}
    judge = load_judge(assets.JUDGE, device)
    protocols: dict[str, Protocol] = {}
    teachers: dict[str, dict[str, Any]] = {}
    pipelines: dict[str, dict[str, Any]] = {}
    for settings, usual, group in by_teacher(students) or [(load_config("demo").teacher, None, {})]:
        whose = teacher_of(next(iter(group))) if protocols else "teacher"
        protocols[whose], found = measure_students(
            judge, settings, usual if guidance is None else guidance, guidance, group,
            steps=steps, n=n, display=display, device=device, schedule=schedule,
        )  # fmt: skip
        pipelines |= {name: found.pop(f"student {name}") for name in group}
        teachers |= {who.replace("teacher", whose, 1): row for who, row in found.items() if row}
    jobs = [(name, drawer, k) for name, drawer in drawers.items() for k in steps or drawer.usual_steps]
    with display.measuring({f"{name} {k}": n for name, _, k in jobs}) as tick:
        for name, drawer, k in jobs:
            scores = measure_pipeline(judge, protocols["teacher"], drawer, k, guidance, partial(tick, f"{name} {k}"))
            pipelines.setdefault(name, {}).update(rows_by_steps({f"{name} {k}": scores})[name])
    record = protocol_record(protocols["teacher"])
    result = {"versions": versions(), "protocol": record, "reals": {"diversity": judge.diversity}}
    if len(protocols) > 1:
        result["protocols"] = {who: protocol_record(other) for who, other in protocols.items()}
    if len(names) == 1 and students:
        result |= {"student_folder": names[0], "usual_steps": students[names[0]][1].usual_steps}
        return result | teachers | {"student": pipelines[names[0]]}
    return result | teachers | {"pipelines": {name: pipelines[name] for name in names}}


def open_students(names: Sequence[str], device: str) -> "dict[str, tuple[Student, Card]]":
    """The students among folders, with their cards.

    Raises:
        UserError: one has another teacher than the bundled one.
    """
    from stepfold.students.card import is_student
    from stepfold.students.loading import load_student

    students: dict[str, tuple[Student, Card]] = {}
    for name in names:
        if is_student(Path(name)):
            _, student, card = load_student(Path(name), device)
            if card.teacher != "emoji":
                raise UserError(
                    f"{name} is a student of {card.teacher!r}, and the evaluator knows the bundled teacher's images "
                    "only; use --protocol teacher or mjhq30k"
                )
            students[name] = student, card
    return students


def by_teacher(
    students: "dict[str, tuple[Student, Card]]",
) -> "list[tuple[TeacherSettings, float | None, dict[str, tuple[Student, Recipe]]]]":
    """Students in groups, each of one teacher: its settings, the scale of their runs' evaluation, the students."""
    groups: dict[str, tuple[TeacherSettings, float | None, dict[str, tuple[Student, Recipe]]]] = {}
    for name, (student, card) in students.items():
        settings, usual = card.teacher_settings(), card.config["evaluation"]["guidance"]
        usual = card.recipe.guidance if usual is None else usual
        group = groups.setdefault(f"{settings.model_dump_json()} {usual}", (settings, usual, {}))
        group[2][name] = student, card.recipe
    return list(groups.values())


def measure_students(
    judge: "Judge",
    settings: "TeacherSettings",
    scale: float | None,
    told: float | None,
    students: "dict[str, tuple[Student, Recipe]]",
    *,
    steps: Sequence[int] | None,
    n: int,
    display: "Display",
    device: str,
    schedule: Path | None = None,
) -> "tuple[Protocol, dict[str, dict[str, Any]]]":
    """Students of one teacher beside it.

    Args:
        judge: scores the pictures.
        settings: of the teacher.
        scale: guidance scale of the teacher; None for its own.
        told: scale that the students are told; None for the usual one of each.
        students: name -> network, and how it is sampled.
        steps: of the students; None for the protocol's.
        n: pictures a row.
        display: shows how far it is.
        device: torch device.
        schedule: levels that were searched for this teacher; None for none.

    Returns:
        The protocol, and who (`teacher`, `student NAME`) -> steps -> scores.
    """
    from stepfold.evaluation.measure import measure_groups, protocol_samplers
    from stepfold.evaluation.protocol import check_steps, emoji_protocol, rows_by_steps
    from stepfold.levels.record import searched_samplers
    from stepfold.teachers.loading import load_teacher

    recipes = [recipe for _, recipe in students.values()]
    check_steps(recipes, steps)
    teacher = load_teacher(settings, device)
    protocol = emoji_protocol(recipes, steps, n, teacher.default_guidance if scale is None else scale)
    named = {f"student {name}": student for name, student in students.items()}
    searched = searched_samplers(schedule, teacher, settings, protocol.guidance) if schedule else {}
    groups = protocol_samplers(teacher, named, protocol, told, searched)
    with display.measuring({name: n for group in groups.values() for name in group}) as tick:
        return protocol, rows_by_steps(measure_groups(judge, protocol, teacher, groups, teacher.device, tick))
