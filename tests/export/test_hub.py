"""`stepfold push`: what would go to the hub; nothing here reaches it."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from stepfold.errors import UserError
from stepfold.export.hub import hub_card, push, teacher_of_nobody_else
from stepfold.export.pipeline import measured, write_cards
from stepfold.jobs.exporting import run_export
from stepfold.students.card import CARD, read_card

StudentOf = Callable[..., Path]


class Recorder:
    """Stands in for HfApi: keeps what it is told, and the repository as it is then."""

    def __init__(self, *, public: bool = False) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.files: dict[str, bytes] = {}
        self.public = public

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.calls.append((repo_id, options))
        return f"hub/{repo_id}"

    def repo_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=not self.public)

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, ignore_patterns: Sequence[str] = (), **options: Any
    ) -> None:
        self.calls.append((repo_id, {"folder": folder_path}))
        paths = {path.relative_to(folder_path).as_posix(): path for path in folder_path.rglob("*") if path.is_file()}
        self.files |= {name: path.read_bytes() for name, path in paths.items() if name not in ignore_patterns}


@pytest.fixture
def student(student_of: StudentOf, tmp_path: Path) -> Path:
    """A student in a run that measured something, of a teacher with a licence."""
    folder = run_export(student_of("sana"), "pipeline", tmp_path / "run" / "student", force=False)
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    (teacher / "README.md").write_text("---\nlicense: other\nlicense_name: mine-alone\n---\n")
    card = json.loads((folder / CARD).read_text()) | {"teacher": str(teacher)}
    (folder / CARD).write_text(json.dumps(card))
    row = dict(accuracy=0.9, clip_score=27.3, fd=0.01, diversity=0.5)
    report = {"protocol": {"n": 480, "hash": "0123456789abcdef"}, "teacher": {"20": row}, "student": {"1": row}}
    (tmp_path / "run" / "report.json").write_text(json.dumps(report))
    return folder


@pytest.mark.parametrize("licence", ["license:\n- apache-2.0\n- other\n", "license: openrail++\n", ""])
def test_the_front_matter_is_what_the_hub_reads(licence: str, student: Path, tmp_path: Path) -> None:
    """A list of licences was one licence called "- apache-2.0"."""
    (tmp_path / "teacher" / "README.md").write_text(f"---\n{licence}---\n")
    told = ModelCard(hub_card(student, "you/mine")).data
    assert told.license == ModelCard(f"---\n{licence}library_name: x\n---\n").data.license
    assert (told.library_name, told.pipeline_tag) == ("diffusers", "text-to-image") and "few-step" in told.tags


def test_the_card_says_it_all(student: Path) -> None:
    api = Recorder()
    assert push(student, "you/mine", private=True, api=api) == "hub/you/mine"
    (made, options), (filled, upload), _ = api.calls
    assert made == filled == "you/mine" and options == {"private": True, "exist_ok": True}
    assert upload["folder"] == student and {path.name for path in student.iterdir() if path.is_file()} <= set(api.files)
    front, text = api.files["README.md"].decode().removeprefix("---\n").split("\n---\n", 1)
    assert front.splitlines()[-2:] == ['license: "other"', 'license_name: "mine-alone"']
    assert "| teacher | mine-alone |" in text
    assert 'from_pretrained("you/mine", dtype=' in text and "FOLDER" not in text
    assert "Protocol 0123456789ab: 480 images a row." in text and "| student, 1 step | 0.900 | 27.3 |" in text


def test_nothing_private_goes_into_a_public_repository(student: Path) -> None:
    """`private` counts for new repositories alone on the hub: the upload would be public."""
    api = Recorder(public=True)
    with pytest.raises(UserError, match="you/mine is there and public, so --private would publish the student"):
        push(student, "you/mine", private=True, api=api)
    assert not api.files
    push(student, "you/mine", private=False, api=api)
    assert CARD in api.files


@pytest.mark.parametrize("lora", [0, 4])
def test_no_path_of_this_machine_goes_to_the_hub(lora: int, student_of: StudentOf, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(student_of("sana", lora), folder)
    card = json.loads((folder / CARD).read_text())
    card["config"]["prompts"] = str(tmp_path / "secret" / "mine.txt")
    card["config"]["teacher"]["lora"] = [{"source": str(tmp_path / "style.safetensors"), "scale": 1.0}]
    card["config"]["reward"]["clip"] = "openai/clip-vit-base-patch32"
    (folder / CARD).write_text(json.dumps(card))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    api = Recorder()
    push(folder, "you/mine", private=False, api=api)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    there = json.loads(api.files[CARD])
    assert there["config"]["prompts"] == "mine.txt" and there["teacher"] == Path(card["teacher"]).name
    assert there["config"]["teacher"]["lora"][0]["source"] == "style.safetensors"
    assert there["config"]["reward"]["clip"] == "openai/clip-vit-base-patch32"
    assert not [name for name, data in api.files.items() if str(tmp_path.parent).encode() in data]


def test_a_card_says_which_latent_errors_compare() -> None:
    rows = {"1": {"latent_error": 0.5}, "4": {"latent_error": 0.9}}
    metrics = {"protocol": {"hash": "0" * 64, "n": 4}, "teacher": rows, "student": rows}
    assert "compare at one step alone: further steps add fresh noise.\n" in measured(metrics | {"fresh_noise": True})
    assert "fresh noise" not in measured(metrics) and "| student, 4 steps | 0.900 |" in measured(metrics)
    assert "fresh noise" not in measured(metrics | {"fresh_noise": True, "student": {"1": rows["1"]}})


def test_an_exported_pipelines_measurements_go_with_it(student: Path, tmp_path: Path) -> None:
    """Its folder is not the run's student, beside which the report lies."""
    card = read_card(student)
    report = json.loads((student.parent / "report.json").read_text())
    write_cards(student, card, report)
    out = run_export(student, "pipeline", tmp_path / "run" / "student-pipeline", force=False)
    assert "| student, 1 step | 0.900 | 27.3 |" in (out / "README.md").read_text()
    text = hub_card(out, "you/mine")
    assert "| student, 1 step | 0.900 | 27.3 |" in text and text.count("## Measured") == text.count("## Licence") == 1
    assert text.index("## Measured") < text.index("## Licence") and 'from_pretrained("you/mine", dtype=' in text


