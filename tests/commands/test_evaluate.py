"""Students under the protocol, each beside its own teacher."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from stepfold import assets
from stepfold.commands import own_teacher
from stepfold.commands.evaluate import run_evaluate
from stepfold.display import Display, results_table
from stepfold.errors import UserError
from stepfold.evaluation import measure


def evaluate(*folders: Path) -> dict[str, Any]:
    return run_evaluate(folders, steps=[1], n=2, guidance=None, display=Display(quiet=True), device="cpu")


@pytest.mark.long
def test_a_folder_twice_and_a_folder_called_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first was a KeyError; the second's scores stood in the teacher's row."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(assets.STUDENT, "teacher")
    result = evaluate(Path("teacher"), Path("teacher"))
    assert result["student_folder"] == "teacher" and set(result["teacher"]) == {"20", "4", "2", "1"}
    assert result["student"]["1"]["agreement"] != result["teacher"]["1"]["agreement"]


def test_every_student_is_looked_at_before_the_first_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured of the first was lost where the second had no prompts."""
    lost = tmp_path / "lost"
    shutil.copytree(assets.STUDENT, lost)
    card = json.loads((lost / "stepfold.json").read_text())
    card["config"]["prompts"] = str(tmp_path / "gone.txt")
    (lost / "stepfold.json").write_text(json.dumps(card))
    monkeypatch.setattr(own_teacher, "latent_scores", lambda *_: pytest.fail("the first was measured"))
    options: dict[str, Any] = {"steps": [1], "n": 2, "guidance": None, "prompts": None, "clip": None, "out": None}
    with pytest.raises(UserError, match=r"prompts cannot be read .*gone\.txt"):
        own_teacher.run_own([assets.STUDENT, lost], **options, display=Display(quiet=True), device="cpu")


def test_runs_with_other_held_out_prompts_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds hold out different prompts, and their errors stood side by side."""
    other, notes = tmp_path / "other", list[str]()
    shutil.copytree(assets.STUDENT, other)
    card = json.loads((other / "stepfold.json").read_text())
    card["config"]["seed"] = 7
    (other / "stepfold.json").write_text(json.dumps(card))
    display = Display(quiet=True)
    monkeypatch.setattr(display, "note", notes.append)
    monkeypatch.setattr(own_teacher, "latent_scores", lambda *_: {"protocol": {"prompts": "2"}})
    options: dict[str, Any] = {"steps": [1], "n": 2, "guidance": None, "clip": None, "out": None}

    def told(*students: Path, prompts: Path | None = None) -> list[str]:
        notes.clear()
        own_teacher.run_own(students, **options, prompts=prompts, display=display, device="cpu")
        return notes

    assert "held out different prompts" in told(assets.STUDENT, other)[0]
    assert not told(assets.STUDENT, other, prompts=assets.PROMPTS) and not told(other, other)
    card["config"]["teacher"]["lora"] = [{"source": "style.safetensors", "scale": 0.5}]
    (other / "stepfold.json").write_text(json.dumps(card))
    with suppress(UserError):  # there is no such LoRA
        told(assets.STUDENT, other, prompts=assets.PROMPTS)
    assert "different teachers, LoRAs or sizes; their latent errors do not compare" in notes[0]


@pytest.mark.long
def test_students_of_two_sizes_stand_each_beside_its_own_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were given the noise of the first one's size, and measured against its teacher."""
    small = tmp_path / "small"
    shutil.copytree(assets.STUDENT, small)
    card = json.loads((small / "stepfold.json").read_text())
    card |= {"height": 32, "width": 32}
    card["config"]["teacher"] |= {"height": 32, "width": 32}
    (small / "stepfold.json").write_text(json.dumps(card))
    drawn, evaluation_noise = [], measure.evaluation_noise

    def noted(*args: Any) -> torch.Tensor:
        drawn.append(evaluation_noise(*args))
        return drawn[-1]

    monkeypatch.setattr(measure, "evaluation_noise", noted)
    names = ["emoji-student", str(small)]
    result = evaluate(*map(Path, names))
    sides = [noise.shape[-1] for noise in drawn]
    half = len(sides) // 2
    assert sides == [sides[0]] * half + [sides[0] // 2] * half
    mine = f"teacher of {small}"
    assert set(result["protocols"]) == {"teacher", mine} and result["teacher"] != result[mine]
    assert list(result["pipelines"]) == names
    assert all(result["pipelines"][name]["1"]["agreement"] > 0 for name in names)
    assert len(results_table(result).rows) == 2 * 4 + 2
    assert result["protocol"]["guidance"] == 3.0  # that of the students, though the pipeline's is 4.5
