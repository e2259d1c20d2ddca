"""What PRX alone has: a text encoder that is half of a T5Gemma."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import PRXPipeline
from tiny_prx import make_prx

from stepfold.config import TeacherSettings
from stepfold.students.saving import save_whole
from stepfold.students.whole import new_student
from stepfold.teachers.loading import load_teacher


@pytest.mark.parametrize("whole", [True, False])
def test_its_text_encoder_is_read_by_either_config(tmp_path: Path, whole: bool) -> None:
    """That of the whole T5Gemma, as published, or its own; a student's folder has what diffusers reads."""
    settings = TeacherSettings(source=str(tiny.save(make_prx, tmp_path / "pipeline")), height=16, width=32)
    expected = load_teacher(settings, "cpu").encode(["red heart"]).embeds
    config = tmp_path / "pipeline" / "text_encoder" / "config.json"
    inner = json.loads(config.read_text())["encoder"]
    config.write_text(json.dumps({"model_type": "t5gemma", "encoder": inner} if whole else inner))
    teacher = load_teacher(settings, "cpu")
    assert torch.equal(teacher.encode(["red heart"]).embeds, expected)
    save_whole(teacher, new_student(teacher), tmp_path / "student", tiny.recipe(teacher))
    embeds, *_ = PRXPipeline.from_pretrained(tmp_path / "student").encode_prompt("red heart", "cpu", False)
    torch.testing.assert_close(embeds[:, : expected.shape[1]], expected)
