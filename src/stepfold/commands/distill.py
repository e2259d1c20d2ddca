"""`stepfold distill`: a teacher becomes a few-step student."""

import os
from pathlib import Path
from typing import Annotated

import typer

from stepfold.commands.launching import continued_by, leave, other_process
from stepfold.commands.options import (
    ChangesOption,
    DeviceOption,
    DtypeOption,
    HoursOption,
    LearningRateOption,
    LoraOption,
    PresetOption,
    PromptsOption,
    Quiet,
    RevisionOption,
    SeedOption,
    SizeOption,
    TeacherLoraOption,
    TeacherOption,
    TrainStepsOption,
    VariantOption,
    WishedStepsOption,
)
from stepfold.commands.settling import settle, within_hours
from stepfold.errors import UserError
from stepfold.jobs.distilling import run_distill


def distill(
    teacher: TeacherOption = None,
    teacher_lora: TeacherLoraOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    prompts: PromptsOption = None,
    preset: PresetOption = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/PRESET.", show_default=False)] = None,
    steps: WishedStepsOption = None,
    hours: HoursOption = None,
    train_steps: TrainStepsOption = None,
    lora: LoraOption = None,
    size: SizeOption = None,
    dtype: DtypeOption = None,
    lr: LearningRateOption = None,
    seed: SeedOption = None,
    changes: ChangesOption = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="An earlier student of the same teacher, to start from.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, or begin it there.")] = False,
    device: DeviceOption = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings and stop.")] = False,
    quiet: Quiet = False,
) -> None:
    """Distil a teacher into a few-step student.

    Writes checkpoints, previews, report.html and report.json into the run folder, and the student into its `student`
    folder, which plain diffusers loads. Without --preset, a rule chooses the method for a --teacher of yours, and says
    why; `stepfold plan` prices the alternatives.

        stepfold distill

        stepfold distill --teacher ./my-sdxl --prompts prompts.txt --steps 4 --out runs/mine

        stepfold distill --preset sana-lora-4step --teacher ./my-sana --prompts prompts.txt --out runs/mine

        stepfold distill --preset sdxl-lora-4step --teacher ./my-sdxl --prompts prompts.txt --out runs/sdxl

        stepfold distill --init runs/demo/student --out runs/more --set objective=continuous
    """
    from stepfold.config import to_yaml

    if dry_run and hours is not None:
        raise UserError("--hours takes a trial, which --dry-run leaves out; leave out one of them")
    settled = settle(
        preset, changes, steps=steps, hours=hours, device=device, out=out, resume=resume, teacher=teacher,
        teacher_lora=teacher_lora, prompts=prompts, init=init, train_steps=train_steps, lora=lora, size=size,
        dtype=dtype, lr=lr, seed=seed, revision=revision, variant=variant,
    )  # fmt: skip
    if dry_run:
        for note in settled.notes():
            typer.echo(note, err=True)
        typer.echo(to_yaml(settled.config), nl=False)
        return
    from stepfold.display import Display, quiet_libraries, results_table, show_table
    from stepfold.evaluation.verdict import headline

    quiet_libraries()
    display = Display(quiet or bool(other_process()))
    folder = out or Path("runs") / Path(settled.name).stem
    if hours is not None and settled.choice:
        from stepfold.commands.plan import TRIAL_STEPS, make_plan
        from stepfold.training.opening import check_run

        check_run(folder, settled.config, resume)  # before the trial, which takes minutes
        trial = make_plan(settled.config, TRIAL_STEPS, display, device)
        settled = within_hours(settled, trial.whole_step_sec, trial.fixed_sec)
    for note in settled.notes():
        display.note(note)
    with continued_by(folder, resume, display.note) as command:
        result = run_distill(settled.config, folder, resume=resume, display=display, command=command, device=device)
    if not other_process():
        if result["teacher"]:
            show_table(results_table(result))
            typer.echo(f"{headline(result)}\n")
        typer.echo(f"student: {folder / 'student'}\nreport:  {folder / 'report.html'}")
    if "WORLD_SIZE" in os.environ:
        leave()
