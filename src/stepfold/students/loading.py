"""From a student's folder to its network, and to what goes with it."""

from pathlib import Path
from typing import Any

import torch

from stepfold.students.lora import load_lora
from stepfold.students.saving import load_network_only
from stepfold.students.two_times import load_embedder
from stepfold.students.whole import as_student
from stepfold.teachers.contract import Student
from stepfold.teachers.folders import check_folder, merge_lora
from stepfold.teachers.loading import (
    is_told_two_times,
    load_teacher,
    lora_rank,
    make_teacher,
    read_card,
    student_folder,
    teacher_settings,
)
from stepfold.teachers.pipeline import PipelineTeacher


def load_student(folder: Path, device: torch.device | str) -> tuple[PipelineTeacher, Student, dict[str, Any]]:
    """A student folder: its encoder and autoencoder (as a teacher), its network, its card.

    Raises:
        UserError: the folder is no student that stepfold wrote.
    """
    card = read_card(folder)
    two_times = is_told_two_times(card)
    if rank := lora_rank(card):
        teacher = load_teacher(teacher_settings(folder, card), device)
        convolutions = card["config"]["student"].get("lora_convolutions", False)
        student = load_lora(teacher, folder, rank, convolutions=convolutions, two_times=two_times)
        return teacher, student, card
    if card["network_only"]:
        teacher = load_teacher(teacher_settings(folder, card), device)
        return teacher, load_network_only(teacher, student_folder(folder), two_times=two_times), card
    check_folder(folder)
    settings = {name: card[name] for name in ("height", "width", "frames", "max_tokens")}
    pipeline = make_teacher(str(folder), device=device, **settings)
    student = as_student(pipeline, two_times=two_times)
    load_embedder(student, folder)
    return pipeline, student, card


def load_merged(folder: Path, device: torch.device | str) -> tuple[PipelineTeacher, Student, dict[str, Any]]:
    """As `load_student`, but a LoRA student is merged into its teacher's network, in float32: both are one then."""
    card = read_card(folder)
    if not lora_rank(card):
        return load_student(folder, device)
    teacher = load_teacher(teacher_settings(folder, card), device, torch.float32)
    merge_lora(teacher.pipe, str(folder), lambda: None)  # a student has no LoRA on text encoders
    student = as_student(teacher, two_times=is_told_two_times(card))
    load_embedder(student, folder)
    return teacher, student, card
