"""A LoRA under other tools' names changes the very weights that the student changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from forms import cases
from safetensors.torch import load_file
from torch import Tensor

from stepfold.config import TeacherSettings
from stepfold.errors import UserError
from stepfold.export.lora_keys import joined, renamed
from stepfold.export.single_file import PREFIXES, original_state
from stepfold.jobs.exporting import run_export
from stepfold.students.card import read_card
from stepfold.students.loading import load_merged
from stepfold.teachers.loading import load_teacher
from stepfold.teachers.lora_merging import merge_lora

FAMILIES = (
    "sd1", "sdxl", "sd3", "flux", "lumina", "wan", "sprint", "z-image", "flux2", "qwen", "chroma", "ernie-image",
    "wan 2.2 ti2v",
)  # fmt: skip


def change(state: dict[str, Tensor], name: str, down: str, up: str) -> Tensor:
    """up x down of a layer [O, I, ...]."""
    a, b = state[f"{name}.{down}.weight"], state[f"{name}.{up}.weight"]
    return (b.flatten(1) @ a.flatten(1)).reshape(len(b), *a.shape[1:])


@pytest.mark.parametrize("keys", ["comfy", "kohya"])
@pytest.mark.parametrize("family", cases(FAMILIES, short=["sdxl", "flux", "qwen"]))
def test_each_layer_of_the_original_changes_as_in_the_student(
    family: str, keys: Any, student_of: Callable[..., Path], tmp_path: Path
) -> None:
    """The names are those of the single file, which diffusers' own loaders hold to; q, k and v are one layer there."""
    student = student_of(family, lora=4)
    file = run_export(student, "lora", tmp_path / "lora.safetensors", force=False, keys=keys)
    merged, _, card = load_merged(student, "cpu")
    plain = load_teacher(TeacherSettings(**card.config["teacher"]), "cpu").transformer
    before, after = (original_state(network) for network in (plain, merged.transformer))
    prefix = PREFIXES.get(type(plain).__name__, "")
    state, seen = load_file(file), 0
    by_diffusers = keys == "kohya" and family == "sd1"
    if by_diffusers:
        before, after, prefix = plain.state_dict(), merged.transformer.state_dict(), ""
    for name, value in before.items():
        layer = name.removeprefix(prefix).removesuffix(".weight")
        ours = f"diffusion_model.{layer}" if keys == "comfy" else f"lora_unet_{layer.replace('.', '_')}"
        ends = ("lora_A", "lora_B") if keys == "comfy" else ("lora_down", "lora_up")
        moved = not torch.equal(value, after[name])
        assert moved == (f"{ours}.{ends[0]}.weight" in state), name
        if moved:
            seen += 1
            torch.testing.assert_close(change(state, ours, *ends), after[name] - value, atol=1e-6, rtol=1e-4)
            assert keys == "comfy" or state[f"{ours}.alpha"] == len(state[f"{ours}.lora_down.weight"])
    assert seen and len(state) == seen * (2 if keys == "comfy" else 3)
    again = load_teacher(TeacherSettings(**card.config["teacher"] | {"lora": str(file)}), "cpu").transformer
    for name, value in merged.transformer.state_dict().items():  # as --teacher-lora reads it
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "keys"),
    cases(
        [
            *((family, "kohya") for family in ("sd1", "sdxl", "flux2", "qwen", "z-image")),
            *((family, "comfy") for family in ("wan", "wan 2.2 ti2v", "flux2", "qwen", "ernie-image")),
        ],
        short=[("sdxl", "kohya"), ("flux2", "comfy")],
    ),
)
def test_diffusers_reads_the_names(family: str, keys: Any, student_of: Callable[..., Path], tmp_path: Path) -> None:
    """It has converters of its own for these layouts, and finds the places that our tables say.

    Its converter of FLUX.1's knows the published widths alone; see below.
    """
    student = student_of(family, lora=4)
    file = run_export(student, "lora", tmp_path / "lora.safetensors", force=False, keys=keys)
    teacher = load_teacher(read_card(student).teacher_settings(), "cpu")
    assert merge_lora(teacher.pipe, str(file), 1.0, lambda: None)


@pytest.mark.parametrize("kind", [FluxTransformer2DModel, ChromaTransformer2DModel])
def test_diffusers_reads_flux_and_chroma_at_their_published_width(kind: Any) -> None:
    """Its converter of kohya's names for both; the network is two blocks that have no weights."""
    with torch.device("meta"):
        network = kind(num_layers=1, num_single_layers=1)
    layers = {
        name: value for name, value in network.named_modules() if "blocks." in name and hasattr(value, "in_features")
    }
    weights = {}
    for name, layer in layers.items():
        weights[f"transformer.{name}.lora_A.weight"] = torch.randn(2, layer.in_features)
        weights[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, 2)
    again = _convert_kohya_flux_lora_to_diffusers(renamed(weights, network, "transformer", "kohya"))
    assert again.keys() == weights.keys()
    for name, layer in layers.items():
        x = torch.randn(layer.in_features)
        ends = [
            (state[f"transformer.{name}.lora_A.weight"], state[f"transformer.{name}.lora_B.weight"])
            for state in (again, weights)
        ]
        found, wanted = (up @ (down @ x) for down, up in ends)
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)


def test_pieces_without_a_lora_stay_as_they_are() -> None:
    rows = {0: ("q", slice(0, 2)), 1: ("k", slice(0, 3)), 3: ("mlp", slice(0, 4)), 2: ("v", slice(0, 2))}
    down = {"k": torch.randn(2, 5), "mlp": torch.randn(3, 5)}
    up = {"k": torch.randn(3, 2), "mlp": torch.randn(4, 3)}
    a, b = joined(rows, down, up)
    wanted = [torch.zeros(2, 5), up["k"] @ down["k"], torch.zeros(2, 5), up["mlp"] @ down["mlp"]]
    torch.testing.assert_close(b @ a, torch.cat(wanted))
    halves = {1: ("mlp", slice(0, 2)), 0: ("mlp", slice(2, 4))}  # the other way round, and one pair of matrices
    a, b = joined(halves, down, up)
    torch.testing.assert_close(b @ a, (up["mlp"] @ down["mlp"])[[2, 3, 0, 1]])
    assert torch.equal(a, down["mlp"])


def test_what_has_no_such_names_is_refused(student_of: Callable[..., Path], tmp_path: Path) -> None:
    student = student_of("sdxl", lora=4)
    with pytest.raises(UserError, match="--keys kohya is for --to lora; leave it out of --to single-file"):
        run_export(student, "single-file", tmp_path / "x.safetensors", force=False, keys="kohya")
    merged, _, _ = load_merged(student, "cpu")
    lost = {f"unet.nowhere.lora_{end}.weight": torch.zeros(1, 1) for end in "AB"}
    with pytest.raises(UserError, match="of a UNet2DConditionModel have no place for nowhere; export with --keys diff"):
        renamed(lost, merged.transformer, "unet", "comfy")
