"""Quantised networks on disk: read back here to the bit, and by plain diffusers with its own libraries.

pip install --target LIBRARIES --no-deps torchao bitsandbytes
PYTHONPATH=src:tests:LIBRARIES pytest tests/teachers/test_quantised_files.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import SanaTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepfold.config import TeacherSettings
from stepfold.errors import UserError
from stepfold.teachers.loading import load_teacher
from stepfold.teachers.quantised import QuantisedLinear
from stepfold.teachers.quantised_files import (
    CONFIG,
    NF4_STATE,
    WEIGHTS,
    plain_layers,
    quantise_for_files,
    read_quantised,
    write_quantised,
)

KINDS: tuple[Any, ...] = ("int8", "fp8", "nf4")
Written = Callable[[Any], tuple[Any, Path]]


def out_of(network: Any) -> Tensor:
    draws = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=draws), torch.randn(2, 5, 32, generator=draws)
    with torch.no_grad():
        return network(x, encoder_hidden_states=text, timestep=torch.tensor([300.0, 700.0]), return_dict=False)[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Kind -> a quantised Sana in memory, and its folder."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(kind: Any) -> tuple[Any, Path]:
        if kind not in made:
            network, folder = tiny.make_sana().transformer.eval(), tmp_path_factory.mktemp(kind)
            quantise_for_files(network, kind, ("block",))
            write_quantised(network, folder, kind, torch.float32)
            made[kind] = network, folder
        return made[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_back_is_what_was_written(kind: Any, written: Written) -> None:
    network, folder = written(kind)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    again, found = read_quantised(SanaTransformer2DModel, folder, torch.float32) or (None, {})
    assert found == {"missing_keys": [], "unexpected_keys": []}
    assert torch.equal(out_of(again), out_of(network))
    inside = {name for name, layer in again.named_modules() if isinstance(layer, QuantisedLinear)}
    assert inside and inside == {n for n, layer in network.named_modules() if isinstance(layer, QuantisedLinear)}
    assert "quantization_config" not in again.config
    loss = (out_of(again) - out_of(tiny.make_sana().transformer.eval())).norm() / out_of(again).norm()
    assert 1e-4 < loss < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_other_weights_may_be_of_half_precision(kind: Any, written: Written, tmp_path: Path) -> None:
    network, whole = written(kind)
    write_quantised(network, tmp_path, kind, torch.bfloat16)
    half, full = (load_file(folder / WEIGHTS) for folder in (tmp_path, whole))
    assert half.keys() == full.keys()
    assert half["proj_out.weight"].dtype == torch.bfloat16 and full["proj_out.weight"].dtype == torch.float32
    codes = "transformer_blocks.0.attn1.to_q." + ("weight" if kind == "nf4" else "_weight_qdata")
    assert torch.equal(half[codes].view(torch.uint8), full[codes].view(torch.uint8))
    again, _ = read_quantised(SanaTransformer2DModel, tmp_path, torch.float32) or (None, {})
    assert torch.allclose(out_of(again), out_of(network), atol=0.05) and not torch.equal(out_of(again), out_of(network))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_torchao_reads_it(kind: Any, written: Written) -> None:
    pytest.importorskip("torchao", reason="see the head of this file for the command")
    network, folder = written(kind)
    theirs = SanaTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    assert "torchao" in type(theirs.transformer_blocks[0].attn1.to_q.weight).__module__
    torch.testing.assert_close(out_of(theirs), out_of(network), rtol=1e-4, atol=1e-4)


def test_bitsandbytes_reads_it(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers asks for a GPU first; the library's own code then runs on the CPU.

    On a CPU that multiplies bfloat16 (AVX-512) the library does so in float32 networks too, 0.4% off: not here.
    """
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="see the head of this file for the command")
    network, folder = written("nf4")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False, raising=False)  # earlier ones lack it
        place: Any = {"": torch.device("cpu")}
        theirs = SanaTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32, device_map=place).eval()
    assert isinstance(theirs.transformer_blocks[0].attn1.to_q, bitsandbytes.nn.Linear4bit)
    torch.testing.assert_close(out_of(theirs), out_of(network), rtol=1e-4, atol=1e-4)


