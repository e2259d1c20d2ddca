"""The latent error of students whose teacher has no evaluator, and the prompts that it is measured on."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from stepfold.cli import app
from stepfold.config import load_config
from stepfold.display import Display
from stepfold.evaluation.latents import LatentProtocol, cost, held_out, known_steps, measure_latents
from stepfold.evaluation.measure import evaluation_noise
from stepfold.evaluation.metrics import relative_error
from stepfold.jobs.distilling import run_distill
from stepfold.jobs.finishing import trained_samples
from stepfold.prompts.reading import shuffled_index
from stepfold.randomness import normal
from stepfold.sampling.samplers import SAMPLERS
from stepfold.sampling.teacher import sample_teacher
from stepfold.students.loading import load_student
from stepfold.teachers.loading import load_teacher
from stepfold.training.draws import prompt_index, step_samples

CHANGES = (
    "training.steps=3", "training.prompts_per_step=2", "training.precision=no", "training.walk_precision=no",
    "space.route_steps=2", "teacher.max_tokens=32",
)  # fmt: skip
WORDS = [f"a red {what} number {i}" for i in range(8) for what in ("cat", "fish", "house")]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return path


@pytest.fixture(scope="module")
def run(tiny_sana: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run of a teacher without an evaluator, and what it said."""
    folder = tmp_path_factory.mktemp("own") / "run"
    config = load_config("default", CHANGES, teacher__source=str(tiny_sana), prompts=str(prompts))
    display = Display()
    with display.console.capture() as said:
        run_distill(config, folder, resume=False, display=display, command="test")
    return folder, said.get()


def test_a_relative_error_is_a_ratio_of_norms() -> None:
    reference = torch.randn(3, 4, 5, 5)
    factors = torch.tensor([1.0, 0.5, -1.0])
    assert relative_error(reference * factors[:, None, None, None], reference).tolist() == pytest.approx([0, 0.5, 2])


@pytest.mark.parametrize(("steps", "unseen"), [(3, 4), (11, 2), (12, 0), (500, 0)])
def test_held_out_prompts_are_those_that_the_run_does_not_reach(prompts: Path, steps: int, unseen: int) -> None:
    """Of 24 prompts, at two a step, the run's own order decides."""
    from stepfold.prompts.reading import open_prompts

    config = load_config("default", [f"training.steps={steps}", "training.prompts_per_step=2"], prompts=str(prompts))
    texts = open_prompts(prompts)
    trained = {i for step in range(steps) for i in prompt_index(step_samples(step, config), texts, config.seed)}
    chosen = held_out(len(texts), trained_samples(config), config.seed, 4)
    assert len(set(chosen.index)) == 4
    assert len(set(chosen.index) - trained) == chosen.unseen == unseen


@pytest.mark.parametrize("rows", [10, 24, 60])
@pytest.mark.parametrize("trained", [5, 20, 500])
def test_a_banks_rows_decide_which_prompts_are_held_out(rows: int, trained: int) -> None:
    """Of 24 prompts, row r being of prompt r % 24, as the run draws its rows."""
    met = [shuffled_index(i, rows, 3) % 24 for i in range(trained)]
    chosen = held_out(24, trained, 3, 4, rows)
    assert len(set(chosen.index)) == 4
    assert chosen.unseen == len(set(chosen.index) - set(met)) == min(4, 24 - len(set(met)))
    if rows == 24:
        assert chosen == held_out(24, trained, 3, 4)


def test_the_samples_of_a_run_count_reuse() -> None:
    config = load_config("default", ["training.steps=10", "training.prompts_per_step=3", "space.reuse=3"])
    assert trained_samples(config) == 12


def test_few_prompts_are_said_in_words() -> None:
    assert held_out(3, 100, 0, 64).said == "3 prompts, all of them trained on: the file has too few"
    assert held_out(100, 90, 0, 64).said == "64 prompts, 10 of them held out: the file has too few"
    assert held_out(1000, 90, 0, 64).said == "64 held-out prompts"


