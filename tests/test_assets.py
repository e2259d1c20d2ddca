"""The bundled teacher, its judge and its prompts are what they are said to be."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import SanaPipeline

from stepfold import assets
from stepfold.config import TeacherSettings
from stepfold.evaluation.judge import load_judge
from stepfold.evaluation.measure import measure, student_sampler, teacher_sampler
from stepfold.evaluation.protocol import EMOJI
from stepfold.jobs.sampling import run_sample
from stepfold.prompts.reading import open_prompts
from stepfold.sections import LoraSettings
from stepfold.students.loading import load_student
from stepfold.teachers.loading import load_teacher


def test_under_32_mb_and_nothing_that_can_execute():
    files = [path for path in assets.EMOJI.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 32e6
    assert sum(path.stat().st_size for path in assets.STUDENT.rglob("*")) < 12e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ".jinja"}
    card = (assets.TEACHER / "README.md").read_text()
    assert "SIL Open Font License" in card
    assert "accuracy" in card


def test_at_least_300_names_each_in_the_prompts():
    judge = load_judge(assets.JUDGE, "cpu")
    assert len(set(judge.names)) == len(judge.names) >= 300
    prompts = open_prompts(assets.PROMPTS)
    text = "\n".join(prompts.prompt(i) for i in range(len(prompts)))
    assert [name for name in judge.names if name not in text] == []


def test_plain_diffusers_draws_with_its_default_instruction_and_guidance(tmp_path: Path):
    """Only the size is given: diffusers' default of 1024 pixels is no size for a 64-pixel model."""
    pipe = SanaPipeline.from_pretrained(assets.TEACHER)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["red heart on blue background", "green apple on yellow background"]
    generator = torch.Generator().manual_seed(0)
    pictures = pipe(
        prompts, height=64, width=64, use_resolution_binning=False, output_type="pt", generator=generator
    ).images
    assert torch.is_tensor(pictures)
    red, green, blue = pictures[0, :, 32, 32]
    assert red > 0.6 > 0.5 > max(green, blue)
    assert pictures[0, 2, 2, 2] > 0.5 > pictures[0, 0, 2, 2]  # blue corner
    assert pictures[1, :2, 2, 2].min() > 0.5 > pictures[1, 2, 2, 2]  # yellow corner


def test_the_bundled_style_is_a_lora_that_diffusers_loads_as_the_teacher_does():
    """`emoji-fluent`, under 1 MB, with its source and licence; merged by us it is the network of plain diffusers."""
    assert assets.STYLE.stat().st_size < 1e6
    card = (assets.STYLE.parent / "README.md").read_text()
    assert "Microsoft" in card and "MIT" in card and "license: mit" in card
    settings = TeacherSettings(source="emoji", max_tokens=32)
    plain, styled = (
        load_teacher(settings.model_copy(update={"lora": loras}), "cpu").transformer.state_dict()
        for loras in ((), (LoraSettings(source="emoji-fluent"),))
    )
    pipe = SanaPipeline.from_pretrained(assets.TEACHER)
    pipe.load_lora_weights(assets.STYLE.parent, weight_name=assets.STYLE.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    theirs = pipe.transformer.state_dict()
    assert theirs.keys() == styled.keys()
    for name, value in styled.items():
        torch.testing.assert_close(value, theirs[name].to(value), rtol=0, atol=1e-5)
    assert any((styled[name] - plain[name]).abs().max() > 1e-2 for name in styled)


def test_the_bundled_student_draws_what_it_is_asked_for():
    prompts = ["red heart on blue background", "green apple on yellow background"]
    heart, apple = run_sample(Path("emoji-student"), prompts, steps=1, seed=1, guidance=None, device="cpu")
    (red, green, blue), heart_corner, apple_corner = (
        picture.getpixel(at) for picture, at in ((heart, (32, 32)), (heart, (2, 2)), (apple, (2, 2)))
    )
    assert red > 150 > 130 > max(green, blue)
    assert heart_corner[2] > 130 > heart_corner[0]
    assert min(apple_corner[:2]) > 130 > apple_corner[2]


def test_the_bundled_student_is_as_good_as_its_card_says():
    teacher, student, card = load_student(Path("emoji-student"), "cpu")
    sampler = student_sampler(student, card.recipe, 1, 0)
    judge = load_judge(assets.JUDGE, "cpu")
    protocol = replace(EMOJI, n=100, guidance=3.0)
    rows = measure(judge, protocol, teacher, {"1": sampler}, torch.device("cpu"))
    assert rows["1"].accuracy >= 0.8  # the card has the figure for n = 500


@pytest.fixture(scope="module")
def scores() -> dict[str, float]:
    torch.manual_seed(0)
    teacher = load_teacher(TeacherSettings(source="emoji", max_tokens=32), "cpu")
    samplers = {str(k): teacher_sampler(teacher, k) for k in (20, 1)}
    judge = load_judge(assets.JUDGE, "cpu")
    rows = measure(judge, replace(EMOJI, n=40), teacher, samplers, torch.device("cpu"))
    return {name: row.accuracy for name, row in rows.items()}


@pytest.mark.long
def test_the_teacher_draws_what_it_is_asked_for_and_one_step_is_visibly_worse(scores: dict[str, float]):
    assert scores["20"] >= 0.7  # the card has the figure for n = 2000
    assert scores["1"] <= scores["20"] - 0.2
