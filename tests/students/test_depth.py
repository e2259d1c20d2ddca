"""Students with fewer blocks than their teacher."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_ernie_image
import tiny_prx
import tiny_qwen
import tiny_z_image
import torch
from diffusers import SanaTransformer2DModel, SD3Transformer2DModel
from forms import cases

from stepfold.config import load_config
from stepfold.errors import UserError
from stepfold.students.depth import drop_blocks, kept_blocks
from stepfold.students.saving import save_whole
from stepfold.students.whole import as_student, new_student
from stepfold.teachers.contract import Student
from stepfold.teachers.loading import family_of


@pytest.mark.parametrize(
    ("count", "depth", "expected"),
    [
        (6, 1.0, [0, 1, 2, 3, 4, 5]),
        (6, 0.5, [0, 2, 5]),
        (28, 0.25, [0, 4, 9, 14, 18, 22, 27]),
        (10, 0.01, [0, 9]),
        (1, 0.5, [0]),
    ],
)
def test_blocks_that_stay_are_evenly_spaced(count: int, depth: float, expected: list[int]):
    kept = kept_blocks(count, depth)
    assert kept == expected


def test_blocks_keep_their_weights_and_their_order():
    network: Any = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=5, sample_size=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
    )  # fmt: skip
    old = list(network.transformer_blocks)
    drop_blocks(network, {"transformer_blocks": "num_layers"}, 0.6)
    assert all(ours is old[i] for ours, i in zip(network.transformer_blocks, [0, 2, 4], strict=True))
    assert SanaTransformer2DModel.from_config(network.config).config["num_layers"] == 3


def test_a_stable_diffusion_35_keeps_its_dual_attention():
    """Its config numbers the blocks that attend twice; the numbers follow the blocks."""
    network: Any = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=5, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=8,
        dual_attention_layers=(0, 1, 2), qk_norm="rms_norm",
    )  # fmt: skip
    drop_blocks(network, {"transformer_blocks": "num_layers"}, 0.6)
    assert network.config.dual_attention_layers == (0, 1)
    again = SD3Transformer2DModel.from_config(network.config)
    again.load_state_dict(network.state_dict())  # strict: the same parts in the same places


OF_BLOCKS: dict[str, Callable[..., Any]] = {
    "sana": tiny.make_sana,
    "flux": tiny.make_flux,
    "sd3": tiny.make_sd3,
    "pixart": tiny.make_pixart,
    "dit": tiny.make_dit,
    "flux2": tiny.make_flux2_klein,
    "lumina": tiny.make_lumina2,
    "wan": tiny.make_wan,
    "qwen": tiny_qwen.make_qwen_image,
    "longcat": tiny_qwen.make_longcat,
    "krea": tiny_qwen.make_krea2,
    "ernie-image": tiny_ernie_image.make_ernie_image,
    "prx": tiny_prx.make_prx,
    "z-image": tiny_z_image.make_z_image,
}


SHORT = ("sana", "flux", "sd3", "dit", "wan", "qwen")


@pytest.fixture(params=cases(OF_BLOCKS, short=SHORT))
def teacher(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    folder = tiny.save(partial(OF_BLOCKS[request.param], num_layers=3), tmp_path / "pipeline")
    frames = 5 if request.param == "wan" else None
    return family_of(str(folder))(folder, height=32, width=32, max_tokens=24, frames=frames)


def num_parameters(student: Student) -> int:
    return sum(p.numel() for p in student.parameters())


def test_a_smaller_student_is_saved_and_read_back(teacher: Any, tmp_path: Path):
    student = new_student(teacher, 0.6)
    assert num_parameters(student) < 0.97 * num_parameters(new_student(teacher))
    for blocks in teacher.block_stacks():
        assert len(getattr(student.transformer, blocks)) <= len(getattr(teacher.transformer, blocks))
    save_whole(teacher, student, tmp_path / "student", tiny.recipe(teacher))
    sizes = dict(height=32, width=32, max_tokens=24, frames=teacher.frames)
    again = family_of(str(tmp_path / "student"))(tmp_path / "student", **sizes)
    condition, guidance = teacher.encode((teacher.examples or ["red heart"])[:1]), torch.full((1,), 4.0)
    x, t = torch.randn(1, *teacher.latent_shape), torch.ones(1)
    with torch.no_grad():
        ours = student(x, t, condition, guidance)
        torch.testing.assert_close(as_student(again)(x, t, condition, guidance), ours, rtol=0, atol=1e-5)
        assert (ours - new_student(teacher)(x, t, condition, guidance)).norm() > 1e-3 * ours.norm()


def test_what_cannot_lose_blocks_says_so(tmp_path: Path):
    folder = tiny.save(tiny.make_sd1, tmp_path / "pipeline")
    teacher = family_of(str(folder))(folder, height=32, width=32, max_tokens=24)
    with pytest.raises(UserError, match=r"UNet2DConditionModel cannot lose blocks; leave student\.depth at 1"):
        new_student(teacher, 0.5)
    with pytest.raises(UserError, match=r"leave student\.depth at 1"):
        load_config("default", ["student.lora=4", "student.depth=0.5"])
