"""An exported student is what plain diffusers makes of its folder."""

import ast
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import SanaSprintPipeline
from PIL import Image
from torch import Tensor, nn

from stepfold.config import Config, load_config, validate
from stepfold.errors import UserError
from stepfold.export.pipeline import model_card, save_student
from stepfold.jobs.sampling import run_sample
from stepfold.maths.routes import few_step_times
from stepfold.randomness import normal
from stepfold.sampling.consistency import sample_consistency
from stepfold.students.card import CARD, read_card
from stepfold.students.loading import load_student
from stepfold.students.sana import SanaStudent
from stepfold.students.whole import new_student
from stepfold.teachers.conventions import conventions
from stepfold.teachers.sana import SanaTeacher

PROMPTS = ["red heart", "dog on blue background", "pizza on a white plate"]
MAX_TOKENS = 40
GUIDANCE = 4.5


@pytest.fixture(scope="module")
def config(tiny_sana: Path) -> Config:
    return validate(
        {
            "prompts": "prompts.txt",
            "teacher": {"source": str(tiny_sana), "width": 64, "max_tokens": MAX_TOKENS},
            "training": {"steps": 77, "prompts_per_step": 5},
        }
    )


@pytest.fixture(scope="module")
def teacher(tiny_sana: Path) -> SanaTeacher:
    return SanaTeacher(tiny_sana, width=64, max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def student(teacher: SanaTeacher) -> SanaStudent:
    """Not its teacher any more, and with a guidance embedding that matters."""
    student = new_student(teacher)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        nn.init.normal_(student.transformer.time_embed.guidance_embedder.linear_2.weight, std=0.2)
    return student


@pytest.fixture(scope="module")
def folder(
    teacher: SanaTeacher, student: SanaStudent, config: Config, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("run") / "student"
    teacher.release_decoder()  # as during training; the folder must have the autoencoder all the same
    save_student(teacher, student, folder, config, tiny.recipe(teacher, "consistency", GUIDANCE), PROMPTS[0])
    return folder


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    pipe = SanaSprintPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain_diffusers(pipe: Any, prompts: list[str], noise: Tensor, steps: int, **options: Any) -> Any:
    return pipe(
        prompts, num_inference_steps=steps, intermediate_timesteps=1.3 if steps == 2 else None, height=32, width=64,
        use_resolution_binning=False, max_sequence_length=MAX_TOKENS, latents=noise, **options,
    ).images  # fmt: skip


def ours(teacher: SanaTeacher, student: SanaStudent, noise: Tensor, steps: int, guidance: float, seed: int) -> Tensor:
    generator, sigma_data = torch.Generator().manual_seed(seed), teacher.sigma_data
    return sample_consistency(
        student,
        sigma_data * noise,
        teacher.encode(PROMPTS),
        torch.full((len(noise),), guidance),
        few_step_times(steps),
        lambda i: sigma_data * torch.randn(noise.shape, generator=generator),
        sigma_data,
    )


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("guidance", [GUIDANCE, 7.0])
def test_plain_diffusers_gives_the_latents_of_our_sampler(
    teacher: SanaTeacher, student: SanaStudent, pipe: Any, steps: int, guidance: float
):
    noise = torch.randn(3, *teacher.latent_shape)
    options = dict(guidance_scale=guidance, output_type="latent", generator=torch.Generator().manual_seed(5))
    expected = plain_diffusers(pipe, PROMPTS, noise, steps, **options)
    x0 = ours(teacher, student, noise, steps, guidance, seed=5)
    torch.testing.assert_close(x0 / teacher.sigma_data, expected, rtol=0, atol=1e-5)
    other = ours(teacher, student, noise, steps, guidance + 2, seed=5)
    assert (other - x0).abs().max() > 1e-3


def test_a_student_read_back_is_the_student(teacher: SanaTeacher, student: SanaStudent, folder: Path):
    again, network, card = load_student(folder, "cpu")
    assert again.latent_shape == teacher.latent_shape == (4, 8, 16)
    noise = torch.randn(3, *teacher.latent_shape)
    a, b = ours(teacher, student, noise, 2, GUIDANCE, 0), ours(again, network, noise, 2, GUIDANCE, 0)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert card.recipe.guidance == GUIDANCE and card.recipe.times[2] == tuple(few_step_times(2))
    torch.testing.assert_close(again.decode(a), teacher.decode(a), rtol=0, atol=1e-6)


def pixels(pictures: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture).astype(int) for picture in pictures])


