"""The plan, the verdicts, the page, and one whole table at toy size."""

import json
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import Forked, server
from inside import in_this_process
from typer.testing import CliRunner

from stepfold.cli import app
from stepfold.config import Config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.evaluation.protocol import EMOJI
from stepfold.reproduction.claims import (
    BACKWARD,
    CLAIMS,
    FORWARD,
    Finding,
    diversity_falls,
    encoder_takes_memory,
    noise_drifts,
    pictures_sharpen,
    text_takes_time,
)
from stepfold.reproduction.experiments import Experiment, Experiments, load_experiments, plan, plan_timing
from stepfold.reproduction.figures import WALK_FIGURES
from stepfold.reproduction.kept import recall
from stepfold.reproduction.page import page, write_page
from stepfold.reproduction.pictures import draw_filter_examples, draw_grids
from stepfold.reproduction.records import SCORES, collect_scores, verdict, with_times
from stepfold.reproduction.runs import (
    costs,
    measure_figures,
    measure_solvers,
    plan_equal_time,
    reproduce,
    score,
    solvers_note,
)
from stepfold.reproduction.sweep import sweep

EXPERIMENTS = load_experiments()


def records(*fds: float) -> list[dict[str, Any]]:
    """Finished runs of a row with these one-step FDs."""
    score = {"accuracy": 0.5, "clip_score": 80.0, "diversity": 0.3, "agreement": 0.4, "images_per_sec": 9.0}
    rows = [{steps: {**score, "fd": fd} for steps in ("1", "2", "4")} for fd in fds]
    teacher = {"20": score | {"fd": 0.01}}
    return [cost_record(1.0) | {"student": row, "teacher": teacher, "parameters": 2_500_000} for row in rows]


def cost_record(sec_per_step: float, memory: float = 1.5) -> dict[str, Any]:
    """A finished run of 240 steps of 60 pairs, without scores."""
    return {
        "command": "stepfold distill", "diverged": False, "steps": 240, "sec_per_step": sec_per_step,
        "sec_per_pair": sec_per_step / 60, "pairs_per_step": 60.0, "peak_memory_gib": memory,
        "stages_sec": {"teacher": sec_per_step / 4, "student forward": 3 * sec_per_step / 4},
    }  # fmt: skip


DIVERGED: dict[str, Any] = {"command": "stepfold distill", "diverged": True, "steps": 240}


def test_every_row_is_a_valid_run_and_every_claim_names_rows() -> None:
    assert set(EXPERIMENTS.tables) == {f"T{i}" for i in range(2, 9)}
    runs = plan(EXPERIMENTS, [], [], Path("folder"))
    assert len(runs) == sum(e.seeds * len(e.rows) for e in EXPERIMENTS.tables.values())
    for experiment in EXPERIMENTS.tables.values():
        named = {*experiment.worst_to_best, experiment.best, *experiment.beaten, experiment.equal_time} - {None}
        assert named <= set(experiment.rows)
    for run in runs:
        assert run.config.seed == int(run.changes[-1].removeprefix("seed="))


def test_rows_see_about_equally_many_pairs() -> None:
    for run in plan(EXPERIMENTS, [], [], Path("folder")):
        config = run.config
        if run.table == "T3":  # about time and memory
            continue
        kept = config.space.route_steps - (not config.space.keep_first)
        assert 28 <= kept * config.training.prompts_per_step <= 32, run.row
        assert config.training.steps == 120


def test_equal_settings_are_one_run_and_seed_0_comes_first() -> None:
    runs = plan(EXPERIMENTS, ["T4", "T6"], [])
    names = {(run.table, run.row, run.config.seed): run.name for run in runs}
    assert names["T4", "reference", 0] == names["T6", "r_final = 0.75", 0] != names["T4", "reference", 1]
    assert len(set(names.values())) == len(names) - 3
    seeds = [run.config.seed for run in runs]
    assert seeds == sorted(seeds)
    assert plan(EXPERIMENTS, ["T4"], ["training.steps=9"])[0].config.training.steps == 9


class LaterConfig(Config):
    """As a version with one more setting would read it."""

    added_later: int = 1


def test_a_setting_of_a_later_version_changes_no_name() -> None:
    """A sweep of days goes on after an update."""
    for run in plan(EXPERIMENTS, ["T4"], []):
        later = LaterConfig.model_validate(run.config.model_dump())
        assert replace(run, config=later).name == run.name
        assert replace(run, config=later.model_copy(update={"added_later": 2})).name != run.name


