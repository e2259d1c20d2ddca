"""Batches of a compiled run: equal shapes, whatever the prompts."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_hunyuan
import tiny_hunyuan_image
import torch

from stepfold.config import TeacherSettings
from stepfold.teachers.loading import load_teacher
from stepfold.training.batches import at_full_length


@pytest.mark.parametrize(
    ("make", "frames"), [(tiny_hunyuan.make_hunyuan_video, 5), (tiny_hunyuan_image.make_hunyuan_image, None)]
)
def test_a_second_text_is_as_long_in_every_batch(make: Any, frames: int | None, tmp_path: Path) -> None:
    """Of a prompt with words in quotes and of one without; what is padded does not matter."""
    folder = tiny.save(make, tmp_path / "teacher")
    settings = TeacherSettings(source=str(folder), height=16, width=32, max_tokens=48, frames=frames)
    teacher = load_teacher(settings, "cpu")
    assert teacher.second_tokens == teacher.pipe.tokenizer_2_max_length
    shapes = set()
    for prompt in ("red heart", 'a sign that says "moon"'):
        condition = teacher.encode([prompt])
        padded = at_full_length(condition, teacher)
        assert padded.second is not None
        shapes.add((padded.embeds.shape, padded.second.embeds.shape))
        x, t = 0.5 * torch.randn(1, *teacher.latent_shape), torch.tensor([1.0])
        plain = teacher.velocity(x, t, condition, None)
        torch.testing.assert_close(teacher.velocity(x, t, padded, None), plain, rtol=0, atol=1e-4)
    assert len(shapes) == 1
