"""A flow map folded for one number of steps draws our latents in plain diffusers, told one time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from forms import cases
from safetensors.torch import load_file

from stepfold.commands.own_teacher import choose
from stepfold.config import load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.export.beside import card_of
from stepfold.export.folded import matrices
from stepfold.export.pipeline import model_card
from stepfold.jobs.distilling import run_distill
from stepfold.jobs.exporting import run_export
from stepfold.jobs.sampling import run_sample
from stepfold.sampling.flow_map import sample_flow_map
from stepfold.students.card import read_card
from stepfold.students.folding import least_change
from stepfold.students.loading import load_student
from stepfold.students.lora import lora_student
from stepfold.teachers.loading import load_teacher

from .conftest import relative, start

StudentOf = Callable[..., Path]
FAMILIES = ("sana", "first sana", "sprint", "sd3", "flux", "sd1", "sdxl", "pixart", "retimed sd3", "retimed flux")
STEPS = (1, 2, 4, 8)
PIPE = "pipe = diffusers.DiffusionPipeline.from_pretrained(folder)"


def unused(i: int) -> torch.Tensor:
    raise AssertionError("the sampler is deterministic")


def latents_of(folder: Path, steps: int, told: bool = True) -> torch.Tensor:
    """Ours, by the student told two times; or one that is not told them after all."""
    teacher, found, card = load_student(folder, "cpu")
    student: Any = found
    if not told:
        student.target_embedder = None
    noise = 0.5 * start((1, *teacher.latent_shape))
    rest = teacher.encode([card.example]), torch.tensor([card.recipe.guidance]), card.recipe.times_for(steps)
    return sample_flow_map(student, noise, *rest, unused, 0.5) / 0.5


def in_diffusers(folder: Path, steps: int) -> torch.Tensor:
    """As the card calls the folder's pipeline."""
    teacher, student, card = load_student(folder, "cpu")
    assert not student.reads_target and not (folder / "target_embedder.safetensors").exists()
    assert card.recipe.sampler == "flow" and list(card.calls) == list(card.recipe.times) == [steps]
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    noise = teacher.given(start((1, *teacher.latent_shape)))
    made = pipe(card.example, latents=noise, output_type="latent", return_dict=False, **card.calls[steps])[0]
    return teacher.made(made)


@pytest.mark.parametrize("family", cases(FAMILIES, short=["sd3"]))
def test_a_folded_student_draws_our_latents_in_diffusers(student_of: StudentOf, tmp_path: Path, family: str) -> None:
    """At 1, 2, 4 and 8 steps, as the card calls it; a map that is not told its targets draws others.

    The network of a re-timed teacher counts to 1000 again, so that its scheduler is the usual one.
    """
    folder = student_of(family, sampler="flow_map")
    for steps in STEPS:
        out = run_export(folder, "pipeline", tmp_path / f"{steps}", force=False, steps=steps)
        assert relative(in_diffusers(out, steps), latents_of(folder, steps)) < 1e-4, steps
    assert relative(latents_of(folder, 4, told=False), latents_of(folder, 4)) > 1e-3


@pytest.mark.long
def test_folded_students_draw_our_latents_where_stepfold_is_not(
    student_of: StudentOf, fresh: Callable, tmp_path: Path
) -> None:
    maps = {family: student_of(family, sampler="flow_map") for family in FAMILIES}
    folded = {
        family: run_export(folder, "pipeline", tmp_path / family, force=False, steps=4)
        for family, folder in maps.items()
    }
    drawn = fresh({family: (folder, PIPE) for family, folder in folded.items()}, 4)
    for family, folder in maps.items():
        teacher, _, _ = load_student(folder, "cpu")
        assert relative(teacher.made(drawn[family]), latents_of(folder, 4)) < 1e-4, family


