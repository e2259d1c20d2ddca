"""What to run, running it, and what the scores say about a claim."""

import hashlib
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepfold import assets
from stepfold.config import Config, Section, load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.evaluation.judge import Judge, load_judge
from stepfold.evaluation.measure import Sampler, measure, student_sampler, teacher_sampler
from stepfold.evaluation.protocol import EMOJI, Protocol
from stepfold.evaluation.solvers import Solver, solver_sampler
from stepfold.jobs import protocol_record, rows_by_steps, versions
from stepfold.prompts.reading import open_prompts, shuffled_index
from stepfold.reproduction.figures import route_numbers, walk_numbers
from stepfold.spaces.pairs import pairs_per_prompt
from stepfold.teachers.contract import Condition
from stepfold.teachers.loading import load_student, load_teacher
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.training.distill import BESIDE_STEPS
from stepfold.training.runs import read_metrics, writing

SCORES = "scores.json"
IMAGES = "{images}"
PRESET = "preset="
DIVERGED = 3  # exit code of `stepfold distill` after a non-finite loss
EQUAL_TIME = "equal_time.json"
EQUAL_TIME_ROW, TIMED_ROW = ", equal time", ", timed"
TIMED = ("training.steps=12", "training.checkpoint_every=12", "training.preview_every=12", "training.time_stages=true")
"""Settings of a run that is made for its times: these come from short runs one after the other, on a quiet machine."""
Verdict = Literal["reproduced", "not reproduced", "not distinguishable", "not measurable here", "not run"]
Metric = Literal["fd", "sec_per_pair", "peak_memory_gib"]


class Experiment(Section):
    """A table of the page.

    Attributes:
        title: its heading.
        claim: what the paper says.
        worst_to_best: rows in the order that the claim puts them in, if it does.
        best: the row that the claim calls the best, if it does.
        beaten: the rows that `best` is claimed to beat; none means all others.
        by: what the claim compares, less being better: FD at one step (for the paper's FID), seconds or memory.
        costs: whether the table is about time and memory alone; its students are not scored.
        equal_time: the row whose training time all other rows get once more, in runs of their own. What a step of each
            row takes is measured before, see `plan_timing`.
        common: settings of all rows, as `key=value`.
        seeds: runs a row, with seeds 0, 1, ...
        rows: name -> settings that differ from the preset; `preset=NAME` begins with another one.
        not_run: name -> the reason, of rows that cannot be run yet.
    """

    title: str
    claim: str
    worst_to_best: tuple[str, ...] = ()
    best: str | None = None
    beaten: tuple[str, ...] = ()
    by: tuple[Metric, ...] = ("fd",)
    costs: bool = False
    equal_time: str | None = None
    common: tuple[str, ...] = ()
    seeds: int = Field(ge=2)
    rows: dict[str, tuple[str, ...]]
    not_run: dict[str, str] = Field(default={})


class Experiments(Section):
    """All tables.

    Attributes:
        preset: that every row changes, unless it names another one.
        pictures: that a score is made from.
        solvers: solver -> step counts that the untrained teacher is measured at.
        walks: of the teacher, that the figures show.
        tables: name -> table.
    """

    preset: str
    pictures: int = Field(ge=2)
    solvers: dict[Solver, tuple[int, ...]] = Field(default={})
    walks: int = Field(default=128, ge=2)
    tables: dict[str, Experiment]


@dataclass(frozen=True)
class Run:
    """One distillation.

    Attributes:
        table, row: where it belongs.
        preset: that the settings begin with.
        changes: `key=value` strings, the seed's among them.
        config: the whole settings.
        costs: whether only time and memory are wanted.
    """

    table: str
    row: str
    preset: str
    changes: tuple[str, ...]
    config: Config
    costs: bool = False

    @property
    def alone(self) -> bool:
        """Whether its times count, so that nothing may run beside it."""
        return self.costs or self.row.endswith(TIMED_ROW)

    @property
    def name(self) -> str:
        """Of its folder: a hash of the settings that are not the defaults.

        Equal settings run once, whatever table asks for them, and neither a setting that a later version adds nor the
        place of the images changes a name.
        """
        changed = self.config.model_dump(mode="json", exclude_defaults=True)
        if self.config.space.images:
            changed["space"]["images"] = IMAGES
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]


def load_experiments() -> Experiments:
    """The tables that ship with the package."""
    return Experiments.model_validate(
        yaml.safe_load((resources.files("stepfold.reproduction") / "experiments.yaml").read_text(encoding="utf-8"))
    )


