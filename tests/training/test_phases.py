"""A run in phases, and a loss on two spaces, on the tiny teacher."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from passes import gradient_step
from torch import Tensor

from stepfold.config import Config, phases_of
from stepfold.errors import UserError
from stepfold.objectives.contract import Networks
from stepfold.prompts.reading import PromptFile, open_prompts
from stepfold.spaces.records import Pairs
from stepfold.students.whole import new_student
from stepfold.teachers.sana import SanaTeacher
from stepfold.training.accelerators import make_accelerator
from stepfold.training.distill import distill
from stepfold.training.draws import draw
from stepfold.training.runs import checkpoints, read_metrics
from stepfold.training.states import collect
from stepfold.training.terms import Term, add_gradients, terms_of

CPU = torch.device("cpu")
Settings = Callable[..., Config]
DISCRETE_FIRST = "training.phases=[{steps: 3, set: {objective: discrete, optimiser.lr: 1.0e-4}}]"
SIX = ("training.steps=6", "training.checkpoint_every=1", "training.keep_checkpoints=9", "consistency.r_warmup=2")


@pytest.fixture
def prompts(prompts_file: Path) -> PromptFile:
    return open_prompts(prompts_file)


def run(config: Config, folder: Path, teacher: SanaTeacher, prompts: PromptFile) -> None:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(config.seed)
    student, black = new_student(teacher), torch.zeros(teacher.latent_shape)
    distill(config, folder, teacher, student, prompts, [black], make_accelerator("no"))


def test_each_phase_has_its_objective_and_a_run_stopped_anywhere_goes_on_to_the_bit(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, tensors: Callable
) -> None:
    config = settings(*SIX, DISCRETE_FIRST)
    run(config, tmp_path / "run", teacher, prompts)
    rows, whole = read_metrics(tmp_path / "run"), tensors(checkpoints(tmp_path / "run")[-1])
    assert ["tangent_norm" in row for row in rows] == [False] * 3 + [True] * 3
    assert [row["lr"] for row in rows] == [1e-4] * 3 + [1e-3] * 3
    assert [row.get("r") for row in rows[3:]] == [0, 0.5, 1]  # the warm-up counts from the phase's first step
    plain = settings(*SIX, "objective=discrete", "optimiser.lr=1e-4")
    run(plain, tmp_path / "plain", teacher, prompts)
    alone = tensors(checkpoints(tmp_path / "plain")[2])
    first = tensors(checkpoints(tmp_path / "run")[2])
    assert all(torch.equal(value, alone[name]) for name, value in first.items())
    for left in (3, 2):  # at the border, and before it
        for path in checkpoints(tmp_path / "run")[left:]:
            shutil.rmtree(path)
        run(config, tmp_path / "run", teacher, prompts)
        assert read_metrics(tmp_path / "run") == rows
        assert all(torch.equal(v, whole[name]) for name, v in tensors(checkpoints(tmp_path / "run")[-1]).items())


def test_what_is_left_of_the_steps_has_the_runs_own_settings(settings: Settings) -> None:
    phases = "[{steps: 2, set: {objective: velocity, space.kind: coupling}}, {steps: 1}]"
    config = settings("training.steps=6", f"training.phases={phases}")
    found = [(first, each.objective, each.space.first) for first, each in phases_of(config)]
    assert found == [(0, "velocity", "coupling"), (2, "continuous", "generation"), (3, "continuous", "generation")]
    exact = settings("training.steps=3", f"training.phases={phases}")
    assert [first for first, _ in phases_of(exact)] == [0, 2]


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ("[{steps: 9}]", r"training\.phases take 9 steps, but training\.steps is 6; give training\.steps=9 or more"),
        ("[{steps: 1, set: {seed: 3}}]", "seed stays the same in all phases; these may change: objective"),
        ("[{steps: 1, set: {space.reuse: 2}}]", r"space\.reuse stays the same in all phases"),
        ("[{steps: 1, set: {objective: auto}}]", "a phase names its objective"),
        ("[{steps: 1, set: {objective: adversary}}]", "in a phase, setting objective is 'adversary'"),
        ("[{steps: 1, set: {space.rout: random}}]", r"in a phase, unknown setting 'space\.rout'; did you mean"),
        ("[{steps: 0}]", r"setting training\.phases\.0\.steps is 0"),
    ],
)
def test_a_phase_that_cannot_be_is_one_line(settings: Settings, phases: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings("training.steps=6", f"training.phases={phases}")


def states_of(teacher: SanaTeacher, config: Config, prompts: PromptFile):
    batch = draw(0, prompts, teacher, config, CPU)
    networks = Networks(new_student(teacher), teacher)
    spaces = [term.space for term in terms_of(config)]
    return batch, collect(spaces, batch, teacher.encode(batch.prompts), networks, config)


def test_the_gradient_of_two_spaces_is_the_weighted_sum_of_both(
    teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    config = settings("space.kind={generation: 1, endpoints: 0.5}", "training.micro_batch=4")
    assert terms_of(config) == [Term("continuous", "generation", 1.0, 4), Term("continuous", "endpoints", 0.5, 4)]
    calls: list[int] = []
    velocity = teacher.velocity
    teacher.velocity = lambda *args: calls.append(1) or velocity(*args)  # type: ignore[method-assign]
    batch, states = states_of(teacher, config, prompts)
    del teacher.velocity
    assert len(calls) == config.space.route_steps + 1  # one walk for both, and one call at all noised states
    torch.manual_seed(1)
    student = new_student(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.02 * torch.randn_like(parameter)

    def gradient(*kinds: str) -> Tensor:
        student.zero_grad(set_to_none=True)
        networks, kind = Networks(student, teacher), settings(f"space.kind={{{', '.join(kinds)}}}")
        add_gradients(terms_of(kind), networks, states, batch.draws, kind, 10, make_accelerator("no"))
        return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])

    both = gradient("generation: 1", "endpoints: 0.5")
    apart = gradient("generation: 1") + 0.5 * gradient("endpoints: 1")
    torch.testing.assert_close(both, apart, rtol=1e-4, atol=1e-6 * float(apart.abs().max()))
    assert (both - gradient("generation: 1")).norm() > 0.01 * both.norm()


def test_a_run_on_two_spaces_logs_each_and_their_sum(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    config = settings("space.kind={generation: 1, endpoints: 0.5}")
    run(config, tmp_path / "run", teacher, prompts)
    for row in read_metrics(tmp_path / "run"):
        assert row["loss"] == pytest.approx(row["generation/loss"] + row["endpoints/loss"])
        assert row["generation/tangent_norm"] != row["endpoints/tangent_norm"]


def test_velocity_on_couplings_learns_the_walks_own_line(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    """Reflow's loss falls; the pairs need no teacher call besides the walk."""
    config = settings("objective=velocity", "space.kind=coupling", "training.steps=30", "optimiser.lr=3e-3")
    run(config, tmp_path / "run", teacher, prompts)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    batch, states = states_of(teacher, config, prompts)
    pairs = states["coupling"]
    assert isinstance(pairs, Pairs)
    metrics = gradient_step(new_student(teacher), pairs, config, teacher=teacher, draws=batch.draws)
    assert len(metrics["loss"]) == len(pairs)
