"""The student of a module of one's own, whose blocks nobody knows."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stepfold.api import distill_module
from stepfold.errors import UserError
from stepfold.students.networks import ModuleStudent
from stepfold.students.whole import new_student
from stepfold.teachers.contract import Condition
from stepfold.teachers.module import ModuleTeacher
from stepfold.training import choices

FEW = ("training.steps=1", "training.prompts_per_step=2", "training.precision=no", "space.route_steps=4")


class Own(nn.Module):
    """A flow-matching velocity that reads all it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.net(torch.cat([x, t[:, None], condition.embeds[:, 0]], 1))


@pytest.fixture
def teacher() -> ModuleTeacher:
    torch.manual_seed(0)
    return ModuleTeacher(Own(), lambda prompts: Condition.whole(torch.ones(len(prompts), 1, 1)), (2,))


@pytest.mark.parametrize("setting", ["training.checkpointing=true", "training.tangent=block"])
def test_recomputing_blocks_that_nobody_knows_is_refused(
    setting: str, teacher: ModuleTeacher, prompts_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"ModuleStudent has no blocks to recompute; leave training\.checkpointing off"):
        distill_module(teacher, prompts_file, tmp_path / "run", [*FEW, setting], quiet=True)


def test_a_small_device_gets_no_blocks_to_recompute(
    teacher: ModuleTeacher, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself, the tangent's choice asks for no more than the student can do."""
    monkeypatch.setattr(choices, "device_memory", lambda device: 1)
    student = distill_module(teacher, prompts_file, tmp_path / "run", FEW, quiet=True)
    start = new_student(teacher)
    assert isinstance(student, ModuleStudent)
    assert not torch.equal(student.transformer.net[0].weight, start.get_parameter("transformer.net.0.weight"))
