"""What an objective is given and what it returns. A new objective is one function of this kind, in one file."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from stepfold.config import Config
from stepfold.randomness import Draws
from stepfold.teachers.contract import Student, Teacher


@dataclass(frozen=True)
class Networks:
    """The networks of a run, and how they are called.

    Attributes:
        student: gives F; trained.
        teacher: gives dx/dt; frozen.
        critics: name -> a network that is trained beside the student and thrown away afterwards.
        tangent: backend of the student's total derivative; see `maths.tangent`.
        precision: opens a context in which the student's forward passes run, such as autocast.
        walk_precision: the same for the teacher's walks.
        average: of the student's weights over the training; None outside a run.
        reward: scores pictures; None where no term asks for it.
    """

    student: Student
    teacher: Teacher
    critics: Mapping[str, nn.Module] = field(default_factory=dict)
    tangent: str = "two_pass"
    precision: Callable[[], AbstractContextManager[object]] = nullcontext
    walk_precision: Callable[[], AbstractContextManager[object]] = nullcontext
    average: Student | None = None
    reward: "Reward | None" = None


Reward = Callable[[Tensor, Sequence[int]], Tensor]
"""(x_0 [M, ...] of standard deviation sigma_data, with its graph; numbers of their samples [M]) -> scores [M] that the
student is to raise, with a graph to x_0."""


class Loss(NamedTuple):
    """Per state.

    Attributes:
        value: [M], with a graph to the student.
        metrics: name -> [M], without a graph, in order of computation.
        of_critic: [M], what the term's own critic minimises on the same pass, with a graph to that critic alone.
    """

    value: Tensor
    metrics: dict[str, Tensor]
    of_critic: Tensor | None = None


Objective = Callable[[Networks, Any, Draws, Config, int], Loss]
"""(networks, states or pairs of a micro-batch, the batch's draws, settings, step) -> the loss of each of them."""
