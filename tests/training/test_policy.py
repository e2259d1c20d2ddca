"""Policy students through the real loop, on tiny teachers: the start, micro-batches, resume, LoRA, what is refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from forms import cases
from passes import gradient_step
from torch import Tensor

from stepfold.config import Config, TeacherSettings
from stepfold.errors import UserError
from stepfold.maths.policy import Policy
from stepfold.objectives.contract import Networks
from stepfold.prompts.reading import PromptFile, open_prompts
from stepfold.sampling.flow import sample_flow
from stepfold.sampling.policy import sample_policy
from stepfold.sampling.recipe import make_recipe
from stepfold.spaces.policy import PolicyStates
from stepfold.students.starting import make_student
from stepfold.students.whole import new_student
from stepfold.teachers.contract import Condition, Student
from stepfold.teachers.loading import load_teacher
from stepfold.teachers.sana import SanaTeacher
from stepfold.training.accelerators import make_accelerator
from stepfold.training.distill import distill
from stepfold.training.draws import draw
from stepfold.training.processes import Processes
from stepfold.training.runs import checkpoints, read_metrics
from stepfold.training.states import collect

POLICY = ("objective=policy", "space.kind=policy", "policy.nodes=4", "policy.steps=3", "policy.states=2")
FORM, CPU = Policy(4, 32, 2.5), torch.device("cpu")
Settings = Callable[..., Config]
FAMILIES: dict[str, Callable[[], Any]] = {"sana": tiny.make_sana, "sd3": tiny.make_sd3, "flux": tiny.make_flux}


@pytest.fixture
def prompts(prompts_file: Path) -> PromptFile:
    return open_prompts(prompts_file)


@pytest.mark.parametrize("family", cases(FAMILIES, short=["sd3", "flux"]))
def test_the_student_starts_as_the_teachers_own_steps(tmp_path: Path, family: str) -> None:
    """In float64, for one step and for three; with one node moved it does not."""
    source = str(tiny.save(FAMILIES[family], tmp_path / "teacher"))
    teacher: Any = load_teacher(TeacherSettings(source=source, height=32, width=32, max_tokens=16), "cpu")
    student, plain = new_student(teacher, policy=FORM).double(), new_student(teacher).double()
    told = teacher.encode(["a cat", "ghost"])
    condition = replace(told, embeds=told.embeds.double(), pooled=None if told.pooled is None else told.pooled.double())
    noise = 0.5 * torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0)).double()
    for times in ((1.5,), teacher.student_times(3, "policy")):
        rest = (noise, condition, torch.full((2,), 2.0).double(), times, lambda i: torch.empty(0), 0.5)
        found = sample_policy(student, *rest)
        torch.testing.assert_close(found, sample_flow(plain, *rest), rtol=0, atol=1e-12)
    with torch.no_grad():
        student.get_parameter("transformer.proj_out.bias")[1] += 0.1
    assert (sample_policy(student, *rest) - found).abs().max() > 1e-5


@pytest.mark.parametrize("make", [tiny.make_pixart, tiny.make_dit], ids=["pixart", "dit"])
def test_a_network_of_one_velocity_is_refused(tmp_path: Path, make: Callable[[], Any]) -> None:
    teacher = load_teacher(TeacherSettings(source=str(tiny.save(make, tmp_path / "teacher"))), "cpu")
    with pytest.raises(UserError, match=r"objective=policy needs a network that can give several .* choose another"):
        new_student(teacher, policy=FORM)


def student_of(teacher: SanaTeacher, config: Config) -> Student:
    torch.manual_seed(0)
    return make_student(teacher, config.student, config.teacher, FORM)


def states_of(teacher: SanaTeacher, student: Student, config: Config, prompts: PromptFile, *who: Processes) -> Any:
    batch = draw(0, prompts, teacher, config, CPU, *who)
    return collect(["policy"], batch, teacher.encode(batch.prompts), Networks(student, teacher), config)["policy"]


def gradient(student: Student, states: PolicyStates, config: Config) -> Tensor:
    student.zero_grad(set_to_none=True)
    gradient_step(student, states, config)  # type: ignore[arg-type]
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def test_micro_batches_add_up_and_processes_share(
    teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    config = settings(*POLICY)
    student = student_of(teacher, config)
    states = states_of(teacher, student, config, prompts)
    assert len(states) == 6 and states.x_at.shape[:2] == (6, 2)
    shares = [states_of(teacher, student, config, prompts, Processes(2, rank)) for rank in range(2)]
    torch.testing.assert_close(torch.cat([share.x_at for share in shares]), states.x_at)
    wide = {name: value.double() for name, value in vars(states).items() if isinstance(value, Tensor)}
    wide |= {name: vars(states)[name] for name in ("prompt", "number")}
    told = Condition(states.condition.embeds.double(), states.condition.mask)
    states, student = replace(states, condition=told, **wide), student.double()
    whole = gradient(student, states, config)
    assert whole.norm() > 1e-3
    for size in (1, 4):
        part = gradient(student, states, settings(*POLICY, f"training.micro_batch={size}"))
        assert (part - whole).norm() <= 1e-7 * whole.norm()


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_is_resumed_to_the_bit(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, tensors: Callable, rank: int
) -> None:
    """Of a LoRA student as of a whole one; the last layer learns, and its nodes part."""
    config = settings(*POLICY, f"student.lora={rank}", "training.steps=2", "training.checkpoint_every=1")

    def train() -> Student:
        student, black = student_of(teacher, config), torch.zeros(teacher.latent_shape)
        tmp_path.joinpath("run").mkdir(exist_ok=True)
        distill(config, tmp_path / "run", teacher, student, prompts, [black], make_accelerator("no"))
        return student

    student = train()
    rows, whole = read_metrics(tmp_path / "run"), tensors(checkpoints(tmp_path / "run")[-1])
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    train()
    assert read_metrics(tmp_path / "run") == rows and len(rows) == 2
    again = tensors(checkpoints(tmp_path / "run")[-1])
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    weight = student.get_parameter("transformer.proj_out.weight")
    nodes = weight.view(-1, FORM.nodes, teacher.transformer.config.out_channels, weight.shape[1])
    assert not torch.equal(nodes[:, 1], nodes[:, 2])
    assert teacher.transformer.proj_out.out_features * FORM.nodes == len(weight)


def test_states_of_the_student_are_kept_over_a_checkpoint(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, tensors: Callable
) -> None:
    """Two updates from each: a run that went on between them would take states of another student."""
    changes = ("space.reuse=2", "training.steps=6", "training.checkpoint_every=3")
    config = settings(*POLICY, *changes, "training.keep_checkpoints=9")
    tmp_path.joinpath("run").mkdir()

    def train() -> None:
        student, black = student_of(teacher, config), torch.zeros(teacher.latent_shape)
        distill(config, tmp_path / "run", teacher, student, prompts, [black], make_accelerator("no"))

    train()
    rows, saved = read_metrics(tmp_path / "run"), checkpoints(tmp_path / "run")
    whole = tensors(saved[-1])
    assert [int(folder.name.split("_")[-1]) for folder in saved] == [4, 6]
    shutil.rmtree(saved[-1])
    train()
    assert read_metrics(tmp_path / "run") == rows
    again = tensors(saved[-1])
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_the_card_says_the_form_and_the_one_number_of_steps(teacher: SanaTeacher, settings: Settings) -> None:
    recipe = make_recipe(settings(*POLICY), teacher, (2.0,), 2.0)
    assert recipe.policy == Policy(4, 32, teacher.shift_at(3)) and list(recipe.times) == [3]
    assert type(recipe).model_validate(recipe.model_dump(mode="json")) == recipe
    for other in ("flow", "consistency", "flow_map"):
        with pytest.raises(UserError, match=f"--sampler is {other}, but this student was trained for policy sampling"):
            recipe.sampled_by(other)
    with pytest.raises(UserError, match="trained for flow sampling: it gives one F"):
        recipe.model_copy(update={"sampler": "flow", "policy": None}).sampled_by("policy")
    with pytest.raises(ValueError, match="says the form of its policy"):
        type(recipe).model_validate(recipe.model_dump() | {"policy": None})