def test_rows_that_need_images_wait_for_a_folder() -> None:
    with_images, without = plan(EXPERIMENTS, ["T2"], [], Path("folder")), plan(EXPERIMENTS, ["T2"], [])
    left_out = {run.row for run in with_images} - {run.row for run in without}
    assert left_out == {"sCM over images", "Sana-Sprint"}
    assert {run.config.space.images for run in with_images} == {"folder", None}
    elsewhere = plan(EXPERIMENTS, ["T2"], [], Path("another/folder"))
    assert [run.name for run in elsewhere] == [run.name for run in with_images]  # the same runs
    assert elsewhere[0].config != elsewhere[3].config


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(UserError, match=r"no table 'T9'; there are T2, T3, T4"):
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
    of_one = claim.model_copy(update={"beaten": ("a",)})
    assert verdict(of_one, {"a": records(3.0, 3.1), "b": records(2.0, 2.1), "c": records(1.0, 1.1)}) == "reproduced"


def test_the_page_says_what_was_not_run() -> None:
    scores = {"accuracy": 0.5, "clip_score": 80.0, "fd": 0.04, "diversity": 0.3}
    text = page(EXPERIMENTS, {"T4": {"random": records(0.03, 0.05), "reference": []}}, {"heun": {"2": scores}})
    assert "| heun | 2 | 50.0 | 80.0 | 0.0400 | 0.300 |" in text
    assert "random 0.0400 ± 0.0141" in text
    assert re.search(r"^\| reference \|[ |]+ not run \|$", text, re.MULTILINE)
    assert len(re.findall(r"^## T\d", text, re.MULTILINE)) == len(EXPERIMENTS.tables)
    assert "| reproduced |" not in text
    assert "1 not measurable here" in text and "not run" in text


def test_claims_beside_the_tables_are_judged_by_their_numbers() -> None:
    walks = {
        "t": [1.5, 1.0, 0.5],
        FORWARD: [1.0, 1.0, 1.0],
        BACKWARD: [1.0, 0.9, 0.7],
        "picture_error": [3.0, 1.0, 0.1],
    }
    figures = {"walks": {"schemes": {"reference": walks}, "darkness": [1.0, 2.0]}}
    assert _verdict(noise_drifts, figures, {}) == _verdict(pictures_sharpen, figures, {}) == "reproduced"
    walks |= {BACKWARD: [1.0, 1.0, 1.0], "picture_error": [3.0, 0.1, 1.0]}
    assert _verdict(noise_drifts, figures, {}) == _verdict(pictures_sharpen, figures, {}) == "not reproduced"

    images, cached = "sCM over images", "sCM over images, latents encoded before"
    costly = {"T3": {images: [cost_record(1.0, 5.0)], cached: [cost_record(1.0, 1.0)], "TBCM": [cost_record(1.0)]}}
    assert _verdict(encoder_takes_memory, {}, costly) == "reproduced"
    costly["T3"][cached] = [cost_record(1.0, 4.9)]
    assert _verdict(encoder_takes_memory, {}, costly) == _verdict(text_takes_time, {}, costly) == "not reproduced"
    costly["T3"][images][0]["stages_sec"]["text"] = 1.0
    assert _verdict(text_takes_time, {}, costly) == "reproduced"

    students = records(0.1, 0.1)  # of diversity 0.3
    for teacher, expected in ((0.4, "reproduced"), (0.2, "not reproduced")):
        for record in students:
            record["teacher"] = {"20": {"diversity": teacher}}
        assert _verdict(diversity_falls, {}, {"T2": {"TBCM": students}}) == expected
    for examine in CLAIMS.values():
        assert (examine({}, {}) or Finding("", "not run")).verdict in ("not run", "not measurable here")


def _verdict(examine: Any, figures: dict[str, Any], tables: Any) -> str:
    finding = examine(figures, tables)
    assert finding is not None
    return finding.verdict


def test_the_page_says_what_diverged_and_what_was_not_timed() -> None:
    found = {"T4": {"random": [*records(0.03, 0.05), DIVERGED], "logit-normal": [DIVERGED]}}
    for record in found["T4"]["random"]:
        record["sec_per_step"] = None
    text = page(EXPERIMENTS, found, {})
    assert "| not timed | 240 | 2.50 | 2, 1 diverged |" in text
    assert re.search(r"^\| logit-normal \|[ |]+ 0, 1 diverged \|$", text, re.MULTILINE)


