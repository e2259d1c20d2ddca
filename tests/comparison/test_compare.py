"""What `stepfold compare` runs, for how long, and what its page says; one comparison at toy size."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inside import in_this_process
from typer.testing import CliRunner

from stepfold.cli import app
from stepfold.commands.compare import asked_for, counts, numbers
from stepfold.commands.options import check_page
from stepfold.comparison import rows as planning
from stepfold.comparison.figures import draw_steps, leaders
from stepfold.comparison.page import SEARCHED, minutes_of, page, write_page
from stepfold.comparison.rows import (
    METHODS,
    REFERENCE,
    SEARCH,
    SEARCH_SEED,
    TIMING,
    Budget,
    Comparison,
    Cost,
    check_changes,
    choose_rows,
    load_rows,
    make_run,
    plan_timing,
    scaled,
    searched_name,
    steps_for,
)
from stepfold.comparison.stage import choose_rates, listing, stage_of
from stepfold.comparison.sweep import check_protocol, compare, protocol_of, run_timing
from stepfold.comparison.verdicts import values_at, verdicts
from stepfold.config import load_config, preset_names
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.evaluation.protocol import EMOJI, protocol_record
from stepfold.reproduction.experiments import Run
from stepfold.reproduction.kept import recall
from stepfold.reproduction.records import SCORES
from stepfold.sampling.recipe import NUM_STEPS, trained_steps
from stepfold.sampling.samplers import sampler_of
from stepfold.training.course import step_cost
from stepfold.training.stages import spent_sec

ROWS = load_rows()
TWO = ("demo", "dmd")
MINUTE = Budget("minutes", 1)
DIVERGED: dict[str, Any] = {"command": "stepfold distill", "diverged": True, "steps": 9}


def asked(names: Sequence[str] = TWO, budget: Budget = MINUTE, **changes: Any) -> Comparison:
    """A comparison of some rows."""
    usual: dict[str, Any] = {"seeds": 2, "rates": (), "steps": (1, 2, 4), "pictures": 4}
    return asked_for(list(names), budget, [], **(usual | changes))


def timed(sec: float, pairs: float = 10.0) -> dict[str, Any]:
    """The record of a short run."""
    return {
        "command": "stepfold distill", "diverged": False, "steps": 8, "peak_memory_gib": 1.25,
        "step_cost": {"spent_sec": sec, "pairs": pairs}, "trainable_parameters": 2_500_000,
    }  # fmt: skip


def ended(fd: float, steps: Sequence[int] = (1, 2, 4), **scores: float) -> dict[str, Any]:
    """The record of a run whose student was scored."""
    row = {"accuracy": 0.5, "clip_score": 80.0, "fd": fd, "diversity": 0.3, "agreement": 0.4} | scores
    teacher = {"20": row | {"fd": 0.01, "accuracy": 0.96, "agreement": None}}
    return timed(2.0) | {"steps": 30, "student": {str(k): row for k in steps}, "teacher": teacher}


def write(root: Path, run: Run, record: dict[str, Any]) -> None:
    """Leaves a run as if it had ended."""
    (root / run.name).mkdir(parents=True, exist_ok=True)
    (root / run.name / SCORES).write_text(json.dumps(record))


def test_every_preset_of_the_bundled_teacher_is_a_row_or_says_why_not() -> None:
    ours = {name for name in preset_names() if not name.endswith("-lora-4step")}
    ours = {name for name in ours if name == "lora-4step" or load_config(name).teacher.source == "emoji"}
    rows = {row.preset for row in ROWS.rows.values()}
    assert ours - {"lora-4step"} | {"lora-4step"} == rows | set(ROWS.left_out)
    assert not rows & set(ROWS.left_out) and ROWS.reference in ROWS.rows


def test_every_row_is_a_valid_run_of_any_length_at_equal_guidance() -> None:
    every = asked(())
    for name, row in every.rows.items():
        for steps in (1, 7):
            config = make_run(every, METHODS, name, row, steps, seed=3, rate=0.5).config
            assert (config.training.steps, config.seed, config.space.guidance) == (steps, 3, (3.0,)), name
            assert config.teacher.source == "emoji" and config.teacher.max_tokens == 32
            assert sum(phase.steps for phase in config.training.phases) < steps or steps == 1
            own = load_config(row.preset, (*every.common, *row.changes))
            assert config.optimiser.lr == pytest.approx(own.optimiser.lr / 2)


def test_what_is_counted_in_steps_is_stretched_with_a_run() -> None:
    common = ("training.ema=0.96",)
    config = load_config("rcm", common)
    longer = load_config("rcm", (*common, *scaled(config, 2 * config.training.steps)))
    (before,), (phase,) = config.training.phases, longer.training.phases
    assert phase.steps == 2 * before.steps and phase.set["matching.weight"] == 0
    assert phase.set["consistency.r_warmup"] == 2 * before.set["consistency.r_warmup"]
    assert longer.optimiser.warmup == 2 * config.optimiser.warmup
    assert longer.fake.head_start == 2 * config.fake.head_start and longer.training.ema == pytest.approx(0.98)
    assert longer.consistency.r_cooldown_start == 2 * config.consistency.r_cooldown_start
    rule = ("semigroup.alpha=0.5", "semigroup.alpha_final=0.1", "semigroup.alpha_steps=60", "reward.from_step=90")
    shorter = load_config("shortcut", (*rule, *scaled(load_config("shortcut", rule), 20)))
    assert load_config("shortcut").training.steps == 120
    assert (shorter.semigroup.alpha_steps, shorter.reward.from_step) == (10, 15)
    third = load_config("progressive", scaled(load_config("progressive"), 40)).training
    assert [phase.steps for phase in third.phases] == [10, 10, 10] and third.preview_every == 40
    assert load_config("progressive", scaled(load_config("progressive"), 2)).training.ema == 0


def test_equal_time_and_equal_pairs_give_steps() -> None:
    slow, fast, demo = Cost(3.0, 12), Cost(0.5, 30), Cost(2.0, 72)
    assert [steps_for(Budget("minutes", 5), cost, demo) for cost in (slow, fast)] == [100, 600]
    assert [steps_for(Budget("demo steps", 60), cost, demo) for cost in (slow, fast, demo)] == [40, 240, 60]
    assert [steps_for(Budget("pairs", 3600), cost, demo) for cost in (slow, fast)] == [300, 120]
    assert steps_for(Budget("minutes", 0.001), slow) == 1


def test_runs_follow_from_what_was_timed_and_searched(tmp_path: Path) -> None:
    """The demo's time decides, whether it is compared or not; a quarter of the budget searches, on a seed apart."""
    ask = asked(("dmd",), Budget("demo steps", 60), rates=(0.5, 1.0, 2.0))
    timing = plan_timing(ask)
    assert [(run.row, run.config.training.steps, run.costs) for run in timing] == [
        ("dmd", 16, True), (REFERENCE, 8, True),
    ]  # fmt: skip
    assert timing[0].alone is torch.cuda.is_available()
    assert stage_of(ask, tmp_path).runs == timing
    write(tmp_path, timing[0], timed(3.0))
    assert stage_of(ask, tmp_path).steps == {}
    write(tmp_path, timing[1], timed(2.0))
    stage = stage_of(ask, tmp_path)
    assert stage.steps == {"dmd": 40} and stage.rates == {} and not stage.of(METHODS)
    search = stage.of(SEARCH)
    assert {run.config.training.steps for run in search} == {10} and {run.config.seed for run in search} == {
        SEARCH_SEED
    }
    assert [run.config.optimiser.lr for run in search] == pytest.approx([5e-5, 1e-4, 2e-4])
    assert {run.steps for run in search} == {(4,)}  # what it is made for
    for run, fd in zip(search, (0.5, 0.3, 0.1), strict=True):
        write(tmp_path, run, ended(fd, (4,)) if fd != 0.1 else DIVERGED)
    stage = stage_of(ask, tmp_path)
    assert stage.rates == {"dmd": 1.0}
    methods = stage.of(METHODS)
    assert [(run.config.training.steps, run.config.seed) for run in methods] == [(40, 0), (40, 1)]
    write(tmp_path, search[2], ended(0.1, (4,)))
    assert [run.config.optimiser.lr for run in stage_of(ask, tmp_path).of(METHODS)] == pytest.approx([2e-4] * 2)
    assert len({run.name for run in stage.runs}) == len(stage.runs)


