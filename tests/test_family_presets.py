"""Presets of families: four-step LoRAs on one GPU."""

import inspect
import re
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import tiny_chroma
import tiny_qwen
import tiny_wan22
import tiny_z_image
from test_cli import Result

from stepfold.config import load_config, preset_names, preset_purpose
from stepfold.students.card import read_card
from stepfold.teachers.loading import FAMILIES
from stepfold.training.runs import read_metrics

PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "sana": "SanaPipeline",
    "lumina2": "Lumina2Pipeline",
    "wan": "WanPipeline",
    "flux2-klein": "Flux2KleinPipeline",
    "z-image": "ZImagePipeline",
    "qwen-image": "QwenImagePipeline",
    "chroma": "ChromaPipeline",
    "wan22-ti2v": "WanPipeline",
}
MAKERS = {
    "sd1": tiny.make_sd1, "sdxl": tiny.make_sdxl, "sd3": tiny.make_sd3, "flux": tiny.make_flux, "sana": tiny.make_sana,
    "lumina2": tiny.make_lumina2, "wan": tiny.make_wan, "flux2-klein": tiny.make_flux2_klein,
    "z-image": tiny_z_image.make_z_image, "qwen-image": tiny_qwen.make_qwen_image, "chroma": tiny_chroma.make_chroma,
    "wan22-ti2v": tiny_wan22.make_ti2v,
}  # fmt: skip
NAMES = [f"{family}-lora-4step" for family in PIPELINES]
SMALL = (
    "training.steps=1", "training.preview_every=9", "space.route_steps=2", "teacher.max_tokens=24", "student.lora=2",
    "training.precision=no", "training.walk_precision=no",
)  # fmt: skip


def test_these_families_have_one() -> None:
    assert {name for name in preset_names() if name.endswith("-lora-4step")} == set(NAMES)


@pytest.mark.parametrize("family", PIPELINES)
def test_its_settings_are_for_four_steps_on_one_card(family: str) -> None:
    name = f"{family}-lora-4step"
    config = load_config(name, teacher__source="x/y", prompts="p.txt")
    assert config.teacher.dtype == "bfloat16" and config.student.lora == 64 and config.training.checkpointing
    assert 0 < config.training.micro_batch <= 8 and config.training.prompts_per_step == 1
    continuous = family == "lumina2"  # the only one with timesteps in [0, 1]
    assert set(config.space.weights) == ({"generation", "endpoints"} if continuous else {"generation"})
    assert config.space.keep_first
    assert config.evaluation.steps == (4, 2, 1) and config.objective == "auto"
    call: Any = getattr(diffusers, PIPELINES[family]).__call__
    own = inspect.signature(call).parameters[FAMILIES[PIPELINES[family]].scale_argument].default
    assert config.space.guidance and own in config.space.guidance
    assert preset_purpose(name).endswith("on one GPU; counted, not measured on a published model.")
    text = (resources.files("stepfold") / "presets" / f"{name}.yaml").read_text()
    assert "`stepfold plan` measures" in " ".join(text.replace("#", "").split())


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("sdxl", marks=pytest.mark.long),
        pytest.param("flux", marks=pytest.mark.long),
        pytest.param("sd1", marks=pytest.mark.long),
        pytest.param("sd3", marks=pytest.mark.long),
        pytest.param("sana", marks=pytest.mark.long),
        pytest.param("lumina2", marks=pytest.mark.long),
        *(pytest.param(family, marks=pytest.mark.long) for family in list(PIPELINES)[6:]),
    ],
)
def test_a_run_of_it_makes_a_student_of_four_steps(family: str, tmp_path: Path, prompts_file: Path) -> None:
    teacher, out = tiny.save(MAKERS[family], tmp_path / "teacher"), tmp_path / "run"
    changes = [*SMALL, *(["teacher.frames=5"] if "wan" in family else [])]
    given = [part for change in changes if change != "student.lora=2" for part in ("--set", change)]
    common = ("--preset", f"{family}-lora-4step", "--teacher", teacher, "--prompts", prompts_file, "--quiet")
    result = Result(
        "distill", *common, "--size", 64 if family == "wan22-ti2v" else 32, "--lora", 2, "--out", out, *given
    )
    assert result.code == 0, result.err
    card = read_card(out)
    assert card.asked_steps == (4, 2, 1) and {1, 2, 4} <= set(card.calls)
    readme = (out / "student" / "README.md").read_text()
    assert "For two steps: " in readme
    used = readme.split("For two steps")[0]
    assert all(f"{name}={value!r}," in used for name, value in card.calls[4].items()), used
    if family == "sdxl":
        pictures = [tmp_path / f"{name}.png" for name in ("default", "four", "one")]
        for picture, steps in zip(pictures, ((), ("--steps", 4), ("--steps", 1)), strict=True):
            assert Result("sample", out, "red heart", *steps, "--out", picture).code == 0
        default, four, one = (picture.read_bytes() for picture in pictures)
        assert default == four != one


def test_a_number_of_steps_without_times_is_refused_before_the_run(
    tiny_sana: Path, prompts_file: Path, tmp_path: Path
) -> None:
    given = ("--teacher", tiny_sana, "--prompts", prompts_file, "--out", tmp_path / "run", "--quiet")
    result = Result(
        "distill", "--preset", "default", *given, "--set", "evaluation.steps=[9]", "--set", "teacher.max_tokens=24"
    )
    assert result.code == 2 and "evaluation.steps has 9, but a consistency student has times for 1, 2" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize("family", ["sdxl", "qwen-image"])
def test_the_pages_matching_runs_on_it(family: str, tmp_path: Path, prompts_file: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "four-step-lora.md").read_text()
    (block,) = re.findall(r"^```yaml\n(# matching\.yaml\n.*?)^```", page, re.DOTALL | re.MULTILINE)
    (file := tmp_path / "matching.yaml").write_text(block.replace("sdxl-lora", f"{family}-lora"))
    assert load_config(str(file)).fake.kind == "lora"
    teacher, out = tiny.save(MAKERS[family], tmp_path / "teacher"), tmp_path / "run"
    changes = (*SMALL[1:], "training.steps=3", "fake.head_start=1", "fake.updates=1", "fake.rank=2")
    given = [part for change in changes for part in ("--set", change)]
    common = ("--preset", file, "--teacher", teacher, "--prompts", prompts_file, "--quiet", "--size", 32)
    result = Result("distill", *common, "--out", out, *given)
    assert result.code == 0, result.err
    card = read_card(out)
    assert card.usual_steps == 4 and card.lora_rank == 2
    rows = read_metrics(out)
    assert rows[-1]["guidance_share"] > 0 and rows[-1]["grad_norm"] > 0
