"""Classifier-free guidance that acts between two noise levels alone."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from stepfold.config import TeacherSettings, load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.jobs.distilling import run_distill
from stepfold.maths.formulations import trigflow_time
from stepfold.students.card import read_card
from stepfold.teachers.loading import load_teacher


def teacher_of(folder: Path, **changed: Any) -> Any:
    return load_teacher(TeacherSettings(source=str(folder), height=32, width=32, max_tokens=24, **changed), "cpu")


def test_guidance_acts_inside_and_costs_half_outside(tiny_sana: Path) -> None:
    plain, teacher = teacher_of(tiny_sana), teacher_of(tiny_sana, guidance_interval=(0.2, 0.7))
    levels = torch.tensor([0.1, 0.3, 0.6, 0.9])
    x, t = 0.5 * torch.randn(4, *plain.latent_shape), trigflow_time(levels)
    condition, scale = plain.encode(["red heart", "a cat", "a dog", "rocket"]), torch.full((4,), 3.0)
    guided, alone = plain.velocity(x, t, condition, scale), plain.velocity(x, t, condition, None)
    found = teacher.velocity(x, t, condition, scale)
    torch.testing.assert_close(found, torch.where(torch.tensor([0, 1, 1, 0])[:, None, None, None] > 0, guided, alone))
    assert not torch.allclose(found, guided, rtol=1e-3) and not torch.allclose(found, alone, rtol=1e-3)
    rows: list[int] = []
    teacher.transformer.register_forward_hook(
        lambda module, args, kwargs, out: rows.append(len(out[0])), with_kwargs=True
    )
    teacher.velocity(x[[0, 3]], t[[0, 3]], condition.rows(torch.tensor([0, 3])), scale[:2])
    teacher.velocity(x[:2], t[:2], condition.rows(slice(2)), scale[:2])
    assert rows == [2, 4]


def test_a_student_remembers_it(tiny_sana: Path, prompts_file: Path, tmp_path: Path) -> None:
    config = load_config(
        "default",
        [
            f"teacher.source={tiny_sana}", f"prompts={prompts_file}", "teacher.height=32", "teacher.width=32",
            "teacher.max_tokens=24", "space.route_steps=4", "training.steps=1", "training.prompts_per_step=2",
            "teacher.guidance_interval=[0.2, 0.7]", "training.preview_every=1000", "objective=discrete",
        ],
    )  # fmt: skip
    run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
    settings = read_card(tmp_path / "run" / "student").teacher_settings()
    assert settings.guidance_interval == (0.2, 0.7)
    assert load_teacher(settings, "cpu").guided_times is not None


def test_what_has_no_such_guidance_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tiny.make_flux, tmp_path / "flux")
    with pytest.raises(UserError, match=r"guidance of '.*' is embedded, not classifier_free, .*; leave it out"):
        teacher_of(folder, guidance_interval=(0.2, 0.7))
    with pytest.raises(UserError, match="no interval; give the lower level first"):
        load_config("default", ["teacher.guidance_interval=[0.7, 0.2]"])
