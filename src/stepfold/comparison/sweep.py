"""A comparison from the first short run to the page."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from stepfold import assets
from stepfold.comparison.page import SEARCHED, write_page
from stepfold.comparison.rows import SEARCH, Comparison, plan_timing
from stepfold.comparison.stage import stage_of
from stepfold.config import Config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.evaluation.judge import load_judge
from stepfold.evaluation.measure import measure
from stepfold.evaluation.protocol import EMOJI, Protocol, rows_by_steps
from stepfold.levels.record import searched_samplers
from stepfold.reproduction.experiments import Run
from stepfold.reproduction.records import SCORES
from stepfold.reproduction.runs import known, measure_teacher, reference_sampler, run_all
from stepfold.teachers.loading import load_teacher
from stepfold.training.runs import writing

TEACHER_STEPS = 20


def protocol_of(asked: Comparison, config: Config) -> Protocol:
    """Teacher and students at the guidance scale that the students are trained at."""
    steps = tuple(sorted(asked.steps, reverse=True))
    teacher_steps = tuple(sorted({TEACHER_STEPS, *steps}, reverse=True))
    scale = (config.space.guidance or (EMOJI.guidance,))[0]
    return replace(EMOJI, n=asked.pictures, guidance=scale, student_steps=steps, teacher_steps=teacher_steps)


def compare(
    asked: Comparison, root: Path, page: Path, display: Display, *, workers: int, schedule: Path | None, page_only: bool
) -> None:
    """Runs what is asked for and not done, and writes the page, after an interruption too.

    Args:
        asked: what to compare.
        root: the folder of the runs.
        page: where to write.
        display: what the user sees.
        workers: runs at once.
        schedule: levels that `stepfold schedule` found; None for none.
        page_only: run and measure nothing.

    Raises:
        UserError: a run failed, but not by diverging; or the runs in `root` were scored otherwise, or there are none
            for a page alone.
    """
    config = plan_timing(asked)[0].config
    protocol = protocol_of(asked, config)
    check_protocol(asked, root, protocol)
    if page_only and not any((root / run.name / SCORES).exists() for run in stage_of(asked, root).runs):
        raise UserError(f"{root} holds no scores for a page; give the --out of a comparison, or leave out --page-only")
    if schedule:  # looked at before the runs, which take hours
        searched_samplers(schedule, load_teacher(config.teacher, "cpu"), config.teacher, protocol.guidance)
    try:
        if not page_only:
            root.mkdir(parents=True, exist_ok=True)
            run_timing(plan_timing(asked), root, display, protocol, workers)
            run_all(stage_of(asked, root).of(SEARCH), root, display, protocol, workers)
            if schedule:
                measure_searched(schedule, config, protocol, root, display)
            run_all(stage_of(asked, root).runs, root, display, protocol, workers)
    finally:
        write_page(asked, stage_of(asked, root), protocol, root, page)


def check_protocol(asked: Comparison, root: Path, protocol: Protocol) -> None:
    """Scores compare under one protocol only.

    Raises:
        UserError: a run in `root` was scored with other images, sampling steps or guidance.
    """
    for run in stage_of(asked, root).runs:
        scores = known(root / run.name / SCORES).get("protocol")
        if scores and scores["hash"] != protocol.hash():
            steps = ",".join(map(str, sorted(scores["student_steps"])))
            raise UserError(
                f"{root} holds scores of --n {scores['n']} --steps {steps} at guidance scale {scores['guidance']:g}, "
                "and others do not compare with them; give the same, or another --out and --page"
            )


def run_timing(runs: list[Run], root: Path, display: Display, protocol: Protocol, workers: int) -> None:
    """The short runs; one that was interrupted begins again, since its time is that of one process."""
    for run in runs:
        folder = root / run.name
        if folder.exists() and not (folder / SCORES).exists():
            shutil.rmtree(folder)
    run_all(runs, root, display, protocol, workers)


def measure_searched(path: Path, config: Config, protocol: Protocol, root: Path, display: Display) -> None:
    """Scores of the teacher under the levels of a file, measured once and kept in `root`.

    Raises:
        UserError: it is no file of `stepfold schedule`, or of another teacher, guidance scale or size.
    """
    digest = hashlib.sha256(path.read_bytes() + protocol.hash().encode()).hexdigest()[:12]
    note = root / SEARCHED.replace("*", digest)
    if known(note):
        return
    display.note("measuring the teacher under searched levels")
    teacher, judge = load_teacher(config.teacher, "cpu"), load_judge(assets.JUDGE, torch.device("cpu"))
    reference = reference_sampler(measure_teacher(teacher, judge, protocol, root))
    searched = searched_samplers(path, teacher, config.teacher, protocol.guidance)
    rows = rows_by_steps(measure(judge, protocol, teacher, {"teacher 0": reference} | searched, teacher.device))
    found = {who: of_who for who, of_who in rows.items() if who not in ("teacher", "student")}
    with writing(note) as part:
        part.write_text(json.dumps(found, indent=2) + "\n")
