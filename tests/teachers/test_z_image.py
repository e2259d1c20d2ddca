"""What Z-Image alone has, and what its relatives are refused for."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny_z_image import make_z_image

from stepfold.config import TeacherSettings
from stepfold.errors import UserError
from stepfold.randomness import generator, normal
from stepfold.sampling.teacher import sample_teacher
from stepfold.teachers.loading import family_of, load_teacher


def dynamic() -> Any:
    pipe = make_z_image()
    pipe.scheduler = type(pipe.scheduler)(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)
    return pipe


def load(folder: Path, **changes: int) -> Any:
    settings = {"height": 16, "width": 24, "max_tokens": 48} | changes
    return load_teacher(TeacherSettings(source=str(folder), **settings), "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(make_z_image, tmp_path_factory.mktemp("z") / "pipeline")


@pytest.mark.parametrize("width", [24, 64])
def test_with_its_own_scheduler_it_is_sampled_too(tmp_path: Path, width: int) -> None:
    """Its shift depends on the number of tokens."""
    teacher = load(tiny.save(dynamic, tmp_path / "pipeline"), width=width)
    call = teacher.usual_call() | {"num_inference_steps": 3, "guidance_scale": 4.0}
    with torch.no_grad():
        theirs = teacher.latents_of(teacher.pipe, ["red heart"], [generator(0, "test", 0)], **call)
    noise = 0.5 * normal(teacher.latent_shape, 0, "test", 0)[None]
    ours = sample_teacher(teacher, noise, teacher.encode(["red heart"]), torch.tensor([4.0]), 3, even=True)
    assert (ours / 0.5 - theirs).norm() < 1e-4 * theirs.norm()


def test_texts_are_of_their_own_lengths(folder: Path) -> None:
    """On both sides of the 32 tokens that the network fills them up to; nothing depends on what lies behind."""
    teacher = load(folder)
    condition = teacher.encode(["a cat", "pizza on a white plate"])
    lengths = [len(text) for text in condition.texts()]
    assert condition.lengths == lengths and condition.lengths is condition.lengths  # read from the device once
    assert lengths == condition.mask.sum(1).tolist() and lengths[0] < 32 < lengths[1] < 48
    (long,), _ = teacher.pipe.encode_prompt(["pizza on a white plate"], "cpu", False, max_sequence_length=48)
    torch.testing.assert_close(condition.texts()[1], long)


def test_what_the_network_cannot_place_is_refused(folder: Path) -> None:
    """32 positions a side, of four pixels each, and 300 tokens of a text that is filled up to multiples of 32."""
    with pytest.raises(UserError, match=r"132 x 24 pixels, but this network draws at most 128 x 128; give a smaller"):
        load(folder, height=132)
    for length in (4, 290):
        with pytest.raises(UserError, match=rf"max_tokens is {length}, but .* puts \d+ tokens .* reads 288; choose"):
            load(folder, max_tokens=length)


def test_what_fills_a_picture_up_is_idle_where_no_picture_needs_it(folder: Path) -> None:
    sized = partial(TeacherSettings, source=str(folder), height=32, width=32, max_tokens=48)
    assert load_teacher(sized(), "cpu").idle_parameters() == (".x_pad_token",)
    assert load_teacher(sized(sizes=((32, 32), (16, 24))), "cpu").idle_parameters() == ()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ZImageOmniPipeline", r"reads images beside the text; give the text-to-image"),
        ("ZImageImg2ImgPipeline", r"starts from an image"),
        ("PRXPixelPipeline", r"makes pixels, not latents; give the pipeline with"),
    ],
)
def test_relatives_are_refused_with_the_reason(folder: Path, tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(UserError, match=rf"is a {name} \(it {reason}.*\); this version distils") as caught:
        family_of(str(tmp_path))
    assert "\n" not in str(caught.value)
