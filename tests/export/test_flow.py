"""Students that are a velocity: their folders in plain diffusers, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepfold.commands.protocols import open_drawer
from stepfold.errors import UserError
from stepfold.evaluation.pipelines import Drawer, draw
from stepfold.export.pipeline import model_card
from stepfold.jobs.exporting import run_export
from stepfold.jobs.sampling import run_sample
from stepfold.sampling.consistency import sample_consistency
from stepfold.sampling.flow import sample_flow
from stepfold.sampling.flow_map import sample_flow_map
from stepfold.students.card import CARD, Card, read_card
from stepfold.students.loading import load_student
from stepfold.teachers.loading import load_any_pipeline
from stepfold.teachers.sana import SanaTeacher

from .conftest import relative, start

StudentOf = Callable[..., Path]
FAMILIES = ("sana", "first sana", "sprint", "sd3", "flux", "flux2", "flux2 dev", "sd1", "lumina", "wan")
FAMILIES += ("qwen", "chroma", "longcat", "krea")
FAMILIES += ("ernie-image", "prx", "z-image")
PIPE = "pipe = diffusers.DiffusionPipeline.from_pretrained(folder)"


def unused(i: int) -> Tensor:
    raise AssertionError("the sampler is deterministic")


@pytest.mark.long
def test_a_flow_student_of_every_family_draws_our_latents_in_plain_diffusers(
    student_of: StudentOf, fresh: Callable, tmp_path: Path
) -> None:
    """Called as the card says; the schedulers of SD3 (shift 3) and FLUX (by size) would shift the levels again."""
    students = {family: student_of(family, sampler="flow") for family in FAMILIES}
    students["sd3 lora"] = run_export(student_of("sd3", 4, sampler="flow"), "pipeline", tmp_path / "sd3", force=False)
    drawn = fresh({name: (folder, PIPE) for name, folder in students.items()}, 4)
    for name, folder in students.items():
        teacher, student, card = load_student(folder, "cpu")
        assert card.recipe.sampler == "flow", name
        noise = 0.5 * start((1, *teacher.latent_shape))
        rest = teacher.encode([card.example]), torch.tensor([2.0]), card.recipe.times_for(4), unused, 0.5
        assert relative(teacher.made(drawn[name]), sample_flow(student, noise, *rest) / 0.5) < 1e-4, name


def test_sanas_flow_student_is_a_sana_pipeline_of_one_scale(student_of: StudentOf) -> None:
    """SanaSprintPipeline would add fresh noise at each step."""
    teacher, _, card = load_student(student_of("sana", sampler="flow"), "cpu")
    assert type(teacher) is SanaTeacher and card.pipeline == "SanaPipeline"
    assert card.recipe.taught == (2.0,) and card.calls[8]["guidance_scale"] == 1
    assert card.calls[4]["sigmas"] == pytest.approx([1, 0.75, 0.5, 0.25])
    text = model_card(card)
    assert "It is sampled in Euler steps." in text and "sigmas=[1.0, 0.875," in text
    assert "For four steps: `sigmas=[1.0, 0.75, 0.5, 0.25]`." in text


def test_levels_are_shifted_once(student_of: StudentOf) -> None:
    """With the teacher's own shift left in the scheduler the pictures would be others."""
    folder = student_of("sd3", sampler="flow")
    card = read_card(folder)
    times = torch.tensor(card.recipe.times[4], dtype=torch.float64)
    sigmas = torch.tensor(card.calls[4]["sigmas"], dtype=torch.float64)
    even = torch.tensor([1, 0.75, 0.5, 0.25], dtype=torch.float64)
    torch.testing.assert_close(sigmas, times.sin() / (times.sin() + times.cos()))
    torch.testing.assert_close(sigmas, 3 * even / (1 + 2 * even))
    pipe = load_any_pipeline(folder, "cpu")
    assert pipe.scheduler.config.shift == 1 and not pipe.scheduler.config.stochastic_sampling
    drawer = Drawer(pipe, card.calls)
    once = draw(drawer, ["a cat"], [0], 4, None, seed=0)
    pipe.scheduler = type(pipe.scheduler)(shift=3.0)
    assert (draw(drawer, ["a cat"], [0], 4, None, seed=0) - once).abs().max() > 0.01


@pytest.mark.parametrize(("trained", "asked"), [("consistency", "flow"), ("flow", "consistency"), ("flow", "flow_map")])
def test_another_sampler_is_refused_with_the_reason(student_of: StudentOf, trained: str, asked: str) -> None:
    folder, options = student_of("sd1", sampler=trained), dict(steps=2, seed=0, guidance=None, device="cpu")
    (picture,) = run_sample(folder, ["a cat"], **options)  # type: ignore[arg-type]
    (same,) = run_sample(folder, ["a cat"], sampler=trained, **options)  # type: ignore[arg-type]
    assert picture.tobytes() == same.tobytes()
    with pytest.raises(UserError, match=rf"--sampler is {asked}, .* trained for {trained} sampling: .*; leave"):
        run_sample(folder, ["a cat"], sampler=asked, **options)  # type: ignore[arg-type]


