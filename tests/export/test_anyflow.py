"""A flow map of Wan in diffusers' own AnyFlowPipeline: our latents at every number of steps, from one folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from forms import cases

from stepfold.errors import UserError
from stepfold.export.anyflow import fitted
from stepfold.jobs.exporting import run_export
from stepfold.jobs.sampling import run_sample
from stepfold.sampling.flow_map import sample_flow_map
from stepfold.students.card import read_card
from stepfold.students.loading import load_student

from .conftest import relative, start

StudentOf = Callable[..., Path]


def unused(i: int) -> torch.Tensor:
    raise AssertionError("the sampler is deterministic")


@pytest.mark.parametrize("lora", cases((0, 4), short=[0]))
def test_diffusers_draws_our_latents_at_every_number_of_steps(student_of: StudentOf, tmp_path: Path, lora: int) -> None:
    """At its scheduler's own noise levels; a network whose target is not what the scheduler says draws others."""
    folder = student_of("wan", lora, sampler="flow_map")
    out = run_export(folder, "anyflow", tmp_path / "any", force=False)
    teacher, student, _ = load_student(folder, "cpu")
    card, pipe = read_card(out), DiffusionPipeline.from_pretrained(out)
    assert type(pipe).__name__ == card.pipeline == "AnyFlowPipeline" and list(card.calls) == list(range(1, 9))
    assert type(pipe.scheduler).__name__ == card.scheduler == "FlowMapEulerDiscreteScheduler"
    pipe.set_progress_bar_config(disable=True)
    whole = pipe(card.example, latents=start((1, *teacher.latent_shape)), output_type="pt", **card.calls[2]).frames
    assert whole.shape[1] == teacher.frames and whole.isfinite().all()
    noise, condition = start((1, *teacher.latent_shape)), teacher.encode([card.example])

    def ours(steps: int, told: bool = True) -> torch.Tensor:
        network: Any = student
        embedder = network.target_embedder
        network.target_embedder = embedder if told else None
        times = card.recipe.times_for(steps)
        x0 = sample_flow_map(network, 0.5 * noise, condition, torch.ones(1), times, unused, 0.5)
        network.target_embedder = embedder
        return x0 / 0.5

    for steps in (1, 2, 3, 4, 7, 8):
        made = pipe(card.example, latents=noise, output_type="latent", return_dict=False, **card.calls[steps])[0]
        assert relative(made, ours(steps)) < 1e-4, steps
    assert relative(ours(4, told=False), ours(4)) > 1e-3
    text = (out / "README.md").read_text()
    assert "AnyFlowPipeline.from_pretrained" in text and "takes 1 to 8 steps" in text and "one time" not in text


def test_stepfold_itself_refuses_it_in_one_line(student_of: StudentOf, tmp_path: Path) -> None:
    out = run_export(student_of("wan", sampler="flow_map"), "anyflow", tmp_path / "any", force=False)
    with pytest.raises(UserError, match=r"an export for diffusers' AnyFlowPipeline, as its README says; give the stud"):
        run_sample(out, ["a cat"], steps=4, seed=0, guidance=None, device="cpu")


def test_what_cannot_be_told_both_times_is_refused(student_of: StudentOf, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--to anyflow is for students of Wan, and this one's is a StableDiffusion3Pip"
    ):
        run_export(student_of("sd3", sampler="flow_map"), "anyflow", tmp_path / "x", force=False)
    with pytest.raises(UserError, match=r"--to anyflow is for flow maps that jump from any time to any other; train"):
        run_export(student_of("wan"), "anyflow", tmp_path / "x", force=False)


def test_a_wan_that_is_told_a_time_for_each_token_is_refused(student_of: StudentOf, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--to anyflow is for students of Wan 2\.1: .* a time for each token"):
        run_export(student_of("wan 2.2 ti2v", sampler="flow_map"), "anyflow", tmp_path / "x", force=False)


def test_the_fit_is_exact_and_a_narrow_network_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    h, e = (torch.randn(6, width, generator=generator, dtype=torch.float64) for width in (8, 5))
    e[0] = 0
    torch.testing.assert_close(h @ fitted(h, e).T, e)
    with pytest.raises(UserError, match=r"too narrow for 6 target times .* use --to pipeline --steps 4"):
        fitted(h[:, :4], e)
