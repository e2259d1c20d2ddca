"""`stepfold plan`: what a run will take, from a few of its own steps."""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepfold.commands.options import (
    ChangesOption,
    DeviceOption,
    DtypeOption,
    HoursOption,
    JsonOption,
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
    write_json,
)
from stepfold.commands.settling import priced, settle, within_hours
from stepfold.jobs.distilling import run_distill

if TYPE_CHECKING:
    from stepfold.config import Config
    from stepfold.display import Display

TRIAL_STEPS = 12
TRIAL_PICTURES = 32  # pictures per row of the trial's table; its time grows with their number


def plan(
    teacher: TeacherOption = None,
    teacher_lora: TeacherLoraOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    prompts: PromptsOption = None,
    preset: PresetOption = None,
    steps: WishedStepsOption = None,
    hours: HoursOption = None,
    train_steps: TrainStepsOption = None,
    lora: LoraOption = None,
    size: SizeOption = None,
    dtype: DtypeOption = None,
    lr: LearningRateOption = None,
    seed: SeedOption = None,
    changes: ChangesOption = None,
    timed_steps: Annotated[
        int, typer.Option(min=2, help="Optimiser steps to time; the first one is start-up.")
    ] = TRIAL_STEPS,
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
    quiet: Quiet = False,
) -> None:
    """Say what a distillation will take before you start it: time of a step, hours, peak memory.

    It runs a few steps of the real thing in a folder that is thrown away. Options are those of `stepfold distill`.
    Each number is `measured` on this machine, or `counted` from measured ones. Without --preset, for a --teacher of
    yours, a table has the method that the rule chose and the alternatives side by side.

    stepfold plan

    stepfold plan --teacher ./my-sdxl --prompts prompts.txt --steps 4

    stepfold plan --preset sdxl-lora-4step --teacher ./my-sdxl --prompts prompts.txt
    """
    from rich.table import Table

    from stepfold.display import Display, quiet_libraries, show_table

    settled = settle(
        preset, changes, steps=steps, hours=hours, device=device, teacher=teacher, teacher_lora=teacher_lora,
        prompts=prompts, train_steps=train_steps, lora=lora, size=size, dtype=dtype, lr=lr, seed=seed,
        revision=revision, variant=variant,
    )  # fmt: skip
    quiet_libraries()
    display = Display(quiet)
    found = make_plan(settled.config, timed_steps, display, device)
    table = Table("what", "prediction", "how", box=None)
    for row in plan_rows(found):
        table.add_row(*row)
    show_table(table)
    if settled.choice is None:
        write_json(json_file, vars(found))
        return
    seconds = found.whole_step_sec, found.fixed_sec
    rows = priced(settled, *seconds)
    table = Table("for steps", "method", "passes", "GiB", "train steps", "hours", "--preset", "--set", box=None)
    for row in rows:
        table.add_row(*(row_words(row)))
    show_table(table)
    for note in (within_hours(settled, *seconds) if hours else settled).notes():
        display.note(note)
    write_json(json_file, vars(found) | {"alternatives": rows})


def row_words(row: dict[str, Any]) -> list[str]:
    """A row of `priced`, for people; what a row is for comes first among its sampling steps."""
    gib = "?" if row["gib"] is None else f"{row['gib']:.1f}"
    numbers = f"{row['passes']:,}", gib, f"{row['steps']:,}", f"{row['hours']:.2g}"
    changes = "\n".join(f"{key}={value}" for key, value in row["changes"].items())
    return [", ".join(map(str, row["sampling_steps"])), row["method"], *numbers, row["preset"], changes]


@dataclass(frozen=True)
class Plan:
    """What a run of these settings will take on this machine.

    Attributes:
        tangent: which backend, and why.
        step_sec: of one optimiser step, on average over those that walk the teacher and those that do not.
        parts_sec: by part: start, steps, previews, checkpoints, evaluation.
        total_sec: their sum.
        peak_memory_gib: of this process while training; of the GPU where there is one.
        trial_steps: how many steps were timed.
        steps: of the run.
        device: where they were: the GPU's name, or cpu.
    """

    tangent: str
    step_sec: float
    parts_sec: dict[str, float]
    total_sec: float
    peak_memory_gib: float
    trial_steps: int
    steps: int
    device: str

    @property
    def fixed_sec(self) -> float:
        """Of the parts that take as long however many steps there are."""
        return sum(self.parts_sec.get(name, 0) for name in ("start", "evaluation"))

    @property
    def whole_step_sec(self) -> float:
        """Of a step, with its share of previews and checkpoints."""
        return (self.total_sec - self.fixed_sec) / self.steps


