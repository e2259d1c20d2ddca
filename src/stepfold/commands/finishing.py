"""The end of a run: its student, its scores, its report and its card."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepfold import assets

if TYPE_CHECKING:
    from stepfold.commands.distill import Run
    from stepfold.display import Display
    from stepfold.evaluation.protocol import Protocol
    from stepfold.sampling.recipe import Recipe
    from stepfold.teachers.contract import Student
    from stepfold.teachers.pipeline import PipelineTeacher
    from stepfold.training.course import Course


def finish(run: "Run", average: "Student", course: "Course", display: "Display", command: str) -> dict[str, Any]:
    """Writes the student, its scores, the report and the card; returns what is in report.json."""
    from stepfold.evaluation.protocol import EMOJI
    from stepfold.evaluation.report import write_report
    from stepfold.export.pipeline import model_card, save_student
    from stepfold.teachers.loading import load_teacher
    from stepfold.training.processes import is_sharded
    from stepfold.training.runs import writing

    config, teacher, student = run.config, run.teacher, run.folder / "student"
    if is_sharded(teacher.network):
        teacher = load_teacher(config.teacher, run.accelerator.device)  # whole again, to be measured
    card = save_student(teacher, average, student, config, run.recipe, run.prompts.prompt(0))
    steps = tuple(sorted({*(config.evaluation.steps or EMOJI.student_steps)}, reverse=True))
    protocol = replace(EMOJI, n=config.evaluation.n or 2, guidance=run.usual, student_steps=steps)
    scores: dict[str, Any] = {"teacher": {}, "student": {}}
    if config.evaluation.n and config.teacher.source == "emoji":
        with course.stages("evaluation"):
            scores |= measure_student(protocol, teacher, average, run.recipe, display)
        teacher.release_decoder()
    result = report_of(run, course, protocol, scores, command)
    write_report(run.folder, result)
    with writing(student / "README.md") as part:
        part.write_text(model_card(card, result), encoding="utf-8")
    if run.lock:
        run.lock.release()
    return result


def measure_student(
    protocol: "Protocol", teacher: "PipelineTeacher", student: "Student", recipe: "Recipe", display: "Display"
) -> dict[str, Any]:
    """Scores of teacher and student, as report.json has them."""
    from stepfold.evaluation.judge import load_judge
    from stepfold.evaluation.measure import measure_groups, protocol_samplers
    from stepfold.evaluation.protocol import rows_by_steps

    judge = load_judge(assets.JUDGE, teacher.device)
    groups = protocol_samplers(teacher, {"student": (student, recipe)}, protocol)
    with display.measuring({name: protocol.n for group in groups.values() for name in group}) as tick:
        scores = measure_groups(judge, protocol, teacher, groups, teacher.device, tick)
    return {"reals": {"diversity": judge.diversity}} | rows_by_steps(scores)


def report_of(
    run: "Run", course: "Course", protocol: "Protocol", scores: dict[str, Any], command: str
) -> dict[str, Any]:
    """What report.json holds."""
    from stepfold.evaluation.protocol import protocol_record
    from stepfold.evaluation.report import curves_from_rows, versions
    from stepfold.training.runs import read_metrics

    config = run.config
    return {
        "title": f"{run.folder.name}: one-step student of {config.teacher.source}",
        "command": command,
        "versions": versions(),
        "config": config.model_dump(mode="json"),
        "protocol": protocol_record(protocol),
        **scores,
        "prompts": {
            "file": config.space.images or config.prompts or "bundled",
            "count": len(run.prompts),
            "sha256": run.prompts.sha256,
        },
        **course.numbers(),
        "processes": run.processes.count,
        "skipped_steps": sum("skipped" in row for row in read_metrics(run.folder)),
        "curves": curves_from_rows(read_metrics(run.folder)),
        "images": {
            p.stem.replace("_", " "): str(p.relative_to(run.folder))
            for p in first_and_last(sorted((run.folder / "previews").glob("*.png")))
        },
    }


def first_and_last(paths: list[Path]) -> list[Path]:
    """Both ends of a list, or all of a shorter one."""
    return paths[:1] + paths[1:][-1:]
