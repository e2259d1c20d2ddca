"""Every file that an export writes is in its card, with its use."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forms import cases

from stepfold.errors import UserError
from stepfold.export.files import OTHER_FILE, OTHER_PART
from stepfold.export.onnx import GRAPHS_SINCE
from stepfold.jobs.exporting import run_export

StudentOf = Callable[..., Path]
EXPORTS: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "lora": ("sd3", 4, "consistency", {"to": "lora"}),
    "lora comfy": ("sd3", 4, "consistency", {"to": "lora", "keys": "comfy"}),
    "lora peft": ("sd3", 4, "consistency", {"to": "lora", "keys": "peft"}),
    "single-file": ("sd3", 4, "consistency", {"to": "single-file"}),
    "single-file of sana": ("sana", 0, "consistency", {"to": "single-file"}),
    "pipeline": ("sd3", 0, "consistency", {"to": "pipeline"}),
    "merged pipeline": ("sd3", 4, "consistency", {"to": "pipeline"}),
    "pipeline of two times": ("sd1", 0, "flow_map", {"to": "pipeline"}),
    "two networks": ("wan 2.2 a14b", 0, "consistency", {"to": "pipeline"}),
    "folded": ("sana", 0, "flow_map", {"to": "pipeline", "steps": 2}),
    "folded lora": ("sd3", 4, "flow_map", {"to": "lora", "steps": 2}),
    "folded peft": ("sd3", 4, "flow_map", {"to": "lora", "steps": 2, "keys": "peft"}),
    "anyflow": ("wan", 0, "flow_map", {"to": "anyflow"}),
    "onnx": ("sana", 0, "consistency", {"to": "onnx"}),
}


def listed(card: Path) -> list[str]:
    """Names in the table of a card's section about files, each of which has a use."""
    (section,) = re.findall(r"^## Files\n\n(.+?)(?:\n\n|\n*\Z)", card.read_text(), re.MULTILINE | re.DOTALL)
    rows = [re.fullmatch(r"\| `(.+)` \| (.+) \|", line) for line in section.splitlines()[2:]]
    assert all(row and row[2] not in (OTHER_FILE, OTHER_PART) for row in rows), section
    return [row[1] for row in rows if row]


def there(folder: Path) -> list[str]:
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", cases(EXPORTS, short=["lora", "lora peft", "single-file of sana", "merged pipeline"]))
def test_the_card_lists_what_is_there(name: str, student_of: StudentOf, tmp_path: Path) -> None:
    family, rank, sampler, options = EXPORTS[name]
    if name == "onnx" and torch.__version__ < GRAPHS_SINCE:
        pytest.skip("this torch makes no such graphs")
    student = student_of(family, lora=rank, sampler=sampler)  # type: ignore[arg-type]
    assert sorted(listed(student / "README.md")) == there(student)
    is_file = options["to"] in ("lora", "single-file") and options.get("keys") != "peft"
    out = run_export(student, out=tmp_path / ("fox.safetensors" if is_file else "fox"), force=False, **options)
    folder, card = (tmp_path, tmp_path / "fox.README.md") if is_file else (out, out / "README.md")
    assert sorted(listed(card)) == there(folder)


def test_a_pipeline_of_an_earlier_version_gets_the_table(student_of: StudentOf, tmp_path: Path) -> None:
    """Its README is copied as it is, with its scores."""
    import shutil

    student = tmp_path / "student"
    shutil.copytree(student_of("sana"), student)
    readme = student / "README.md"
    before = readme.read_text()
    readme.write_text(before[: before.index("## Files")] + "## Mine\n")
    out = run_export(student, "pipeline", tmp_path / "out", force=False)
    assert sorted(listed(out / "README.md")) == there(out)
    assert "## Mine\n" in (out / "README.md").read_text()


def test_what_lies_beside_is_not_overwritten(student_of: StudentOf, tmp_path: Path) -> None:
    file, notes = tmp_path / "fox.safetensors", tmp_path / "fox.README.md"
    notes.write_text("mine")
    with pytest.raises(UserError, match=r"fox\.README\.md is there already; choose another --out, or --force"):
        run_export(student_of("sd3", lora=4), "lora", file, force=False)
    assert there(tmp_path) == [notes.name] and notes.read_text() == "mine"
    run_export(student_of("sd3", lora=4), "lora", file, force=True)
    assert there(tmp_path) == ["fox.README.md", "fox.safetensors", "fox.workflow.json"]