def test_steps_that_the_card_does_not_list_are_refused(student_of: StudentOf) -> None:
    with pytest.raises(UserError, match="has times for 1, 2, 3, 4, 5, 6, 7, 8 steps, not for 9"):
        run_sample(student_of("sd1"), ["a cat"], steps=9, seed=0, guidance=None, device="cpu")


def test_times_are_the_cards_not_the_installed_classs(student_of: StudentOf, tmp_path: Path) -> None:
    folder = run_export(student_of("sana"), "pipeline", tmp_path / "student", force=False)
    options = dict(steps=2, seed=0, guidance=None, device="cpu")
    (before,) = run_sample(folder, ["a cat"], **options)  # type: ignore[arg-type]
    values = json.loads((folder / CARD).read_text())
    values["recipe"]["times"]["2"][1] = 0.5
    (folder / CARD).write_text(json.dumps(values))
    (after,) = run_sample(folder, ["a cat"], **options)  # type: ignore[arg-type]
    assert before.tobytes() != after.tobytes()


@pytest.mark.parametrize("lora", [0, 4])
def test_a_flow_map_in_plain_diffusers_is_a_consistency_model(student_of: StudentOf, tmp_path: Path, lora: int) -> None:
    """The second embedder is zero at target 0, and lies beside the network for our own sampler."""
    folder = student_of("sd3", lora, sampler="flow_map")
    teacher, student, card = load_student(folder, "cpu")
    assert student.reads_target and card.recipe.sampler == "flow_map"
    whole = run_export(folder, "pipeline", tmp_path / "whole", force=False)
    pipe, card = load_any_pipeline(whole, "cpu"), read_card(whole)
    assert pipe.scheduler.config.stochastic_sampling and sorted(card.calls) == [1, 2, 4]
    assert "samples it as a consistency model" in model_card(card)
    noise, rest = start((1, *teacher.latent_shape)), (teacher.encode(["a cat"]), torch.tensor([2.0]))
    torch.manual_seed(7)
    theirs = pipe("a cat", latents=noise, output_type="latent", return_dict=False, **card.calls[2])[0]
    torch.manual_seed(7)
    fresh = 0.5 * torch.randn(noise.shape)
    times = teacher.student_times(2, "consistency")
    ours = sample_consistency(student, 0.5 * noise, *rest, times, lambda i: fresh, 0.5) / 0.5
    assert relative(theirs, ours) < 1e-4
    jumps = sample_flow_map(student, 0.5 * noise, *rest, card.recipe.times_for(2), unused, 0.5) / 0.5
    assert relative(theirs, jumps) > 0.01
    _, again, _ = load_student(whole, "cpu")
    same = sample_flow_map(again, 0.5 * noise, *rest, card.recipe.times_for(2), unused, 0.5) / 0.5
    assert relative(same, jumps) < 1e-4
    (picture,) = run_sample(folder, ["a cat"], steps=2, seed=0, guidance=None, device="cpu")
    options = dict(steps=2, seed=0, guidance=None, device="cpu", sampler="consistency")
    (other,) = run_sample(folder, ["a cat"], **options)  # type: ignore[arg-type]
    assert picture.tobytes() != other.tobytes()


def test_a_card_of_the_first_version_is_made_whole(student_of: StudentOf, tmp_path: Path) -> None:
    """It had no recipe and no calls: `push` was a KeyError."""
    folder = run_export(student_of("sana"), "pipeline", tmp_path / "student", force=False)
    now = read_card(folder)
    old = {name: getattr(now, name) for name in ("teacher", "height", "width", "max_tokens", "config")}
    old |= {"guidance": 2.0, "sigma_data": 0.5, "times": {"1": [1.57]}}
    (folder / CARD).write_text(json.dumps(old))
    _, _, card = load_student(folder, "cpu")
    assert card.recipe == now.recipe
    with pytest.raises(UserError, match=r"does not say how plain diffusers calls .* stepfold export STUDENT --to pipe"):
        model_card(card)
    with pytest.raises(UserError, match=r"does not say how plain diffusers calls"):
        open_drawer(folder, "cpu")
    whole = run_export(folder, "pipeline", tmp_path / "whole", force=False)
    again: Card = read_card(whole)
    assert again.recipe == now.recipe and again.calls == now.calls and again.pipeline == now.pipeline
    assert type(DiffusionPipeline.from_pretrained(whole)).__name__ == again.pipeline
