"""Running a sweep: distillations, their scores, and what the figures are drawn from."""

import json
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepfold import assets
from stepfold.config import Config, last_of_each, load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.evaluation.judge import Judge, load_judge
from stepfold.evaluation.measure import Sampler, measure, steps_of, student_sampler, teacher_sampler
from stepfold.evaluation.protocol import EMOJI, Protocol, protocol_record, rows_by_steps
from stepfold.evaluation.report import versions
from stepfold.evaluation.solvers import solver_sampler
from stepfold.prompts.reading import open_prompts, shuffled_index
from stepfold.reproduction.experiments import (
    EQUAL_TIME_ROW,
    PRESET,
    TIMED_ROW,
    Experiments,
    Run,
    make_run,
    plan_timing,
    stretched,
)
from stepfold.reproduction.figures import route_numbers, walk_numbers
from stepfold.reproduction.records import SCORES, collect_scores, mean_sec_per_step
from stepfold.spaces.records import pairs_per_prompt
from stepfold.students.loading import load_student
from stepfold.teachers.contract import Condition
from stepfold.teachers.loading import load_teacher
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.training.runs import read_metrics, writing
from stepfold.training.stages import BESIDE_STEPS

DIVERGED = 3  # exit code of `stepfold distill` after a non-finite loss
LOADING = threading.Lock()
"""Held while models load: diffusers and transformers change defaults of torch meanwhile, for all threads."""
EQUAL_TIME, FIGURES = "equal_time.json", "figures.json"


def reproduce(runs: list[Run], root: Path, display: Display, pictures: int, workers: int = 1) -> None:
    """As `run_all`, with scores of the bundled teacher's usual protocol, made from so many `pictures`."""
    run_all(runs, root, display, replace(EMOJI, n=pictures), workers)


