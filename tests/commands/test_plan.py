"""The plan is the run's own first steps, reckoned up."""

import time
from pathlib import Path
from typing import Any

import pytest
from forms import cases

from stepfold.commands.plan import evaluation_prompts, make_plan, plan_rows, reckon
from stepfold.config import Config, load_config
from stepfold.display import Display
from stepfold.jobs.distilling import run_distill
from stepfold.students.sana import SanaStudent
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.training.course import step_times


def test_the_parts_add_up() -> None:
    config = load_config("demo", ["training.steps=250", "training.preview_every=100", "training.checkpoint_every=50"])
    trial = load_config("demo", ["evaluation.n=50"])
    stages = {"load": 3.0, "first preview": 2.0, "preview": 1.5, "checkpoint": 0.5, "evaluation": 4.0, "teacher": 99.0}
    result: dict[str, Any] = {
        "stages_sec": stages,
        "step_sec": {"first": 60.0, "again": 7.0, "median": 2.0, "mean": 9.0},
        "timed_steps": 12,
        "tangent": "one_pass (as set)",
        "peak_memory_gib": 1.25,
        "device": "NVIDIA H200",
        "protocol": {"n": 50},
        "prompts": {"count": 6000},
    }
    plan = reckon(config, trial, result)
    assert plan.parts_sec == {
        "start": 3 + 2 + 58,
        "steps": 500,
        "previews": 3 * 1.5,  # after 100, 200 and 250
        "checkpoints": 5 * 0.5,
        "evaluation": 10 * 4.0,
    }
    assert plan.total_sec == sum(plan.parts_sec.values()) and plan.peak_memory_gib == 1.25
    assert {name: how for name, _, how in plan_rows(plan)} == {
        "tangent": "",
        "one step": "measured on NVIDIA H200, 12 steps",
        "start": "measured on NVIDIA H200",
        "250 steps": "counted",
        "previews": "counted",
        "checkpoints": "counted",
        "evaluation": "counted",
        "in all": "counted",
        "peak memory": "measured on NVIDIA H200",
    }


def test_a_trial_is_no_run_of_a_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was one more run, `trial-1a2b3c4d`, in the user's project."""
    seen: list[Config] = []
    monkeypatch.setattr("stepfold.commands.plan.run_distill", lambda config, *_, **__: seen.append(config))
    monkeypatch.setattr("stepfold.commands.plan.reckon", lambda *_: None)
    make_plan(load_config("demo", ["training.trackers=[wandb]"]), 2, Display(quiet=True))
    assert seen[0].training.trackers == () and seen[0].training.steps == 2