def test_a_rate_is_chosen_once_all_were_tried() -> None:
    ask = asked(("demo",), rates=(0.5, 1.0))
    found = {searched_name("demo", 0.5): [ended(0.2)], searched_name("demo", 1.0): []}
    assert choose_rates(ask, found) == {}
    found[searched_name("demo", 1.0)] = [ended(0.1)]
    assert choose_rates(ask, found) == {"demo": 1.0}
    assert choose_rates(ask, {name: [DIVERGED] for name in found}) == {"demo": 1.0}
    assert choose_rates(replace(ask, rates=()), {}) == {"demo": 1.0}


def test_a_verdict_is_against_the_best_row_of_a_column() -> None:
    values = {"a": [0.1, 0.12, 0.11], "b": [0.11, 0.12, 0.13], "c": [0.3, 0.31, 0.3], "d": [0.05], "e": []}
    told = verdicts({name: of for name, of in values.items() if name != "d"}, "lower")
    assert told == {"a": "best", "b": "not distinguishable from the best", "c": "worse"}
    assert verdicts({name: of for name, of in values.items() if name != "d"}, "higher") == {
        "a": "worse", "b": "worse", "c": "best",
    }  # fmt: skip
    assert verdicts(values, "lower") == dict.fromkeys("abcd", "")  # the best mean has one seed
    assert verdicts({}, "lower") == {}