def plan(experiments: Experiments, tables: list[str], extra: list[str], images: Path | None = None) -> list[Run]:
    """The runs of some tables, all rows of seed 0 first: an early look at every row.

    Args:
        experiments: see `Experiments`.
        tables: names; none means all.
        extra: settings for every run, as `key=value`.
        images: the folder for rows that need one; without it they are left out.

    Raises:
        UserError: no such table, or a bad setting.
    """
    if unknown := [name for name in tables if name not in experiments.tables]:
        raise UserError(f"no table {unknown[0]!r}; there are {', '.join(experiments.tables)}")
    runs = [
        (seed, table, row, tuple(change.replace(IMAGES, str(images)) for change in changes))
        for table, experiment in experiments.tables.items()
        if table in tables or not tables
        for row, changes in experiment.rows.items()
        if images or not any(IMAGES in change for change in changes)
        for seed in range(experiment.seeds)
    ]
    runs.sort(key=lambda run: run[0])
    return [
        make_run(experiments, table, row, (*changes, *experiments.tables[table].common, *extra, f"seed={seed}"))
        for seed, table, row, changes in runs
    ]


def make_run(experiments: Experiments, table: str, row: str, changes: tuple[str, ...]) -> Run:
    """A run from what its row says."""
    named = [change.removeprefix(PRESET) for change in changes if change.startswith(PRESET)]
    preset, rest = (named or [experiments.preset])[-1], tuple(c for c in changes if not c.startswith(PRESET))
    return Run(table, row, preset, rest, load_config(preset, rest), experiments.tables[table].costs)


def plan_timing(experiments: Experiments, runs: list[Run]) -> list[Run]:
    """Two short runs of every row of the tables that compare at equal time; they show what a step of it takes.

    They are apart from `runs`, which may take days, and share the machine with other work.
    """
    timed = [run for run in runs if experiments.tables[run.table].equal_time and run.config.seed < 2]
    return [
        make_run(experiments, run.table, run.row + TIMED_ROW, (PRESET + run.preset, *run.changes, *TIMED))
        for run in timed
    ]


def plan_equal_time(experiments: Experiments, runs: list[Run], root: Path) -> list[Run]:
    """The runs of the rows that get as long as their table's `equal_time` row takes, by the runs of `plan_timing`.

    The number of steps is worked out once both rows are timed, and kept in `root`; what is counted in steps (the course
    of r) is stretched with it.
    """
    note = root / EQUAL_TIME
    known: dict[str, int] = json.loads(note.read_text()) if note.exists() else {}
    steps = dict(known)
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
    if steps != known:
        with writing(note) as part:
            part.write_text(json.dumps(steps, indent=2) + "\n")
    return planned


def stretched(config: Config, steps: int) -> list[str]:
    """The settings that make a run `steps` long and stretch the course of r with it."""
    c, factor = config.consistency, steps / config.training.steps
    counted = {"r_warmup": c.r_warmup, "r_cooldown_start": c.r_cooldown_start, "r_cooldown_steps": c.r_cooldown_steps}
    return [
        f"training.steps={steps}",
        *(f"consistency.{name}={round(factor * value)}" for name, value in counted.items()),
    ]


