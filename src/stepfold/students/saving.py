"""Whole students on disk: a pipeline folder of diffusers, and back."""

from pathlib import Path

from safetensors.torch import load_file

from stepfold.students.two_times import load_embedder, save_embedder
from stepfold.students.whole import new_student
from stepfold.teachers.contract import Student
from stepfold.teachers.pipeline import PipelineTeacher

NETWORK_WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_whole(teacher: PipelineTeacher, student: Student, folder: Path) -> None:
    """Writes a folder that plain diffusers loads, and beside it the second embedder of a student told two times.

    Args:
        teacher: gives the text encoders and the autoencoder, which stay where they are for that.
        student: a whole one.
        folder: made if it does not exist.
    """
    network = student.get_submodule("transformer")
    teacher.write_pipeline(
        teacher.student_class, lambda: teacher.student_parts() | {teacher.network_part: network}, folder
    )
    save_embedder(student, folder)


def load_network_only(teacher: PipelineTeacher, folder: Path, *, two_times: bool = False) -> Student:
    """The student of `teacher` that a folder has the network of, in any precision; the rest is the teacher's."""
    student = new_student(teacher, two_times=two_times)
    load_embedder(student, folder)
    weights = load_file(folder / teacher.network_part / NETWORK_WEIGHTS)
    student.get_submodule("transformer").load_state_dict(weights)
    return student.eval().requires_grad_(False)