@pytest.mark.parametrize(("source", "count", "prompts"), [("emoji", 6000, 500), ("x", 6000, 64), ("x", 40, 40)])
def test_evaluation_is_of_as_many_prompts_as_the_run_will_sample(
    source: str, count: int, prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another teacher's is of at most 64 prompts, whatever `evaluation.n` says."""
    monkeypatch.setattr("stepfold.evaluation.latents.NUM_PROMPTS", 64)
    config = load_config("demo", [f"teacher.source={source}", "prompts=p.txt"])
    assert config.evaluation.n == 500 and evaluation_prompts(config, count) == prompts


def test_a_plan_of_matching_times_whole_turns_and_no_head_start(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("stepfold.commands.plan.run_distill", lambda config, *args, **options: given.append(config))
    monkeypatch.setattr("stepfold.commands.plan.reckon", lambda *args: None)
    for preset, steps in (("dmd", 1 + 4), ("sid", 1 + 16), ("rcm", 1 + 16)):
        make_plan(load_config(preset), 2, Display(quiet=True))
        assert given[-1].training.steps == steps and given[-1].fake.head_start == 0 and given[-1].training.phases == ()
        assert given[-1].fake.updates == load_config(preset).fake.updates > 0


@pytest.mark.parametrize("n", cases([0, 4], short=[0]))
def test_a_plan_leaves_nothing_behind(n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    config = load_config(
        "demo",
        [
            f"evaluation.n={n}", "training.steps=40", "training.prompts_per_step=1", "space.route_steps=3",
            "training.precision=no", "training.walk_precision=no", "objective=continuous",
            "optimiser.warmup=9",
        ],
    )  # fmt: skip
    notes: list[str] = []
    display = Display(quiet=True)
    monkeypatch.setattr(display, "note", notes.append)
    plan = make_plan(config, 3, display)
    assert [note[:25] for note in notes if "r_warmup" in note] == [
        "r ends at 0.65 after 40 s"
    ]  # of the run, not of the trial
    assert [note for note in notes if "optimiser.warmup" in note] == [
        "the learning rate rises during 9 of 40 steps (optimiser.warmup); for this run take --set optimiser.warmup=4"
    ]
    assert plan.trial_steps == 3 and plan.step_sec > 0 and plan.device == "cpu" and plan.tangent.startswith("one_pass")
    assert (plan.parts_sec["evaluation"] > 0) == bool(n)
    assert plan.total_sec >= 40 * plan.step_sec
    assert list(tmp_path.glob("stepfold*")) == []
    assert len(plan_rows(plan)) == 4 + len(plan.parts_sec)


@pytest.mark.parametrize(
    ("sec", "cycle", "again", "mean"),
    [
        ([9.0, 2.0, 2.0, 2.0], 1, 2.0, 2.0),
        ([9.0, 1.0, 4.0, 1.0, 4.0], 2, 4.0, 2.5),  # every second step walks the teacher
        ([9.0, 1.0, 4.0, 1.0], 2, 4.0, 2.5),  # a whole cycle, the last one
        ([9.0, 1.0], 4, 1.0, 1.0),  # not a whole one
        ([9.0], 1, 9.0, 9.0),
    ],
)
def test_times_of_steps_that_differ(sec: list[float], cycle: int, again: float, mean: float) -> None:
    times = step_times(sec, cycle)
    assert (times["first"], times["again"], times["mean"]) == (9.0, again, mean)


@pytest.mark.long
def test_a_plan_is_what_the_run_takes(
    tiny_sana: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a walk in every second step only; the median is one kind of step, twice or none of the mean."""
    velocity = PipelineTeacher.velocity

    def slow_velocity(self: PipelineTeacher, *args: Any) -> Any:
        time.sleep(0.25)
        return velocity(self, *args)

    monkeypatch.setattr(PipelineTeacher, "velocity", slow_velocity)
    config = load_config(
        "default",
        [
            "space.reuse=2", "space.route_steps=4", "training.steps=8", "training.prompts_per_step=1",
            "objective=discrete", "training.precision=no", "training.walk_precision=no", "teacher.max_tokens=32",
            "evaluation.n=0",
        ],
        teacher__source=str(tiny_sana), prompts=str(prompts_file),
    )  # fmt: skip
    plan = make_plan(config, 3, Display(quiet=True))
    result = run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="")
    assert plan.trial_steps == 3
    assert plan.step_sec == pytest.approx(result["step_sec"]["mean"], rel=0.4)


@pytest.mark.long
def test_a_plan_of_matching_is_what_the_run_takes(
    tiny_sana: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps cost unequal passes by the rollout's turn; the passes of all networks are what takes the time here."""
    passes: list[int] = []
    for kind, name in ((PipelineTeacher, "call_network"), (SanaStudent, "forward")):
        monkeypatch.setattr(kind, name, slowed(getattr(kind, name), passes))
    config = load_config(
        "default",
        [
            "objective=matching", "space.kind=rollout", "space.filter_rule=off", "rollout.steps=2", "fake.updates=2",
            "fake.kind=whole", "fake.head_start=0", "training.steps=8", "training.prompts_per_step=1",
            "training.precision=no", "training.walk_precision=no", "teacher.max_tokens=32", "evaluation.n=0",
        ],
        teacher__source=str(tiny_sana), prompts=str(prompts_file),
    )  # fmt: skip
    plan = make_plan(config, 2, Display(quiet=True))
    result = run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="")
    assert len(passes) > 8 * 7  # each step has 2 (1/2 + 1 + 1) of the fake score's and 1/2 + 1 + 1 + 1 of the student's
    assert plan.step_sec == pytest.approx(result["step_sec"]["mean"], rel=0.15)


def slowed(call: Any, passes: list[int]) -> Any:
    def slow(*args: Any, **options: Any) -> Any:
        passes.append(1)
        time.sleep(0.2)
        return call(*args, **options)

    return slow