@pytest.mark.parametrize("family", cases(("sd3", "flux", "sd1", "wan", "first sana"), short=[]))
def test_a_lora_for_so_many_steps_draws_our_latents_in_the_teachers_pipeline(
    student_of: StudentOf, tmp_path: Path, family: str
) -> None:
    folder = student_of(family, 8, sampler="flow_map")
    teacher, _, card = load_student(folder, "cpu")
    out = run_export(folder, "lora", tmp_path / "4.safetensors", force=False, steps=4)
    before = load_file(folder / "pytorch_lora_weights.safetensors")
    assert len(load_file(out)) == len(before) + 2
    pipe: Any = DiffusionPipeline.from_pretrained(card.teacher)
    pipe.load_lora_weights(out.parent, weight_name=out.name)
    pipe.scheduler = teacher.lora_scheduler("flow")
    call = teacher.lora_call(card.recipe.times_for(4), card.recipe.guidance, "flow")
    told = card_of(out).read_text().split("```python\n")[1].split("```")[0]
    loading, _, sampling = told.rpartition(" = pipe(")
    said: dict[str, Any] = {}
    exec(loading.rpartition("\n")[0], said)  # our own card's
    assert all(f"    {name}={value!r}," in sampling for name, value in call.items())
    noise = teacher.given(start((1, *teacher.latent_shape)))
    for each in (pipe, said["pipe"]):
        each.set_progress_bar_config(disable=True)
        theirs = each(card.example, latents=noise, output_type="latent", return_dict=False, **call)[0]
        assert relative(teacher.made(theirs), latents_of(folder, 4)) < 1e-4


@pytest.mark.parametrize("objective", cases(("pair", "semigroup", "lagrange"), short=["pair"]))
def test_a_lora_that_was_trained_for_two_times_is_exported(first_sana: Path, tmp_path: Path, objective: str) -> None:
    """It begins as its teacher whatever the target, learns, and jumps as it did: merged, and as a file of two steps."""
    (tmp_path / "prompts.txt").write_text("\n".join(tiny.PROMPTS))
    rule = "later" if objective == "pair" else "uniform"
    changes = [
        "student.lora=4", "student.times=two", f"objective={objective}", f"target.rule={{{rule}: 0.7, zero: 0.3}}",
        "teacher.height=32", "teacher.width=32", "teacher.max_tokens=24", "space.route_steps=4", "training.steps=3",
        "training.precision=no", "training.walk_precision=no", "optimiser.name=adamw", "optimiser.lr=1e-2",
        "space.guidance=[1.0]", "evaluation.n=0", "training.preview_every=9", "space.filter_rule=off",
    ]  # fmt: skip
    config = load_config("default", changes, teacher__source=str(first_sana), prompts=str(tmp_path / "prompts.txt"))
    teacher = load_teacher(config.teacher, "cpu")
    condition, t, s = teacher.encode(["a cat", "ghost"]), torch.tensor([1.3, 0.7]), torch.tensor([0.9, 0.1])
    x = start((2, *teacher.latent_shape))
    begun = lora_student(teacher, 4, two_times=True)(x, t, condition, torch.ones(2), s)
    torch.testing.assert_close(
        0.5 * begun, teacher.velocity(0.5 * x, t, condition, torch.ones(2)), rtol=1e-4, atol=1e-5
    )
    run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
    folder = tmp_path / "run" / "student"
    told, untold = (latents_of(folder, 2, told=told) for told in (True, False))
    assert relative(untold, told) > 1e-5  # its second embedder has learned
    merged = run_export(folder, "pipeline", tmp_path / "merged", force=False)
    assert relative(latents_of(merged, 2), told) < 1e-4
    out = run_export(folder, "lora", tmp_path / "2.safetensors", force=False, steps=2)
    pipe: Any = DiffusionPipeline.from_pretrained(first_sana)
    pipe.load_lora_weights(out.parent, weight_name=out.name)
    pipe.scheduler = teacher.lora_scheduler("flow")
    card = read_card(folder)
    call = teacher.lora_call(card.recipe.times_for(2), card.recipe.guidance, "flow")
    pipe.set_progress_bar_config(disable=True)
    noise = start((1, *teacher.latent_shape))
    made = pipe(card.example, latents=noise, output_type="latent", return_dict=False, **call)[0]
    assert relative(made, told) < 1e-4


