"""`stepfold schedule`: noise levels at which a teacher is better in a few steps of its own; nothing is trained."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stepfold.commands.options import (
    DeviceOption,
    DtypeOption,
    Quiet,
    RevisionOption,
    SizeOption,
    TeacherLoraOption,
    VariantOption,
    pixels_of,
    teacher_settings,
)
from stepfold.errors import UserError
from stepfold.jobs.devices import usable_device

if TYPE_CHECKING:
    from torch import Tensor

    from stepfold.config import TeacherSettings
    from stepfold.display import Display
    from stepfold.levels.record import Row
    from stepfold.levels.search import Reference
    from stepfold.levels.solvers import Velocity

FEW, LEAST = 16, 4  # prompts of each half: fewer than FEW are told what it may cost, fewer than LEAST are refused
NODES = 16  # of the table that the search starts from
SOLVER_NAMES = ("euler", "unipc", "calibrated")


def schedule(
    teacher: Annotated[
        str, typer.Argument(help="`emoji` (bundled), a diffusers pipeline folder, or a hub id.", show_default=False)
    ],
    prompts: Annotated[
        str | None,
        typer.Option(help="Prompts, as of `distill`. Default: the bundled teacher's.", show_default=False),
    ] = None,
    steps: Annotated[str, typer.Option(help="Numbers of sampling steps.")] = "4,6,8",
    solvers: Annotated[str, typer.Option(help="euler, unipc, calibrated: one or several.")] = "euler,unipc,calibrated",
    guidance: Annotated[
        float | None,
        typer.Option(min=0, max=1000, help="Scale. Default: the pipeline's own.", show_default=False),
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="Prompts to search on, and as many others for the verdict.")] = 64,
    start: Annotated[
        Literal["rollout", "local", "default"],
        typer.Option(
            help="Start of the search, besides the usual levels: a table of short trajectories (OSS), or the least "
            "sum of local errors (BOSS, GITS)."
        ),
    ] = "rollout",
    sweeps: Annotated[int, typer.Option(min=0, help="Sweeps over all levels, at most.")] = 4,
    reference_steps: Annotated[int, typer.Option(min=2, help="Steps of the trajectory that counts as exact.")] = 48,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise and the choice of prompts.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images that the network sees at once.")] = 8,
    teacher_lora: TeacherLoraOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    size: SizeOption = None,
    dtype: DtypeOption = None,
    out: Annotated[Path, typer.Option(help="json file; rows that it has already are kept.")] = Path("schedule.json"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file of another search.")] = False,
    device: DeviceOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Search the noise levels at which a teacher is best in a few steps of its own. Nothing is trained.

    Half of the prompts are searched on, and the other half gives the verdict: searched levels count where they beat the
    usual ones there. They belong to one teacher, guidance scale and image size.

    stepfold schedule emoji --guidance 3

    stepfold schedule ./my-sd3 --prompts prompts.txt --steps 4,8 --solvers unipc --dtype bfloat16

    stepfold evaluate runs/demo/student --schedule schedule.json
    """
    from rich.table import Table

    from stepfold.display import Display, quiet_libraries, show_table

    quiet_libraries()
    chosen = numbers_of(steps)
    names = [name.strip() for name in solvers.split(",") if name.strip()]
    if unknown := [name for name in names if name not in SOLVER_NAMES]:
        raise UserError(f"--solvers has {unknown[0]!r}; choose of {', '.join(SOLVER_NAMES)}")
    height, width = pixels_of(size) if size else (None, None)
    settings = teacher_settings(
        source=teacher, lora=teacher_lora, revision=revision, variant=variant, height=height, width=width, dtype=dtype
    )
    rows, use = run_schedule(
        settings, prompts, out, steps=chosen, solvers=names, guidance=guidance, n=n, start=start, sweeps=sweeps,
        reference_steps=reference_steps, seed=seed, batch=batch, force=force, display=Display(quiet),
        device=usable_device(device),
    )  # fmt: skip
    table = Table("solver", "steps", "error", "usual levels", "their error", "verdict", box=None)
    for row in rows:
        verdict = f"[green]{row.error / row.default:.2f} of it[/]" if row.better else "[red]not better[/]"
        table.add_row(row.solver, str(row.steps), f"{row.error:.4f}", row.default_name, f"{row.default:.4f}", verdict)
    show_table(table)
    for lines in use:
        typer.echo(f"\n# {lines['name']}, in diffusers:\n{lines['diffusers']}")
        if lines["comfyui"]:
            told = lines["comfyui_guidance"]
            typer.echo(f"# in ComfyUI, sampler euler, {told}, ManualSigmas:\n{lines['comfyui']}")
    if use:
        typer.echo("\nNearer ends can lack fine detail: compare images before you use these levels.")
    typer.echo(f"\nschedule: {out}")


