"""The plan is the run's own first steps, reckoned up."""

from pathlib import Path
from typing import Any

import pytest

from stepfold.commands.plan import make_plan, plan_rows, reckon
from stepfold.config import load_config
from stepfold.display import Display


def test_the_parts_add_up() -> None:
    config = load_config("demo", ["training.steps=250", "training.preview_every=100", "training.checkpoint_every=50"])
    trial = load_config("demo", ["evaluation.n=50"])
    stages = {"load": 3.0, "first preview": 2.0, "preview": 1.5, "checkpoint": 0.5, "evaluation": 4.0, "teacher": 99.0}
    result: dict[str, Any] = {
        "stages_sec": stages,
        "step_sec": {"first": 60.0, "median": 2.0},
        "timed_steps": 12,
        "tangent": "one_pass (as set)",
        "peak_memory_gib": 1.25,
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


@pytest.mark.parametrize("n", [0, 40])
def test_a_plan_leaves_nothing_behind(n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    config = load_config(
        "demo",
        [
            f"evaluation.n={n}", "training.steps=40", "training.prompts_per_step=1", "space.route_steps=3",
            "training.precision=no", "training.walk_precision=no", "objective=continuous",
        ],
    )  # fmt: skip
    plan = make_plan(config, 3, Display(quiet=True))
    assert plan.trial_steps == 3 and plan.step_sec > 0 and plan.tangent.startswith("one_pass")
    assert (plan.parts_sec["evaluation"] > 0) == bool(n)
    assert plan.total_sec >= 40 * plan.step_sec
    assert list(tmp_path.glob("stepfold*")) == []
    assert len(plan_rows(plan)) == 4 + len(plan.parts_sec)
