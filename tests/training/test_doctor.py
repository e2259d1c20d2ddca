"""The doctor: a sound teacher passes, and each check fails on a teacher that is broken where the check looks."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from forms import cases
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepfold.config import TeacherSettings
from stepfold.spaces.generation import pairs_from, walk
from stepfold.spaces.records import Pairs
from stepfold.students.whole import new_student
from stepfold.teachers.conventions import conventions
from stepfold.teachers.loading import load_teacher
from stepfold.teachers.sana import SanaTeacher, trigflow_network
from stepfold.teachers.stable_diffusion import StableDiffusionXLTeacher
from stepfold.training import doctor
from stepfold.training.steepness import without_tangent
from stepfold.training.terms import terms_of


@pytest.fixture
def teacher(tiny_sana: Path) -> SanaTeacher:
    return load_teacher(TeacherSettings(source=str(tiny_sana), max_tokens=64), "cpu")


@pytest.fixture
def pairs(teacher: SanaTeacher) -> Pairs:
    condition = teacher.encode(doctor.PROMPTS)
    noise, route = 0.5 * torch.randn(4, *teacher.latent_shape), torch.tensor([[1.57, 1.2, 0.8, 0.4]]).expand(4, 4)
    guidance, keep = torch.full((4,), 4.5), torch.ones(4, dtype=torch.bool)
    return pairs_from(
        walk(teacher.velocity, noise, route, condition, guidance), condition, guidance, keep_first=False, keep=keep
    )


def test_sound_teacher_passes_every_check(tiny_sana: Path) -> None:
    findings = doctor.examine(TeacherSettings(source=str(tiny_sana), max_tokens=64), "cpu")
    assert [f for f in findings if not f.ok] == []
    assert len({f.check for f in findings}) == len(findings) == 29
    assert all(f.number and f.want for f in findings)
    said = conventions(load_teacher(TeacherSettings(source=str(tiny_sana), max_tokens=64), "cpu"))
    assert said.items() <= {f.check: f.number for f in findings}.items()


@pytest.mark.parametrize(
    ("dtype", "lora"),
    cases([("float32", 4), ("bfloat16", 0), ("bfloat16", 4)], short=[("float32", 4)]),
)
def test_it_looks_at_a_teacher_as_it_will_be_trained(tiny_sana: Path, dtype: Any, lora: int) -> None:
    settings = TeacherSettings(source=str(tiny_sana), max_tokens=64, dtype=dtype)
    findings = {finding.check: finding for finding in doctor.examine(settings, "cpu", lora)}
    assert [f for f in findings.values() if not f.ok] == [] and len(findings) == 29
    steps = findings["network = the pipeline's own, 4 calls"]
    assert steps.want == ("<= 1e-04" if dtype == "float32" else "<= 3e-01")
    assert 0 < float(steps.number.split()[-1]) < (1e-4 if dtype == "float32" else 0.05)
    assert findings["tangent backend, training.tangent=auto"].number.startswith("one_pass: ")
    moved, total = re.findall(r"\d+", findings["one step changes the weights"].number)
    assert int(moved) < int(total) and findings["one step changes the weights"].want == f">= {moved}"


def test_half_precision_excuses_no_wrong_wrapper(tiny_sana: Path) -> None:
    half = load_teacher(TeacherSettings(source=str(tiny_sana), max_tokens=64, dtype="bfloat16"), "cpu")
    assert sampler_check(half).ok
    wrong_null(half)
    assert not sampler_check(half).ok


def test_a_step_that_does_not_fit_into_memory_is_not_tried(
    teacher: SanaTeacher, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "free_bytes", lambda device: 2**20)
    (finding,) = doctor.one_step(new_student(teacher), pairs, teacher)
    assert finding.ok and "not run: all weights and AdamW need" in finding.number and "--lora" in finding.want


def sampler_check(teacher: SanaTeacher) -> doctor.Finding:
    condition, guidance = teacher.encode(doctor.PROMPTS), torch.full((4,), 4.5)
    return doctor.own_loop(teacher, doctor.PROMPTS, condition, guidance)[0]


def wrong_time(teacher: SanaTeacher) -> None:
    teacher.predict = partial(trigflow_network, time_scale=0.9)


def wrong_mask(teacher: SanaTeacher) -> None:
    teacher.null_mask = "prompt"


def wrong_null(teacher: SanaTeacher) -> None:
    teacher._null = teacher._encode(["something"], None)
    teacher._null_trimmed = teacher._null.trimmed()


@pytest.mark.parametrize("mistake", [wrong_time, wrong_mask, wrong_null])
def test_a_wrapper_that_is_not_the_pipeline_is_flagged(
    teacher: SanaTeacher, mistake: Callable[[SanaTeacher], None]
) -> None:
    assert sampler_check(teacher).ok
    scheduler = teacher.pipe.scheduler
    mistake(teacher)
    assert not sampler_check(teacher).ok
    assert teacher.pipe.scheduler is scheduler


def test_a_schedule_that_was_misread_is_flagged(tmp_path: Path) -> None:
    """Both once passed: the pipeline was given a scheduler of our own reading first."""
    teacher = StableDiffusionXLTeacher(tiny.save(tiny.make_sdxl, tmp_path / "pipeline"), height=16, width=32)
    condition, guidance = teacher.encode(doctor.PROMPTS), torch.full((4,), 4.5)
    findings = doctor.own_loop(teacher, doctor.PROMPTS, condition, guidance)
    assert all(f.ok for f in findings) and findings[1].check == "schedule = that of EulerDiscreteScheduler"
    teacher.pipe.scheduler = DDIMScheduler.from_config(teacher.pipe.scheduler.config, clip_sample=True)
    (_, schedule) = doctor.own_loop(teacher, doctor.PROMPTS, condition, guidance)
    assert schedule.ok and schedule.check == "schedule = that of DDIMScheduler without clip_sample"
    teacher.pipe.scheduler = EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02)
    assert not doctor.own_loop(teacher, doctor.PROMPTS, condition, guidance)[1].ok


def test_a_student_that_is_not_the_teacher_is_flagged(teacher: SanaTeacher, pairs: Pairs) -> None:
    student = new_student(teacher)
    assert doctor.same_network(teacher, student, pairs).ok
    with torch.no_grad():
        student.transformer.proj_out.weight.mul_(1.001)
    assert not doctor.same_network(teacher, student, pairs).ok


def test_a_time_embedding_that_turns_too_fast_is_flagged(teacher: SanaTeacher, pairs: Pairs) -> None:
    student = new_student(teacher)
    assert doctor.tangent_size(student, pairs, "objective=discrete").ok
    first = student.transformer.time_embed.timestep_embedder.linear_1
    with torch.no_grad():
        first.weight.mul_(1000)
    finding = doctor.tangent_size(student, pairs, "objective=discrete")
    assert not finding.ok
    assert float(finding.number) > 50


def test_retiming_is_advised_where_retime_takes_the_teacher(first_sana: Path, tmp_path: Path) -> None:
    """The teachers that are not advised are those that `test_where_there_is_nothing_to_retime` has refused."""
    sdxl = tiny.save(tiny.make_sdxl, tmp_path / "sdxl")
    steep, fine = doctor.Finding("", "812.00", "", False), doctor.Finding("", "", "", True)
    for source, tokens, ways in (
        (sdxl, None, "objective=discrete"),
        ("emoji", None, "objective=discrete"),
        (first_sana, 64, "objective=discrete, or stepfold retime first"),
    ):
        teacher = load_teacher(TeacherSettings(source=str(source), max_tokens=tokens), "cpu")
        said = without_tangent(teacher.retimable)
        assert said == ways
        assert doctor.why_no_tangent(fine, steep, said) == f"dF/dt is 812.00, above 50; take {ways}"


def test_a_kink_between_the_tangent_backends_is_flagged(teacher: SanaTeacher, pairs: Pairs) -> None:
    student = new_student(teacher)
    assert doctor.backends_agree(student, pairs).ok

    class Steps(nn.Module):
        """Its derivative is zero, its differences are not."""

        def forward(self, x: Tensor) -> Tensor:
            return (x * 50).round() / 50

    student.transformer.proj_out = nn.Sequential(student.transformer.proj_out, Steps())
    assert not doctor.backends_agree(student, pairs).ok


def test_a_kink_at_one_state_is_not_the_backends_fault(
    teacher: SanaTeacher, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen on a re-timed teacher: rounding put one of the states on the other side of a ReLU, and 2e-2 away."""
    real = doctor.tangent

    def rounded(student: Any, pairs: Pairs, backend: str) -> Tensor:
        found = real(student, pairs, backend)
        found[0] *= 1.5 if backend == "one_pass" else 1
        return found

    monkeypatch.setattr(doctor, "tangent", rounded)
    assert doctor.backends_agree(new_student(teacher), pairs).ok