def run_all(runs: list[Run], root: Path, display: Display, protocol: Protocol, workers: int = 1) -> None:
    """Runs what has no scores yet, each as a `stepfold distill` of its own, which continues where a kill left it.

    Scores are those of `protocol`. A run that diverges is noted as such and not tried again; the others go on.
    So many `workers` go on at once, each with its share of the cores; runs whose times count go alone, at the end.

    Raises:
        UserError: a run failed for any other reason; its last words are above.
    """
    different: dict[str, Run] = {}
    for run in runs:
        different.setdefault(run.name, run)
    todo = [run for run in different.values() if not (root / run.name / SCORES).exists()]
    display.note(f"{len(different)} different runs, {len(todo)} to do, in {root}")
    if to_score := [run for run in todo if not run.costs]:
        display.note("measuring the teacher, unless that was done")
        root.mkdir(parents=True, exist_ok=True)
        teacher, judge = load_teacher(to_score[0].config.teacher, "cpu"), load_judge(assets.JUDGE, torch.device("cpu"))
        measure_teacher(teacher, judge, protocol, root)
    cores = torch.get_num_threads()
    for batch, at_once in (([r for r in todo if not r.alone], workers), ([r for r in todo if r.alone], 1)):
        torch.set_num_threads(max(1, cores // at_once))
        try:
            _finish_all(batch, root, display, protocol, at_once)
        finally:
            torch.set_num_threads(cores)


def _finish_all(runs: list[Run], root: Path, display: Display, protocol: Protocol, at_once: int) -> None:
    began = time.perf_counter()
    quiet = display.console.quiet or at_once > 1  # bars of several runs would write over each other

    def one(number: int, run: Run) -> None:
        done = number - at_once
        left = (time.perf_counter() - began) / done * (len(runs) - done) / 60 if done > 0 else None
        told = f", about {left:.0f} min left" if left is not None else ""
        display.note(f"run {number}/{len(runs)}: {run.table}, {run.row}, seed={run.config.seed}{told}")
        finish(run, root, protocol, quiet)

    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(one, number, run) for number, run in enumerate(runs, 1)]
        try:
            for future in as_completed(futures):
                future.result()
        finally:  # after an error or Ctrl-C: what runs ends, what waits is not begun
            pool.shutdown(wait=False, cancel_futures=True)


def finish(run: Run, root: Path, protocol: Protocol, quiet: bool) -> None:
    """Trains a run to its end and writes its scores.

    Raises:
        UserError: `stepfold distill` failed, but not by diverging.
    """
    folder = root / run.name
    command = distill_command(run, folder)
    code = subprocess.run(  # noqa: S603 - this package, no shell
        [sys.executable, "-m", "stepfold", *command, "--resume", *(["--quiet"] if quiet else [])],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL if quiet else None,
    ).returncode
    if code not in (0, DIVERGED):
        raise UserError(f"stepfold {shlex.join(command)} failed; start the same command again to continue it")
    record: dict[str, Any] = {
        "command": f"stepfold {shlex.join(command)}",
        "changes": list(run.changes),
        "versions": versions(),
        "diverged": code == DIVERGED,
        "steps": run.config.training.steps,
    }
    if not record["diverged"]:
        record |= costs(folder, run.config)
        if not run.costs:
            record |= score(folder / "student", protocol, root, run.steps)
    with writing(folder / SCORES) as part:
        part.write_text(json.dumps(record, indent=2) + "\n")


def costs(folder: Path, config: Config) -> dict[str, Any]:
    """What a finished run took: median seconds a step, mean seconds of its parts; pairs a step; memory.

    The seconds are None if the last process of the run had no step left to do. The median does not see a pause.
    """
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    stages = {name: sec for name, sec in report["stages_sec"].items() if name not in BESIDE_STEPS}
    steps, sec = report["timed_steps"], (report["step_sec"] or {}).get("median")
    kept = statistics.mean([row["kept"] for row in read_metrics(folder) if "kept" in row] or [1.0])
    pairs = (
        kept * config.training.prompts_per_step * pairs_per_prompt(config.space.route_steps, config.space.keep_first)
    )
    return {
        "sec_per_step": sec,
        "sec_per_pair": sec and sec / pairs,
        "stages_sec": {name: sec / steps for name, sec in stages.items()} if steps else None,
        "pairs_per_step": pairs,
        "peak_memory_gib": report["peak_memory_steps_gib"],
        "step_cost": report.get("step_cost"),
        "trainable_parameters": report.get("trainable_parameters"),
    }


def distill_command(run: Run, folder: Path) -> list[str]:
    """The arguments of `stepfold` that repeat a run."""
    changes = [part for change in last_of_each(run.changes) for part in ("--set", change)]
    return ["distill", "--preset", run.preset, *changes, "--out", str(folder)]


def score(student_folder: Path, protocol: Protocol, root: Path, steps: tuple[int, ...] = ()) -> dict[str, Any]:
    """A student's rows; the agreement is with the teacher's pictures that `measure_teacher` kept in `root`.

    They are of `steps`, or of those of the protocol that the student has times for.
    """
    with LOADING:
        _, student, card = load_student(student_folder, "cpu")
        teacher = load_teacher(card.teacher_settings(), "cpu")
        judge = load_judge(assets.JUDGE, torch.device("cpu"))
    note = measure_teacher(teacher, judge, protocol, root)
    samplers = {"teacher 0": reference_sampler(note)}
    for k in steps or steps_of(card.recipe, protocol):
        samplers[f"student {k}"] = student_sampler(student, card.recipe, k, protocol.seed)
    rows = rows_by_steps(measure(judge, protocol, teacher, samplers, teacher.device), timed=True)["student"]
    return {
        "protocol": protocol_record(protocol),
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "student": rows,
        "teacher": json.loads(note.read_text(encoding="utf-8")),
    }


def reference_sampler(note: Path) -> Sampler:
    """The teacher's pictures that `measure_teacher` kept beside its note, of the same protocol."""
    reference = load_file(note.with_suffix(".safetensors"))["x0"]
    return lambda noise, condition, guidance, samples: reference[samples.start : samples.stop]


def measure_teacher(teacher: PipelineTeacher, judge: Judge, protocol: Protocol, root: Path) -> Path:
    """The teacher's own rows, measured once: a json file in `root`, and beside it its pictures at the most steps."""
    note = teacher_note(protocol, root)
    if not note.exists():
        steps, made = protocol.teacher_steps, []
        best = teacher_sampler(teacher, steps[0])

        def remember(noise: Tensor, condition: Condition, guidance: Tensor, samples: range) -> Tensor:
            made.append(best(noise, condition, guidance, samples))
            return made[-1]

        samplers: dict[str, Sampler] = {f"teacher {steps[0]}": remember}
        samplers |= {f"teacher {k}": teacher_sampler(teacher, k) for k in steps[1:]}
        rows = rows_by_steps(measure(judge, protocol, teacher, samplers, teacher.device), timed=True)["teacher"]
        with writing(note.with_suffix(".safetensors")) as part:
            save_file({"x0": torch.cat(made)}, part)
        with writing(note) as part:
            part.write_text(json.dumps(rows, indent=2) + "\n")
    return note


def teacher_note(protocol: Protocol, root: Path) -> Path:
    """Where the teacher's own rows are."""
    return root / f"teacher_{protocol.hash()[:12]}.json"


def measure_solvers(experiments: Experiments, root: Path, display: Display) -> dict[str, dict[str, Any]]:
    """solver -> steps -> scores of the teacher under it, measured once and kept in `root`."""
    protocol, note = replace(EMOJI, n=experiments.pictures), solvers_note(experiments, root)
    kept: dict[str, dict[str, Any]] = known(note)
    settings = load_config(experiments.preset).teacher
    for solver, wanted in experiments.solvers.items():
        counts = [k for k in wanted if str(k) not in kept.get(solver, {})]
        if not counts:
            continue
        display.note(f"measuring the teacher under {solver} at {', '.join(map(str, counts))} steps")
        teacher, judge = load_teacher(settings, "cpu"), load_judge(assets.JUDGE, torch.device("cpu"))
        samplers = {f"teacher {k}": solver_sampler(teacher, solver, k) for k in counts}
        rows = rows_by_steps(measure(judge, protocol, teacher, samplers, teacher.device), timed=True)["teacher"]
        found = {k: scores | {"agreement": None} for k, scores in rows.items()}  # there is no reference here
        kept[solver] = kept.get(solver, {}) | found
        with writing(note) as part:
            part.write_text(json.dumps(kept, indent=2) + "\n")
    return kept


def solvers_note(experiments: Experiments, root: Path) -> Path:
    """Where the scores of the solvers are, which depend on the protocol."""
    return root / f"solvers_{replace(EMOJI, n=experiments.pictures).hash()[:12]}.json"


def known(note: Path) -> dict[str, Any]:
    """What an earlier call left in a file; nothing if there is none."""
    return json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}