def test_an_outer_layer_of_an_inner_ones_name_is_quantised_too() -> None:
    """diffusers leaves out layers by the last part of their names, so the inner one would be read as a plain one."""
    network = nn.ModuleDict(
        {"blocks": nn.ModuleDict({"out": nn.Linear(64, 8), "up": nn.Linear(48, 8)}), "out": nn.Linear(64, 4),
         "in": nn.Linear(64, 4)}
    )  # fmt: skip
    quantise_for_files(network, "nf4", ("block",))
    assert plain_layers(network) == ["blocks.up", "in"]  # 64 does not divide 48
    odd = nn.ModuleDict({"blocks": nn.ModuleDict({"out": nn.Linear(64, 8)}), "out": nn.Linear(48, 4)})
    with pytest.raises(UserError, match=r"the layer out has 48 inputs, no multiple of 64, .*; use int8 or fp8"):
        quantise_for_files(odd, "nf4", ("block",))
    rows = nn.ModuleDict({"blocks": nn.ModuleDict({"out": nn.Linear(48, 8)}), "out": nn.Linear(48, 4)})
    quantise_for_files(rows, "int8", ("block",))
    assert plain_layers(rows) == ["out"]


def changed(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a written network whose tensors were changed."""
    to.mkdir()
    (to / CONFIG).write_text((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, to / WEIGHTS)
    return to


def test_files_that_do_not_fit_are_refused(written: Written, tmp_path: Path) -> None:
    layer = "transformer_blocks.0.attn1.to_q"

    def read(kind: Any, name: str, change: Callable[[dict[str, Tensor]], object]) -> Any:
        return read_quantised(SanaTransformer2DModel, changed(written(kind)[1], tmp_path / name, change), torch.float32)

    def set_to(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
        return lambda tensors: tensors.update({key: value})

    with pytest.raises(UserError, match=f"the weight of {layer} has no scale for each row"):
        read("int8", "offset", set_to(f"{layer}._weight_zero_point", torch.ones(64, 1)))
    with pytest.raises(UserError, match="has no scale for each row"):
        read("fp8", "scales", set_to(f"{layer}._weight_scale", torch.ones(64, 2)))
    with pytest.raises(UserError, match=f"the codes of {layer} do not fit its layer; copy the folder again"):
        read("int8", "rows", lambda tensors: tensors.update({
            f"{layer}._weight_qdata": torch.zeros(2, 64, dtype=torch.int8), f"{layer}._weight_scale": torch.ones(2, 1)
        }))  # fmt: skip
    with pytest.raises(UserError, match="has 64 inputs in blocks of 64; give blocks within rows"):
        read("nf4", "levels", set_to(f"{layer}.weight.quant_map", torch.zeros(16)))
    state = {"quant_type": "nf4", "blocksize": 128, "dtype": "float32", "shape": [64, 64]}
    packed = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(UserError, match="has 64 inputs in blocks of 128"):
        read("nf4", "blocks", set_to(layer + NF4_STATE, packed))
    _, found = read("int8", "missing", lambda tensors: tensors.pop("proj_out.weight"))
    assert found["missing_keys"] == ["proj_out.weight"]


def test_other_ways_are_left_to_diffusers(written: Written, tmp_path: Path) -> None:
    folder = changed(written("nf4")[1], tmp_path / "other", lambda tensors: None)
    config = json.loads((folder / CONFIG).read_text())
    for said in (None, {"quant_method": "gguf"}, {**config["quantization_config"], "bnb_4bit_use_double_quant": True}):
        (folder / CONFIG).write_text(json.dumps(config | {"quantization_config": said}))
        assert read_quantised(SanaTransformer2DModel, folder, torch.float32) is None
    assert read_quantised(SanaTransformer2DModel, tmp_path / "nothing", torch.float32) is None


def test_it_is_no_teacher(written: Written, tiny_sana: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    pipe = tiny.make_sana()
    pipe.save_pretrained(folder, safe_serialization=True)
    (folder / "transformer" / CONFIG).write_text((written("int8")[1] / CONFIG).read_text())
    with pytest.raises(UserError, match="is quantised on disk, and exports need plain weights; give the model that"):
        load_teacher(TeacherSettings(source=str(folder), max_tokens=32), "cpu")


def test_the_files_metadata_names_every_weight(written: Written) -> None:
    """torchao takes a weight that its metadata lacks for none of its own."""
    _, folder = written("fp8")
    with safe_open(folder / WEIGHTS, "pt") as file:
        named = set(json.loads(file.metadata()["tensor_names"]))
    assert named == {name for name, _ in tiny.make_sana().transformer.state_dict().items()}
