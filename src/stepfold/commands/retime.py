"""`stepfold retime`: a teacher that reads timesteps in [0, 1000] learns to read [0, 1]."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepfold import __version__
from stepfold.commands.launching import continued_by
from stepfold.commands.options import (
    ChangesOption,
    DeviceOption,
    JsonOption,
    Quiet,
    short_forms,
    write_json,
)
from stepfold.errors import UserError
from stepfold.jobs.devices import usable_device

if TYPE_CHECKING:
    from stepfold.display import Display

SETTINGS = (
    "space.route=random", "space.route_steps=8", "space.route_per=prompt", "space.keep_first=true",
    "space.filter_rule=off", "optimiser.name=adamw", "optimiser.lr=1e-4", "optimiser.warmup=20", "optimiser.decay=0.8",
    "training.prompts_per_step=8", "training.precision=no", "training.walk_precision=no",
)  # fmt: skip


def retime(
    teacher: Annotated[
        str, typer.Argument(help="A pipeline of a family that can be re-timed (docs/teachers.md).", show_default=False)
    ],
    prompts: Annotated[
        str, typer.Option(help="txt (one prompt a line), jsonl, csv, tsv or parquet; .gz too.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Run folder; the new teacher is its `teacher` folder.")] = Path(
        "runs/retimed"
    ),
    train_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimiser steps: `training.steps`. Default: 1000.", show_default=False),
    ] = None,
    changes: ChangesOption = None,
    device: DeviceOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that --out holds.")] = False,
    json_file: JsonOption = None,
    quiet: Quiet = False,
) -> None:
    """Re-time a teacher from timesteps in [0, 1000] to [0, 1], on its own trajectories.

    Continuous consistency needs it: its tangent contains dF/dt. Discrete consistency does not. It takes no images and
    trains all of the network, in float32. The result is a pipeline of the same class.

    stepfold retime ./my-sana --prompts prompts.txt --out runs/retimed

    stepfold retime ./my-sana --prompts prompts.txt --train-steps 5000 --set optimiser.lr=1e-5 --out runs/long --resume

    stepfold distill --preset released --teacher runs/retimed/teacher --prompts prompts.txt --out runs/mine
    """
    from stepfold.display import Display, quiet_libraries

    quiet_libraries()
    given = short_forms(changes, train_steps=train_steps) or {"training.steps": 1000}
    changes = [*(f"{name}={value}" for name, value in given.items()), *(changes or [])]
    if device != "auto":
        usable_device(device)
    display = Display(quiet)
    with continued_by(out, resume, display.note):
        found = run_retime(teacher, prompts, out, changes, resume=resume, display=display, device=device)
    for name, number in found.items():
        typer.echo(f"{name:32} {number:.4g}")
    write_json(json_file, found)
    typer.echo(f"teacher: {out / 'teacher'}")


def run_retime(
    source: str,
    prompts: str | Path,
    folder: Path,
    changes: Sequence[str],
    *,
    resume: bool,
    display: "Display",
    device: str = "auto",
) -> dict[str, float]:
    """Re-times a teacher into `folder/teacher`, a pipeline of its class; returns what was measured on the way.

    Args:
        source: `emoji`, a folder or a hub id.
        prompts: a text file, one prompt a line; or a table, as `open_prompts` takes it.
        folder: of the run.
        changes: settings, on top of the preset `default` and SETTINGS; those of teacher, routes, optimiser and
            checkpoints count, and `conditions`, `training.precision`, `walk_precision`, `micro_batch` and
            `checkpointing`.
        resume: continue from the folder's last checkpoint.
        display: where progress is shown.
        device: cpu, cuda, cuda:1 or auto.

    Raises:
        UserError: the teacher is none that can be re-timed, or settings, prompts or folder are wrong.
        NonFiniteError: a loss or gradient is not finite; the checkpoints are intact.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    from stepfold.config import load_config
    from stepfold.prompts.conditions import cache_of, conditions_from, notes_on
    from stepfold.prompts.reading import open_prompts
    from stepfold.teachers.fingerprints import teacher_fingerprint
    from stepfold.teachers.loading import load_teacher, retimable
    from stepfold.training.accelerators import make_accelerator
    from stepfold.training.choices import choose_precision
    from stepfold.training.opening import Source, as_begun, check_run, prepare_run
    from stepfold.training.retiming import retimed_network
    from stepfold.training.runs import writing

    config = load_config("default", [*SETTINGS, *changes], teacher__source=source, prompts=str(prompts))
    if config.teacher.dtype != "float32":
        raise UserError(f"re-timing trains the network in float32, not {config.teacher.dtype}; leave teacher.dtype out")
    if config.training.skip_nonfinite:
        raise UserError("re-timing skips no step that is not finite; leave training.skip_nonfinite out")
    config = choose_precision(as_begun(folder, config) if resume else config, device)
    file, accelerator = open_prompts(prompts), make_accelerator(config.training.precision, device=device)
    check_run(folder, config, resume)
    cache = cache_of(config, file)
    teacher = load_teacher(
        config.teacher, accelerator.device, network_only=cache is not None, null=cache.null if cache else None
    )
    if teacher.time_scale < 10:
        raise UserError(f"the time of {source!r} counts to {teacher.time_scale:g}, not to 1000; distil it as it is")
    if not teacher.retimable:
        raise UserError(
            f"{source!r} is a {type(teacher.pipe).__name__}, but re-timing is for {', '.join(retimable())}; distil it "
            "as it is, with objective=discrete"
        )
    for note in notes_on(file, teacher):
        display.note(note)
    sources = [
        Source("prompts", str(file.source), file.sha256, len(file)),
        Source("teacher", source, teacher_fingerprint(config.teacher, network_only=cache is not None)),
    ]
    lock = prepare_run(folder, config, resume, sources, display.note)
    network, found = retimed_network(
        teacher, file, conditions_from(cache, teacher, file), config, folder, lambda: accelerator.autocast(), display
    )
    with writing(folder / "teacher") as part:
        teacher.save_retimed(network, part)
        (part / "README.md").write_text(card(source, config.training.steps, found), encoding="utf-8")
    lock.release()
    return found


CARD = """---
library_name: diffusers
{licence}---

# {source}, re-timed

Its network reads times of [0, 1] in the place of 0 to 1000, which the continuous objective of `stepfold distill` wants.
Made from its own walks by stepfold {version} in {steps} steps, without images. The licence is the original's.

| measured | |
|---|---|
{found}

Where the scheduler's config has `num_train_timesteps: 1` (Stable Diffusion 3, FLUX), plain diffusers needs the noise
levels: `pipe(prompt, sigmas=[1 - i / 20 for i in range(20)])`.
"""


def card(source: str, steps: int, found: Mapping[str, float]) -> str:
    """The README of a re-timed teacher; its licence is what the original's card states."""
    from stepfold.teachers.licences import stated_licence

    return CARD.format(
        licence="".join(f"{name}: {value}\n" for name, value in stated_licence(source).items()),
        source=source,
        version=__version__,
        steps=steps,
        found="\n".join(f"| {name} | {number:.4g} |" for name, number in found.items()),
    )
