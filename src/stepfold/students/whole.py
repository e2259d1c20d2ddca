"""Whole students: a copy of the teacher's network, all weights of which are trained."""

import copy
import math
from typing import Any

from stepfold.errors import UserError
from stepfold.students.depth import drop_blocks
from stepfold.students.networks import ModuleStudent, NetworkStudent
from stepfold.students.sana import SanaStudent, student_transformer
from stepfold.teachers.contract import Student
from stepfold.teachers.module import ModuleTeacher
from stepfold.teachers.once import compute_afresh
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.teachers.sana import SanaTeacher


def new_student(teacher: PipelineTeacher | ModuleTeacher, depth: float = 1.0) -> Student:
    """A student with weights of its own that starts as its teacher.

    Args:
        teacher: what it is copied from; stays as it is.
        depth: share of the teacher's blocks that the student keeps, in (0, 1]. Below 1 it starts elsewhere.

    Raises:
        UserError: this network cannot lose blocks.
    """
    if isinstance(teacher, ModuleTeacher):
        if depth != 1:
            raise UserError("a network of one's own has no known blocks; leave student.depth at 1")
        network = copy.deepcopy(teacher.network).requires_grad_(True)
        return ModuleStudent(network, teacher.predict, weight_start(teacher.latent_shape))
    start = weight_start(teacher.latent_shape)
    network = own_network(teacher, depth)
    if isinstance(teacher, SanaTeacher) and teacher.student_is_sprint:
        return SanaStudent(student_transformer(network), start).to(teacher.device)
    return NetworkStudent(network, teacher.plain_predict, start).to(teacher.device)


def as_student(teacher: PipelineTeacher) -> Student:
    """The network of a pipeline folder that is a student's, as a student: the very weights, no copy."""
    if isinstance(teacher, SanaTeacher) and teacher.is_sprint:
        return SanaStudent(teacher.transformer)
    return NetworkStudent(teacher.transformer, teacher.predict)


def own_network(teacher: PipelineTeacher, depth: float) -> Any:
    """A trainable copy of the teacher's network, with the share `depth` of its blocks."""
    network = copy.deepcopy(teacher.transformer).to(teacher.work_dtype).requires_grad_(True)
    compute_afresh(network.modules())
    drop_blocks(network, teacher.block_stacks(), depth)
    return network


def weight_start(latent_shape: tuple[int, ...]) -> float:
    """Initial -w_phi: where it settles for a tangent of unit norm.

    Starting there, the weight's own gradient does not swamp the time embedding's while w_phi climbs.
    """
    return -math.log(math.prod(latent_shape))
