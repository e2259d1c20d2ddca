"""What is said of a run with a fake score: each verdict on curves made for it, and nothing of a healthy one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stepfold.cli import app
from stepfold.evaluation import symptoms
from stepfold.evaluation.symptoms import LEAST, symptoms_of
from stepfold.evaluation.verdict import sentences
from stepfold.training.runs import CONFIG, METRICS
from stepfold.web.runs import read_run, symptoms_in

STEPS = 100


def curves(prefix: str = "", steps: int = STEPS, **ends: tuple[float, float]) -> dict[str, list[list[float]]]:
    """Curves that go from one number to another, with some noise; healthy where nothing else is given."""
    healthy = {"gap": (0.9, 0.5), "cosine": (0.8, 0.95), "std": (0.75, 0.8), "spread": (0.7, 0.75)}
    healthy |= {"miss": (-0.2, -0.4)}

    def at(first: float, last: float, step: int) -> float:
        return (first + (last - first) * step / (steps - 1)) * (1 + 0.03 * math.sin(7 * step))

    return {
        prefix + name: [[20 + step, at(*both, step)] for step in range(steps)]
        for name, both in (healthy | ends).items()
    }


LATE: dict[str, tuple[float, float]] = {"gap": (0.7, 1.6), "cosine": (0.9, 0.6)}
OVER: dict[str, tuple[float, float]] = {"gap": (0.7, 1.6), "std": (0.7, 1.4)}
CASES: list[tuple[dict[str, tuple[float, float]], list[str]]] = [
    ({}, []),
    (LATE, ["The fake score looks late"]),
    (OVER, ["Guidance looks too strong"]),
    (OVER | {"cosine": (0.9, 0.6)}, ["Guidance looks too strong"]),
    ({"gap": (0.85, 0.8), "std": (0.7, 1.4)}, ["Guidance looks too strong"]),
    (OVER | {"miss": (-0.3, -1.5)}, ["The fake score looks late"]),
    ({"spread": (0.8, 0.2)}, ["The student's images look collapsed"]),
    (LATE | {"spread": (0.8, 0.2)}, ["The fake score looks late", "The student's images look collapsed"]),
    ({"miss": (1.4, 1.5)}, ["The fake score looks late: the images moved 1.5 times"]),
    ({"miss": (-0.3, -1.5)}, ["The fake score looks late: the images moved 1.4 times"]),
    ({"gap": (0.7, 1.6)}, []),  # the gap alone says nothing
    ({"cosine": (0.9, 0.6)}, []),
    ({"std": (0.7, 1.4)}, []),  # a student that began as a grey image gains contrast
    ({"gap": (0.7, 0.75), "cosine": (0.9, 0.88), "spread": (0.8, 0.7)}, []),
]


@pytest.mark.parametrize(("ends", "said"), CASES)
@pytest.mark.parametrize("prefix", ["", "rollout/"])
def test_each_verdict_has_its_curves(ends: dict[str, tuple[float, float]], said: list[str], prefix: str) -> None:
    found = symptoms_of(curves(prefix, **ends))
    assert len(found) == len(said) and all(line.startswith(start) for line, start in zip(found, said, strict=True))


def test_short_runs_and_those_without_a_fake_score_are_not_judged() -> None:
    assert symptoms_of(curves(steps=LEAST - 1, **LATE)) == [] != symptoms_of(curves(steps=LEAST, **LATE))
    assert symptoms_of({"loss": [[0, 1.0]]}) == symptoms_of({"gap": [[0, None]]}) == []
    broken: dict[str, Any] = curves(**LATE)
    broken["gap"] = [[step, math.nan] for step, _ in broken["gap"]]
    assert symptoms_of(broken) == []


def test_a_space_that_looks_like_another_is_said_once() -> None:
    both = curves("rollout/", **LATE) | curves("endpoints/", **LATE)
    assert len(symptoms_of(both)) == 1


@pytest.mark.parametrize("name", ["GAP_RISES", "COSINE_FALLS", "MISSES"])
def test_the_thresholds_are_those_of_the_module(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    late = {"miss": (1.5, 1.5)} if name == "MISSES" else LATE
    assert symptoms_of(curves(**late))
    monkeypatch.setattr(symptoms, name, 9.0)
    assert symptoms_of(curves(**late)) == []


def report(**more: Any) -> dict[str, Any]:
    return {"student": {"1": {"diversity": 0.3}}, "teacher": {"20": {"diversity": 0.33}}, **more}


def test_the_report_says_it() -> None:
    assert any("looks late" in line for line in sentences(report(curves=curves(**LATE))))
    assert not any("look" in line for line in sentences(report(curves=curves())))
    assert any("looks late" in line for line in sentences({"curves": curves(**LATE)}))  # nothing was measured
    collapsed = report() | {"student": {"1": {"diversity": 0.1}}}
    assert any("0.100 against the teacher's 0.330" in line for line in sentences(collapsed))
    assert not any("collapsed" in line for line in sentences(report()))


def test_runs_says_it(tmp_path: Path) -> None:
    for name, ends in (("late", LATE), ("healthy", {})):
        folder = tmp_path / name
        folder.mkdir()
        (folder / CONFIG).write_text("seed: 0\n")
        points = curves(**ends)
        rows = [{"step": int(gap[0]), **{key: of[i][1] for key, of in points.items()}}
                for i, gap in enumerate(points["gap"])]  # fmt: skip
        (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = CliRunner().invoke(app, ["runs", str(tmp_path), "--json", str(tmp_path / "runs.json")])
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if "looks late" in line]
    assert line.startswith("late: The fake score looks late")
    looks = {row["name"]: row["looks"] for row in json.loads((tmp_path / "runs.json").read_text())}
    assert looks["healthy"] == [] and len(looks["late"]) == 1


def test_numbers_that_are_too_large_say_nothing(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("seed: 0\n")
    row = {"gap": 10**400, "cosine": 1, "std": 1}
    (tmp_path / METRICS).write_text("".join(json.dumps({"step": step, **row}) + "\n" for step in range(STEPS)))
    assert symptoms_in(read_run(tmp_path.parent, tmp_path.name)) == []
