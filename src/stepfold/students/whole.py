"""Whole students: a copy of the teacher's network, all weights of which are trained."""

import copy
import math
from typing import Any

from torch import nn

from stepfold.errors import UserError
from stepfold.maths.policy import Policy
from stepfold.students.depth import drop_blocks
from stepfold.students.networks import ModuleStudent, NetworkStudent
from stepfold.students.policy import head_of, widen
from stepfold.students.sana import SanaStudent, student_transformer
from stepfold.teachers.contract import Student
from stepfold.teachers.module import ModuleTeacher
from stepfold.teachers.once import compute_afresh
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.teachers.sana import SanaTeacher, SprintTeacher


def new_student(
    teacher: PipelineTeacher | ModuleTeacher,
    depth: float = 1.0,
    *,
    two_times: bool = False,
    policy: Policy | None = None,
) -> Student:
    """A student with weights of its own that starts as its teacher.

    Args:
        teacher: what it is copied from; stays as it is.
        depth: share of the teacher's blocks that the student keeps, in (0, 1]. Below 1 it starts elsewhere.
        two_times: whether the student is told its target time too. It starts as the teacher for all of them.
        policy: the form of a policy student's policy; all its velocities start as the teacher's.

    Raises:
        UserError: this network cannot lose blocks, has no place for a second time, or gives one velocity only.
    """
    start = weight_start(teacher.latent_shape)
    if isinstance(teacher, ModuleTeacher):
        if depth != 1:
            raise UserError("a network of one's own has no known blocks; leave student.depth at 1")
        network = copy.deepcopy(teacher.network)
        if teacher.half:  # in which small updates are lost
            network = network.float()
        network.requires_grad_(True)
        return ModuleStudent(network, teacher.predict, start, time_part(teacher, network) if two_times else None)
    network = own_network(teacher, depth)
    if isinstance(teacher, SanaTeacher) and teacher.student_is_sprint:
        network = student_transformer(network)
        student = SanaStudent(network, start, time_part(teacher, network) if two_times else None)
    else:
        part = time_part(teacher, network) if two_times else None
        student = NetworkStudent(network, teacher.plain_predict, start, part)
    if policy:
        widen(network, head_of(teacher), policy.nodes)
    student.policy = policy
    return student.to(teacher.device)


def as_student(teacher: PipelineTeacher, *, two_times: bool = False, policy: Policy | None = None) -> Student:
    """The network of a pipeline folder that is a student's, as a student: the very weights, no copy.

    With `two_times` its second embedder is new; see `two_times.load_embedder`. With `policy` the network gives several
    velocities already.
    """
    network, part = teacher.transformer, time_part(teacher, teacher.transformer) if two_times else None
    if isinstance(teacher, SprintTeacher):
        return SanaStudent(network, time_part=part)
    student = NetworkStudent(network, teacher.predict, time_part=part)
    student.policy = policy
    return student


def time_part(teacher: PipelineTeacher | ModuleTeacher, network: nn.Module) -> str:
    """Name of the part of a student's network to whose output an embedding of the target time is added.

    Raises:
        UserError: there is none.
    """
    part = teacher.time_part(network)
    if part is not None:
        return part
    if isinstance(teacher, ModuleTeacher):
        raise UserError(
            "student.times=two needs the part of your network that embeds its time; give its name to ModuleTeacher as "
            "time_part, or leave student.times at one"
        )
    raise UserError(
        f"a {type(network).__name__} embeds its time in several of its parts, so there is no one place for a second; "
        "leave student.times at one"
    )


def own_network(teacher: PipelineTeacher, depth: float) -> Any:
    """A trainable copy of the teacher's network, with the share `depth` of its blocks."""
    network = copy.deepcopy(teacher.transformer).to(teacher.work_dtype).requires_grad_(True)
    compute_afresh(network.modules())
    for part in teacher.network_parts(network).values():
        drop_blocks(part, teacher.block_stacks(), depth)
    return network


def weight_start(latent_shape: tuple[int, ...]) -> float:
    """Initial -w_phi: where it settles for a tangent of unit norm.

    Starting there, the weight's own gradient does not swamp the time embedding's while w_phi climbs.
    """
    return -math.log(math.prod(latent_shape))