def test_processor_time_is_not_lengthened_by_waiting() -> None:
    began, clock = spent_sec(torch.device("cpu")), time.perf_counter()
    time.sleep(0.2)
    assert spent_sec(torch.device("cpu")) - began < 0.1 <= time.perf_counter() - clock
    assert step_cost([9.0, 1.0, 3.0], [0.0, 6.0, 6.0]) == {"spent_sec": 2.0, "pairs": 4.0}
    assert step_cost([9.0], [6.0])["spent_sec"] == 9.0


def test_the_page_has_verdicts_costs_and_what_is_missing(tmp_path: Path) -> None:
    ask = asked(("demo", "dmd", "segments", "tbcm"), rates=(1.0, 2.0), pictures=300)
    timing = plan_timing(ask)
    for run in timing:
        write(tmp_path, run, DIVERGED if run.row == "tbcm" else timed(2.0 if run.row == "demo" else 1.0))
    for run in stage_of(ask, tmp_path).of(SEARCH):
        at = {"demo": (1,), "dmd": (4,), "segments": (4,)}[run.row.partition(" x ")[0]]
        write(tmp_path, run, ended(0.2 if run.row.endswith("x 1") else 0.1, at))
    scores = {("demo", 0): 0.10, ("demo", 1): 0.11, ("dmd", 0): 0.3, ("dmd", 1): 0.31}
    for run in stage_of(ask, tmp_path).of(METHODS):
        if fd := scores.get((run.row, run.config.seed)):
            write(tmp_path, run, ended(fd, accuracy=1 - fd))
        elif run.row == "segments":
            write(tmp_path, run, ended(0.2, (4,)) if run.config.seed == 0 else DIVERGED)
    (tmp_path / SEARCHED.replace("*", "0")).write_text(
        json.dumps({"teacher, searched euler": {"2": ended(0.07)["student"]["1"]}})
    )
    stage = stage_of(ask, tmp_path)
    protocol = protocol_of(ask, timing[0].config)
    write_page(ask, stage, protocol, tmp_path, tmp_path / "page" / "methods.md")
    text = (tmp_path / "page" / "methods.md").read_text(encoding="utf-8")
    assert "| demo | 1, 2, 4 | 89.5 ± 0.7 | best | 0.1050 ± 0.0071 | best | 0.300 ± 0.000 | 0.400 ± 0.000 | 2 |" in text
    assert "| dmd | 4 | 69.5 ± 0.7 | worse | 0.3050 ± 0.0071 | worse |" in text
    assert "| segments | 4 | | | | | | | has no times for 1 step |" in text
    assert "| 0.300 | 0.400 | 1, 1 diverged |" in text and "| tbcm | diverged | | | | | | |" in text
    assert "| demo | 2.00 | 10 | 30 | 1.0 ± 0.0 | 1.25 | 2.50 | 0.0008 |" in text  # twice the preset's rate
    assert "| dmd | 1.00 | 10 | 60 | 1.0 ± 0.0 | 1.25 | 2.50 | 0.0002 |" in text
    assert "| demo | 1 | 0.2000 | 0.1000 | x 2, the last that was tried |" in text
    assert "| Euler, even | 20 | 96.0 | 0.0100 | 0.300 |" in text and "| searched euler | 2 | 50.0 | 0.0700 |" in text
    assert "| 1 | FD | demo 0.1050 ± 0.0071 | none |" in text
    assert "for 1 minute a run" in text and "300 images a row" in text and "2 seeds" in text
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1, block
    drawn = {file.name for file in (tmp_path / "page" / "figures").iterdir()}
    assert drawn == {"methods_steps.svg", "methods_diversity.svg", "methods_memory.svg"}
    assert all(f"(figures/{name})" in text for name in drawn)

    elsewhere = tmp_path / "elsewhere"  # another machine, which has the page's numbers and nothing else
    assert recall(tmp_path / "page" / "methods.json", elsewhere, (SEARCHED,)) == len(
        {run.name for run in stage.runs if (tmp_path / run.name / SCORES).exists()}
    )
    assert stage_of(ask, elsewhere) == stage
    write_page(ask, stage, protocol, elsewhere, tmp_path / "page" / "methods.md")
    assert (tmp_path / "page" / "methods.md").read_text(encoding="utf-8") == text