def test_every_row_of_a_table_has_as_many_cells_as_its_head() -> None:
    found = {
        "T2": {"TBCM": records(0.03, 0.05), "sCM over images": [DIVERGED], "Sana-Sprint, equal time": records(0.1)},
        "T3": {"TBCM": [cost_record(0.5)], "sCM over images": [cost_record(1.0), DIVERGED]},
    }
    for block in page(EXPERIMENTS, found, {"heun": {}}).split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1, block


def test_costs_are_ratios_to_the_first_row_of_as_many_pairs() -> None:
    fast, slow = [cost_record(0.5, 1.0), cost_record(0.6, 1.0)], [cost_record(1.0, 2.0), cost_record(1.1, 2.0)]
    text = page(EXPERIMENTS, {"T3": {"TBCM": fast, "sCM over images": slow}}, {})
    assert "| sCM over images | 60 | 17.5 ± 1.2 | 1.00 | 1050 ± 71 | 2.00 ± 0.00 | 1.00 | 262 | 788 | 2 |" in text
    assert "| TBCM | 60 | 9.2 ± 1.2 | 0.52 | 550 ± 71 | 1.00 ± 0.00 | 0.50 | 138 | 412 | 2 |" in text
    claims = [line for line in text.splitlines() if line.startswith("| [T3]")]
    assert [line.split("|")[-2].strip() for line in claims] == ["reproduced", "reproduced"]
    assert "TBCM takes 48% less" in claims[0] and "TBCM takes 50% less" in claims[1]
    little = [cost_record(0.95, 1.9), cost_record(0.96, 1.9)]  # less, but not as the paper says
    text = page(EXPERIMENTS, {"T3": {"TBCM": little, "sCM over images": slow}}, {})
    assert text.count("% less | not reproduced |") == 2
    assert "milliseconds a pair: " in claims[0] and "GiB at most while training: " in claims[1]


def test_a_step_costs_what_was_timed(tmp_path: Path) -> None:
    run = plan(EXPERIMENTS, ["T4"], [])[0]
    stages = {"teacher": 3.0, "student forward": 5.0, "preview": 100.0}
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "kept": 1.0}\n{"step": 1, "kept": 0.5}\n')
    for timed_steps, step_sec in ((4, {"first": 9.0, "median": 2.0}), (0, None)):
        expected = step_sec and step_sec["median"]
        report = {
            "stages_sec": stages,
            "timed_steps": timed_steps,
            "step_sec": step_sec,
            "peak_memory_gib": 9.0,
            "peak_memory_steps_gib": 1.25,
        }
        (tmp_path / "report.json").write_text(json.dumps(report))
        found = costs(tmp_path, run.config)
        assert (found["sec_per_step"], found["peak_memory_gib"]) == (expected, 1.25)
        assert found["pairs_per_step"] == 22.5  # a quarter of 30 was filtered out
        assert found["sec_per_pair"] == (expected and expected / 22.5)


def test_equal_time_follows_from_what_steps_took_and_stays(tmp_path: Path) -> None:
    """Half as fast a row gets half the steps, and the course of r with them."""
    runs = plan(EXPERIMENTS, ["T5"], [])
    timing = plan_timing(EXPERIMENTS, runs)
    assert {run.row for run in timing} == {f"N = {n}, timed" for n in (4, 8, 16, 32)}
    assert all(run.alone and run.costs == (run.config.seed > 0) for run in timing)
    assert plan_equal_time(EXPERIMENTS, runs, tmp_path) == []
    for run in timing:
        assert run.config.training.steps == 12 and run.config.training.time_stages
        (tmp_path / run.name).mkdir()
        took = 2.0 if run.row == "N = 4, timed" else 1.0
        (tmp_path / run.name / SCORES).write_text(json.dumps(cost_record(took)))
    extra = plan_equal_time(EXPERIMENTS, runs, tmp_path)
    assert {run.row for run in extra} == {f"N = {n}, equal time" for n in (4, 8, 32)}
    slow = next(run for run in extra if run.row == "N = 4, equal time")
    whole = next(run for run in runs if run.row == "N = 4")
    assert slow.config.training.steps == 60 and slow.config.space == whole.config.space
    r, of_whole = slow.config.consistency, whole.config.consistency
    assert (r.r_warmup, r.r_cooldown_start) == (of_whole.r_warmup / 2, of_whole.r_cooldown_start / 2)
    for run in timing:
        (tmp_path / run.name / SCORES).write_text(json.dumps(cost_record(3.0)))  # measured again, on another day
    assert [run.name for run in plan_equal_time(EXPERIMENTS, runs, tmp_path)] == [run.name for run in extra]