def test_the_sample_command_draws_the_pipelines_picture(folder: Path, pipe: Any):
    pictures = run_sample(folder, PROMPTS, steps=1, seed=3, guidance=None, device="cpu")
    assert [picture.size for picture in pictures] == [(64, 32)] * 3
    noise = torch.stack([normal((4, 8, 16), 3, "sample", i) for i in range(3)])
    expected = plain_diffusers(pipe, PROMPTS, noise, 1, guidance_scale=GUIDANCE)
    difference = np.abs(pixels(pictures) - pixels(expected))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    alone = run_sample(folder, PROMPTS[:1], steps=1, seed=3, guidance=None, device="cpu")
    assert np.abs(pixels(alone) - pixels(pictures[:1])).max() <= 1


def test_a_scale_that_it_was_not_taught_is_refused(folder: Path):
    with pytest.raises(
        UserError, match=r"--guidance is 7, but this student was taught at 4\.5 alone.*leave --guidance out"
    ):
        run_sample(folder, PROMPTS[:1], steps=1, seed=3, guidance=7.0, device="cpu")
    assert len(run_sample(folder, PROMPTS[:1], steps=1, seed=3, guidance=GUIDANCE, device="cpu")) == 1


def test_nothing_in_the_folder_is_unsafe_and_the_card_holds_the_recipe(folder: Path, config: Config):
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".md", ".jinja", ".txt"}
    card = json.loads((folder / CARD).read_text())
    assert Config.model_validate(card["config"]) == config
    assert (card["height"], card["width"], card["max_tokens"]) == (32, 64, MAX_TOKENS)
    assert not any(part.name.startswith(".") for part in folder.parent.iterdir())  # no half-written leftovers


def code_block(readme: str) -> str:
    found = re.search(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_cards_code_runs_as_it_stands(folder: Path, pipe: Any):
    scope: dict[str, Any] = {}
    exec(code_block((folder / "README.md").read_text()).replace("FOLDER", str(folder)), scope)
    noise = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    (expected,) = plain_diffusers(pipe, PROMPTS[:1], noise, 1, guidance_scale=GUIDANCE)
    assert np.array_equal(np.asarray(scope["image"]), np.asarray(expected))


@pytest.mark.parametrize("prompt", ['say "hi"', "a\\", "{x} \\n {}", "”quotes“ 'n' ```", "tab\there", "ünï 🦊"])
def test_any_prompt_can_stand_in_the_card(folder: Path, prompt: str):
    card = read_card(folder).model_copy(update={"example": prompt})
    tree = ast.parse(code_block(model_card(card)))
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert prompt in strings


def test_the_card_shows_what_was_measured(folder: Path):
    card = read_card(folder)
    row = dict(accuracy=0.876543, clip_score=27.31, fd=0.01234, diversity=0.5)
    protocol = {"n": 480, "hash": "0123456789abcdef"}
    text = model_card(card, {"protocol": protocol, "teacher": {"20": row}, "student": {"1": row | {"accuracy": 0.5}}})
    assert "| teacher, 20 steps | 0.877 | 27.3 | 0.0123 | 0.500 |" in text
    assert "| student, 1 step | 0.500 | 27.3 | 0.0123 | 0.500 |" in text
    assert "| CLIP score | FD (n = 480) | Diversity |" in text
    assert "77 optimiser steps of 5 trajectories" in text and "with consistency on the teacher's own" in text
    assert "accuracy" not in model_card(card)


def test_the_card_says_what_a_matched_student_was_trained_for(folder: Path) -> None:
    card = read_card(folder)
    settings, sections = (
        load_config("decoupled").model_dump(mode="json"),
        ("objective", "space", "rollout", "evaluation"),
    )
    matched = card.model_copy(update={"config": card.config | {name: settings[name] for name in sections}})
    assert "`num_inference_steps=1`. The student was trained for 4 steps." in model_card(matched)
    assert "was trained for" not in model_card(card)


def test_the_card_says_how_the_pipeline_counts(folder: Path, teacher: SanaTeacher):
    card = read_card(folder)
    assert card.conventions == conventions(teacher, {k: card.recipe.times[k] for k in card.calls})
    text, named = model_card(card), "guidance scale s and weight w"
    assert (
        f"| {named} | {card.conventions[named]} |" in text
        and "| noise levels, 4 steps | 1, 0.7071, 0.5, 0.2929; no shift |" in text
    )
    assert "In other tools" not in model_card(card.model_copy(update={"conventions": {}}))  # an earlier card


def test_a_student_is_replaced_whole_or_not_at_all(
    teacher: SanaTeacher, student: SanaStudent, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr("stepfold.export.pipeline.model_card", lambda *_, **__: 1 / 0)  # after the weights are written
        with pytest.raises(ZeroDivisionError):
            save_student(teacher, student, folder, config, tiny.recipe(teacher, "consistency", GUIDANCE), "fox")
    assert [path.name for path in tmp_path.rglob("*")] == ["student", "old.txt"]
    save_student(teacher, student, folder, config, tiny.recipe(teacher, "consistency", GUIDANCE), "fox")
    assert not (folder / "old.txt").exists() and (folder / "model_index.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
