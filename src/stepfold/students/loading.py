"""From a student's folder to its network, and to what goes with it."""

from pathlib import Path

import torch

from stepfold.errors import UserError
from stepfold.sampling.recipe import times_of
from stepfold.sections import TeacherSettings
from stepfold.students.card import ANYFLOW, CARD, Card, read_card, student_folder
from stepfold.students.lora import load_lora, lora_files, read_matrices
from stepfold.students.policy import head_of, load_head, widen
from stepfold.students.saving import load_network_only
from stepfold.students.two_times import load_embedder
from stepfold.students.whole import as_student
from stepfold.teachers.contract import Student
from stepfold.teachers.fingerprints import network_fingerprint
from stepfold.teachers.folders import check_folder
from stepfold.teachers.live import copied
from stepfold.teachers.loading import load_teacher, make_teacher
from stepfold.teachers.lora_merging import merge_lora
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.teachers.quantised import Quantised

MOVED = f"a student's {CARD} names its teacher: if that has moved, correct config.teacher.source there"


def load_student(
    folder: Path, device: torch.device | str, quantise: Quantised | None = None
) -> tuple[PipelineTeacher, Student, Card]:
    """A student folder: its encoder and autoencoder (as a teacher), its network, its card.

    Args:
        folder: the student's.
        device: where it goes.
        quantise: how the network beneath a LoRA is kept, of `none` the text encoders too; None for as it was trained.

    Raises:
        UserError: the folder is no student that stepfold wrote, or its teacher has changed.
    """
    card, folder = read_card(folder), student_folder(folder)
    if card.pipeline == ANYFLOW:
        raise UserError(
            f"{folder} is an export for diffusers' {ANYFLOW}, as its README says; give the student that it was made of"
        )
    if card.lora_rank:
        settings = base_of(card)
        rounded = settings.model_copy(update={"quantise": quantise or settings.quantise})
        teacher = load_teacher(settings.plain() if quantise == "none" else rounded, device)
        options = {"convolutions": card.lora_convolutions, "two_times": card.two_times, "policy": card.recipe.policy}
        student: Student = load_lora(teacher, folder, card.lora_rank, **options)
    elif card.network_only:
        teacher = load_teacher(card.teacher_settings(), device)
        student = load_network_only(teacher, folder, two_times=card.two_times)
    else:
        check_folder(folder)
        sizes = {name: getattr(card, name) for name in ("height", "width", "frames", "max_tokens")}
        velocities = card.recipe.policy.nodes if card.recipe.policy else 1
        teacher = make_teacher(str(folder), device=device, velocities=velocities, **sizes)
        student = as_student(teacher, two_times=card.two_times, policy=card.recipe.policy)
        load_embedder(student, folder)
    return teacher, student, checked(card, teacher)


def load_merged(folder: Path, device: torch.device | str) -> tuple[PipelineTeacher, Student, Card]:
    """As `load_student`, but a LoRA student is merged into its teacher's network, in float32: both are one then.

    Raises:
        UserError: the student is quantised, or its teacher has changed.
    """
    card, folder = read_card(folder), student_folder(folder)
    card.check_plain()
    if not card.lora_rank:
        return load_student(folder, device)
    settings = base_of(card).plain()
    with copied(settings.source):
        teacher = load_teacher(settings, device, torch.float32)
    read_matrices(teacher, folder, card.lora_rank, convolutions=card.lora_convolutions)
    for part, file in lora_files(teacher).items():
        merge_lora(teacher.pipe, str(folder / file), 1.0, lambda: None, part)  # a student has none on text encoders
    if card.recipe.policy:
        widen(teacher.transformer, head_of(teacher), card.recipe.policy.nodes)
    student = as_student(teacher, two_times=card.two_times, policy=card.recipe.policy)
    load_embedder(student, folder)
    load_head(teacher, teacher.transformer, folder, card.recipe.policy)
    return teacher, student, checked(card, teacher)


def base_of(card: Card) -> TeacherSettings:
    """The settings of a LoRA student's teacher.

    Raises:
        UserError: it is not there; or its network, or a LoRA of its, is another than when the student was distilled.
    """
    settings = card.teacher_settings()
    try:
        now = network_fingerprint(settings) if card.base else ""
    except UserError as error:
        raise UserError(f"{error}; {MOVED}") from None
    if now.count(" ") < card.base.count(" "):  # a LoRA is away, which loading says
        return settings
    if now != card.base:
        loras = "".join(f", {each.source}" for each in settings.lora)
        raise UserError(
            f"the weights of {settings.source}{loras} are not those that this LoRA was distilled from; put those back. "
            f"If it is the same model in another form, delete the line `base` in {CARD}"
        )
    return settings


def checked(card: Card, teacher: PipelineTeacher) -> Card:
    """A card whose recipe fits the teacher; one of an earlier version gets the times of the teacher's class.

    Raises:
        UserError: it does not fit.
    """
    recipe = card.recipe
    if recipe.sigma_data != teacher.sigma_data:
        raise UserError(
            f"{CARD} says sigma_data {recipe.sigma_data:g}, but this version samples with {teacher.sigma_data:g}; copy "
            "the student folder again, or use the version that wrote it"
        )
    if recipe.times:
        return card
    whole = recipe.model_copy(update={"times": times_of(teacher, recipe.sampler)})
    return card.model_copy(update={"recipe": whole})