def test_a_single_file_of_a_folded_student_is_its_network(student_of: StudentOf, tmp_path: Path) -> None:
    folded = run_export(student_of("sd3", sampler="flow_map"), "pipeline", tmp_path / "4", force=False, steps=4)
    file = run_export(folded, "single-file", tmp_path / "4.safetensors", force=False)
    network = load_student(folded, "cpu")[1].get_submodule("transformer")
    weight: Any = network.get_submodule("time_text_embed.timestep_embedder.linear_2").weight
    assert any(value.shape == weight.shape and torch.equal(value, weight) for value in load_file(file).values())


def test_another_grid_is_refused(student_of: StudentOf, tmp_path: Path) -> None:
    folder = student_of("sd3", sampler="flow_map")
    out = run_export(folder, "pipeline", tmp_path / "4", force=False, steps=4)
    options = dict(seed=0, guidance=None, device="cpu")
    assert run_sample(out, ["a cat"], steps=4, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has times for 4 steps, not for 2"):
        run_sample(out, ["a cat"], steps=2, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"--sampler is flow_map, but this student was trained for flow"):
        run_sample(out, ["a cat"], steps=4, sampler="flow_map", **options)  # type: ignore[arg-type]
    text = model_card(read_card(out))
    assert "a flow map for exactly 4 steps" in text and "for these steps alone" in text
    with pytest.raises(UserError, match=r"for flow sampling, folded for 4 steps; fold the run's own student; leave"):
        run_export(out, "pipeline", tmp_path / "2", force=False, steps=2)


@pytest.mark.long
@pytest.mark.parametrize("family", ["sana", "sd3"])
def test_a_folded_students_card_tells_of_its_own_pipeline(
    student_of: StudentOf, tmp_path: Path, family: str, prompts_file: Path
) -> None:
    """Of Sana it told of Sana-Sprint's, whose network is told the scale and counts its time to 1."""
    out = run_export(student_of(family, sampler="flow_map"), "pipeline", tmp_path / "4", force=False, steps=4)
    said = read_card(out).conventions
    assert said["timesteps of the network"] == "in [0, 1000], noise at 1000"
    if family == "sana":
        assert "guidance_scale=1" in said["guidance scale s and weight w"]
        assert said["noise levels, 4 steps"] == "1, 0.75, 0.5, 0.25"
    card = read_card(out)
    settings = card.config | {"target": {"segments": {"1": 0.5, "4": 0.5}}, "prompts": str(prompts_file)}
    texts, chosen = choose(out, card.model_copy(update={"config": settings}), None, 2)  # two times are folded away
    assert len(texts) == 12 and len(chosen.index) == 2


@pytest.mark.long
def test_times_that_the_embedder_cannot_tell_apart_are_refused(student_of: StudentOf, tmp_path: Path) -> None:
    """Lumina reads times in [0, 1], and its config has no place to say otherwise."""
    folder = student_of("lumina", sampler="flow_map")
    run_export(folder, "pipeline", tmp_path / "2", force=False, steps=2)
    with pytest.raises(UserError, match=r"hardly tells the 8 times .* reads times in \[0, 1\]; export for fewer steps"):
        run_export(folder, "pipeline", tmp_path / "8", force=False, steps=8)
    with pytest.raises(UserError, match=r"WanPipeline takes no noise levels, and its scheduler's own are not this"):
        run_export(student_of("wan", sampler="flow_map"), "pipeline", tmp_path / "w", force=False, steps=4)


def test_a_flow_map_does_not_become_a_file_that_others_sample_otherwise(student_of: StudentOf, tmp_path: Path) -> None:
    """Unfolded, a LoRA or a single file would be a consistency model there; its README names the right one."""
    whole, lora = (student_of("sd3", rank, sampler="flow_map") for rank in (0, 8))
    for keys in (None, "comfy", "peft"):
        with pytest.raises(UserError, match=r"is a flow map, .* for 8 steps first: --to lora --steps 8"):
            run_export(lora, "lora", tmp_path / "x.safetensors", force=False, keys=keys)  # type: ignore[arg-type]
    for folder in (whole, lora):
        with pytest.raises(UserError, match=r"first: --to pipeline --steps 8, and export that folder --to single-file"):
            run_export(folder, "single-file", tmp_path / "x.safetensors", force=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="has all weights of its own and no LoRA"):
        run_export(whole, "lora", tmp_path / "x.safetensors", force=False)
    for folder, options in ((whole, "--to pipeline --steps 8"), (lora, "--to lora --steps 8")):
        assert f"stepfold export FOLDER {options}" in model_card(read_card(folder))
    folded = run_export(whole, "pipeline", tmp_path / "4", force=False, steps=4)
    assert "stepfold export" not in model_card(read_card(folded))


@pytest.mark.parametrize(
    ("rank", "asked", "times", "options"),
    [
        (8, [8, 4, 2, 1], (1, 2, 4, 8), "--to lora --steps 8"),
        (4, [8, 4, 2, 1], (1, 2, 4, 8), "--to pipeline --steps 8"),
        (0, [4], (1, 2, 4, 8), "--to pipeline --steps 4"),
        (8, [3], (1, 2), "--to lora --steps 2"),
        (8, [1], (1,), ""),
    ],
)
def test_which_fold_a_card_names(
    student_of: StudentOf, rank: int, asked: list[int], times: tuple[int, ...], options: str
) -> None:
    """For its first number of steps, as a LoRA where its rank has room; a map of one step needs none."""
    card = read_card(student_of("sd3", 4, sampler="flow_map"))
    config = card.config | {"student": {"lora": rank}, "evaluation": {"steps": asked}}
    recipe = card.recipe.model_copy(update={"times": {k: card.recipe.times[k] for k in times}})
    changed = card.model_copy(update={"config": config, "recipe": recipe})
    assert changed.folding == options
    if not options:
        changed.check_folded("lora")
    assert student_of("sd3") and not read_card(student_of("sd3")).folding


def test_what_cannot_be_folded_is_refused(student_of: StudentOf, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--steps is for flow maps, and this student is for consistency"):
        run_export(student_of("sd3"), "pipeline", tmp_path / "x", force=False, steps=4)
    folder = student_of("sd3", sampler="flow_map")
    with pytest.raises(UserError, match="has times for 1, 2, 3, 4, 5, 6, 7, 8 steps, not for 50"):
        run_export(folder, "pipeline", tmp_path / "x", force=False, steps=50)
    with pytest.raises(UserError, match=r"--steps folds a flow map with --to pipeline or lora"):
        run_export(folder, "onnx", tmp_path / "x", force=False, steps=4)
    with pytest.raises(UserError, match=r"has all weights of its own and no LoRA; use --to pipeline --steps 4"):
        run_export(folder, "lora", tmp_path / "x.safetensors", force=False, steps=4)
    lora = student_of("sd3", 4, sampler="flow_map")
    with pytest.raises(UserError, match=r"8 steps need a LoRA of rank 7 or more, and this one has 4"):
        run_export(lora, "lora", tmp_path / "x.safetensors", force=False, steps=8)


def test_the_least_change_that_gives_each_output() -> None:
    """Against the closed form of one condition, dW = (e - W h) h / |h|^2; any other change that does it is larger."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        h, e, weight = (torch.randn(n, m, dtype=torch.float64) for n, m in ((4, 16), (4, 8), (8, 16)))
        away = torch.randn(8, 16, dtype=torch.float64)
    change = least_change(weight, h, e)
    torch.testing.assert_close(h @ (weight + change).T, e, rtol=1e-12, atol=1e-12)
    one = least_change(weight, h[:1], e[:1])
    torch.testing.assert_close(one, torch.outer(e[0] - weight @ h[0], h[0]) / h[0].square().sum())
    away -= away @ torch.linalg.pinv(h) @ h
    torch.testing.assert_close(h @ (weight + change + away).T, e, rtol=1e-10, atol=1e-10)
    assert (change + away).norm() > change.norm()
    down, up = matrices(change, 6)
    assert down.shape == (6, 16) and up.shape == (8, 6)
    torch.testing.assert_close((up @ down).double(), change, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="hardly tells the 2 times of the steps apart"):
        least_change(weight, torch.stack([h[0], h[0] + 1e-7]), e[:2])
