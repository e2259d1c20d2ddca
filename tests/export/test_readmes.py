"""A student's README runs word by word, whatever precision the parts of its folders are in."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtSigmaPipeline, StableDiffusionXLPipeline

from stepfold.export.pipeline import model_card
from stepfold.jobs.exporting import run_export
from stepfold.students.card import Card, read_card

StudentOf = Callable[..., Path]


def run_readme(card: Card, folder: Path) -> Any:
    """The card's lines, word by word, and the pipeline that they leave."""
    names: dict[str, Any] = {}
    (code,) = re.findall(r"```python\n(.*?)```", model_card(card, name=str(folder)), re.DOTALL)
    exec(code, names)
    return names["pipe"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_readme_runs_on_a_teacher_in_half_precision(dtype: str, student_of: StudentOf, tmp_path: Path) -> None:
    """diffusers by itself reads networks in float32, and text encoders as their files are."""
    student = student_of("sdxl", 4)
    card = read_card(student)
    StableDiffusionXLPipeline.from_pretrained(card.teacher, dtype=torch.float16).save_pretrained(tmp_path / "half")
    theirs = card.config["teacher"] | {"dtype": dtype}
    card = card.model_copy(update={"teacher": str(tmp_path / "half"), "config": card.config | {"teacher": theirs}})
    pipe = run_readme(card, student)
    assert {pipe.unet.dtype, pipe.text_encoder.dtype, pipe.vae.dtype} == {getattr(torch, dtype)}


def test_a_readme_runs_where_parts_of_a_folder_are_rounded(student_of: StudentOf, tmp_path: Path) -> None:
    """A whole student has its network in float32 beside its teacher's other parts, which may be in bfloat16."""
    mixed = tmp_path / "mixed"
    shutil.copytree(student_of("pixart"), mixed)
    pipe = PixArtSigmaPipeline.from_pretrained(mixed)
    for part in ("text_encoder", "vae"):
        getattr(pipe, part).bfloat16().save_pretrained(mixed / part)
    assert run_readme(read_card(mixed), mixed).text_encoder.dtype == torch.float32
    rounded = run_export(student_of("sdxl", 4), "pipeline", tmp_path / "rounded", force=False, dtype="bfloat16")
    assert run_readme(read_card(rounded), rounded).text_encoder.dtype == torch.bfloat16
    rounded = run_export(student_of("sdxl"), "pipeline", tmp_path / "whole", force=False, dtype="float16")
    assert read_card(rounded).loaded_dtype == "float16" and "dtype=torch.float16" in (rounded / "README.md").read_text()


def test_a_rounded_folder_keeps_what_only_its_readme_says(student_of: StudentOf, tmp_path: Path) -> None:
    """A student from elsewhere has its scores in its README alone; the run's report is not beside it."""
    shutil.copytree(student_of("sdxl"), tmp_path / "theirs")
    readme = tmp_path / "theirs" / "README.md"
    readme.write_text(readme.read_text() + "\n## Measured\n\n95%\n")
    rounded = run_export(tmp_path / "theirs", "pipeline", tmp_path / "half", force=False, dtype="bfloat16")
    text = (rounded / "README.md").read_text()
    assert text == readme.read_text().replace("dtype=torch.float32", "dtype=torch.bfloat16") != readme.read_text()
    assert read_card(rounded).loaded_dtype == "bfloat16" and "## Measured" in text
