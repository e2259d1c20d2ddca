"""What Kandinsky 5 alone has: padding that its class attends to, positions by size, sizes of images."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import Kandinsky5Transformer3DModel
from tiny_kandinsky import SIZES, make_kandinsky_image, make_kandinsky_video

from stepfold.config import TeacherSettings
from stepfold.errors import UserError
from stepfold.students.whole import new_student
from stepfold.teachers.kandinsky5_video import spread_of_video
from stepfold.teachers.loading import load_teacher


def test_padding_is_left_out_when_blocks_are_computed_again(tmp_path: Path) -> None:
    """Its mark is in the values: gradients are finite, and the same with and without checkpointing."""
    folder = tiny.save(make_kandinsky_video, tmp_path / "pipeline")
    settings = TeacherSettings(source=str(folder), height=16, width=32, frames=5, max_tokens=24)
    teacher = load_teacher(settings, "cpu")
    condition = teacher.encode(["red heart", "dog on blue background"])
    assert condition.lengths[0] < condition.lengths[1]
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([0.5, 1.2])
    student, gradients = new_student(teacher), []
    for again in (False, True):
        if again:
            student.recompute_blocks()
        F = student(x, t, condition, torch.ones(2))
        teacher.velocity(x[:1], t[:1], condition.rows(slice(0, 1)).trimmed(), None)  # another mask in between
        gradients.append(torch.autograd.grad(F.square().sum(), list(student.transformer.parameters())))
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.isfinite().all()
        torch.testing.assert_close(recomputed, plain)
    alone = load_teacher(settings, "cpu", network_only=True, null=teacher.null_condition)
    scale = torch.full((2,), 4.0)
    assert alone.pipe.vae is None
    assert torch.equal(alone.velocity(x, t, condition, scale), teacher.velocity(x, t, condition, scale))


def test_positions_of_videos_go_by_their_size() -> None:
    """As the pipeline has it, in pixels: both sides between 480 and 854 or not."""
    assert spread_of_video(64, 96, factor=8) == (1, 2, 2)
    assert spread_of_video(64, 128, factor=8) == spread_of_video(2, 4, factor=8) == (1, 3.16, 3.16)


def test_images_have_the_sizes_of_their_pipeline(tmp_path: Path) -> None:
    settings = TeacherSettings(source=str(tiny.save(make_kandinsky_image, tmp_path / "pipeline")))
    teacher = load_teacher(settings, "cpu")
    assert (teacher.latent_shape, len(teacher.pipe.resolutions)) == ((4, 128, 128), 7 + len(SIZES))
    with pytest.raises(
        UserError, match=r"to be 512 x 512 pixels, but .* makes 1024 x 1024, 1408 x 640, .*; give one of"
    ):
        load_teacher(settings.model_copy(update={"height": 512, "width": 512}), "cpu")


def test_sparse_attention_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(partial(make_kandinsky_video, attention_type="nabla"), tmp_path / "pipeline")
    with pytest.raises(UserError, match=r"attention_type='nabla': sparse .*; give a Kandinsky 5 of regular") as caught:
        load_teacher(TeacherSettings(source=str(folder)), "cpu")
    assert "\n" not in str(caught.value)


def test_a_prompt_has_room_for_what_stands_behind_it(tmp_path: Path) -> None:
    folder = tiny.save(make_kandinsky_image, tmp_path / "pipeline")
    settings = TeacherSettings(source=str(folder), height=32, width=32, max_tokens=24)
    teacher = load_teacher(settings, "cpu")
    reader = teacher.text_reader()
    assert reader is not None and reader.most == 23 and reader.count(["a b"]) == [2]
    assert teacher.encode(["a b"]).lengths == [3]
    with pytest.raises(
        UserError, match="max_tokens is 1024, but this pipeline reads 1023 tokens of a prompt; leave it"
    ):
        load_teacher(settings.model_copy(update={"max_tokens": 1024}), "cpu")


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (dict(model_dim=2560, ff_dim=10240, num_visual_blocks=50, axes_dims=(32, 48, 48)), "6.02"),
        (dict(model_dim=1792, ff_dim=7168, visual_cond=True), "2.01"),
        (
            dict(
                model_dim=4096, ff_dim=16384, time_dim=1024, num_text_blocks=4, num_visual_blocks=60,
                axes_dims=(32, 48, 48), visual_cond=True,
            ),
            "19.31",
        ),
    ],
    ids=["image lite", "video lite", "video pro"],
)  # fmt: skip
def test_published_sizes_are_those_of_the_page(config: dict[str, Any], billions: str) -> None:
    with torch.device("meta"):
        network = Kandinsky5Transformer3DModel(in_visual_dim=16, out_visual_dim=16, **config)
    count = sum(p.numel() for p in network.parameters())
    assert f"{count / 1e9:.2f}" == billions
    page = Path(__file__).parents[2] / "docs" / "families.md"
    assert billions in "".join(line for line in page.read_text().splitlines() if line.startswith("| Kandinsky 5"))