def test_errors_and_cost_are_what_they_say(tiny_sana: Path, run: tuple[Path, str]) -> None:
    """Against samplers called by hand, without batches; every call of the network counts as `cost` has it."""
    settings = load_config("default", CHANGES, teacher__source=str(tiny_sana), prompts="x").teacher
    teacher = load_teacher(settings, "cpu")
    _, student, card = load_student(run[0] / "student", "cpu")
    protocol = LatentProtocol(n=10, steps=(2, 1), guidance=4.5, prompts_sha256="", index=tuple(range(10)))
    condition = teacher.encode(WORDS[:10])
    rows: dict[str, int] = {"teacher": 0, "student": 0}

    def count(who: str) -> Any:
        return lambda module, args: rows.update({who: rows[who] + len(args[0])})

    network: Any = student
    handles = [
        teacher.network.register_forward_pre_hook(count("teacher")),
        network.transformer.register_forward_pre_hook(count("student")),
    ]
    ticks: list[tuple[str, int]] = []
    found = measure_latents(
        teacher, student, card.recipe, protocol, condition, WORDS[:10], tick=lambda *args: ticks.append(args)
    )
    for handle in handles:
        handle.remove()
    assert rows == {"teacher": 10 * 2 * (20 + 2 + 1), "student": 10 * (2 + 1)}
    assert cost(protocol, teacher) == (
        f"{sum(rows.values())} network calls: the teacher at 20 steps, teacher and student at 1, 2"
    )
    assert ticks[:2] == [("reference 20", 8), ("reference 20", 2)] and sum(n for _, n in ticks) == 5 * 10
    assert {who: list(row) for who, row in found.items()} == {"teacher": ["20", "2", "1"], "student": ["2", "1"]}
    assert found["teacher"]["20"]["latent_error"] is None

    noise = evaluation_noise(0, range(10), teacher, torch.device("cpu"))
    scale = torch.full((10,), 4.5)
    end = sample_teacher(teacher, noise, condition, scale, 20, even=True)
    by_hand = {("teacher", k): sample_teacher(teacher, noise, condition, scale, k, even=True) for k in (1, 2)}

    def fresh(i: int) -> torch.Tensor:
        return 0.5 * torch.stack([normal(teacher.latent_shape, 0, "evaluation fresh noise", i, s) for s in range(10)])

    for k in (1, 2):
        by_hand["student", k] = SAMPLERS[card.recipe.sampler](
            student, noise, condition, scale, card.recipe.times[k], fresh, 0.5
        )
    for (who, k), x0 in by_hand.items():
        expected = ((x0 - end).flatten(1).norm(dim=1) / end.flatten(1).norm(dim=1)).mean().item()
        assert found[who][str(k)]["latent_error"] == pytest.approx(expected, rel=1e-4), (who, k)


def test_a_run_of_any_teacher_has_a_result(run: tuple[Path, str]) -> None:
    """In its report, its card and `stepfold runs`; what it costs is said before, what it was measured on after."""
    folder, said = run
    report = json.loads((folder / "report.json").read_text())
    assert list(report["student"]) == ["8", "4", "2", "1"] and list(report["teacher"]) == ["20", "8", "4", "2", "1"]
    assert all(0 < row["latent_error"] < 10 for row in report["student"].values())
    assert report["protocol"]["unseen"] == 2 and report["protocol"]["n"] == 2
    assert re.search(r"evaluation on 2 held-out prompts, 170 network calls: the teacher at 20 steps", said)
    assert said.index("evaluation on") < said.index("measured reference 20") < said.index("measured student 1")
    html = (folder / "report.html").read_text()
    value = report["student"]["1"]["latent_error"]
    assert f"<b>{value:.2f}</b><span>latent error in one step</span>" in html
    assert "Measured on 2 held-out prompts, at guidance 4.5." in html
    card = (folder / "student" / "README.md").read_text()
    assert "2 held-out prompts" in card and f"| student, 1 step | {value:.3f} |" in card
    table = CliRunner().invoke(app, ["runs", str(folder.parent)]).stdout
    assert f"{value:.3f}" in table and "latent error" in table


