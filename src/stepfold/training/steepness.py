"""The size of dF/dt before a run: whether the continuous objective can take this teacher."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from stepfold.config import Config
from stepfold.objectives.consistency import STEEPEST, derivative_size
from stepfold.objectives.contract import Networks
from stepfold.prompts.reading import Prompts
from stepfold.spaces.records import Pairs
from stepfold.teachers.contract import Condition, Student, Teacher
from stepfold.training.draws import draw
from stepfold.training.states import collect


def of_pairs(student: Student, pairs: Pairs, x_unit: Tensor, t: Tensor) -> Tensor:
    """F at other states and times of the pairs' prompts and scales."""
    return student(x_unit, t, pairs.condition, pairs.guidance)


def steepness(
    teacher: Teacher,
    student: Student,
    prompts: Prompts,
    conditions: Callable[[Sequence[int]], Condition],
    config: Config,
    device: torch.device,
    *,
    retimable: bool,
) -> str:
    """How large dF/dt is on one walk, of a teacher whose time counts to 1000, and what to do about it.

    Arguments as of a run; `retimable` is whether `stepfold retime` takes the teacher.
    """
    space = config.space.model_copy(update={"kind": "generation", "filter_rule": "off"})
    training = config.training.model_copy(update={"prompts_per_step": 1})
    config = config.model_copy(update={"space": space, "training": training})
    batch = draw(0, prompts, teacher, config, device)
    networks = Networks(student, teacher)
    pairs = cast(Pairs, collect(["generation"], batch, conditions(batch.index), networks, config)["generation"])
    sizes = []
    for row in range(len(pairs)):  # one at a time: a step may have just as much memory
        one = pairs.rows(slice(row, row + 1))
        F = partial(of_pairs, student, one)
        sizes.append(derivative_size(F, one.x, one.t, one.dxdt, teacher.sigma_data))
    size = math.hypot(*sizes) / math.sqrt(len(sizes))
    said = f"this teacher's time counts to 1000, and its dF/dt is {size:.3g} (root mean square over one trajectory)"
    if size <= STEEPEST:
        return f"{said}; up to {STEEPEST:g} objective=continuous is fine"
    return f"{said}; above {STEEPEST:g} take {without_tangent(retimable)}"


def without_tangent(retimable: bool) -> str:
    """The ways around a large dF/dt; re-timing is one for teachers that `stepfold retime` takes."""
    return "objective=discrete, or stepfold retime first" if retimable else "objective=discrete"