def test_a_page_of_some_rows_keeps_the_numbers_of_the_others(tmp_path: Path) -> None:
    """A page of the demo alone took 36 of 38 runs out of the file beside it."""
    both, one = asked(seeds=1), asked(("demo",), seeds=1)
    for run in plan_timing(both):
        write(tmp_path / "runs", run, timed(1.0))
    for run in stage_of(both, tmp_path / "runs").of(METHODS):
        write(tmp_path / "runs", run, ended(0.1 if run.row == "demo" else 0.2))
    path = tmp_path / "methods.md"
    write_page(both, stage_of(both, tmp_path / "runs"), EMOJI, tmp_path / "runs", path)
    text, before = path.read_text(), json.loads(path.with_suffix(".json").read_text())
    assert len(before["runs"]) == 4 and before["command"] == "compare"

    elsewhere = tmp_path / "elsewhere"
    recall(path.with_suffix(".json"), elsewhere, (SEARCHED,))
    write_page(one, stage_of(one, elsewhere), EMOJI, elsewhere, path)
    assert "| dmd |" not in path.read_text()
    after = json.loads(path.with_suffix(".json").read_text())
    assert after["runs"] == before["runs"] and after["teacher"] == before["teacher"]
    again = tmp_path / "again"
    assert recall(path.with_suffix(".json"), again, (SEARCHED,)) == 4
    write_page(both, stage_of(both, again), EMOJI, again, path)
    assert path.read_text() == text

    (run,) = stage_of(one, again).of(METHODS)  # scored on other images: the dmd's teacher is not this one's
    write(again, run, ended(0.1) | {"teacher": {"20": before["teacher"]["20"] | {"fd": 0.5}}})
    write_page(one, stage_of(one, again), EMOJI, again, path)
    (other,) = (run for run in stage_of(both, again).of(METHODS) if run.row == "dmd")
    recall(path.with_suffix(".json"), tmp_path / "third", (SEARCHED,))
    kept = json.loads((tmp_path / "third" / other.name / SCORES).read_text())
    assert kept["teacher"] == before["teacher"] != json.loads(path.with_suffix(".json").read_text())["teacher"]


def test_the_page_lists_what_is_changed_of_the_presets(tmp_path: Path) -> None:
    changed = asked_for(
        ["demo", "lora-4step"], MINUTE, ["optimiser.lr=1e-5"], seeds=1, rates=(), steps=(1,), pictures=4
    )
    text = page(changed, stage_of(changed, tmp_path), EMOJI, {}, {})
    assert "- demo: `optimiser.lr=1e-5`\n" in text and "the preset's own" not in text
    assert re.search(r"- lora-4step: .*`student.lora=32`.*`optimiser.lr=1e-5`\n", text)
    assert all(f"- `{change}`\n" in text for change in ROWS.common)
    assert "settings of their own" not in page(asked(), stage_of(asked(), tmp_path), EMOJI, {}, {})


@pytest.mark.parametrize("change", ["training.steps=5", "seed=3", "training.checkpoint_every=2"])
def test_what_the_budget_gives_is_no_setting(change: str) -> None:
    """`training.steps=5` was taken: warm-up and average were stretched from it, a hundredfold."""
    with pytest.raises(UserError, match="whose budget and --seeds give"):
        asked_for(["demo"], MINUTE, [change], seeds=1, rates=(), steps=(1,), pictures=4)


