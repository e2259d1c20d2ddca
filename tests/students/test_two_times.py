"""Students told two times: the teacher for every target time at first, and the same target wherever it is needed."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_ernie_image
import tiny_prx
import tiny_qwen
import tiny_z_image
import torch
from forms import cases
from torch import Tensor, nn

from stepfold.api import distill_module, load_module_student
from stepfold.config import load_config
from stepfold.errors import UserError
from stepfold.maths.blocks import compiled_blocks
from stepfold.maths.formulations import euler_step
from stepfold.maths.tangent import BACKENDS, total_derivative
from stepfold.students.lora import load_lora, lora_student, save_lora
from stepfold.students.saving import save_whole
from stepfold.students.two_times import load_embedder
from stepfold.students.whole import as_student, new_student
from stepfold.teachers.contract import Condition, Student, deepcopy_sharing
from stepfold.teachers.loading import family_of
from stepfold.teachers.module import ModuleTeacher
from stepfold.training.processes import blocks_of

FAMILIES: dict[str, Callable[[], Any]] = {
    "sana": tiny.make_sana,
    "sana, to 1000": partial(tiny.make_sana, timestep_scale=1.0),
    "sprint": tiny.make_sprint,
    "sd3": tiny.make_sd3,
    "flux dev": tiny.make_flux,
    "flux schnell": partial(tiny.make_flux, guidance_embeds=False),
    "flux 2 klein": tiny.make_flux2_klein,
    "flux 2 dev": tiny.make_flux2,
    "lumina 2": tiny.make_lumina2,
    "wan": tiny.make_wan,
    "pixart": tiny.make_pixart,
    "sd 1": tiny.make_sd1,
    "sdxl": tiny.make_sdxl,
    "qwen image": tiny_qwen.make_qwen_image,
    "longcat": tiny_qwen.make_longcat,
    "krea 2": tiny_qwen.make_krea2,
    "ernie-image": tiny_ernie_image.make_ernie_image,
    "prx": tiny_prx.make_prx,
    "z-image": tiny_z_image.make_z_image,
}
PROMPTS = ["red heart", "a cat", "ghost"]
Batch = tuple[Tensor, Tensor, Condition, Tensor]


def load(folder: Path) -> Any:
    frames = 5 if "Wan" in (folder / "model_index.json").read_text() else None
    return family_of(str(folder))(folder, height=32, width=32, max_tokens=24, frames=frames)


@pytest.fixture(scope="module", params=cases(FAMILIES, short=["sana", "sd3", "flux dev", "wan", "sd 1"]))
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(tiny.save(FAMILIES[request.param], tmp_path_factory.mktemp("family") / "pipeline"))


@pytest.fixture(scope="module")
def sana(tiny_sana: Path) -> Any:
    return load(tiny_sana)


def batch_of(teacher: Any) -> Batch:
    """x / sigma_data, t, condition, guidance."""
    x = torch.randn(3, *teacher.latent_shape)
    return x, torch.tensor([1.5, 1.1, 0.6]), teacher.encode(PROMPTS), torch.tensor([3.0, 4.5, 6.0])


TARGETS = torch.tensor([1.2, 0.4, 0.1])


def lively(student: Student) -> Student:
    """One whose target times matter, as after some training."""
    with torch.no_grad():
        student.get_parameter("target_embedder.linear_2.weight").normal_(std=0.1)
        if isinstance(head := student.get_submodule("variance_head"), nn.Linear):
            head.weight.normal_()
        else:
            student.get_parameter("variance_head.target.weight").normal_()
    return student


def students(teacher: Any) -> list[Student]:
    """Of either kind."""
    kinds = [new_student(teacher, two_times=True)]
    return [*kinds, lora_student(teacher, 2, two_times=True)] if teacher.loads_lora else kinds


def test_it_starts_as_the_student_told_one_time_whatever_the_target(teacher: Any) -> None:
    """To the bit, the adaptive weight too, and by that as its teacher; stock parameters keep their names."""
    batch = batch_of(teacher)
    plain = [new_student(teacher), *([lora_student(teacher, 2)] if teacher.loads_lora else [])]
    for student, one in zip(students(teacher), plain, strict=True):
        assert student.reads_target and not one.reads_target
        assert one.state_dict().keys() <= student.state_dict().keys()
        expected, weight = one(*batch), one.log_variance(batch[1], batch[3])
        for target in (None, torch.zeros(3), TARGETS, torch.rand(3) * batch[1], batch[1]):
            assert torch.equal(student(*batch, target), expected)
            assert torch.equal(student.log_variance(batch[1], batch[3], target), weight)
        assert torch.equal(one(*batch, TARGETS), expected)  # told one time, it ignores the other


def test_the_target_matters_row_by_row_and_zero_is_none(teacher: Any) -> None:
    batch = batch_of(teacher)
    for student in map(lively, students(teacher)):
        with torch.no_grad():
            F, none = student(*batch, TARGETS), student(*batch)
            assert torch.equal(student(*batch, torch.zeros(3)), none)
            for row in range(3):
                assert (F[row] - none[row]).norm() > 1e-3 * none[row].norm()
            other = student(*batch, TARGETS * torch.tensor([1.0, 0.5, 1.0]))
            torch.testing.assert_close(other[[0, 2]], F[[0, 2]], rtol=1e-4, atol=1e-4)
            assert (other[1] - F[1]).norm() > 1e-4 * F[1].norm()
            weight = student.log_variance(batch[1], batch[3])
            assert torch.equal(student.log_variance(batch[1], batch[3], torch.zeros(3)), weight)
            assert (student.log_variance(batch[1], batch[3], TARGETS) - weight).abs().min() > 0


def test_a_jump_to_where_it_stands_is_none(sana: Any) -> None:
    """X(x, t, t) = x, to the bit."""
    x, t, *rest = batch_of(sana)
    F = lively(new_student(sana, two_times=True))(x, t, *rest, t)
    assert torch.equal(euler_step(0.5 * x, t, t, 0.5 * F), 0.5 * x)


def test_the_zero_layer_learns_first_and_what_lies_behind_it_then(teacher: Any) -> None:
    batch = batch_of(teacher)
    for student in students(teacher):
        first, last = (student.get_parameter(f"target_embedder.linear_{i}.weight") for i in (1, 2))
        optimiser = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1e-3)
        student(*batch, TARGETS).square().mean().backward()
        assert last.grad is not None and last.grad.any() and (first.grad is None or not first.grad.any())
        optimiser.step()
        optimiser.zero_grad()
        student(*batch, TARGETS).square().mean().backward()
        assert first.grad is not None and first.grad.any()


def gradients(student: Student, batch: Batch, targets: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Of a loss over several calls before one backward pass."""
    student.zero_grad()
    losses = [student(*batch, target).square().mean() for target in targets]
    torch.stack(losses).sum().backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def test_blocks_that_are_computed_again_see_the_same_target(teacher: Any) -> None:
    """Two calls with different targets, then one backward pass: each block's second forward is its first one."""
    batch, targets = batch_of(teacher), (TARGETS, 0.3 * TARGETS)
    for student in map(lively, students(teacher)):
        expected = gradients(student, batch, targets)
        student.recompute_blocks()
        student.train()
        found = gradients(student, batch, targets)
        assert found.keys() == expected.keys() and any(name.startswith("target_embedder") for name in found)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()))