def reproduce(runs: list[Run], root: Path, display: Display, pictures: int, workers: int = 1) -> None:
    """Runs what has no scores yet, each as a `stepfold distill` of its own, which continues where a kill left it.

    Scores are made from so many `pictures`. A run that diverges is noted as such and not tried again; the others go on.
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
        measure_teacher(teacher, judge, replace(EMOJI, n=pictures), root)
    cores = torch.get_num_threads()
    for batch, at_once in (([r for r in todo if not r.alone], workers), ([r for r in todo if r.alone], 1)):
        torch.set_num_threads(max(1, cores // at_once))
        try:
            _finish_all(batch, root, display, pictures, at_once)
        finally:
            torch.set_num_threads(cores)


def _finish_all(runs: list[Run], root: Path, display: Display, pictures: int, at_once: int) -> None:
    began = time.perf_counter()
    quiet = display.console.quiet or at_once > 1  # bars of several runs would write over each other

    def one(number: int, run: Run) -> None:
        done = number - at_once
        left = (time.perf_counter() - began) / done * (len(runs) - done) / 60 if done > 0 else None
        told = f", about {left:.0f} min left" if left is not None else ""
        display.note(f"run {number}/{len(runs)}: {run.table}, {run.row}, seed={run.config.seed}{told}")
        finish(run, root, pictures, quiet)

    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(one, number, run) for number, run in enumerate(runs, 1)]
        try:
            for future in as_completed(futures):
                future.result()
        finally:  # after an error or Ctrl-C: what runs ends, what waits is not begun
            pool.shutdown(wait=False, cancel_futures=True)


def finish(run: Run, root: Path, pictures: int, quiet: bool) -> None:
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
        raise UserError(f"stepfold {shlex.join(command)} failed; start `stepfold reproduce` again to continue it")
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
            record |= score(folder / "student", replace(EMOJI, n=pictures), root)
    with writing(folder / SCORES) as part:
        part.write_text(json.dumps(record, indent=2) + "\n")


def costs(folder: Path, config: Config) -> dict[str, Any]:
    """What a finished run took: median seconds a step, mean seconds of its parts; pairs a step; memory.

    The seconds are None if the last process of the run had no step left to do. The median does not see a pause.
    """
    report = json.loads((folder / "report.json").read_text())
    stages = {name: sec for name, sec in report["stages_sec"].items() if name not in BESIDE_STEPS}
    steps, sec = report["timed_steps"], (report["step_sec"] or {}).get("median")
    kept = statistics.mean(row["kept"] for row in read_metrics(folder))
    pairs = (
        kept * config.training.prompts_per_step * pairs_per_prompt(config.space.route_steps, config.space.keep_first)
    )
    return {
        "sec_per_step": sec,
        "sec_per_pair": sec and sec / pairs,
        "stages_sec": {name: sec / steps for name, sec in stages.items()} if steps else None,
        "pairs_per_step": pairs,
        "peak_memory_gib": report["peak_memory_steps_gib"],
    }


def distill_command(run: Run, folder: Path) -> list[str]:
    """The arguments of `stepfold` that repeat a run."""
    changes = [part for change in run.changes for part in ("--set", change)]
    return ["distill", "--preset", run.preset, *changes, "--out", str(folder)]


def score(student_folder: Path, protocol: Protocol, root: Path) -> dict[str, Any]:
    """A student's rows; the agreement is with the teacher's pictures that `measure_teacher` kept in `root`."""
    _, student, card = load_student(student_folder, "cpu")
    config = Config.model_validate(card["config"])
    teacher = load_teacher(config.teacher, "cpu")
    judge = load_judge(assets.JUDGE, torch.device("cpu"))
    note = measure_teacher(teacher, judge, protocol, root)
    reference = load_file(note.with_suffix(".safetensors"))["x0"]
    samplers: dict[str, Sampler] = {
        "teacher 0": lambda noise, condition, guidance, samples: reference[samples.start : samples.stop]
    }
    for k in protocol.student_steps:
        samplers[f"student {k}"] = student_sampler(student, teacher.student_times(k), protocol.seed, teacher.sigma_data)
    rows = rows_by_steps(measure(judge, protocol, teacher, samplers, teacher.device))["student"]
    return {
        "protocol": protocol_record(protocol),
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "student": rows,
        "teacher": json.loads(note.read_text()),
    }


def measure_teacher(teacher: PipelineTeacher, judge: Judge, protocol: Protocol, root: Path) -> Path:
    """The teacher's own rows, measured once: a json file in `root`, and beside it its pictures at the most steps."""
    note = root / f"teacher_{protocol.hash()[:12]}.json"
    if not note.exists():
        steps, made = protocol.teacher_steps, []
        best = teacher_sampler(teacher, steps[0])

        def remember(noise: Tensor, condition: Condition, guidance: Tensor, samples: range) -> Tensor:
            made.append(best(noise, condition, guidance, samples))
            return made[-1]

        samplers: dict[str, Sampler] = {f"teacher {steps[0]}": remember}
        samplers |= {f"teacher {k}": teacher_sampler(teacher, k) for k in steps[1:]}
        rows = rows_by_steps(measure(judge, protocol, teacher, samplers, teacher.device))["teacher"]
        with writing(note.with_suffix(".safetensors")) as part:
            save_file({"x0": torch.cat(made)}, part)
        with writing(note) as part:
            part.write_text(json.dumps(rows, indent=2) + "\n")
    return note