def numbers_of(steps: str) -> list[int]:
    """`4,6,8` as numbers.

    Raises:
        UserError: it is no list of numbers of 2 or more.
    """
    try:
        found = sorted({int(part) for part in steps.split(",")})
    except ValueError:
        raise UserError(f"--steps {steps!r} is no list of numbers; for example --steps 4,6,8") from None
    if found[0] < 2:
        raise UserError(
            f"--steps has {found[0]}; a search places the levels between the first and 0, so give 2 or more"
        )
    return found


def run_schedule(
    settings: "TeacherSettings",
    prompts: str | None,
    out: Path,
    *,
    steps: Sequence[int],
    solvers: Sequence[str],
    guidance: float | None,
    n: int,
    start: Any,
    sweeps: int,
    reference_steps: int,
    seed: int,
    batch: int,
    force: bool,
    display: "Display",
    device: str,
) -> "tuple[list[Row], list[dict[str, str]]]":
    """Searches levels and writes them after each row, so that a search that was stopped goes on; returns rows and use.

    Arguments as of the command.

    Raises:
        UserError: too few prompts, a solver that the teacher's pipeline does not take, or a file of another search.
    """
    from stepfold import assets
    from stepfold.levels.record import lines_for, write_schedule
    from stepfold.prompts.conditions import encoded
    from stepfold.prompts.reading import open_prompts, shuffled_index
    from stepfold.teachers.contract import concatenate
    from stepfold.teachers.fingerprints import teacher_fingerprint
    from stepfold.teachers.loading import load_teacher

    if prompts is None and settings.source != "emoji":
        raise UserError("a teacher of your own has no prompts here; give some with --prompts FILE, 128 are enough")
    if n < LEAST:
        raise UserError(f"--n is {n}, and a search needs {LEAST} prompts or more; 64 are usual")
    file = open_prompts(prompts or assets.PROMPTS)
    half = min(n, len(file) // 2)
    if half < LEAST:
        raise UserError(
            f"{len(file)} prompts, half of them for the verdict; give {2 * LEAST} or more, {2 * n} are usual"
        )
    if half < FEW:
        display.note(
            f"{half} prompts to search on: levels overfit on few; on a known teacher 4 lost up to 37% of the gain on "
            "other prompts, 64 at most 7%"
        )
    teacher = load_teacher(settings, device)
    scale = teacher.default_guidance if guidance is None else guidance
    key: dict[str, Any] = {
        "teacher": settings.source, "fingerprint": teacher_fingerprint(settings, network_only=False),
        "guidance": float(scale), "height": teacher.height, "width": teacher.width, "prompts_sha256": file.sha256,
        "n": half, "seed": seed, "reference_steps": reference_steps, "start": start, "sweeps": sweeps,
    }  # fmt: skip
    known = kept_rows(out, key, force)
    if teacher.ode == "trigflow" and set(solvers) - {"euler"}:
        display.note("Euler alone: no other scheduler of this pipeline's kind takes listed levels")
        solvers = ["euler"]
    wanted = [(name, k) for k in steps for name in solvers if (name, k) not in known]
    index = [shuffled_index(i, len(file), seed) for i in range(2 * half)]
    condition = concatenate([encoded(teacher, file, index[i : i + batch]) for i in range(0, len(index), batch)])
    teacher.park_text_encoder()
    if wanted:
        for row in search_rows(teacher, condition, scale, wanted, known, key, batch, display):
            known[row.solver, row.steps] = row
            write_schedule(out, key, list(known.values()), [])
    rows = [known[name, k] for name in SOLVER_NAMES for k in steps if (name, k) in known]
    use = [lines_for(teacher, row, scale) for row in rows if row.better]
    write_schedule(out, key, list(known.values()), use)
    return rows, use


def kept_rows(out: Path, key: dict[str, Any], force: bool) -> "dict[tuple[str, int], Row]":
    """The rows of an earlier search with the same key.

    Raises:
        UserError: the file is one of another search, and not to be replaced.
    """
    from stepfold.levels.record import read_schedule

    if not out.exists() or force:
        return {}
    there, rows = read_schedule(out)
    if changed := [name for name in key if there.get(name) != key[name]]:
        raise UserError(
            f"{out} is of a search with {changed[0]}={there.get(changed[0])!r}, not {key[changed[0]]!r}; "
            "give another --out, or --force to replace it"
        )
    return {(row.solver, row.steps): row for row in rows}


def search_rows(
    teacher: Any,
    condition: Any,
    scale: float,
    wanted: "Sequence[tuple[str, int]]",
    known: "Mapping[tuple[str, int], Row]",
    key: dict[str, Any],
    batch: int,
    display: "Display",
) -> "Iterator[Row]":
    """Each row when it is found: the first half of the conditions is searched on, the other one judges.

    Calibrated steps take the levels of Euler's row, where one is `known` by then and is better than the usual ones.
    """
    from stepfold.levels.search import reference
    from stepfold.levels.solvers import velocity_of

    half, fine = key["n"], fine_levels(teacher, key["reference_steps"])
    names = {"the reference": 2 * half * (len(fine) - 1)}
    names |= {f"{name} {k}": half * most_calls(name, k, key) for name, k in wanted}
    branches = 2 if teacher.guidance_kind == "classifier_free" and scale != teacher.no_guidance else 1
    display.note(
        f"at most {branches * sum(names.values()):,} network calls of one image each: {half} prompts to search on, "
        f"{half} others for the verdict"
    )
    with display.searching(names) as tick:
        at = "the reference"
        sides = []
        for first in (0, half):
            rows = condition.rows(slice(first, first + half))
            velocity = velocity_of(teacher, rows, scale, batch, lambda count: tick(at, count))
            noise = start_noise(teacher, key["seed"], range(first, first + half))
            sides.append(Side(velocity, reference(velocity, noise, fine)))
        tick(at, 0, done=True)
        starts: dict[int, list[float]] = {}
        for name, k in wanted:
            at = f"{name} {k}"
            euler = known.get(("euler", k))
            levels = euler.levels if euler and euler.better else None
            yield found_row(teacher, name, k, sides[0], sides[1], key, starts, levels)
            tick(at, 0, done=True)


def most_calls(name: str, k: int, key: dict[str, Any]) -> int:
    """Network calls of one row for each prompt, at most: of the search, and of the verdict."""
    from stepfold.levels.search import calls_of_search

    verdict = 4 * k
    if name == "calibrated":
        return key["reference_steps"] + 2 * k + verdict
    table = NODES * k if key["start"] == "rollout" else NODES * (key["start"] == "local")
    return calls_of_search(k, key["sweeps"] / 4 + 1) + 4 * k + table + verdict


def start_noise(teacher: Any, seed: int, samples: range) -> "Tensor":
    """The states at the first level [B, ...], in flow coordinates."""
    import torch

    from stepfold.maths.formulations import flow_input
    from stepfold.randomness import normal

    noise = torch.stack([normal(teacher.latent_shape, seed, "schedule noise", sample) for sample in samples])
    return flow_input(noise, torch.full((len(noise),), teacher.start_time), 1.0)


def usual_levels(teacher: Any, k: int) -> dict[str, list[float]]:
    """The hand-made levels of a teacher: its own scheduler's, and even ones."""
    import torch

    from stepfold.maths.formulations import flow_time
    from stepfold.maths.routes import even_flow_times, flow_euler_times

    first = float(flow_time(torch.tensor(teacher.start_time, dtype=torch.float64)).clamp(max=1.0))
    shift = teacher.shift_at(k)
    if teacher.ode == "trigflow":
        times = {"the scheduler's": teacher.ddim_times(k)}
    else:
        times = {"the scheduler's": flow_euler_times(k, shift), "even": even_flow_times(k, shift)}
        if shift != 1:
            times["even, no shift"] = even_flow_times(k, 1.0)
    found = {name: flow_time(values.double()).tolist() for name, values in times.items()}
    return {name: [first, *levels[1:-1], 0.0] for name, levels in found.items()}


def fine_levels(teacher: Any, steps: int, among: Sequence[float] = ()) -> list[float]:
    """The levels of the reference: even in the teacher's own coordinates, and `among` with them."""
    usual = usual_levels(teacher, steps)
    return sorted({*(usual.get("even") or usual["the scheduler's"]), *among}, reverse=True)


@dataclass(frozen=True)
class Side:
    """One half of the prompts: the teacher's velocity for them, and its long trajectories."""

    velocity: "Velocity"
    fine: "Reference"


def found_row(
    teacher: Any,
    name: str,
    k: int,
    side: Side,
    other: Side,
    key: dict[str, Any],
    starts: dict[int, list[float]],
    found: list[float] | None,
) -> "Row":
    """The best levels of one solver and number of steps on one side, judged on the other.

    `starts` are kept for the next solver; `found` are Euler's levels, for calibrated steps.
    """
    from stepfold.levels.calibrated import calibrate
    from stepfold.levels.record import Row, end_of, rounded
    from stepfold.levels.search import error, reference

    solver: Any = "euler" if name == "calibrated" else name
    usual = usual_levels(teacher, k)

    def judged(row: Row) -> float:
        return error(end_of(row, other.velocity, other.fine.noise), other.fine.end)

    plain = Row(solver, k, [], 0.0, 0.0, "", False)
    defaults = {label: judged(replace(plain, levels=levels)) for label, levels in usual.items()}
    label = min(defaults, key=defaults.__getitem__)
    weights: list[list[float]] = []
    if name == "calibrated":
        levels = found or usual[label]
        fine = reference(side.velocity, side.fine.noise, fine_levels(teacher, key["reference_steps"], levels))
        weights = [rounded(step) for step in calibrate(side.velocity, fine, levels)[0]]
    else:
        levels = rounded(searched(side, list(usual.values()), solver, k, key, starts))
    row = Row(name, k, levels, 0.0, defaults[label], label, False, weights)
    reached = judged(row)
    return replace(row, error=reached, better=reached < row.default)


def searched(
    side: Side, usual: Sequence[list[float]], solver: Any, k: int, key: dict[str, Any], starts: dict[int, list[float]]
) -> list[float]:
    """Levels by descent from the best of the usual levels and of the start that is asked for.

    The sweeps go by a quarter of the prompts, and a last one by all of them.
    """
    from stepfold.levels.search import descend, error, local_start, rollout_start
    from stepfold.levels.solvers import rollout

    makers: dict[str, Callable[..., list[float]]] = {"rollout": rollout_start, "local": local_start}
    if key["start"] in makers and k not in starts:
        starts[k] = makers[key["start"]](side.velocity, side.fine.thinned(NODES), k)
    tried = [*usual, *([starts[k]] if k in starts else [])]
    reached = [error(rollout(side.velocity, side.fine.noise, levels, solver)[0], side.fine.end) for levels in tried]
    first = tried[reached.index(min(reached))]
    *_, rough = descend(side.velocity, side.fine.first(-(-key["n"] // 4)), first, solver, key["sweeps"])
    *_, last = descend(side.velocity, side.fine, rough.levels, solver, min(key["sweeps"], 1))
    return last.levels
