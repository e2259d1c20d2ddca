"""Checkpoints combined: the best sum of a linear student is found, and nothing worse is ever written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stepfold.commands import combine as command
from stepfold.commands.combine import run_combine
from stepfold.config import load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.export.pipeline import metrics_beside
from stepfold.jobs.distilling import run_distill
from stepfold.jobs.sampling import run_sample
from stepfold.students.combining import combine, put_sum, with_coefficient
from stepfold.training.runs import CHECKSUMS


def test_a_sum_of_states_is_the_sum_of_their_numbers() -> None:
    module = nn.BatchNorm1d(2)
    states = [
        {
            name: torch.randn_like(value) if value.is_floating_point() else value + 3
            for name, value in module.state_dict().items()
        }
        for _ in range(3)
    ]
    put_sum(module, states, [0.5, 0.75, -0.25])
    torch.testing.assert_close(
        module.weight, 0.5 * states[0]["weight"] + 0.75 * states[1]["weight"] - 0.25 * states[2]["weight"]
    )
    assert module.num_batches_tracked == 3  # type: ignore[comparison-overlap]


def test_coefficients_keep_the_sum_of_one() -> None:
    found = with_coefficient([0.0, 1.0, 0.0], 2, -0.4, 1)
    assert found == [0.0, 1.4, -0.4] and sum(with_coefficient(found, 0, 0.3, 1)) == pytest.approx(1)


def test_the_best_sum_of_a_linear_student_is_that_of_least_squares() -> None:
    """Its output is linear in its weights, so that least squares knows the answer."""
    draw = torch.Generator().manual_seed(0)
    outputs, wanted = torch.randn(3, 50, generator=draw).double(), torch.randn(50, generator=draw).double()

    def error(coefficients: Sequence[float]) -> float:
        made = (torch.tensor(coefficients).double()[:, None] * outputs).sum(0)
        return (made - wanted).square().mean().item()

    found, least = combine(error, 3, reference=2, sweeps=60)
    others = (outputs[:2] - outputs[2]).T
    exact = torch.linalg.lstsq(others, wanted - outputs[2]).solution
    assert least < error([0, 0, 1]) and sum(found) == pytest.approx(1)
    assert least < 1.01 * error([*exact.tolist(), 1 - exact.sum().item()])
    torch.testing.assert_close(torch.tensor(found[:2]).double(), exact, rtol=0, atol=0.05)


def test_it_is_never_worse_than_where_it_starts() -> None:
    assert combine(lambda a: abs(a[1] - 1), 3, reference=1, sweeps=3) == ([0.0, 1.0, 0.0], 0.0)


@pytest.fixture
def run(tiny_sana: Path, prompts_file: Path, tmp_path: Path) -> Path:
    config = load_config(
        "default",
        [
            f"teacher.source={tiny_sana}", f"prompts={prompts_file}", "teacher.height=32", "teacher.width=32",
            "teacher.max_tokens=24", "space.route_steps=4", "space.filter_rule=off", "training.steps=4",
            "training.prompts_per_step=2", "training.preview_every=1000", "training.precision=no", "evaluation.n=0",
            "training.walk_precision=no", "objective=discrete", "training.checkpoint_every=2", "optimiser.lr=1e-3",
            "optimiser.name=adamw", "optimiser.warmup=0", "space.guidance=[4.5]",
        ],
    )  # fmt: skip
    run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
    return tmp_path / "run"


def test_a_runs_checkpoints_become_a_student(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "FEW", 2)
    last = run / "checkpoints" / "000004"
    noisy = {
        name: value + 0.05 * torch.randn_like(value) for name, value in load_file(last / "average.safetensors").items()
    }
    save_file(noisy, last / "average.safetensors")
    (last / CHECKSUMS).unlink()
    options: dict[str, Any] = dict(steps=None, n=6, prompts=None, sweeps=1, display=Display(quiet=True), device="cpu")
    found = run_combine(run, tmp_path / "new", **options)
    assert found["after"] < found["before"] and sum(found["coefficients"]) == pytest.approx(1)
    assert found["states"] == ["average 000002", "student 000002", "average 000004", "student 000004"]
    sampled = dict(steps=1, seed=0, guidance=None, device="cpu")
    pictures = [run_sample(place, ["red heart"], **sampled)[0].tobytes() for place in (run, tmp_path / "new")]  # type: ignore[arg-type]
    assert pictures[0] != pictures[1]


def test_a_sum_that_other_prompts_do_not_like_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "FEW", 2)
    monkeypatch.setattr("stepfold.students.combining.combine", lambda *args: ([30.0, -29.0, 0.0, 0.0], 0.0))
    options: dict[str, Any] = dict(steps=None, n=6, prompts=None, sweeps=1, display=Display(quiet=True), device="cpu")
    with pytest.raises(UserError, match=r"not nearer to the teacher .* nothing was written"):
        run_combine(run, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(command, "FEW", 8)
    with pytest.raises(UserError, match="12 prompts, half of them for the verdict; give 16 or more"):
        run_combine(run, tmp_path / "new", **options)
    for old in sorted((run / "checkpoints").iterdir())[:1]:
        (old / "student.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"has 1 whole checkpoint, .*; train with --set training.keep_checkpoints=8"):
        run_combine(run, tmp_path / "new", **options)


def test_the_card_of_a_sum_has_no_scores_of_the_runs_student(tmp_path: Path) -> None:
    """`combine RUN --out RUN/combined` lies in the run, whose report is of other weights."""
    (tmp_path / "report.json").write_text('{"student": {}}')
    assert metrics_beside(tmp_path / "student") == {"student": {}} and metrics_beside(tmp_path / "combined") is None


def test_it_replaces_an_earlier_student_alone(run: Path, tmp_path: Path) -> None:
    """--force once deleted whatever --out named: a run with its checkpoints, a folder of models."""
    other = tmp_path / "models"
    (other / "mine").mkdir(parents=True)
    for out in (run, other):
        with pytest.raises(UserError, match="is there already; choose another --out, or --force to replace an earlier"):
            command.combine(run, out, force=True)
    with pytest.raises(UserError, match="is the student itself, or in it"):
        command.combine(run, run / "student", force=True)
    with pytest.raises(UserError, match=r"is a student, and the checkpoints are in its run; give its run, .*run$"):
        command.combine(run / "student", tmp_path / "new")
    assert (run / "checkpoints").is_dir() and (other / "mine").is_dir()