def test_a_teacher_without_guidance_is_flagged(teacher: SanaTeacher, pairs: Pairs) -> None:
    assert doctor.guidance_effect(teacher, pairs).ok
    deaf(teacher.transformer)
    assert not doctor.guidance_effect(teacher, pairs).ok


def deaf(transformer: nn.Module) -> None:
    """Cross-attention that adds nothing: prompts do not matter."""
    for name, parameter in transformer.named_parameters():
        if ".attn2.to_out.0." in name:
            parameter.data.zero_()


def test_a_parameter_that_nothing_trains_is_flagged(teacher: SanaTeacher, pairs: Pairs) -> None:
    student = new_student(teacher)
    assert all(f.ok for f in doctor.one_step(copy.deepcopy(student), pairs, teacher))
    student.register_parameter("unused", nn.Parameter(torch.ones(3)))
    assert [f.check for f in doctor.one_step(student, pairs, teacher) if not f.ok] == ["one step changes the weights"]


def test_the_teacher_is_looked_at_where_it_is(
    teacher: SanaTeacher, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with a GPU accelerate names that, whatever --device says."""
    real = doctor.make_accelerator("no")
    elsewhere = SimpleNamespace(device=torch.device("meta"), autocast=real.autocast, backward=real.backward)
    monkeypatch.setattr(doctor, "make_accelerator", lambda precision: elsewhere)
    assert all(f.ok for f in doctor.one_step(new_student(teacher), pairs, teacher))


def test_a_loss_that_is_not_finite_is_flagged(teacher: SanaTeacher, pairs: Pairs) -> None:
    student = new_student(teacher)
    with torch.no_grad():
        student.transformer.proj_out.bias.fill_(float("inf"))
    assert "loss is finite" in [f.check for f in doctor.one_step(student, pairs, teacher) if not f.ok]


def test_what_auto_avoids_is_a_number_and_no_fault(
    tiny_sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher whose time counts to 1000 has a steep tangent, which `objective=auto` does without."""
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_sana, folder)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"timestep_scale": 1.0}))
    trained: list[str] = []
    monkeypatch.setattr(doctor, "terms_of", lambda config: trained.append(config.objective) or terms_of(config))
    findings = doctor.examine(TeacherSettings(source=str(folder), max_tokens=64), "cpu")
    assert [finding.check for finding in findings if not finding.ok] == [] and trained == ["discrete"]
    (size,) = (finding for finding in findings if finding.check.startswith("size of dF/dt"))
    assert float(size.number) > 50
    assert size.want.startswith("any: objective=auto is discrete, without it; continuous: <= 50 ")


def test_a_deaf_teacher_on_disk_is_flagged(tiny_sana: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_sana, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({n: torch.zeros_like(v) if ".attn2.to_out.0." in n else v for n, v in weights.items()}, file)
    flagged = [f.check for f in doctor.examine(TeacherSettings(source=str(folder), max_tokens=64), "cpu") if not f.ok]
    assert flagged[0] == "guidance changes the velocity"