@pytest.mark.parametrize("page_file", [".", "", "page.json"])
@pytest.mark.parametrize("command", ["compare", "reproduce"])
def test_a_page_is_a_markdown_file(command: str, page_file: str) -> None:
    with pytest.raises(UserError, match=r"give the name of a .md file"):
        check_page(Path(page_file), command)


def test_a_page_of_another_command_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "page.json").write_text(json.dumps({"command": "compare"}))
    check_page(tmp_path / "page.md", "compare")
    with pytest.raises(UserError, match="is a page of stepfold compare; give another --page"):
        check_page(tmp_path / "page.md", "reproduce")


def test_searched_levels_are_looked_at_before_hours_of_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no file of `stepfold schedule`"):
        compare(
            asked(), tmp_path / "runs", tmp_path / "page.md", Display(quiet=True),
            workers=1, schedule=tmp_path / "nofile.json", page_only=False,
        )  # fmt: skip
    assert not (tmp_path / "runs").exists()


def test_a_page_alone_needs_scores(tmp_path: Path) -> None:
    """A wrong --out wrote a page on which nothing was run."""
    with pytest.raises(UserError, match="holds no scores for a page; give the --out of a comparison"):
        compare(
            asked(), tmp_path / "runs", tmp_path / "page.md", Display(quiet=True),
            workers=1, schedule=None, page_only=True,
        )  # fmt: skip
    assert not (tmp_path / "page.md").exists()


def test_rows_that_lead_somewhere_are_told_apart() -> None:
    rows = {
        name: [ended(fd, accuracy=accuracy)] for name, fd, accuracy in (("a", 3, 0.9), ("b", 2, 0.1), ("c", 1, 0.2))
    }
    assert leaders(rows | {"none": [DIVERGED]}, (1, 4), 1) == ["a", "c"]
    assert leaders(rows, (1, 4), 2) == ["a", "b", "c"] and leaders({}, (1,)) == []
    teacher = {"20": ended(1)["student"]["1"], "4": ended(1)["student"]["1"]}
    drawn = draw_steps(rows, teacher, (1, 4)).axes[0]
    assert [text.get_text() for text in drawn.get_legend().get_texts()] == ["a", "b", "c", "teacher, untrained"]


def test_one_seed_has_no_verdict_and_equal_pairs_show_time(tmp_path: Path) -> None:
    ask = asked(("demo",), Budget("pairs", 300), seeds=1)
    (timing,) = {run.name: run for run in plan_timing(ask)}.values()
    write(tmp_path, timing, timed(2.0))
    (run,) = stage_of(ask, tmp_path).of(METHODS)
    assert run.config.training.steps == 30
    write(tmp_path, run, ended(0.1))
    write_page(ask, stage_of(ask, tmp_path), EMOJI, tmp_path, tmp_path / "methods.md")
    text = (tmp_path / "methods.md").read_text(encoding="utf-8")
    assert "| 1 | FD | demo 0.1000 | one seed: no verdict |" in text and "One seed gives no verdict" in text
    assert "on 300 pairs a run" in text and (tmp_path / "figures" / "methods_time.svg").exists()
    assert minutes_of([ended(0.1), DIVERGED]) == [1.0]
    assert page(ask, stage_of(ask, tmp_path / "none"), EMOJI, {}, {}).count("not run") >= 6


