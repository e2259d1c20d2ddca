"""Whole students on disk: a pipeline folder of diffusers, and back."""

from pathlib import Path
from typing import Any

from stepfold.sampling.recipe import Recipe
from stepfold.sampling.samplers import in_diffusers
from stepfold.students.intact import check_shapes, read_weights, shapes_of
from stepfold.students.policy import save_policy
from stepfold.students.sana import SanaStudent, plain_transformer
from stepfold.students.two_times import load_embedder, save_embedder
from stepfold.students.whole import new_student
from stepfold.teachers.contract import Student
from stepfold.teachers.pipeline import PipelineTeacher

NETWORK_WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_whole(
    teacher: PipelineTeacher, student: Student, folder: Path, recipe: Recipe, time_scale: float = 1.0
) -> None:
    """Writes a folder that plain diffusers loads, and beside it the second embedder of a student told two times.

    Args:
        teacher: gives the text encoders and the autoencoder, which stay where they are for that.
        student: a whole one.
        folder: made if it does not exist.
        recipe: how the student is sampled; decides the pipeline's class and scheduler.
        time_scale: what the network of a `SanaStudent` counts its time to.
    """
    network: Any = student.get_submodule("transformer")
    if loses_guidance(student, recipe):
        network = plain_transformer(network, recipe.guidance, time_scale / teacher.num_train_timesteps)
    sampler = in_diffusers(recipe.sampler)
    teacher.write_pipeline(
        teacher.student_class(sampler), lambda: teacher.student_parts(sampler) | teacher.network_parts(network), folder
    )
    save_embedder(student, folder)
    save_policy(teacher, student, folder, recipe, lora=False)


def loses_guidance(student: Student, recipe: Recipe) -> bool:
    """Whether the saved student stands for its usual guidance scale alone: no pipeline tells it another one."""
    return isinstance(student, SanaStudent) and in_diffusers(recipe.sampler) == "flow"


def load_network_only(teacher: PipelineTeacher, folder: Path, *, two_times: bool = False) -> Student:
    """The student of `teacher` that a folder has the network of, in any precision; the rest is the teacher's."""
    student = new_student(teacher, two_times=two_times)
    load_embedder(student, folder)
    file, network = folder / teacher.network_part / NETWORK_WEIGHTS, student.get_submodule("transformer")
    weights = read_weights(file)
    check_shapes(file, shapes_of(weights), shapes_of(network.state_dict()))
    network.load_state_dict(weights)
    return student.eval().requires_grad_(False)
