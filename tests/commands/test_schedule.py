"""`stepfold schedule`: it goes on where it stopped, refuses what cannot be, and its levels stand beside students."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from stepfold import assets
from stepfold.commands.evaluate import run_evaluate
from stepfold.commands.schedule import numbers_of, run_schedule, usual_levels
from stepfold.config import TeacherSettings, load_config
from stepfold.display import Display, results_table
from stepfold.errors import UserError
from stepfold.levels import solvers
from stepfold.levels.record import read_schedule
from stepfold.teachers.loading import load_teacher


def search(teacher: Path | str, prompts: Path | str | None, out: Path, names: tuple[str, ...], **changed: Any) -> Any:
    options: dict[str, Any] = dict(
        steps=[3], solvers=names, guidance=2.0, n=64, start="rollout", sweeps=1, reference_steps=8, seed=0, batch=4,
        force=False, display=Display(quiet=True), device="cpu",
    )  # fmt: skip
    settings = TeacherSettings(source=str(teacher), height=32, width=32, max_tokens=24)
    return run_schedule(settings, prompts and str(prompts), out, **options | changed)


def test_a_search_goes_on_where_it_was(
    tiny_sana: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, told = tmp_path / "schedule.json", []
    (euler,), _ = search(tiny_sana, prompts_file, out, ("euler",))
    assert (euler.solver, euler.steps, len(euler.levels)) == ("euler", 3, 4)
    assert euler.better == (euler.error < euler.default)
    of = solvers.velocity_of
    monkeypatch.setattr(solvers, "velocity_of", lambda *args: (told.append(args), of(*args))[1])
    again, use = search(tiny_sana, prompts_file, out, ("euler",))
    assert again == [euler] and not told
    both, use = search(tiny_sana, prompts_file, out, ("euler", "calibrated"))
    assert both[0] == euler and both[1].solver == "calibrated" and told
    assert (both[1].levels == euler.levels) == euler.better
    found = json.loads(out.read_text())
    assert found["use"] == use and [row["solver"] for row in found["rows"]] == ["euler", "calibrated"]
    assert [lines["name"] for lines in use] == [f"{row.solver} 3" for row in both if row.better]
    key, rows = read_schedule(out)
    assert rows == both and key["guidance"] == 2 and key["n"] == 6  # a dozen prompts


def test_a_file_of_another_search_is_kept(tiny_sana: Path, prompts_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "schedule.json"
    search(tiny_sana, prompts_file, out, ("calibrated",))
    before = out.read_bytes()
    with pytest.raises(UserError, match=r"is of a search with guidance=2.0, not 3.0; give another --out, or --force"):
        search(tiny_sana, prompts_file, out, ("calibrated",), guidance=3.0)
    assert out.read_bytes() == before
    search(tiny_sana, prompts_file, out, ("calibrated",), guidance=3.0, force=True)
    assert out.read_bytes() != before


def test_what_cannot_be_searched_is_one_line(tiny_sana: Path, tmp_path: Path) -> None:
    out, few = tmp_path / "schedule.json", tmp_path / "few.txt"
    few.write_text("a\nb\nc\n")
    with pytest.raises(UserError, match="3 prompts, half of them for the verdict; give 8 or more, 128 are usual"):
        search(tiny_sana, few, out, ("euler",))
    with pytest.raises(UserError, match="a teacher of your own has no prompts here; give some with --prompts"):
        search(tiny_sana, None, out, ("euler",))
    assert not out.exists()
    for wrong in ("1,4", "0", "4,x", ""):
        with pytest.raises(UserError, match="--steps"):
            numbers_of(wrong)
    assert numbers_of("8,4,4") == [4, 8]


def test_usual_levels_are_the_teachers_own_and_even_ones(tmp_path: Path) -> None:
    folder = tiny.save(tiny.make_sd3, tmp_path / "sd3")  # its shift is 3
    found = usual_levels(load_teacher(TeacherSettings(source=str(folder), height=32, width=32), "cpu"), 4)
    assert list(found) == ["the scheduler's", "even", "even, no shift"]
    assert all(levels[0] == 1 and levels[-1] == 0 and len(levels) == 5 for levels in found.values())
    assert found["even, no shift"] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert found["even"] == pytest.approx([1, 0.9, 0.75, 0.5, 0])


@pytest.mark.long
def test_levels_stand_beside_a_student(tmp_path: Path) -> None:
    """And those of another guidance scale do not."""
    config = load_config("demo").teacher
    out = tmp_path / "schedule.json"
    run_schedule(
        config, None, out, steps=[2], solvers=["calibrated"], guidance=3.0, n=4, start="default", sweeps=0,
        reference_steps=6, seed=0, batch=8, force=False, display=Display(quiet=True), device="cpu",
    )  # fmt: skip
    found = json.loads(out.read_text())
    found["rows"][0]["better"] = True
    out.write_text(json.dumps(found))

    def evaluate(guidance: float) -> dict[str, Any]:
        return run_evaluate(
            [assets.STUDENT], steps=[1], n=2, guidance=guidance, display=Display(quiet=True), device="cpu", schedule=out
        )

    result = evaluate(3.0)
    searched = result["teacher, searched calibrated"]
    assert set(searched) == {"2"} and searched["2"]["calls"] == 4
    assert searched["2"]["agreement"] != result["teacher"]["2"]["agreement"]
    assert any("searched calibrated 2 steps" in str(cell) for cell in results_table(result).columns[0].cells)
    with pytest.raises(UserError, match=r"was searched for guidance=3.0, not 2.0, and levels belong to one teacher"):
        evaluate(2.0)
