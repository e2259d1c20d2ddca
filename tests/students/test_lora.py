"""LoRA students on convolutions too, and beside other students of the same teacher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from torch import Tensor, nn

from stepfold.config import load_config
from stepfold.errors import UserError
from stepfold.students.lora import is_pointwise, lora_student, save_lora
from stepfold.students.whole import as_student, new_student
from stepfold.teachers.contract import Student
from stepfold.teachers.loading import family_of
from stepfold.teachers.lora_merging import merge_lora

WITH_CONVOLUTIONS: dict[str, Callable[[], Any]] = {
    "sana": tiny.make_sana,
    "sprint": tiny.make_sprint,
    "sd 1": tiny.make_sd1,
    "sdxl": tiny.make_sdxl,
}


def load(make: Callable[[], Any], folder: Path) -> Any:
    source = tiny.save(make, folder / "pipeline")
    return family_of(str(source))(source, height=32, width=32, max_tokens=24)


def call(student: Student, teacher: Any) -> Tensor:
    torch.manual_seed(1)
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([1.2, 0.5])
    return student(x, t, teacher.encode((teacher.examples or ["red heart", "a cat"])[:2]), torch.tensor([4.0, 4.0]))


def matrices(student: nn.Module) -> list[Tensor]:
    return [p for name, p in student.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("family", WITH_CONVOLUTIONS)
def test_a_lora_on_convolutions_is_loaded_and_merged_by_plain_diffusers(family: str, tmp_path: Path) -> None:
    teacher = load(WITH_CONVOLUTIONS[family], tmp_path)
    student, linear = lora_student(teacher, 4, convolutions=True), lora_student(teacher, 4)
    assert all(p.ndim == 2 for p in matrices(linear)) and len(matrices(linear)) < len(matrices(student))
    on = {n.rsplit(".lora_A", 1)[0] for n, p in student.named_parameters() if "lora_A" in n and p.ndim == 4}
    assert on and all(is_pointwise(student.get_submodule(f"{name}.base_layer")) for name in on)
    with torch.no_grad():
        start = call(student, teacher)
        assert torch.equal(start, call(as_student(teacher), teacher))
        for name, parameter in student.named_parameters():
            if "lora_B" in name and parameter.ndim == 4:  # on convolutions alone
                parameter.normal_(std=0.1)
        expected = call(student, teacher)
        assert (expected - start).norm() > 1e-3 * start.norm()
        save_lora(teacher, student, tmp_path / "lora", tiny.recipe(teacher))
        pipe: Any = getattr(diffusers, type(teacher.pipe).__name__).from_pretrained(tmp_path / "pipeline")
        pipe.load_lora_weights(tmp_path / "lora")
        teacher.transformer, own = getattr(pipe, teacher.network_part), teacher.transformer
        torch.testing.assert_close(call(as_student(teacher), teacher), expected, rtol=1e-4, atol=1e-5)
        teacher.transformer = own
        merge_lora(teacher.pipe, str(tmp_path / "lora"), 1.0, lambda: None)
        torch.testing.assert_close(call(as_student(teacher), teacher), expected, rtol=1e-4, atol=1e-4)


def test_what_has_no_such_convolutions_says_so(tmp_path: Path) -> None:
    teacher = load(tiny.make_sd3, tmp_path)
    with pytest.raises(UserError, match=r"SD3Transformer2DModel has no 1 x 1 convolutions in its blocks; leave"):
        lora_student(teacher, 4, convolutions=True)
    assert lora_student(teacher, 4, convolutions=True, for_export=False).shared
    with pytest.raises(UserError, match=r"student\.lora_convolutions is for LoRA students; set student\.lora"):
        load_config("default", ["student.lora_convolutions=true"], prompts="x")


def test_a_network_that_is_thrown_away_needs_no_pipeline_that_loads_it(tmp_path: Path) -> None:
    teacher = load(tiny.make_pixart, tmp_path)
    with pytest.raises(UserError, match="PixArtSigmaPipeline loads no LoRA"):
        lora_student(teacher, 4)
    fake = lora_student(teacher, 4, convolutions=True, for_export=False)
    assert torch.equal(call(fake, teacher), call(as_student(teacher), teacher))
    assert matrices(fake) and all(p.requires_grad for p in matrices(fake))


KINDS: dict[str, Callable[[Any], Student]] = {
    "whole": new_student,
    "lora": lambda teacher: lora_student(teacher, 4, convolutions=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other_kind", KINDS)
def test_two_students_of_a_teacher_do_not_know_of_each_other(kind: str, other_kind: str, tiny_sana: Path) -> None:
    """As a student and a critic's network are trained: either alone moves, and no teacher."""
    teacher = family_of(str(tiny_sana))(tiny_sana, height=32, width=32, max_tokens=24)
    student, other = KINDS[kind](teacher), KINDS[other_kind](teacher)
    of_teacher = {p.data_ptr() for p in teacher.transformer.parameters()}
    for each, its_kind in ((student, kind), (other, other_kind)):
        state = each.state_dict()
        assert {name for name, value in state.items() if value.data_ptr() in of_teacher} == each.shared
        assert bool(each.shared) == (its_kind == "lora")
        assert all(not p.requires_grad for name, p in each.named_parameters() if name in each.shared)
    with torch.no_grad():
        before = call(student, teacher), call(as_student(teacher), teacher)
    optimiser = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        call(other, teacher).square().mean().backward()
        optimiser.step()
    assert all(p.grad is None for p in (*student.parameters(), *teacher.transformer.parameters()))
    with torch.no_grad():
        assert torch.equal(call(student, teacher), before[0])
        assert torch.equal(call(as_student(teacher), teacher), before[1])
        assert not torch.equal(call(other, teacher), before[0])