def shown_prompts(count: int) -> list[str]:
    """The first prompts of the bundled file in the order of seed 0."""
    prompts = open_prompts(assets.PROMPTS)
    return [prompts.prompt(shuffled_index(i, len(prompts), 0)) for i in range(count)]


def measure_figures(experiments: Experiments, root: Path, display: Display) -> dict[str, Any]:
    """The numbers that the figures are drawn from, measured once and kept in `root`."""
    note = root / FIGURES
    if not note.exists():
        display.note("walking the teacher for the figures")
        config = load_config(experiments.preset)
        teacher = load_teacher(config.teacher, "cpu")
        shown = shown_prompts(experiments.walks)
        guidance = torch.full((len(shown),), teacher.default_guidance)
        numbers = {
            "routes": route_numbers(config.space, teacher.sigma_data),
            "walks": walk_numbers(
                teacher, teacher.encode(shown), guidance, config.space, teacher.black_latent(teacher.latent_shape)
            ),
            "threshold": config.space.filter_threshold,
        }
        root.mkdir(parents=True, exist_ok=True)
        with writing(note) as part:
            part.write_text(json.dumps(numbers) + "\n")
    return known(note)


def plan_equal_time(experiments: Experiments, runs: list[Run], root: Path) -> list[Run]:
    """The runs of the rows that get as long as their table's `equal_time` row takes, by the runs of `plan_timing`.

    The number of steps is worked out once both rows are timed, and kept in `root`; what is counted in steps (the course
    of r) is stretched with it.
    """
    note = root / EQUAL_TIME
    before: dict[str, int] = known(note)
    steps = dict(before)
    found, planned = collect_scores(plan_timing(experiments, runs), root), []
    for run in runs:
        reference = experiments.tables[run.table].equal_time
        if reference is None or run.row == reference:
            continue
        key = f"{run.table}, {run.row}"
        if key not in steps:
            ours, theirs = (found.get(run.table, {}).get(row + TIMED_ROW, []) for row in (run.row, reference))
            sec, reference_sec = mean_sec_per_step(ours), mean_sec_per_step(theirs)
            if sec is None or reference_sec is None:
                continue
            steps[key] = max(1, round(run.config.training.steps * reference_sec / sec))
        given = (PRESET + run.preset, *run.changes, *stretched(run.config, steps[key]))
        planned.append(make_run(experiments, run.table, run.row + EQUAL_TIME_ROW, given))
    if steps != before:
        with writing(note) as part:
            part.write_text(json.dumps(steps, indent=2) + "\n")
    return planned
