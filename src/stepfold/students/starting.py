"""How the networks of a run start: as the teacher, or from an earlier student of it."""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from stepfold.errors import UserError
from stepfold.maths.policy import Policy
from stepfold.scores import FakeSettings
from stepfold.sections import TeacherSettings
from stepfold.settings import StudentSettings
from stepfold.students.card import read_card, student_folder
from stepfold.students.loading import load_merged, load_student
from stepfold.students.lora import lora_student
from stepfold.students.sana import SanaStudent, student_transformer
from stepfold.students.two_times import EMBEDDER
from stepfold.students.whole import new_student
from stepfold.teachers.contract import Student
from stepfold.teachers.pipeline import PipelineTeacher

SAME_TEACHER = ("source", "revision", "variant", "lora")
"""Settings of the teacher that a student and the earlier one must have in common."""


def make_student(
    teacher: PipelineTeacher,
    settings: StudentSettings,
    of_teacher: TeacherSettings,
    policy: Policy | None = None,
) -> Student:
    """The student of a run, as it starts; `of_teacher` are the settings that `teacher` was loaded with.

    Raises:
        UserError: the network cannot be trained so, or `student.init` does not fit.
    """
    two_times = settings.times == "two"
    if settings.lora:
        student: Student = lora_student(
            teacher, settings.lora, convolutions=settings.lora_convolutions, two_times=two_times, policy=policy
        )
    else:
        student = new_student(teacher, settings.depth, two_times=two_times, policy=policy)
    if settings.init:
        start_from(Path(settings.init), student, settings, of_teacher)
    return student


def make_fake(teacher: PipelineTeacher, settings: FakeSettings) -> Student:
    """The fake score of a run, as it starts: as the teacher."""
    if settings.kind == "lora":
        return lora_student(teacher, settings.rank, convolutions=True, for_export=False)
    return new_student(teacher)


def start_from(folder: Path, student: Student, settings: StudentSettings, of_teacher: TeacherSettings) -> None:
    """Gives `student`, which starts as its teacher, the weights of the student in `folder`.

    A whole student may start from a whole or a LoRA student, a LoRA student from one of its own rank. The head of the
    adaptive weight starts anew: a student's folder does not have it. So does the second embedder of a student told two
    times, unless the earlier student has one.

    Args:
        folder: of the earlier student.
        student: changed in place.
        settings: of `student`.
        of_teacher: the settings that its teacher was loaded with.

    Raises:
        UserError: the folder is no student, or one of another teacher, rank or depth.
    """
    folder = student_folder(folder)
    card = read_card(folder)
    card.check_plain()
    theirs = card.teacher_settings()
    for name in SAME_TEACHER:
        if (then := getattr(theirs, name)) != (now := getattr(of_teacher, name)):
            raise UserError(
                f"student.init {folder} is a student of another teacher (teacher.{name} is {then!r} there and {now!r} "
                "here); a student goes on with its own teacher"
            )
    if settings.lora and card.lora_rank != settings.lora:
        rank = card.lora_rank
        raise UserError(
            f"student.init {folder} is {f'a LoRA of rank {rank}' if rank else 'a whole student'}, but student.lora is "
            f"{settings.lora}; give --set student.lora={rank}"
        )
    then, now = (policy.nodes if policy else 1 for policy in (card.recipe.policy, student.policy))
    if then != now:
        raise UserError(
            f"student.init {folder} does not give as many velocities at a time as this run's student ({then}, {now}); "
            "give the same objective, and with objective=policy the same policy.nodes"
        )
    device = next(student.parameters()).device
    becomes_whole = card.lora_rank and not settings.lora
    as_here = partial(load_student, folder, device, of_teacher.quantise)
    earlier = whole_from_lora(folder, device) if becomes_whole else as_here()[1]
    copy_weights(earlier, student, folder)


def whole_from_lora(folder: Path, device: torch.device) -> Student:
    """The whole student that a LoRA student is, merged into its teacher's network."""
    merged, student, _ = load_merged(folder, device)
    whole = new_student(merged, two_times=student.reads_target)
    if student.reads_target:
        whole.get_submodule(EMBEDDER).load_state_dict(student.get_submodule(EMBEDDER).state_dict())
    return whole


def network_for(student: Student, earlier: Student) -> nn.Module:
    """The earlier student's network, with a neutral guidance embedder where it stands for one scale and this for many.

    A Sana that was trained as a velocity is such: see `sana.plain_transformer`.
    """
    network = earlier.get_submodule("transformer")
    gains = isinstance(student, SanaStudent) and not isinstance(earlier, SanaStudent)
    return student_transformer(network) if gains else network


@torch.no_grad()
def copy_weights(earlier: Student, student: Student, folder: Path) -> None:
    """Copies the network's weights, and the second embedder's where both students have one.

    Raises:
        UserError: the networks differ, in depth for example.
    """
    parts = {"transformer": network_for(student, earlier)}
    if earlier.reads_target and student.reads_target:
        parts[EMBEDDER] = earlier.get_submodule(EMBEDDER)
    for part, weights in parts.items():
        try:
            student.get_submodule(part).load_state_dict(weights.state_dict())
        except RuntimeError:
            raise UserError(
                f"student.init {folder} has another network than this run's student; give the same student.depth and "
                "student.lora_convolutions as its run had"
            ) from None
