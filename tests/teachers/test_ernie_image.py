"""What ERNIE-Image alone has: a prompt enhancer, no limit to prompts, and blocks whose tokens come first."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import ErnieImagePipeline
from tiny_ernie_image import make_ernie_image

from stepfold.config import TeacherSettings
from stepfold.students.saving import save_whole
from stepfold.students.whole import new_student
from stepfold.teachers.ernie_image import ErnieImageTeacher
from stepfold.teachers.loading import load_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(make_ernie_image, tmp_path_factory.mktemp("ernie") / "pipeline")


def load(folder: Path, **changes: int) -> ErnieImageTeacher:
    teacher = load_teacher(TeacherSettings(source=str(folder), height=16, width=32, **changes), "cpu")
    assert isinstance(teacher, ErnieImageTeacher)
    return teacher


def test_the_prompt_enhancer_is_neither_loaded_nor_saved(folder: Path, tmp_path: Path) -> None:
    teacher = load(folder)
    assert json.loads((folder / "model_index.json").read_text())["pe"][1] == "Ministral3ForCausalLM"
    assert teacher.pipe.pe is None and teacher.pipe.pe_tokenizer is None
    save_whole(teacher, new_student(teacher), tmp_path / "student", tiny.recipe(teacher))
    assert not (tmp_path / "student" / "pe").exists()
    assert ErnieImagePipeline.from_pretrained(tmp_path / "student").pe is None


def test_a_prompt_is_cut_where_the_settings_say(folder: Path, tmp_path: Path) -> None:
    """The call takes no length: the tokenizer has it, that of a saved student too."""
    assert load(folder).max_tokens == 1024
    teacher = load(folder, max_tokens=6)
    assert teacher.encode(["red heart", "a"]).mask.sum(1).tolist() == [6, 2]
    save_whole(teacher, new_student(teacher), tmp_path / "student", tiny.recipe(teacher))
    (text,) = ErnieImagePipeline.from_pretrained(tmp_path / "student").encode_prompt("red heart", "cpu")
    assert torch.equal(text, teacher.encode(["red heart"]).embeds[0])


def test_features_are_of_each_row(folder: Path) -> None:
    teacher = load(folder)
    x, t = 0.5 * torch.randn(2, *teacher.latent_shape), torch.tensor([0.5, 1.2])
    condition, scale = teacher.encode(["red heart", "a cat"]), torch.ones(2)
    both = teacher.features(x, t, condition, scale)
    alone = teacher.features(x[1:], t[1:], condition.rows(slice(1, 2)), scale[1:])
    assert {len(maps) for maps in both} == {2}
    for maps, single, width in zip(both, alone, teacher.feature_widths, strict=True):
        assert maps.shape[2] == width
        torch.testing.assert_close(maps[1:, :32], single[:, :32], rtol=1e-4, atol=1e-4)
