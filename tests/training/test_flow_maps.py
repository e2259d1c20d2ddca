"""Flow maps through the real loop, on the tiny teacher: micro-batches, backends, precision, resume, LoRA, processes."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import gradient_step
from torch import Tensor

from stepfold.config import Config
from stepfold.maths.tangent import BACKENDS
from stepfold.objectives.contract import Networks
from stepfold.prompts.reading import PromptFile, open_prompts
from stepfold.spaces.records import Pairs, States
from stepfold.students.lora import lora_student
from stepfold.students.whole import new_student
from stepfold.teachers.contract import Condition, Student
from stepfold.teachers.sana import SanaTeacher
from stepfold.training.accelerators import make_accelerator
from stepfold.training.distill import distill
from stepfold.training.draws import draw
from stepfold.training.processes import Processes
from stepfold.training.runs import checkpoints, read_metrics
from stepfold.training.states import collect

CPU = torch.device("cpu")
Settings = Callable[..., Config]
TWO = "student.times=two"
MIXED = "target.rule={uniform: 0.5, zero: 0.25, diagonal: 0.25}"
METHODS: dict[str, tuple[str, ...]] = {
    "continuous": (TWO, "objective=continuous", "target.rule={gap: 0.5, zero: 0.25, diagonal: 0.25}"),
    "meanflow": (TWO, "objective=continuous", MIXED, "consistency.tangent_weight=meanflow"),
    "pair": (TWO, "objective=pair", "target.rule={later: 0.5, zero: 0.25, diagonal: 0.25}"),
    "discrete": (TWO, "objective=discrete", "target.rule=edge", "target.segments={1: 1, 3: 1}"),
    "semigroup": (TWO, "objective=semigroup", MIXED),
    "shortcut": (TWO, "objective=semigroup", MIXED, "semigroup.alpha=0.5", "semigroup.first=student"),
    "average": (TWO, "objective=semigroup", MIXED, "semigroup.second=average"),
    "segments": ("objective=semigroup", "target.rule=edge"),
    "merging segments": (
        "objective=semigroup", "target.rule=edge", "target.segments=1",
        "training.phases=[{steps: 1, set: {target.segments: 2}}]",
    ),
    "lagrange": (TWO, "objective=lagrange", MIXED),
    "lagrange on the prior": (TWO, "objective=lagrange", MIXED, "space.kind=prior", "training.prompts_per_step=6"),
    "boot": (
        TWO, "objective=semigroup", MIXED, "space.kind=prior", "semigroup.alpha=0.9", "semigroup.first=student",
        "semigroup.second=teacher", "training.prompts_per_step=6",
    ),
}  # fmt: skip
"""What people know by name -> its settings."""
LORAS = ("continuous", "pair", "semigroup", "lagrange")
SHORT = ("continuous", "pair", "semigroup", "lagrange on the prior")
each_method = pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in SHORT else pytest.mark.long) for name in METHODS]
)


@pytest.fixture
def prompts(prompts_file: Path) -> PromptFile:
    return open_prompts(prompts_file)


def student_of(teacher: SanaTeacher, config: Config, *, lively: bool = False, double: bool = False) -> Student:
    """The student of a run; lively: with no zeroed layer, so that every parameter has a gradient."""
    torch.manual_seed(config.seed)
    two = config.student.times == "two"
    student = lora_student(teacher, 4, two_times=two) if config.student.lora else new_student(teacher, two_times=two)
    student = student.double() if double else student
    with torch.no_grad():
        for parameter in student.parameters() if lively else ():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return student


def states_of(teacher: SanaTeacher, config: Config, prompts: PromptFile, *, double: bool = False) -> States:
    """The states of step 0."""
    batch = draw(0, prompts, teacher, config, CPU)
    networks = Networks(student_of(teacher, config), teacher)
    states = collect([config.space.first], batch, teacher.encode(batch.prompts), networks, config)[config.space.first]
    if not double:
        return states
    names = ("x", "t", "guidance", "t_target", "dxdt", "x0", "x_target", "t_next")
    wide = {name: getattr(states, name).double() for name in names if getattr(states, name, None) is not None}
    return replace(states, **wide, condition=Condition(states.condition.embeds.double(), states.condition.mask))


def gradient(student: Student, states: States, config: Config, **options: Any) -> Tensor:
    student.zero_grad(set_to_none=True)
    gradient_step(student, states, config, **options)  # type: ignore[arg-type]
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


class Wide:
    """The teacher, whose velocity takes and gives float64, as far as its weights go."""

    def __init__(self, teacher: SanaTeacher) -> None:
        self.teacher, self.sigma_data = teacher, teacher.sigma_data

    def velocity(self, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        narrow = Condition(condition.embeds.float(), condition.mask)
        return self.teacher.velocity(x.float(), t.float(), narrow, guidance.float()).to(x.dtype)


@each_method
def test_micro_batches_add_up(teacher: SanaTeacher, settings: Settings, prompts: PromptFile, method: str) -> None:
    """Whatever part a state comes in, and however many in it stay."""
    if method == "average":
        pytest.skip("outside a run there is none")
    config = settings(*METHODS[method])
    states, student = (
        states_of(teacher, config, prompts, double=True),
        student_of(teacher, config, lively=True, double=True),
    )
    assert len(states) == 6 and states.t_target is not None
    whole = gradient(student, states, config, teacher=Wide(teacher))
    assert whole.norm() > 1e-3
    for size in (1, 4):
        found = gradient(
            student, states, settings(*METHODS[method], f"training.micro_batch={size}"), teacher=Wide(teacher)
        )
        assert (found - whole).norm() <= 1e-5 * whole.norm(), size


@each_method
def test_each_process_asks_its_states_for_what_one_process_would(
    teacher: SanaTeacher, settings: Settings, prompts: PromptFile, method: str
) -> None:
    """The shares of several, one after another, are the batch of one: states, targets, and where the walk was there."""
    config = settings(*METHODS[method], "training.prompts_per_step=5", "training.phases=[]")

    def collected(processes: Processes) -> States:
        batch = draw(3, prompts, teacher, config, CPU, processes)
        networks = Networks(student_of(teacher, config), teacher)
        kind = config.space.first
        return collect([kind], batch, teacher.encode(batch.prompts), networks, config)[kind]

    whole = collected(Processes())
    shares = [collected(Processes(2, rank)) for rank in range(2)]
    assert {len(share) for share in shares} != {len(whole)} and sum(map(len, shares)) == len(whole)
    for name in ("x", "t", "t_target", "x_target"):
        if (value := getattr(whole, name, None)) is not None:
            torch.testing.assert_close(torch.cat([getattr(share, name) for share in shares]), value)
    assert (whole.t_target is not None and whole.t_target.unique().numel() > 1) or method == "merging segments"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["continuous", "lagrange"])
def test_tangents_agree(
    teacher: SanaTeacher, settings: Settings, prompts: PromptFile, method: str, backend: str
) -> None:
    config = settings(*METHODS[method], "consistency.normalise=none")
    states, student = states_of(teacher, config, prompts), student_of(teacher, config, lively=True)
    wanted = gradient(student, states, config, teacher=teacher, tangent="two_pass")
    if backend == "block":
        student.recompute_blocks()
    found = gradient(student, states, config, teacher=teacher, tangent=backend)
    assert (found - wanted).norm() <= (2e-2 if backend == "finite_difference" else 1e-4) * wanted.norm()


def train(config: Config, folder: Path, teacher: SanaTeacher, prompts: PromptFile) -> Student:
    folder.mkdir(exist_ok=True)
    student, black = student_of(teacher, config), torch.zeros(teacher.latent_shape)
    distill(config, folder, teacher, student, prompts, [black], make_accelerator(config.training.precision))
    return student


@each_method
def test_a_run_is_resumed_to_the_bit(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, tensors: Callable, method: str
) -> None:
    """Of a LoRA student as of a whole one; every part that is trained moves."""
    same = ("training.steps=2", "training.checkpoint_every=1", "training.micro_batch=4", "training.tangent=two_pass")
    for lora in ("student.lora=0", "student.lora=4") if method in LORAS else ("student.lora=0",):
        config = settings(*METHODS[method], *same, lora)
        folder = tmp_path / lora
        student = train(config, folder, teacher, prompts)
        rows, whole = read_metrics(folder), tensors(checkpoints(folder)[-1])
        assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows) and len(rows) == 2
        if config.student.times == "two":
            assert student.get_parameter("target_embedder.linear_2.weight").any()
        shutil.rmtree(checkpoints(folder)[-1])
        train(config, folder, teacher, prompts)
        assert read_metrics(folder) == rows
        again = tensors(checkpoints(folder)[-1])
        assert all(torch.equal(value, again[name]) for name, value in whole.items())


@pytest.mark.parametrize("method", ["continuous", "semigroup", "lagrange"])
@pytest.mark.long
def test_the_student_computes_in_the_runs_precision(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, method: str
) -> None:
    config = settings(*METHODS[method], "training.precision=bf16", "training.steps=2")
    student = train(config, tmp_path / "run", teacher, prompts)
    rows = read_metrics(tmp_path / "run")
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_target_zero_is_tbcm_to_the_bit(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    """A student told that it jumps to 0 takes the steps of one that is told nothing, adaptive weight and all."""
    config = settings(TWO)
    plain = states_of(teacher, config, prompts)
    assert plain.t_target is None
    told = replace(plain, t_target=torch.zeros_like(plain.t))
    student = student_of(teacher, config, lively=True)
    for backend in ("two_pass", "one_pass"):
        ours, theirs = (gradient(student, states, config, tangent=backend) for states in (told, plain))
        named = [name for name, p in student.named_parameters() if p.grad is not None]
        assert not any(name.startswith("target_embedder") for name in named)
        count = len(theirs)
        assert torch.equal(ours[:count], theirs)
    one, two = (
        settings(f"student.times={times}", "training.steps=2", "training.tangent=two_pass") for times in ("one", "two")
    )
    a, b = (train(config, tmp_path / config.student.times, teacher, prompts).state_dict() for config in (one, two))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert read_metrics(tmp_path / "one") == read_metrics(tmp_path / "two")


@pytest.mark.long
def test_pairs_of_a_walk_learn_its_states(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    config = settings(*METHODS["pair"], "training.steps=30", "optimiser.lr=3e-3", "training.checkpoint_every=30")
    train(config, tmp_path / "run", teacher, prompts)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert isinstance(states_of(teacher, config, prompts), Pairs)