def test_the_plan_says_what_is_left(tmp_path: Path) -> None:
    ask = asked(TWO, Budget("minutes", 30), rates=(1.0, 2.0))
    _, left = listing(ask, tmp_path)
    assert left == 2 * (2 + 2 * 0.25) * 1800
    assert listing(asked(TWO, Budget("demo steps", 60)), tmp_path)[1] is None
    for run in plan_timing(ask):
        write(tmp_path, run, timed(2.0))
    lines, left = listing(ask, tmp_path)
    assert left == 2 * (2 + 2 * 0.25) * 1800 and [line.done for line in lines] == [True] * 2 + [False] * 4
    command = ["compare", "--preset", "demo", "--preset", "dmd", "--minutes", "30", "--rates", "1,2", "--seeds", "2"]
    told = CliRunner().invoke(app, [*command, "--dry-run", "--out", str(tmp_path), "--page", str(tmp_path / "p.md")])
    assert told.exit_code == 0, told.output
    assert "done   timing: demo, seed 0, 8 steps" in told.output
    assert "to do  learning rate: dmd x 2, seed 1000, 225 steps, about 7.5 min" in told.output
    assert "training to do: 2.5 hours of processor time" in told.output or torch.cuda.is_available()


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no row 'dnd'; there are demo, tbcm"):
        choose_rows(ROWS, ["dnd"])
    other = tmp_path / "other.yaml"
    other.write_text("preset: demo\nprompts: a.txt\nteacher: {source: ./my-sana}\n")
    with pytest.raises(UserError, match=r"other.yaml has the teacher './my-sana', but the evaluator knows the bundled"):
        choose_rows(ROWS, [str(other)])
    with pytest.raises(UserError, match=r"--rates '0.5,x' is no list of numbers above 0; for example --rates 0.5,1,2"):
        numbers("--rates", "0.5,x", "0.5,1,2")
    with pytest.raises(UserError, match=r"--steps '1,2.5' is no list of whole numbers"):
        counts("1,2.5")
    assert numbers("--rates", "", "") == () and counts("4,1,1") == (1, 4)
    own = tmp_path / "mine.yaml"
    own.write_text("preset: demo\ntraining: {prompts_per_step: 2}\n")
    assert choose_rows(ROWS, [str(own), "scm-endpoints"])[str(own)].steps == (1, 2, 4)
    assert choose_rows(ROWS, ["demo-4step"])["demo-4step"].steps == (4,)
    for text, steps in (
        ("preset: dmd", (4,)), ("preset: flow-map", (1, 2, 4, 8)), ("preset: guidance", (8,)),
        ("preset: emoji-long", (1, 2, 4)),
        ("preset: dmd\nrollout: {steps: 2}", (2,)), ("preset: demo\nevaluation: {steps: [4, 2]}", (2, 4)),
        (f"preset: {own}", (1, 2, 4)), ("preset: sid\nseed: 3", (1, 2, 4)),
    ):  # fmt: skip
        (file := tmp_path / "built.yaml").write_text(text + "\n")
        assert choose_rows(ROWS, [str(file)])[str(file)].steps == steps, text
    for options, words in (
        (["--minutes", "5", "--pairs", "9"], "three kinds of budget"), (["--minutes", "0"], "--minutes is 0"),
    ):  # fmt: skip
        result = CliRunner().invoke(app, ["compare", *options])
        assert isinstance(result.exception, UserError) and words in str(result.exception)


def test_rows_are_made_for_steps_that_their_students_have_times_for() -> None:
    every = asked(())
    for name, row in every.rows.items():
        config = make_run(every, METHODS, name, row, 40).config
        trained = trained_steps(config)
        assert set(row.steps) <= set(NUM_STEPS[sampler_of(config)]), name
        assert trained is None or trained & {1, 2, 4, 8} == set(row.steps), name


def test_scores_of_another_protocol_are_refused(tmp_path: Path) -> None:
    ask = asked(("demo",), rates=())
    protocol = protocol_of(ask, plan_timing(ask)[0].config)
    assert (protocol.guidance, protocol.teacher_steps, protocol.student_steps) == (3.0, (20, 4, 2, 1), (4, 2, 1))
    write(tmp_path, plan_timing(ask)[0], timed(2.0))
    for run in stage_of(ask, tmp_path).of(METHODS):
        write(tmp_path, run, ended(0.1) | {"protocol": protocol_record(protocol)})
    check_protocol(ask, tmp_path, protocol)
    with pytest.raises(UserError, match=r"holds scores of --n 4 --steps 1,2,4 at guidance scale 3, and others"):
        check_protocol(ask, tmp_path, replace(protocol, n=6))


