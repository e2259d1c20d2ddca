"""From the settings to a teacher; from a folder to a student."""

import json
from pathlib import Path
from typing import Any

import torch

from stepfold import assets
from stepfold.config import TeacherSettings
from stepfold.errors import UserError
from stepfold.teachers.sana import SanaStudent, SanaTeacher, check_folder

CARD = "stepfold.json"


def load_teacher(
    settings: TeacherSettings, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> SanaTeacher:
    """The teacher of a run. `emoji` is the bundled one, loaded like any other folder."""
    return SanaTeacher(
        assets.TEACHER if settings.source == "emoji" else settings.source,
        device=device,
        dtype=dtype,
        height=settings.height,
        width=settings.width,
        max_tokens=settings.max_tokens,
        null_mask=settings.null_mask,
        guidance_kind=settings.guidance,
    )


def load_student(folder: Path, device: torch.device | str) -> tuple[SanaTeacher, SanaStudent, dict[str, Any]]:
    """A student folder: its encoder and autoencoder (as a teacher with embedded guidance), its network, its card.

    Raises:
        UserError: the folder is no student that stepfold wrote.
    """
    if not (folder / CARD).is_file():
        raise UserError(f"{folder} is no student folder ({CARD} is missing); give OUT/student of a finished run")
    check_folder(folder)
    try:
        card = json.loads((folder / CARD).read_text())
        settings = {name: card[name] for name in ("height", "width", "max_tokens")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CARD} is damaged ({error}); copy the student folder again") from None
    pipeline = SanaTeacher(folder, device=device, **settings)
    return pipeline, SanaStudent(pipeline.transformer), card