def test_copies_are_independent(sana: Any) -> None:
    batch = batch_of(sana)
    for student in map(lively, students(sana)):
        frozen = [p for p in student.parameters() if not p.requires_grad]
        for other in (copy.deepcopy(student), deepcopy_sharing(student, frozen)):
            before = student(*batch, TARGETS)
            assert torch.equal(other(*batch, TARGETS), before)
            with torch.no_grad():
                other.get_parameter("target_embedder.linear_2.weight").mul_(-1)
            assert torch.equal(student(*batch, TARGETS), before) and not torch.equal(other(*batch, TARGETS), before)
            assert torch.equal(other(*batch), student(*batch))


def held(student: Student, batch: Batch, target: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """F of (x, t) with s held."""
    return lambda x, t: student(x, t, batch[2], batch[3].to(x), target)


def moved(student: Student, batch: Batch) -> Callable[[Tensor, Tensor], Tensor]:
    """F of (x, s) with t held."""
    return lambda x, s: student(x, batch[1].to(x), batch[2], batch[3].to(x), s)


def tangents(student: Student, batch: Batch, target: Tensor, backend: str, step: float) -> list[Tensor]:
    """dF/dt with s held, and dF/ds with t held."""
    still, one = torch.zeros_like(batch[0]), torch.ones_like(batch[1])
    both = (held(student, batch, target), batch[1]), (moved(student, batch), target)
    return [total_derivative(network, batch[0], at, still, one, backend, step).dF for network, at in both]


@pytest.mark.parametrize("backend", BACKENDS)
def test_tangents_in_either_time(backend: str) -> None:
    """Of every backend, against the definition in float64."""
    student = lively(new_student(ModuleTeacher(Own(), encode, (2,), time_part="embed"), two_times=True)).double()
    condition = encode(PROMPTS).to("cpu", torch.float64)
    batch = torch.randn(3, 2).double(), torch.tensor([1.5, 1.1, 0.6]).double(), condition, torch.ones(3).double()
    found = tangents(student, batch, TARGETS.double(), backend, 1e-5)
    at, h = (held(student, batch, TARGETS.double()), moved(student, batch)), 1e-5
    for network, time, ours in zip(at, (batch[1], TARGETS.double()), found, strict=True):
        with torch.no_grad():
            expected = (network(batch[0], time + h) - network(batch[0], time - h)) / (2 * h)
        assert expected.abs().min() > 1e-4
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tangents_of_a_transformer_agree(backend: str, sana: Any) -> None:
    student, batch = lively(new_student(sana, two_times=True)), batch_of(sana)
    expected = tangents(student, batch, TARGETS, "two_pass", 0.0)
    if backend == "block":
        student.recompute_blocks()
    for ours, theirs in zip(tangents(student, batch, TARGETS, backend, 1e-3), expected, strict=True):
        assert theirs.norm() > 1e-2
        assert (ours - theirs).norm() < (1e-2 if backend == "finite_difference" else 1e-4) * theirs.norm()


def test_a_target_read_late_or_not_at_all_is_noticed(sana: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above can fail: a second embedding made at the wrong moment, or forgotten."""
    batch, student = batch_of(sana), lively(new_student(sana, two_times=True))
    expected = gradients(student, batch, (TARGETS, 0.3 * TARGETS))

    class Late:
        """Reads the last target that was set, whenever a block is computed."""

        target: Tensor | None = None

        def __call__(self, network: Any, embedder: Any, s: Tensor | None, call: Callable[[], Any]) -> Any:
            if self.target is None:
                for block in network.transformer_blocks:
                    block.register_forward_hook(lambda part, args, out: out + embedder(self.target)[:, None])
            self.target = s
            return call()

    for told in (Late(), lambda network, embedder, s, call: call()):
        with monkeypatch.context() as patch:
            patch.setattr("stepfold.students.sana.told", told)
            found = gradients(copy.deepcopy(student), batch, (TARGETS, 0.3 * TARGETS))
        name = "transformer.transformer_blocks.0.attn1.to_q.weight"
        assert not torch.allclose(found[name], expected[name], rtol=1e-3, atol=0)


@pytest.mark.long
def test_compiled_blocks_and_networks_follow_the_target(sana: Any) -> None:
    """Compiled code is made at the first call, and must not keep its target."""
    student, batch, targets = lively(new_student(sana, two_times=True)), batch_of(sana), (TARGETS, 0.3 * TARGETS)
    expected = gradients(student, batch, targets)
    with compiled_blocks(blocks_of(student), backend="aot_eager_decomp_partition"):
        found = gradients(student, batch, targets)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
    own = lively(new_student(ModuleTeacher(Own(), encode, (2,), time_part="embed"), two_times=True))
    small = torch.randn(3, 2), torch.tensor([1.5, 1.1, 0.6]), encode(PROMPTS), torch.ones(3)
    plain = [own(*small, target) for target in (*targets, None)]
    with compiled_blocks([own], backend="aot_eager_decomp_partition"):  # as a run does that finds no blocks in it
        for _ in range(2):
            for target, value in zip((*targets, None), plain, strict=True):
                torch.testing.assert_close(own(*small, target), value, rtol=1e-5, atol=1e-6)


def trained(student: Student) -> Student:
    """With other weights than at first, where they are its own."""
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return lively(student)


def test_it_is_saved_and_read_back(teacher: Any, tmp_path: Path) -> None:
    """And plain diffusers' network, without the embedder, is the consistency function."""
    batch, student = batch_of(teacher), trained(new_student(teacher, two_times=True))
    save_whole(teacher, student, tmp_path / "student", tiny.recipe(teacher))
    pipeline = load(tmp_path / "student")
    again = as_student(pipeline, two_times=True)
    load_embedder(again, tmp_path / "student")
    with torch.no_grad():
        torch.testing.assert_close(again(*batch, TARGETS), student(*batch, TARGETS), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(as_student(pipeline)(*batch), student(*batch), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(again(*batch), again(*batch, TARGETS), rtol=1e-3, atol=1e-3)


def test_a_lora_is_saved_and_read_back(teacher: Any, tmp_path: Path) -> None:
    if not teacher.loads_lora:
        pytest.skip("it has no LoRA students")
    batch, student = batch_of(teacher), trained(lora_student(teacher, 2, two_times=True))
    save_lora(teacher, student, tmp_path, tiny.recipe(teacher))
    again = load_lora(teacher, tmp_path, 2, two_times=True)
    with torch.no_grad():
        torch.testing.assert_close(again(*batch, TARGETS), student(*batch, TARGETS), rtol=1e-5, atol=1e-5)
    assert {name for name in student.shared if "target" in name} == set()
    (tmp_path / "target_embedder.safetensors").unlink()
    with pytest.raises(UserError, match=r"target_embedder\.safetensors does not load .*; copy the student"):
        load_lora(teacher, tmp_path, 2, two_times=True)


def test_a_network_that_embeds_its_time_in_each_block_is_refused(tmp_path: Path) -> None:
    teacher = load(tiny.save(tiny.make_dit, tmp_path / "pipeline"))
    with pytest.raises(UserError, match=r"DiTTransformer2DModel embeds its time in several of its parts") as caught:
        new_student(teacher, two_times=True)
    assert "\n" not in str(caught.value) and "student.times" in str(caught.value)


class Own(nn.Module):
    """Whose time has an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 8))
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        words = self.first(torch.cat([x, condition.embeds[:, 0]], 1))
        return self.last(torch.tanh(words + self.embed(t[:, None])))


def encode(prompts: Any) -> Condition:
    return Condition.whole(torch.tensor([[[len(prompt) / 10]] for prompt in prompts]))


def test_a_network_of_ones_own_names_the_part(prompts_file: Path, tmp_path: Path) -> None:
    settings = ["student.times=two", "training.steps=2", "training.prompts_per_step=2", "training.precision=no"]
    with pytest.raises(UserError, match=r"give its name to ModuleTeacher as time_part, or leave student\.times at one"):
        distill_module(ModuleTeacher(Own(), encode, (2,)), prompts_file, tmp_path / "none", settings, quiet=True)
    with pytest.raises(UserError, match=r"a Own has no part 'nowhere' that ends in a linear layer"):
        new_student(ModuleTeacher(Own(), encode, (2,), time_part="nowhere"), two_times=True)
    teacher = ModuleTeacher(Own(), encode, (2,), time_part="embed")
    student = distill_module(teacher, prompts_file, tmp_path / "run", settings, quiet=True)
    again = load_module_student(teacher, tmp_path / "run")
    batch = torch.randn(3, 2), torch.tensor([1.5, 1.0, 0.5]), encode(PROMPTS), torch.ones(3)
    assert torch.equal(again(*batch, TARGETS), student.eval()(*batch, TARGETS))
    assert not torch.equal(lively(again)(*batch, TARGETS), again(*batch))


def test_the_setting_is_one_or_two() -> None:
    assert load_config("default", ["student.times=two"], prompts="x").student.times == "two"
    with pytest.raises(UserError, match=r"student\.times"):
        load_config("default", ["student.times=three"], prompts="x")