def test_a_short_run_that_was_interrupted_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps would be those of two processes, or of none."""
    monkeypatch.setattr("stepfold.comparison.sweep.run_all", lambda *args: None)
    first, second = plan_timing(asked())[:2]
    (tmp_path / first.name).mkdir()
    write(tmp_path, second, timed(1.0))
    run_timing([first, second], tmp_path, Display(quiet=True), EMOJI, 1)
    assert not (tmp_path / first.name).exists() and (tmp_path / second.name).exists()


@pytest.mark.long
def test_two_rows_are_compared_to_the_end_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepfold.reproduction.runs.subprocess.run", in_this_process)
    monkeypatch.setattr(planning, "TIMED_STEPS", 1)
    root, file = tmp_path / "runs", tmp_path / "page" / "methods.md"
    command = [
        "compare", "--preset", "demo", "--preset", "dmd", "--pairs", "8", "--seeds", "1", "--n", "4", "--steps", "1,4",
        "--set", "training.prompts_per_step=1", "--set", "space.route_steps=4",
        "--out", str(root), "--page", str(file), "--quiet",
    ]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, (result.output, result.exception)
    kept = json.loads(file.with_suffix(".json").read_text())
    assert {table: set(rows) for table, rows in kept["tables"].items()} == {
        TIMING: set(TWO), METHODS: set(TWO),
    }  # fmt: skip
    demo = kept["runs"][kept["tables"][METHODS]["demo"][0]]
    assert set(demo["student"]) == {"1", "4"} and demo["steps"] == 2 and demo["step_cost"]["pairs"] == 4
    assert 0 < demo["student"]["1"]["agreement"] < 5 and demo["protocol"]["guidance"] == 3.0
    text = file.read_text()
    assert re.search(r"^\| demo \| [0-9.]+ \| 4 \| 2 \| [0-9.]+ \| [0-9.]+ \| 3\.97 \|", text, re.MULTILINE)
    assert "| Euler, even | 20 |" in text
    written = {path: path.stat().st_mtime_ns for path in root.glob(f"*/{SCORES}")}
    (root / kept["tables"][METHODS]["dmd"][0] / SCORES).unlink()  # as if killed between its last step and its scores
    file.with_suffix(".json").unlink()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, (result.output, result.exception)
    again = json.loads(file.with_suffix(".json").read_text())
    redone = kept["tables"][METHODS]["dmd"][0]
    assert again["runs"][redone]["student"]["4"]["fd"] == kept["runs"][redone]["student"]["4"]["fd"]
    same = {path for path, at in written.items() if path.exists() and path.stat().st_mtime_ns == at}
    assert {path.parent.name for path in written.keys() - same} == {redone}
    assert values_at([kept["runs"][redone]], 4, "fd") == values_at([again["runs"][redone]], 4, "fd")


def test_a_row_without_its_images_is_refused() -> None:
    with pytest.raises(UserError, match=r"scm trains on images; give a yaml file with the preset and their folder"):
        choose_rows(load_rows(), ["scm"])


def test_another_teacher_is_refused_by_set_too() -> None:
    """Its images had the bundled evaluator's scores."""
    for change in ("teacher.source=x/y", "prompts=p.txt"):
        with pytest.raises(UserError, match=rf"--set {change.split('=')[0]} is not for compare, whose evaluator knows"):
            check_changes([change])


def test_a_files_own_settings_go_before_those_of_all_rows(tmp_path: Path) -> None:
    """A file with other tokens or precision was trained as if it had not said so, under its own name."""
    (base := tmp_path / "base.yaml").write_text("preset: demo\ntraining: {precision: bf16}\n")
    (mine := tmp_path / "mine.yaml").write_text(f"preset: {base}\nteacher: {{max_tokens: 16}}\n")
    row = choose_rows(ROWS, [str(mine)], ["training.walk_precision=bf16"])[str(mine)]
    config = load_config(row.preset, (*ROWS.common, *row.changes))
    assert (config.teacher.max_tokens, config.training.precision, config.training.walk_precision) == (
        16,
        "bf16",
        "bf16",
    )
    assert config.space.guidance == (3.0,)
    mine.write_text("preset: demo\ntraining: {precision: no}\n")  # a word, though YAML 1.1 has it for false
    row = choose_rows(ROWS, [str(mine)])[str(mine)]
    assert load_config(row.preset, (*ROWS.common, *row.changes)).training.precision == "no"
    for broken in (f"preset: {mine}\n", "- 1\n", "a: [\n"):
        mine.write_text(broken)
        with pytest.raises(UserError, match=r"mine\.yaml"):
            choose_rows(ROWS, [str(mine)])
    mine.write_text("preset: demo\nspace: {guidance: [4.5]}\n")
    with pytest.raises(
        UserError, match=r"space\.guidance is \[4\.5\] in .*mine\.yaml, and a comparison scores all rows"
    ):
        choose_rows(ROWS, [str(mine)])
    choose_rows(ROWS, [str(mine)], ["space.guidance=[4.5]"])
    with pytest.raises(UserError, match="is for a model of yours; the row of the bundled one is lora-4step"):
        choose_rows(ROWS, ["sdxl-lora-4step"])