def test_times_are_those_of_the_short_runs() -> None:
    """What a long run took beside other work is not shown."""
    rows = {"TBCM": records(0.2), "TBCM, equal time": records(0.1), "other": records(0.3)}
    short = records(9.0)[0] | {"sec_per_step": 0.25}
    short["student"] = {k: scores | {"images_per_sec": 70.0} for k, scores in short["student"].items()}
    unscored = {name: value for name, value in short.items() if name != "student"}
    shown = with_times(rows | {"TBCM, timed": [short, unscored]})
    assert list(shown) == list(rows)
    assert [shown[row][0]["sec_per_step"] for row in rows] == [0.25, 0.25, None]
    assert [shown[row][0]["student"]["1"]["images_per_sec"] for row in rows] == [70.0, 70.0, None]
    assert shown["TBCM"][0]["student"]["1"]["fd"] == 0.2 and rows["TBCM"][0]["sec_per_step"] == 1.0
    text = page(EXPERIMENTS, {"T2": shown}, {})
    assert "| TBCM | 1 | 50.0 | 80.0 | 0.2000 | 0.300 | 0.400 | 70 | 0.25 | 240 | 2.50 | 1 |" in text
    assert "| not timed | not timed | 240 | 2.50 | 1 |" in text


def test_a_claim_is_judged_at_equal_pairs_and_at_equal_time() -> None:
    rows = {"sCM over images": records(0.2, 0.21), "Sana-Sprint": records(0.15, 0.16), "TBCM": records(0.1, 0.11)}
    rows |= {"sCM over images, equal time": records(0.05, 0.06)}
    text = page(EXPERIMENTS, {"T2": rows}, {})
    assert "| at equal pairs: reproduced; at equal time: not reproduced |" in text


@pytest.mark.long
def test_a_table_runs_resumes_and_makes_a_page(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepfold.reproduction.runs.subprocess.run", in_this_process)
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
    reproduce(runs, tmp_path / "runs", Display(), 4)
    assert "run 2/2: X, three, seed=0" in capfd.readouterr().err
    found = collect_scores(runs, tmp_path / "runs")
    assert found["X"]["again"] == found["X"]["three"] != found["X"]["two"]
    record = found["X"]["two"][0]
    assert set(record["student"]) == {"1", "2", "4"} and set(record["teacher"]) == {"20", "4", "2", "1"}
    assert 0 < record["student"]["1"]["agreement"] < 5 and record["sec_per_step"] > 0
    (tmp_path / "runs" / runs[1].name / SCORES).unlink()  # as if killed between its last step and its scores
    reproduce(runs, tmp_path / "runs", Display(quiet=True), 4)
    again = collect_scores(runs, tmp_path / "runs")["X"]["three"][0]
    assert again["sec_per_step"] is None
    assert again["student"]["1"]["fd"] == found["X"]["three"][0]["student"]["1"]["fd"]
    found = collect_scores(runs, tmp_path / "runs")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob(f"*/{SCORES}")}
    reproduce(runs, tmp_path / "runs", Display(), 4)
    assert "2 different runs, 0 to do" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in written} == written
    solvers = measure_solvers(experiments, tmp_path / "runs", Display())
    assert set(solvers["dpmsolver++"]) == {"2"} and solvers["dpmsolver++"]["2"]["agreement"] is None
    assert measure_solvers(experiments, tmp_path / "runs", Display(quiet=True)) == solvers
    more = experiments.model_copy(update={"solvers": {"dpmsolver++": (1, 2)}})
    assert (
        measure_solvers(more, tmp_path / "runs", Display(quiet=True))["dpmsolver++"].items()
        > solvers["dpmsolver++"].items()
    )
    solvers_note(experiments, tmp_path / "runs").write_text(json.dumps(solvers))
    figures = measure_figures(experiments, tmp_path / "runs", Display())
    draw_grids(experiments, runs, tmp_path / "page" / "figures", tmp_path / "runs", Display())
    draw_filter_examples(experiments, tmp_path / "page" / "figures", Display())
    write_page(experiments, runs, tmp_path / "runs", tmp_path / "page" / "paper.md")
    drawn = {file.name for file in (tmp_path / "page" / "figures").iterdir()}
    grids = {f"grid_methods_at_{steps}.png" for steps in ("1_step", "2_steps", "4_steps")}
    grids |= {"grid_the_brightness_filter.png"}
    assert drawn == grids | {f"{name}.{suffix}" for name in WALK_FIGURES for suffix in ("svg", "png")}
    text = (tmp_path / "page" / "paper.md").read_text()
    assert all(f"(figures/{name})" in text for name in drawn if not name.endswith(".png") or name in grids)
    assert "| two | 1 |" in (tmp_path / "page" / "paper.md").read_text()

    elsewhere = tmp_path / "elsewhere"  # another machine, which has the page's numbers and nothing else
    assert recall(tmp_path / "page" / "paper.json", elsewhere) == 2
    assert collect_scores(runs, elsewhere) == found
    assert measure_solvers(experiments, elsewhere, Display()) == solvers
    assert measure_figures(experiments, elsewhere, Display()) == figures
    grid = tmp_path / "page" / "figures" / "grid_methods_at_1_step.png"
    drawn_at = grid.stat().st_mtime_ns
    draw_grids(experiments, runs, grid.parent, elsewhere, Display())  # without the students
    assert grid.stat().st_mtime_ns == drawn_at
    write_page(experiments, runs, elsewhere, tmp_path / "page" / "paper.md")
    assert (tmp_path / "page" / "paper.md").read_text() == text
    assert recall(tmp_path / "page" / "paper.json", tmp_path / "runs") == 0