def test_evaluate_needs_a_student_and_nothing_else(
    run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the run's folder it repeats the report's numbers to the digit; with --out it draws a report, images first."""
    found = tmp_path / "scores.json"
    command = ["evaluate", str(run[0]), "--n", "2", "--json", str(found)]
    monkeypatch.setattr("sys.argv", ["stepfold", "evaluate", "my run", "--n", "2"])
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    scores, report = (json.loads(path.read_text()) for path in (found, run[0] / "report.json"))
    assert scores["student"] == report["student"] and scores["teacher"] == report["teacher"]
    assert scores["protocol"] == report["protocol"]
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.index("<img") < html.index('<table class="results">')
    assert "<pre>stepfold evaluate &#39;my run&#39; --n 2</pre>" in html
    again = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert "holds a report already" in str(again.exception)


def test_evaluate_on_prompts_of_ones_own(run: tuple[Path, str], tmp_path: Path) -> None:
    others = tmp_path / "others.txt"
    others.write_text("a moon\na river\na hill\n")
    found = tmp_path / "scores.json"
    command = ["evaluate", str(run[0] / "student"), "--prompts", str(others), "--steps", "1", "--json", str(found)]
    assert CliRunner().invoke(app, command).exit_code == 0
    scores = json.loads(found.read_text())
    assert scores["protocol"]["index"] == [0, 1, 2] and scores["protocol"]["unseen"] is None
    assert list(scores["student"]) == ["1"] and scores["fresh_noise"] is True  # of a consistency student


def test_prompts_that_are_gone_or_others_are_said(run: tuple[Path, str], prompts: Path) -> None:
    before = prompts.read_text()
    try:
        prompts.write_text(before + "one more\n")
        result = CliRunner().invoke(app, ["evaluate", str(run[0]), "--n", "2", "--steps", "1"])
        assert f"{run[0]}: 2 prompts\n" in result.stdout, result.output
        prompts.unlink()
        result = CliRunner().invoke(app, ["evaluate", str(run[0])])
        assert "prompts cannot be read" in str(result.exception) and "--prompts FILE" in str(result.exception)
    finally:
        prompts.write_text(before)


def test_a_clip_adds_its_score(run: tuple[Path, str], clip: Path, tmp_path: Path) -> None:
    found = tmp_path / "scores.json"
    command = ["evaluate", str(run[0]), "--n", "2", "--steps", "1", "--json", str(found), "--clip"]
    assert CliRunner().invoke(app, [*command, str(clip)]).exit_code == 0
    scores = json.loads(found.read_text())
    rows = [*scores["student"].values(), *scores["teacher"].values()]
    assert len(rows) == 3 and all(0 <= row["clip_score"] <= 100 for row in rows)
    bad = CliRunner().invoke(app, [*command, str(tmp_path)])
    assert "does not load" in str(bad.exception)


def test_a_clip_that_does_not_load_ends_no_run(tiny_sana: Path, prompts: Path, tmp_path: Path) -> None:
    changes = (*CHANGES, "training.steps=1", f"evaluation.clip={tmp_path}")
    config = load_config("default", changes, teacher__source=str(tiny_sana), prompts=str(prompts))
    display = Display()
    with display.console.capture() as said:
        result = run_distill(config, tmp_path / "run", resume=False, display=display, command="test")
    assert "no CLIP score: the CLIP" in said.get()
    assert "clip_score" not in result["student"]["1"] and result["student"]["1"]["latent_error"] > 0


def test_step_counts_are_those_of_the_card(run: tuple[Path, str]) -> None:
    from stepfold.errors import UserError
    from stepfold.students.card import read_card

    recipe = read_card(run[0]).recipe
    assert known_steps(recipe) == (8, 4, 2, 1) and known_steps(recipe, [1, 3]) == (3, 1)
    with pytest.raises(UserError, match="not for 9"):
        known_steps(recipe, [9])


def test_a_pipeline_is_no_student(run: tuple[Path, str], tiny_sana: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(run[0]), str(tiny_sana)])
    assert "is no student folder" in str(result.exception)