def test_a_lora_students_card_loads_its_teacher(student_of: StudentOf) -> None:
    text = hub_card(student_of("sd1", 4), "you/mine")
    assert 'pipe.load_lora_weights("you/mine")' in text and 'from_pretrained("you/mine", subfolder="scheduler")' in text


def test_only_what_diffusers_loads_goes_there(student: Path, tmp_path: Path) -> None:
    (tmp_path / CARD).write_bytes((student / CARD).read_bytes())  # as an onnx export has it
    with pytest.raises(UserError, match=r"no model_index.json"):
        hub_card(tmp_path, "you/mine")


def test_mistakes_leave_the_folder_alone(student: Path) -> None:
    before = {path: path.read_bytes() for path in student.rglob("*") if path.is_file()}
    for repo, reason in (
        ("mine", "names no owner"),
        ("you/mine/too", "is no name on the hub"),
        ("y ou/mine", "no name"),
    ):
        api = Recorder()
        with pytest.raises(UserError, match=reason) as caught:
            push(student, repo, private=False, api=api)
        assert "OWNER/NAME" in str(caught.value) and "\n" not in str(caught.value) and api.calls == []
    assert before == {path: path.read_bytes() for path in student.rglob("*") if path.is_file()}


def test_without_the_hub_it_is_one_line(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot push to you/mine: .*; log in with `hf auth login`") as caught:
        push(student, "you/mine", private=False)
    assert "\n" not in str(caught.value)


def test_a_connection_that_fails_is_one_line(student: Path) -> None:
    class Unreachable(Recorder):
        def create_repo(self, repo_id: str, **options: Any) -> str:
            raise ConnectionRefusedError("nobody\nthere")

    with pytest.raises(UserError, match=r"cannot push to you/mine: nobody; log in"):
        push(student, "you/mine", private=False, api=Unreachable())


def test_a_teacher_that_nobody_else_has_is_pointed_out(student_of: Callable[..., Path]) -> None:
    whole, lora = student_of("sana"), student_of("sana", 4)
    assert teacher_of_nobody_else(whole) is None
    assert teacher_of_nobody_else(lora) == read_card(lora).teacher