def test_another_number_of_steps_stretches_r_and_is_named() -> None:
    """The page said 120 steps of runs of 500, and the course of r ended after a quarter of them."""
    few, many = (plan(EXPERIMENTS, ["T7"], extra) for extra in ([], ["training.steps=480"]))
    assert {run.config.training.steps for run in many} == {480}
    for before, after in zip(few, many, strict=True):
        assert after.config.consistency.r_warmup == 4 * before.config.consistency.r_warmup
    text = page(EXPERIMENTS, {}, {}, extra=["training.steps=480"])
    assert "(480 steps of 28 to 32), all with `training.steps=480`, and is measured" in text
    assert "(120 steps of 28 to 32) and is measured" in page(EXPERIMENTS, {}, {})
    own = plan(EXPERIMENTS, ["T7"], ["training.steps=480", "consistency.r_warmup=7"])
    assert {run.config.consistency.r_warmup for run in own} == {7}


def test_a_page_without_images_shows_the_rows_that_needed_some(tmp_path: Path) -> None:
    (run,) = [run for run in plan(EXPERIMENTS, [], [], tmp_path) if run.config.space.images and run.config.seed == 0][
        :1
    ]
    (tmp_path / "runs" / run.name).mkdir(parents=True)
    record = {"command": "c", "diverged": True, "steps": 3}
    (tmp_path / "runs" / run.name / SCORES).write_text(json.dumps(record))
    for _ in range(2):
        sweep(
            EXPERIMENTS, [], tmp_path / "runs", tmp_path / "paper.md", Display(quiet=True),
            workers=1, extra=[], images=None, page_only=True,
        )  # fmt: skip
        assert json.loads((tmp_path / "paper.json").read_text())["runs"] == {run.name: record}


