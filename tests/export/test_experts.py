"""Students of a pipeline of two networks: each sample goes to the one that its time picks, and a LoRA is two files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_wan22
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

from stepfold.config import TeacherSettings
from stepfold.errors import UserError
from stepfold.export.lora import export_lora
from stepfold.export.onnx import export_onnx
from stepfold.export.pipeline import export_pipeline
from stepfold.export.single_file import export_single_file
from stepfold.sampling.consistency import sample_consistency
from stepfold.students.loading import load_merged, load_student
from stepfold.students.whole import new_student
from stepfold.teachers.loading import load_teacher
from stepfold.training.processes import Processes, shard

from .conftest import relative, start

StudentOf = Callable[..., Path]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny.save(tiny_wan22.make_a14b, tmp_path_factory.mktemp("teacher") / "pipeline")
    return load_teacher(TeacherSettings(source=str(folder), height=16, width=32, frames=5, max_tokens=24), "cpu")


def test_a_time_picks_its_network(teacher: Any) -> None:
    """From the boundary up, as the pipeline does, a rounded boundary too; rows come back in their order."""
    experts = teacher.transformer
    high, low = experts.transformer, experts.transformer_2
    shares = experts.shares(torch.tensor([840.0, 100.0, 999.0, 839.99995, 839.9]))
    assert [(network is high, rows.tolist()) for network, rows in shares] == [(True, [0, 2, 3]), (False, [1, 4])]
    x, text = torch.randn(5, 4, 2, 2, 4), torch.randn(5, 24, 24)
    times = torch.tensor([900.0, 100.0, 999.0, 850.0, 700.0])
    (made,) = experts(x, times, text, return_dict=False)
    for i, network in enumerate((high, low, high, high, low)):
        row = slice(i, i + 1)
        torch.testing.assert_close(made[row], network(x[row], times[row], text[row], return_dict=False)[0])


def test_features_are_those_of_the_network_that_is_called(teacher: Any) -> None:
    x, t, scale = 0.5 * torch.randn(3, *teacher.latent_shape), torch.tensor([1.5, 0.3, 1.45]), torch.ones(3)
    condition = teacher.encode(["red heart", "a cat", "ghost"])
    maps = teacher.features(x, t, condition, scale)
    assert [m.shape[-1] for m in maps] == list(teacher.feature_widths)
    for i in range(3):
        row = slice(i, i + 1)
        alone = teacher.features(x[row], t[row], condition.rows(row), scale[row])
        for whole, one in zip(maps, alone, strict=True):
            torch.testing.assert_close(whole[row], one)


def test_a_lora_of_two_networks_is_two_files(student_of: StudentOf, tmp_path: Path) -> None:
    """Plain diffusers loads each where the README says; merged they are the same, and one file is refused."""
    folder = student_of("wan 2.2 a14b", 4)
    card, readme = json.loads((folder / "stepfold.json").read_text()), (folder / "README.md").read_text()
    load = (
        'pipe.load_lora_weights("FOLDER", weight_name="transformer_2_lora.safetensors", load_into_transformer_2=True)'
    )
    assert load in readme
    teacher, student, read = load_student(folder, "cpu")
    noise, condition = start((1, *teacher.latent_shape)), teacher.encode(["red heart"])
    rest = torch.full((1,), read.recipe.guidance), read.recipe.times[2], lambda step: 0.5 * noise, 0.5
    with torch.no_grad():
        ours = sample_consistency(student, 0.5 * noise, condition, *rest) / 0.5
        merged = sample_consistency(load_merged(folder, "cpu")[1], 0.5 * noise, condition, *rest) / 0.5
    assert relative(merged, ours) < 1e-4

    pipe: Any = WanPipeline.from_pretrained(card["teacher"])
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    pipe.set_progress_bar_config(disable=True)

    def drawn() -> torch.Tensor:
        torch.manual_seed(0)
        state = torch.get_rng_state()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "diffusers.schedulers.scheduling_flow_match_euler_discrete.randn_tensor", lambda *a, **k: noise
            )
            made = pipe(["red heart"], latents=noise, output_type="latent", return_dict=False, **card["calls"]["2"])[0]
        torch.set_rng_state(state)
        return made

    pipe.load_lora_weights(folder)
    first = drawn()
    pipe.load_lora_weights(folder, weight_name="transformer_2_lora.safetensors", load_into_transformer_2=True)
    both = drawn()
    assert relative(both, ours) < 1e-4 < 1e-2 < relative(first, ours)

    export_pipeline(folder, tmp_path / "whole")
    whole: Any = WanPipeline.from_pretrained(tmp_path / "whole")
    assert whole.config.boundary_ratio == 0.84
    pipe = whole
    pipe.set_progress_bar_config(disable=True)
    assert relative(drawn(), ours) < 1e-4
    with pytest.raises(UserError, match="has another LoRA for transformer_2; use the folder, as its README says"):
        export_lora(folder, tmp_path / "lora.safetensors")


def test_what_takes_one_network_is_refused(student_of: StudentOf, teacher: Any, tmp_path: Path) -> None:
    folder = student_of("wan 2.2 a14b")
    with pytest.raises(UserError, match="has 2 networks, and an onnx graph here holds one; use --to pipeline"):
        export_onnx(folder, tmp_path / "onnx")
    with pytest.raises(UserError, match="Experts"):
        export_single_file(folder, tmp_path / "file")
    with pytest.raises(UserError, match="Experts embeds its time in several of its parts"):
        new_student(teacher, two_times=True)
    with pytest.raises(UserError, match=r"teacher\.lora is for a pipeline of one network.*; merge"):
        load_teacher(TeacherSettings(source=teacher.source, lora=[{"source": "x.safetensors"}]), "cpu")
    with pytest.raises(UserError, match=r"training\.shard spreads one network.*=none"):
        shard(new_student(teacher), Processes(2, 0))


class Pair(Processes):
    """Two processes, of which the other's numbers are known."""

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value + torch.ones_like(value)


def test_a_network_that_one_process_did_not_call_gets_the_others_gradients() -> None:
    called, not_called = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))
    called.grad = torch.tensor([2.0, 3.0])
    Pair(2, 0).sum_gradients([called, not_called])
    assert called.grad.tolist() == [3, 4] and not_called.grad is not None and not_called.grad.tolist() == [1, 1, 1]