def measure_solvers(experiments: Experiments, root: Path, display: Display) -> dict[str, dict[str, Any]]:
    """solver -> steps -> scores of the teacher under it, measured once and kept in `root`."""
    protocol = replace(EMOJI, n=experiments.pictures)
    note = root / f"solvers_{protocol.hash()[:12]}.json"
    kept: dict[str, dict[str, Any]] = json.loads(note.read_text()) if note.exists() else {}
    settings = load_config(experiments.preset).teacher
    for solver, counts in experiments.solvers.items():
        if solver in kept:
            continue
        display.note(f"measuring the teacher under {solver} at {', '.join(map(str, counts))} steps")
        teacher, judge = load_teacher(settings, "cpu"), load_judge(assets.JUDGE, torch.device("cpu"))
        samplers = {f"teacher {k}": solver_sampler(teacher, solver, k) for k in counts}
        rows = rows_by_steps(measure(judge, protocol, teacher, samplers, teacher.device))["teacher"]
        kept[solver] = {k: scores | {"agreement": None} for k, scores in rows.items()}  # there is no reference here
        with writing(note) as part:
            part.write_text(json.dumps(kept, indent=2) + "\n")
    return kept


def shown_prompts(count: int) -> list[str]:
    """The first prompts of the bundled file in the order of seed 0."""
    prompts = open_prompts(assets.PROMPTS)
    return [prompts.prompt(shuffled_index(i, len(prompts), 0)) for i in range(count)]


def measure_figures(experiments: Experiments, root: Path, display: Display) -> dict[str, Any]:
    """The numbers that the figures are drawn from, measured once and kept in `root`."""
    note = root / "figures.json"
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
    return json.loads(note.read_text())


def collect_scores(runs: list[Run], root: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """table -> row -> the records of its seeds that have ended, well or diverged."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        rows = found.setdefault(run.table, {}).setdefault(run.row, [])
        path = root / run.name / SCORES
        if path.exists():
            rows.append(json.loads(path.read_text()))
    return found


def with_times(rows: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of a table of scores, each with the times of its short runs instead of its own, which are dropped."""
    timed = {row.removesuffix(TIMED_ROW): scored(records) for row, records in rows.items() if row.endswith(TIMED_ROW)}
    shown = {}
    for row, records in rows.items():
        if row.endswith(TIMED_ROW):
            continue
        times = timed.get(row.removesuffix(EQUAL_TIME_ROW), [])
        sec = mean_sec_per_step(times)
        shown[row] = [record | {"sec_per_step": sec} for record in records]
        for record in scored(shown[row]):
            rates = {
                k: statistics.mean(t["student"][k]["images_per_sec"] for t in times) if times else None
                for k in record["student"]
            }
            record["student"] = {k: scores | {"images_per_sec": rates[k]} for k, scores in record["student"].items()}
    return shown


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean, and standard deviation with n - 1; the spread of one value is not known."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def scored(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records that have scores: all but the diverged."""
    return [record for record in records if not record["diverged"]]


def values_of(records: list[dict[str, Any]], metric: Metric) -> list[float]:
    """One value a seed, of those that have one; FD is that of one step."""
    found = [record["student"]["1"]["fd"] if metric == "fd" else record[metric] for record in scored(records)]
    return [value for value in found if value is not None]


def mean_sec_per_step(records: list[dict[str, Any]]) -> float | None:
    """Mean over the seeds that were timed; None if none was."""
    timed = [record["sec_per_step"] for record in scored(records) if record["sec_per_step"] is not None]
    return statistics.mean(timed) if timed else None


def is_less(a: list[float], b: list[float]) -> bool | None:
    """Whether the mean of `a` is below that of `b`; None if they are nearer than twice their standard error."""
    (mean_a, spread_a), (mean_b, spread_b) = mean_and_spread(a), mean_and_spread(b)
    error = math.sqrt(spread_a**2 / len(a) + spread_b**2 / len(b))
    return None if math.isnan(error) or abs(mean_a - mean_b) < 2 * error else mean_a < mean_b


def verdict(experiment: Experiment, rows: dict[str, list[dict[str, Any]]], metric: Metric = "fd") -> Verdict | None:
    """What the seeds say about the claim, in one metric; None if there is no claim.

    `reproduced` if every comparison of the claim comes out as claimed, `not reproduced` if one comes out the other way
    round, `not distinguishable` if one lies within the spread, `not run` if a row has fewer than two seeds with scores.
    """
    if experiment.best:
        beaten = experiment.beaten or [row for row in experiment.rows if row != experiment.best]
        compared = [(experiment.best, row) for row in beaten]
    else:
        order = experiment.worst_to_best
        compared = list(zip(order[1:], order[:-1], strict=True)) if order else []
    if not compared:
        return None
    values = {row: values_of(rows.get(row, []), metric) for pair in compared for row in pair}
    if any(len(of_row) < 2 for of_row in values.values()):
        return "not run"
    answers = [is_less(values[better], values[worse]) for better, worse in compared]
    if False in answers:
        return "not reproduced"
    return "not distinguishable" if None in answers else "reproduced"