@pytest.mark.long
def test_workers_share_the_runs_and_times_are_taken_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["training.steps=1", "training.preview_every=9", "space.route_steps=2", "training.prompts_per_step=1"]
    together = plan(EXPERIMENTS, ["T4"], common)[:2]
    alone = [replace(run, costs=True) for run in plan(EXPERIMENTS, ["T6"], common)[:1]]
    cores = torch.get_num_threads()
    threads: list[int] = []
    server()  # here, since workers are threads

    def watched(command: list[str], *, env: dict[str, str], **rest: Any) -> subprocess.CompletedProcess[bytes]:
        threads.append(int(env["OMP_NUM_THREADS"]))
        log = tmp_path / f"{len(threads)}.log"
        code, words = Forked(command[command.index("stepfold") + 1 :], log).finish()
        assert code == 0, words
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr("stepfold.reproduction.runs.subprocess.run", watched)
    reproduce([*alone, *together], tmp_path, Display(), 2, workers=2)
    assert threads == [max(1, cores // 2)] * 2 + [cores] and torch.get_num_threads() == cores
    told = capfd.readouterr().err
    assert "run 2/2: T4, " in told and "run 1/1: T6, r_final = 0.25" in told
    found = collect_scores([*alone, *together], tmp_path)
    assert "student" not in found["T6"]["r_final = 0.25"][0]
    assert all(len(rows) == 1 and "student" in rows[0] for rows in found["T4"].values())


@pytest.mark.long
def test_a_run_that_fails_stops_the_others_and_is_named(tmp_path: Path) -> None:
    runs = plan(EXPERIMENTS, ["T4"], [])[:3]
    (tmp_path / runs[0].name).write_text("in the way")
    with pytest.raises(UserError, match=r"stepfold distill --preset reproduce --set space.route=random .* failed"):
        reproduce(runs[:1], tmp_path, Display(quiet=True), 2)


@pytest.mark.parametrize(
    "damage",
    [
        "[]", "{", '{"runs": {}, "notes": {}}', '{"teacher": null, "runs": {"../up": {}}, "notes": {}}',
        '{"teacher": null, "runs": {}, "notes": {"../figures.json": {}}}',
        '{"teacher": null, "runs": {}, "notes": {"other.json": {}}}',
        '{"teacher": null, "runs": {"a": 1}, "notes": {}}',
    ],
)  # fmt: skip
def test_a_file_that_holds_no_sweep_is_refused(tmp_path: Path, damage: str) -> None:
    (tmp_path / "paper.json").write_text(damage)
    with pytest.raises(UserError, match=r"paper\.json holds no numbers of a sweep"):
        recall(tmp_path / "paper.json", tmp_path / "runs" / "here")
    assert not (tmp_path / "runs").exists()
    assert recall(tmp_path / "nothing.json", tmp_path / "runs") == 0


def test_a_page_of_what_is_known_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepfold.reproduction.runs.subprocess.run", None)
    known = plan(EXPERIMENTS, ["T4"], [])[:3]
    for run, record in zip(known, records(0.3, 0.2, 0.1), strict=True):
        (tmp_path / "runs" / run.name).mkdir(parents=True)
        (tmp_path / "runs" / run.name / SCORES).write_text(json.dumps(record))
    command = ["reproduce", "--page-only", "--out", str(tmp_path / "runs"), "--page", str(tmp_path / "paper.md")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "paper.md").read_text()
    assert "random 0.3000; logit-normal 0.2000; reference 0.1000" in text
    kept = json.loads((tmp_path / "paper.json").read_text())
    assert set(kept["runs"]) == {run.name for run in known} and kept["tables"]["T4"]["random"] == [known[0].name]
    assert kept["tables"]["T6"]["r_final = 0.75"] == [known[2].name]
    listed = CliRunner().invoke(app, [*command[:1], *command[4:], "--out", str(tmp_path / "elsewhere"), "--dry-run"])
    assert listed.output.count("done   ") == 8  # T4's three, and the reference route in five more tables


def test_workers_load_models_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once took each other's defaults, and a teacher was left without numbers ("Cannot copy out of meta")."""
    loading, most = [0], [0]

    def slow(*args: Any) -> tuple[None, None, SimpleNamespace]:
        loading[0] += 1
        most[0] = max(most[0], loading[0])
        time.sleep(0.05)
        loading[0] -= 1
        return None, None, SimpleNamespace(teacher_settings=lambda: None)

    for name in ("load_student", "load_teacher", "load_judge"):
        monkeypatch.setattr(f"stepfold.reproduction.runs.{name}", slow)
    monkeypatch.setattr("stepfold.reproduction.runs.measure_teacher", lambda *args: tmp_path / "none.json")
    with ThreadPoolExecutor(3) as pool:
        ended = [pool.submit(score, tmp_path, EMOJI, tmp_path) for _ in range(3)]
    assert all(isinstance(future.exception(), FileNotFoundError) for future in ended)  # after loading
    assert most == [1]


@pytest.mark.parametrize(
    ("extra", "tables", "said"),
    [
        ("seed=4", [], r"--set seed is not for reproduce, whose tables have seeds"),
        ("space.route=random", ["T4"], r"--set space\.route is what the rows of T4 differ in \(row random\)"),
    ],
)
def test_what_rows_and_seeds_set_is_refused(extra: str, tables: list[str], said: str) -> None:
    """A page said "all with seed=4" of runs of other seeds; three equal rows had a verdict on their order."""
    with pytest.raises(UserError, match=said):
        plan(load_experiments(), tables, [extra])
    assert plan(load_experiments(), ["T5"], ["space.route=random"])
