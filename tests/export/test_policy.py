"""A policy student draws our latents in plain diffusers: one step in a stock network, several with our scheduler."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from forms import cases

from stepfold.config import load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.export.files import OTHER_FILE
from stepfold.export.pipeline import model_card, save_student
from stepfold.jobs.distilling import run_distill
from stepfold.jobs.exporting import run_export
from stepfold.jobs.sampling import run_sample
from stepfold.maths.policy import Policy
from stepfold.sampling.policy import sample_policy
from stepfold.sampling.recipe import make_recipe, policy_of
from stepfold.students.card import read_card
from stepfold.students.loading import load_student
from stepfold.students.policy_scheduler import PolicyScheduler
from stepfold.students.starting import make_student
from stepfold.teachers.loading import load_teacher

from .conftest import relative, start

FAMILIES: dict[str, Callable[[], Any]] = {"sana": tiny.make_sana, "sd3": tiny.make_sd3, "flux": tiny.make_flux}
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(family, steps, LoRA rank) -> a policy student's folder, with weights that moved."""
    found: dict[tuple[str, int, int], Path] = {}
    teachers: dict[str, Path] = {}

    def make(family: str, steps: int, rank: int = 0) -> Path:
        if (family, steps, rank) not in found:
            folder = tmp_path_factory.mktemp("policy")
            source = teachers.setdefault(family, folder / "teacher")
            if not source.exists():
                tiny.save(FAMILIES[family], source)
            found[family, steps, rank] = finished(source, folder / "student", steps, rank)
        return found[family, steps, rank]

    return make


def finished(source: Path, folder: Path, steps: int, rank: int) -> Path:
    changes = ["objective=policy", "space.kind=policy", f"policy.steps={steps}", "policy.nodes=4"]
    sizes = ["teacher.height=32", "teacher.width=32", "teacher.max_tokens=24", f"student.lora={rank}"]
    config = load_config("default", [*changes, *sizes, f"teacher.source={source}", "prompts=prompts.txt"])
    teacher = load_teacher(config.teacher, "cpu")
    student = make_student(teacher, config.student, config.teacher, policy_of(config, teacher))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    save_student(teacher, student, folder, config, make_recipe(config, teacher, (2.0,), 2.0), "red heart")
    return folder


def latents_of(folder: Path) -> torch.Tensor:
    """Ours, of the student in a folder."""
    teacher, student, card = load_student(folder, "cpu")
    ((_, times),) = card.recipe.times.items()
    rest = (teacher.encode([card.example]), torch.tensor([card.recipe.guidance]), times, lambda i: torch.empty(0))
    return sample_policy(student, 0.5 * start((1, *teacher.latent_shape)), *rest, 0.5) / 0.5


def in_diffusers(folder: Path, scheduler: Any = None) -> torch.Tensor:
    """As the card calls the folder's pipeline."""
    teacher, _, card = load_student(folder, "cpu")
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if scheduler:
        pipe.scheduler = scheduler
    ((_, call),) = card.calls.items()
    noise = teacher.given(start((1, *teacher.latent_shape)))
    return teacher.made(pipe(card.example, latents=noise, output_type="latent", return_dict=False, **call)[0])


@pytest.mark.parametrize(
    ("family", "rank"), cases([(f, r) for f in FAMILIES for r in (0, 4)], [("sana", 0), ("flux", 4)])
)
def test_one_step_is_a_stock_network(made: Made, tmp_path: Path, family: str, rank: int) -> None:
    folder = made(family, 1, rank)
    out = run_export(folder, "pipeline", tmp_path / "one", force=False, steps=1)
    teacher, student, card = load_student(out, "cpu")
    assert card.recipe.sampler == "flow" and student.policy is None and not (out / "policy_scheduler").exists()
    assert teacher.network_channels()[0] == teacher.network_channels()[1]
    found, wanted = in_diffusers(out), latents_of(folder)
    assert relative(found, wanted) < 1e-4
    assert "a policy for exactly 1 step." in model_card(card)


