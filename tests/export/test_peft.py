"""`--to lora --keys peft`: the folder that PeftModel.from_pretrained loads, and no other network comes of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forms import cases
from peft import PeftModel

from stepfold.config import TeacherSettings
from stepfold.errors import UserError
from stepfold.jobs.exporting import run_export
from stepfold.students.loading import load_merged, load_student
from stepfold.teachers.loading import load_teacher
from stepfold.teachers.once import compute_afresh

from .conftest import relative, start

StudentOf = Callable[..., Path]
FAMILIES = ("sd3", "sana", "flux", "sd1", "sdxl", "lumina", "wan", "z-image", "qwen")


@pytest.mark.parametrize("family", cases(FAMILIES, short=["sd3", "sana", "flux"]))
def test_the_loaded_network_is_the_merged_student(family: str, student_of: StudentOf, tmp_path: Path) -> None:
    student = student_of(family, lora=4)
    out = run_export(student, "lora", tmp_path / "adapter", force=False, keys="peft")
    merged, _, card = load_merged(student, "cpu")
    plain = load_teacher(TeacherSettings(**card.config["teacher"]), "cpu")
    compute_afresh(plain.transformer.modules())  # the teacher's own weights do not change, but here they do
    x, t, condition = start((1, *plain.latent_shape)), torch.tensor([1.1]), plain.encode([card.example])
    scale = torch.tensor([2.0]) if plain.student_reads_guidance else None
    before = plain.predict(plain.transformer, x, t, condition, scale)
    network = PeftModel.from_pretrained(plain.transformer, str(out))
    with torch.no_grad():
        wanted = merged.predict(merged.transformer, x, t, condition, scale)
        found = plain.predict(network, x, t, condition, scale)
        fused = plain.predict(network.merge_and_unload(), x, t, condition, scale)
    assert relative(found, wanted) < 1e-5 and relative(fused, wanted) < 1e-5 < 1e-2 < relative(before, wanted)


def test_the_folder_is_the_same_each_time(student_of: StudentOf, tmp_path: Path) -> None:
    student = student_of("sd3", lora=4)
    out = run_export(student, "lora", tmp_path / "adapter", force=False, keys="peft")
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == 4 and settings["target_modules"] == sorted(
        settings["target_modules"]
    )
    assert "PeftModel.from_pretrained(pipe.transformer, " in (out / "README.md").read_text()
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    run_export(student, "lora", out, force=True, keys="peft")
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=r"lacks pytorch_lora_weights\.safetensors; give the student's own folder"):
        load_student(out, "cpu")
    with pytest.raises(UserError, match=r"lacks pytorch_lora_weights\.safetensors; give the student's own folder"):
        run_export(out, "lora", tmp_path / "again.safetensors", force=False)


@pytest.mark.long
def test_a_folded_flow_map_too(student_of: StudentOf, tmp_path: Path) -> None:
    """The change of the time embedder's last layer is there as well."""
    out = run_export(
        student_of("sd3", 4, sampler="flow_map"), "lora", tmp_path / "a", force=False, steps=2, keys="peft"
    )
    layers = json.loads((out / "adapter_config.json").read_text())["target_modules"]
    assert "time_text_embed.timestep_embedder.linear_2" in layers
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert not scheduler["stochastic_sampling"]  # Euler steps