def make_plan(config: "Config", steps: int, display: "Display", device: str = "auto") -> Plan:
    """Runs `steps` steps of a distillation in a folder that is thrown away, and reckons the rest.

    Of a run in phases they are those of the last one; a head start, in which the student waits, is left out.

    Everything is the run itself: loading, the first step with what it compiles, previews, a checkpoint, the table.

    Args:
        config: the settings of the run.
        steps: to time; the first one counts as start-up. Whole cycles of `space.reuse` and `training.encode_ahead`
            are timed, and so a few more where need be.
        display: where the trial shows its progress.
        device: as of `run_distill`.

    Raises:
        UserError: as the run would.
    """
    from stepfold.objectives.consistency import short_of_r
    from stepfold.teachers.loading import choose_objective
    from stepfold.training.course import cycle_of
    from stepfold.training.optimisers import long_warmup

    for note in (short_of_r(choose_objective(config)), long_warmup(config.training.steps, config.optimiser)):
        if note:
            display.note(note)
    training, cycle = config.training, cycle_of(config)
    steps = min(1 + max(1, math.ceil((steps - 1) / cycle)) * cycle, training.steps)
    changes: dict[str, Any] = {"steps": steps, "preview_every": steps, "checkpoint_every": steps, "phases": ()}
    changes["look_every"] = 1  # each step is timed
    changes["trackers"] = ()  # a trial is no run in the user's project
    trial = config.model_copy(
        update={
            "training": training.model_copy(update=changes),
            "consistency": config.consistency.model_copy(
                update={"r_schedule": "none"}
            ),  # of the run's steps, not these
            "optimiser": config.optimiser.model_copy(update={"warmup": 0}),
            "fake": config.fake.model_copy(update={"head_start": 0}),  # in which the student waits
            "reward": config.reward.model_copy(update={"from_step": 0}),
            "evaluation": config.evaluation.model_copy(update={"n": min(TRIAL_PICTURES, config.evaluation.n)}),
        }
    )
    with tempfile.TemporaryDirectory(prefix="stepfold-plan-") as folder:
        result = run_distill(
            trial, Path(folder) / "trial", resume=False, display=display, command="stepfold plan", device=device
        )
    return reckon(config, trial, result)


def evaluation_prompts(config: "Config", prompts: int) -> int:
    """Prompts that a run's evaluation samples: with a teacher of one's own at most NUM_PROMPTS of its `prompts`."""
    from stepfold.evaluation.latents import NUM_PROMPTS

    n = config.evaluation.n
    return n if config.teacher.source == "emoji" else min(NUM_PROMPTS, n, prompts)


def reckon(config: "Config", trial: "Config", result: dict[str, Any]) -> Plan:
    """From the trial's report.json to the plan.

    Where steps differ, by reuse, by encoding ahead or by size, the mean counts; else the median, which no hiccup moves.
    """
    from stepfold.training.course import cycle_of

    training, stages, step = config.training, result["stages_sec"], result["step_sec"]
    differ = cycle_of(config) > 1 or len(config.teacher.sizes or ()) > 1
    step_sec, again = (step["mean"], step["again"]) if differ else (step["median"], step["median"])
    previews, checkpoints = (
        math.ceil(training.steps / every) for every in (training.preview_every, training.checkpoint_every)
    )
    timed = result["protocol"]["n"] if trial.evaluation.n else 0
    pictures = evaluation_prompts(config, result["prompts"]["count"]) / timed if timed else 0
    seconds = {
        "start": stages["load"] + stages["first preview"] + max(step["first"] - again, 0),
        "steps": training.steps * step_sec,
        "previews": previews * stages["preview"],
        "checkpoints": checkpoints * stages["checkpoint"],
        "evaluation": pictures * stages.get("evaluation", 0),
    }
    return Plan(
        tangent=result["tangent"],
        step_sec=step_sec,
        parts_sec=seconds,
        total_sec=sum(seconds.values()),
        peak_memory_gib=result["peak_memory_gib"],
        trial_steps=result["timed_steps"],
        steps=training.steps,
        device=result["device"],
    )


def plan_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """For people: what, how much, and whether it was measured or counted from what was."""
    from stepfold.evaluation.report import duration

    measured = f"measured on {plan.device}"
    parts = {f"{plan.steps:,} steps" if name == "steps" else name: sec for name, sec in plan.parts_sec.items()}
    return [
        ("tangent", plan.tangent, ""),
        ("one step", f"{plan.step_sec:.2f} s", f"{measured}, {plan.trial_steps} steps"),
        *((name, duration(sec), measured if name == "start" else "counted") for name, sec in parts.items()),
        ("in all", duration(plan.total_sec), "counted"),
        ("peak memory", f"{plan.peak_memory_gib:.2f} GiB", measured),
    ]