@pytest.mark.parametrize(
    ("family", "rank"), cases([(f, r) for f in FAMILIES for r in (0, 4)], [("sd3", 4), ("flux", 0)])
)
def test_three_steps_are_our_schedulers(made: Made, tmp_path: Path, family: str, rank: int) -> None:
    """A LoRA becomes a whole pipeline first; the folder's own scheduler cannot take the network's output."""
    folder = made(family, 3, rank)
    wanted = latents_of(folder)
    out = run_export(folder, "pipeline", tmp_path / "whole", force=False)
    assert relative(latents_of(out), wanted) < 1e-4
    scheduler: Any = PolicyScheduler.from_pretrained(out, subfolder="policy_scheduler")
    assert relative(in_diffusers(out, scheduler), wanted) < 1e-4
    with pytest.raises(ValueError, match=r"trained for 3 steps, not 2; give num_inference_steps=3"):
        scheduler.set_timesteps(2)
    with pytest.raises(RuntimeError):
        in_diffusers(out)
    text = model_card(read_card(out))
    assert "gives 4 velocities at a time" in text and 'subfolder="policy_scheduler"' in text
    assert ("--out WHOLE" in model_card(read_card(folder))) == (rank > 0)
    for card in (folder / "README.md", out / "README.md"):
        assert OTHER_FILE not in card.read_text() and "follows the policy in diffusers" in card.read_text()


def test_other_exports_and_steps_are_refused(made: Made, tmp_path: Path) -> None:
    folder = made("sd3", 3, 4)
    for to, said in (("lora", "gives 4 velocities at a time"), ("onnx", "export it with --to pipeline, or")):
        with pytest.raises(UserError, match=said):
            run_export(folder, to, tmp_path / f"x{'.safetensors' * (to == 'lora')}", force=False)
    with pytest.raises(UserError, match=r"each of this student's 3 steps has its own mean"):
        run_export(folder, "pipeline", tmp_path / "x", force=False, steps=3)
    with pytest.raises(UserError, match=r"each of this student's 3 steps has its own mean .*; leave --steps out"):
        run_export(folder, "pipeline", tmp_path / "x", force=False, steps=1)  # "give --steps 3", it said
    with pytest.raises(UserError, match="no place in a LoRA file"):
        run_export(folder, "lora", tmp_path / "x.safetensors", force=False, steps=3)
    options: Any = dict(seed=0, guidance=None, device="cpu")
    assert run_sample(folder, ["a cat"], steps=3, **options)
    with pytest.raises(UserError, match="trained for policy sampling: it gives several F"):
        run_sample(folder, ["a cat"], steps=3, sampler="flow", **options)
    (folder / "policy_head.safetensors").rename(folder / "elsewhere")
    with pytest.raises(UserError, match=r"policy_head.safetensors does not load"):
        load_student(folder, "cpu")
    (folder / "elsewhere").rename(folder / "policy_head.safetensors")


def test_a_run_makes_such_a_student(tiny_sana: Path, prompts_file: Path, tmp_path: Path) -> None:
    """From settings to a folder that is sampled and becomes a stock network, with guidance told to no network."""
    changes = [
        "objective=policy", "space.kind=policy", "policy.steps=1", "policy.nodes=3", "policy.states=2",
        "training.steps=2", "training.prompts_per_step=2", "training.precision=no", "training.walk_precision=no",
        "optimiser.name=adamw", "optimiser.lr=1e-2", "space.guidance=[2.0]", "evaluation.n=2",
        "evaluation.steps=[4, 1]",
        "teacher.height=32", "teacher.width=32", "teacher.max_tokens=24", "training.preview_every=9",
    ]  # fmt: skip
    config = load_config("default", changes, teacher__source=str(tiny_sana), prompts=str(prompts_file))
    run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
    card = read_card(tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert list(report["student"]) == ["1"]  # the run ended in an error here, since the preset has other steps too
    assert card.recipe.policy == Policy(3, 32, card.recipe.policy.shift) and list(card.recipe.times) == [1]  # type: ignore[union-attr]
    assert "pi-Flow, arXiv:2510.14974" in model_card(card)
    one = run_export(tmp_path / "run", "pipeline", tmp_path / "one", force=False, steps=1)
    assert relative(in_diffusers(one), latents_of(tmp_path / "run" / "student")) < 1e-4
