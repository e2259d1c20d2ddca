"""How long a prompt is to a pipeline: what is counted as beyond its end changes nothing that the network sees."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_chroma
import tiny_ernie_image
import tiny_kandinsky
import tiny_prx
import tiny_qwen
import tiny_z_image
import torch
from forms import cases
from transformers import ProcessorMixin

from stepfold.config import TeacherSettings
from stepfold.teachers.loading import load_teacher, load_text_reader
from stepfold.teachers.tokens import tokenizer_in

MAKERS: dict[str, Any] = {
    "sana": tiny.make_sana,
    "sprint": tiny.make_sprint,
    "sd 1": tiny.make_sd1,
    "sdxl": tiny.make_sdxl,
    "sd3": tiny.make_sd3,
    "flux": tiny.make_flux,
    "pixart": tiny.make_pixart,
    "flux 2 klein": tiny.make_flux2_klein,
    "flux 2 dev": tiny.make_flux2,
    "lumina 2": tiny.make_lumina2,
    "wan": tiny.make_wan,
    "qwen image": tiny_qwen.make_qwen_image,
    "chroma": tiny_chroma.make_chroma,
    "longcat": tiny_qwen.make_longcat,
    "krea 2": tiny_qwen.make_krea2,
    "kandinsky": tiny_kandinsky.make_kandinsky_image,
    "ernie-image": tiny_ernie_image.make_ernie_image,
    "prx": tiny_prx.make_prx,
    "z-image": tiny_z_image.make_z_image,
}
TOKENS = {"sd 1": None, "sdxl": None, "sd3": 200, "lumina 2": 200, "longcat": None}  # of SD3, CLIP reads 77 by itself


@pytest.mark.parametrize(
    "family",
    cases(MAKERS, short=["sana", "sdxl", "sd3", "flux 2 dev", "qwen image", "longcat"]),
)
def test_what_is_counted_as_cut_is_cut(family: str, tmp_path: Path) -> None:
    settings = TeacherSettings(
        source=str(tiny.save(MAKERS[family], tmp_path / "pipeline")), max_tokens=TOKENS.get(family, 24),
        height=32, width=32, frames=5 if family == "wan" else None,
    )  # fmt: skip
    teacher = load_teacher(settings, "cpu")
    reader, alone = teacher.text_reader(), load_text_reader(settings)
    assert reader is not None and alone is not None and reader.most == alone.most
    words = [" ".join("abcdefgh"[i % 8] for i in range(count)) for count in range(1, max(270, reader.most + 3))]
    counted = reader.count(words)
    assert counted == alone.count(words) == sorted(counted)
    first = next(i for i, count in enumerate(counted) if count >= reader.most)
    assert first > 2
    for i in range(first - 2, first + 2):
        here, longer = (teacher.encode([text]).embeds for text in (words[i], f"{words[i]} z z z"))
        same = here.shape == longer.shape and torch.equal(here, longer)
        assert same == (counted[i] >= reader.most), (i, counted[i], reader.most)


def test_a_processors_tokenizer_reads() -> None:
    """A pipeline may have a processor for texts and images in the place of its tokenizer, as FLUX.2 dev has."""
    tokenizer = tiny.mistral_tokenizer()
    processor = ProcessorMixin.__new__(ProcessorMixin)
    processor.tokenizer = tokenizer
    assert tokenizer_in(processor) is tokenizer_in(tokenizer) is tokenizer


def test_classes_are_not_read(tmp_path: Path) -> None:
    settings = TeacherSettings(source=str(tiny.save(tiny.make_dit, tmp_path / "pipeline")))
    assert load_text_reader(settings) is load_teacher(settings, "cpu").text_reader() is None


def test_the_bundled_teacher_reads_its_own_prompts() -> None:
    reader = load_text_reader(TeacherSettings())
    assert reader is not None and reader.most == 300 and max(reader.count(list(tiny.PROMPTS))) < 30
