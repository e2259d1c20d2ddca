"""The plan, the verdicts, the page, and one whole table at toy size."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.reproduction.figures import FIGURES
from stepfold.reproduction.page import page, write_page
from stepfold.reproduction.runs import (
    SCORES,
    Experiment,
    Experiments,
    collect_scores,
    load_experiments,
    measure_figures,
    measure_solvers,
    plan,
    reproduce,
    seconds_per_step,
    verdict,
)

EXPERIMENTS = load_experiments()


def records(*fds: float) -> list[dict[str, Any]]:
    """Finished runs of a row with these one-step FDs."""
    score = {"accuracy": 0.5, "clip_score": 80.0, "diversity": 0.3, "agreement": 0.4, "images_per_sec": 9.0}
    rows = [{steps: {**score, "fd": fd} for steps in ("1", "2", "4")} for fd in fds]
    return [
        {"student": row, "teacher": {}, "command": "stepfold distill", "sec_per_step": 1.0, "diverged": False}
        for row in rows
    ]


DIVERGED: dict[str, Any] = {"command": "stepfold distill", "diverged": True}


def test_every_row_is_a_valid_run_and_every_claim_names_rows() -> None:
    assert {"T2", "T4", "T5", "T6", "T7", "T8"} <= set(EXPERIMENTS.tables)
    runs = plan(EXPERIMENTS, [], [], Path("folder"))
    assert len(runs) == sum(e.seeds * len(e.rows) for e in EXPERIMENTS.tables.values())
    for experiment in EXPERIMENTS.tables.values():
        assert set(experiment.worst_to_best) | ({experiment.best} - {None}) <= set(experiment.rows)
    for run in runs:
        assert run.config.seed == int(run.changes[-1].removeprefix("seed="))


def test_rows_see_about_equally_many_pairs() -> None:
    for run in plan(EXPERIMENTS, [], [], Path("folder")):
        config = run.config
        kept = config.space.route_steps - (not config.space.keep_first)
        assert 60 <= kept * config.training.prompts_per_step <= 64, run.row
        assert config.training.steps == 240


def test_equal_settings_are_one_run_and_seed_0_comes_first() -> None:
    runs = plan(EXPERIMENTS, ["T4", "T6"], [])
    names = {(run.table, run.row, run.config.seed): run.name for run in runs}
    assert names["T4", "reference", 0] == names["T6", "r_final = 0.75", 0] != names["T4", "reference", 1]
    assert len(set(names.values())) == len(names) - 3
    seeds = [run.config.seed for run in runs]
    assert seeds == sorted(seeds)
    assert plan(EXPERIMENTS, ["T4"], ["training.steps=9"])[0].config.training.steps == 9


def test_rows_that_need_images_wait_for_a_folder() -> None:
    with_images, without = plan(EXPERIMENTS, ["T2"], [], Path("folder")), plan(EXPERIMENTS, ["T2"], [])
    left_out = {run.row for run in with_images} - {run.row for run in without}
    assert left_out == {"sCM over images"}
    assert {run.config.space.images for run in with_images} == {"folder", None}


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(UserError, match=r"no table 'T9'; there are T2, T4"):
        plan(EXPERIMENTS, ["T4", "T9"], [])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({"a": records(3.0, 3.1), "b": records(2.0, 2.1), "c": records(1.0, 1.1)}, "reproduced"),
        ({"a": records(3.0, 3.1), "b": records(1.0, 1.1), "c": records(2.0, 2.1)}, "not reproduced"),
        ({"a": records(3.0, 3.1), "b": records(1.0, 1.1), "c": records(0.9, 1.1)}, "not distinguishable"),
        ({"a": records(3.0, 3.1), "b": records(2.0, 2.1), "c": records(1.0)}, "not run"),
        ({"a": records(3.0, 3.1), "b": records(2.0, 2.1)}, "not run"),
        ({"a": records(3.0, 3.1), "b": records(2.0, 2.1), "c": [*records(1.0), DIVERGED]}, "not run"),
    ],
)
def test_verdicts_follow_the_order_of_a_claim(rows: dict[str, list[dict[str, Any]]], expected: str) -> None:
    every: Any = dict.fromkeys("abc", ())
    claim = Experiment(title="t", claim="c", worst_to_best=("a", "b", "c"), seeds=2, rows=every)
    assert verdict(claim, rows) == expected
    assert verdict(claim.model_copy(update={"worst_to_best": ()}), rows) is None


def test_the_best_row_must_beat_every_other() -> None:
    every: Any = dict.fromkeys("abc", ())
    claim = Experiment(title="t", claim="c", best="b", seeds=2, rows=every)
    assert verdict(claim, {"a": records(3.0, 3.1), "b": records(1.0, 1.1), "c": records(2.0, 2.1)}) == "reproduced"
    assert verdict(claim, {"a": records(3.0, 3.1), "b": records(2.0, 2.1), "c": records(1.0, 1.1)}) == "not reproduced"


def test_the_page_says_what_was_not_run() -> None:
    scores = {"accuracy": 0.5, "clip_score": 80.0, "fd": 0.04, "diversity": 0.3}
    text = page(EXPERIMENTS, {"T4": {"random": records(0.03, 0.05), "reference": []}}, {"heun": {"2": scores}})
    assert "| heun | 2 | 50.0 | 80.0 | 0.0400 | 0.300 |" in text
    assert "random 0.0400 ± 0.0141" in text
    assert "| reference | not run |" in text
    assert "| Sana-Sprint | not run: " in text
    assert len(re.findall(r"^## T\d", text, re.MULTILINE)) == len(EXPERIMENTS.tables)
    assert "| reproduced |" not in text


def test_the_page_says_what_diverged_and_what_was_not_timed() -> None:
    found = {"T4": {"random": [*records(0.03, 0.05), DIVERGED], "logit-normal": [DIVERGED]}}
    for record in found["T4"]["random"]:
        record["sec_per_step"] = None
    text = page(EXPERIMENTS, found, {})
    assert "| not timed | 2, 1 diverged |" in text
    assert "| logit-normal | diverged | | | | | | | 0, 1 diverged |" in text


def test_a_step_costs_what_was_timed() -> None:
    stages = {"teacher": 3.0, "student": 5.0, "preview": 100.0}
    assert seconds_per_step({"stages_sec": stages, "timed_steps": 4}) == 2.0
    assert seconds_per_step({"stages_sec": {}, "timed_steps": 0}) is None


@pytest.mark.slow
def test_a_table_runs_resumes_and_makes_a_page(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    toy: Any = {
        "preset": "reproduce",
        "pictures": 4,
        "solvers": {"dpmsolver++": [2]},
        "walks": 3,
        "tables": {
            "X": {
                "title": "toy", "claim": "none", "seeds": 2, "worst_to_best": ["two", "three"],
                "rows": {
                    "two": ["space.route_steps=2"], "three": ["space.route_steps=3"], "again": ["space.route_steps=3"],
                },
            }
        },
    }  # fmt: skip
    experiments = Experiments.model_validate(toy)
    runs = plan(experiments, [], ["training.steps=1", "training.preview_every=9", "training.precision=no"])[:3]
    reproduce(experiments, runs, tmp_path / "runs", Display())
    assert "run 2/2: X, three, seed=0" in capfd.readouterr().err
    found = collect_scores(runs, tmp_path / "runs")
    assert found["X"]["again"] == found["X"]["three"] != found["X"]["two"]
    record = found["X"]["two"][0]
    assert set(record["student"]) == {"1", "2", "4"} and set(record["teacher"]) == {"20", "4", "2", "1"}
    assert 0 < record["student"]["1"]["agreement"] < 5 and record["sec_per_step"] > 0
    (tmp_path / "runs" / runs[1].name / SCORES).unlink()  # as if killed between its last step and its scores
    reproduce(experiments, runs, tmp_path / "runs", Display(quiet=True))
    again = collect_scores(runs, tmp_path / "runs")["X"]["three"][0]
    assert again["sec_per_step"] is None
    assert again["student"]["1"]["fd"] == found["X"]["three"][0]["student"]["1"]["fd"]
    found = collect_scores(runs, tmp_path / "runs")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob(f"*/{SCORES}")}
    reproduce(experiments, runs, tmp_path / "runs", Display())
    assert "2 different runs, 0 to do" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in written} == written
    solvers = measure_solvers(experiments, tmp_path / "runs", Display())
    assert set(solvers["dpmsolver++"]) == {"2"} and solvers["dpmsolver++"]["2"]["agreement"] is None
    assert measure_solvers(experiments, tmp_path / "runs", Display(quiet=True)) == solvers
    figures = measure_figures(experiments, tmp_path / "runs", Display())
    write_page(experiments, found, solvers, figures, tmp_path / "page" / "paper.md")
    drawn = {file.name for file in (tmp_path / "page" / "figures").iterdir()}
    assert drawn == {f"{name}.{suffix}" for name in FIGURES for suffix in ("svg", "png")}
    assert "| two | 1 |" in (tmp_path / "page" / "paper.md").read_text()
    assert json.loads((tmp_path / "page" / "paper.json").read_text()) == {
        "tables": found,
        "solvers": solvers,
    }
