"""A quantised network on disk, as plain diffusers reads it: int8 and fp8 for torchao, NF4 for bitsandbytes.

Neither library is needed here. Files are safetensors alone.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepfold.errors import UserError
from stepfold.teachers.quantised import BLOCK, Quantised, QuantisedLinear, nf4_levels, quantise, quantised_layer

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
TORCHAO = {"int8": ("Int8WeightOnlyConfig", "Int8Tensor"), "fp8": ("Float8WeightOnlyConfig", "Float8Tensor")}
"""Kind -> torchao's classes of the way and of its weights."""
NF4_STATE = ".weight.quant_state.bitsandbytes__nf4"
PACKAGES = {"int8": "torchao>=0.16", "fp8": "torchao>=0.16", "nf4": "bitsandbytes>=0.43.3"}
"""Kind -> what plain diffusers needs to load it."""


def quantise_for_files(network: nn.Module, kind: Quantised, blocks: tuple[str, ...]) -> None:
    """Quantises the linear layers of a network's blocks that the files can hold, in place on the CPU.

    bitsandbytes' blocks of NF4 run through rows, so that ours are its own where 64 divides the inputs. diffusers leaves
    out a layer by the last part of its name too: an outer layer that shares it with one in the blocks is quantised.
    """
    columns = BLOCK if kind == "nf4" else 2
    quantise(network, kind, blocks, "cpu", columns)
    inside = {name for name, layer in network.named_modules() if isinstance(layer, QuantisedLinear)}
    for name in plain_layers(network) if kind == "nf4" else ():
        layer: Any = network.get_submodule(name)
        if any(left_out(name, each) for each in inside):
            if layer.in_features % columns:
                raise UserError(
                    f"the layer {name} has {layer.in_features} inputs, no multiple of {columns}, and diffusers cannot "
                    "tell it from one in the blocks; use int8 or fp8"
                )
            network.set_submodule(name, quantised_layer(layer, kind, "cpu"))


def plain_layers(network: nn.Module) -> list[str]:
    """Names of the linear layers that are not quantised."""
    return [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and not isinstance(layer, QuantisedLinear)
    ]


def left_out(key: str, name: str) -> bool:
    """Whether diffusers lets a layer be because of an entry of its list of layers to leave out."""
    return key in (name, name.rpartition(".")[2]) or f"{key}." in name


def write_quantised(network: Any, folder: Path, kind: Quantised, dtype: torch.dtype) -> None:
    """A network of diffusers whose layers were quantised, as its config and one file of weights.

    Args:
        network: on the CPU.
        folder: its part of a pipeline; earlier weights in it are replaced.
        kind: of its quantised layers.
        dtype: of the other weights, except those that its class keeps in float32, and of what layers compute in.
    """
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, QuantisedLinear)}
    ours = {f"{name}.{part}" for name in layers for part in ("codes", "scales")}
    tensors = {
        name: value.to(stored_dtype(network, name, value, dtype)).contiguous().clone()
        for name, value in network.state_dict().items()
        if name not in ours
    }
    said, stored, metadata = (as_bitsandbytes if kind == "nf4" else as_torchao)(layers, kind, dtype, list(tensors))
    if kind == "nf4":
        said["llm_int8_skip_modules"] = plain_layers(network)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    network.save_config(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | {"quantization_config": said}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors | stored, folder / WEIGHTS, {"format": "pt"} | metadata)


def stored_dtype(network: Any, name: str, value: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a plain tensor on disk."""
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ()) & set(name.split("."))
    return value.dtype if kept or not value.is_floating_point() else dtype


Stored = tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]
"""The config's section, tensors by their names, metadata of the file."""


def as_torchao(layers: Mapping[str, QuantisedLinear], kind: Quantised, dtype: torch.dtype, others: list[str]) -> Stored:
    """torchao's layout: codes and scales of rows, with the classes that hold them in the file's metadata."""
    way, kept = TORCHAO[kind]
    codes_dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    stored, metadata = {}, dict.fromkeys(others, json.dumps({"_type": "Tensor"}))
    for name, layer in layers.items():
        stored[f"{name}._weight_qdata"] = layer.codes.view(codes_dtype)
        stored[f"{name}._weight_scale"] = layer.scales
        data = {"block_size": [1, layer.in_features], "dtype": {"_type": "torch.dtype", "_data": name_of(dtype)}}
        metadata[f"{name}.weight"] = json.dumps(
            {"_type": kept, "_data": data, "_tensor_data_names": ["qdata", "scale"]}
        )
    row = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    said = {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": way, "_version": 2, "_data": {"granularity": row}}},
        "modules_to_not_convert": None,
    }
    return said, stored, metadata | {"tensor_names": json.dumps(list(metadata))}


def as_bitsandbytes(
    layers: Mapping[str, QuantisedLinear], kind: Quantised, dtype: torch.dtype, others: list[str]
) -> Stored:
    """bitsandbytes' layout of NF4: two codes a byte, each block's largest weight, the levels, a json in bytes."""
    stored = {}
    for name, layer in layers.items():
        state = {
            "quant_type": kind, "blocksize": BLOCK, "dtype": name_of(dtype),
            "shape": [layer.out_features, layer.in_features],
        }  # fmt: skip
        stored |= {
            f"{name}.weight": layer.codes.reshape(-1, 1),
            f"{name}.weight.absmax": layer.scales.flatten(),
            f"{name}.weight.quant_map": nf4_levels(),
            name + NF4_STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }
    said = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": kind,
        "bnb_4bit_compute_dtype": name_of(dtype), "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip
    return said, stored, {}


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16`."""
    return str(dtype).removeprefix("torch.")


def kind_in(config: Mapping[str, Any]) -> Quantised | None:
    """How the network of a config is quantised; None where it is not, or in a way that is left to diffusers."""
    said = config.get("quantization_config") or {}
    if said.get("quant_method") == "torchao":
        way = said.get("quant_type", {}).get("default", {}).get("_type")
        return next((kind for kind, (name, _) in TORCHAO.items() if name == way), None)  # type: ignore[return-value]
    nf4 = said.get("quant_method") == "bitsandbytes" and said.get("bnb_4bit_quant_type") == "nf4"
    return "nf4" if nf4 and said.get("load_in_4bit") and not said.get("bnb_4bit_use_double_quant") else None


def check_plain(source: str, part: str) -> None:
    """Refuses a pipeline folder whose network is quantised on disk, for a teacher.

    Raises:
        UserError: it is.
    """
    config = Path(source) / part / CONFIG
    if config.is_file() and "quantization_config" in json.loads(config.read_text(encoding="utf-8")):
        raise UserError(
            f"teacher {source!r} is quantised on disk, and exports need plain weights; give the model that it was made "
            "of, and teacher.quantise where memory is short"
        )


def read_quantised(reader: Any, folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, list[str]]] | None:
    """A quantised network and what its files lack or have too much, as `from_pretrained` tells; None for others.

    Args:
        reader: the network's class in diffusers.
        folder: its part of a pipeline.
        dtype: of its other weights, and of what it multiplies.

    Raises:
        UserError: codes and scales do not fit the layers.
    """
    if not (folder / CONFIG).is_file():
        return None
    config = reader.load_config(folder)
    kind = kind_in(config)
    if kind is None:
        return None
    with init_empty_weights():
        network = reader.from_config({name: value for name, value in config.items() if name != "quantization_config"})
    tensors = {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
    stored = (from_bitsandbytes if kind == "nf4" else from_torchao)(tensors)
    state = {name: value.to(stored_dtype(network, name, value, dtype)) for name, value in tensors.items()}
    for name, (codes, scales) in stored.items():
        layer = network.get_submodule(name)
        if not isinstance(layer, nn.Linear) or codes.shape[0] != layer.out_features:
            raise UserError(f"{folder}: the codes of {name} do not fit its layer; copy the folder again")
        network.set_submodule(name, QuantisedLinear(layer, kind, codes, scales, dtype))
        state |= {f"{name}.codes": codes, f"{name}.scales": scales}
    found = network.load_state_dict(state, strict=False, assign=True)
    return network.eval(), {"missing_keys": found.missing_keys, "unexpected_keys": found.unexpected_keys}


def from_torchao(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> codes and scales, which are taken out of the tensors."""
    ending, found = "._weight_qdata", {}
    for name in [key.removesuffix(ending) for key in tensors if key.endswith(ending)]:
        codes, scales = tensors.pop(name + ending), tensors.pop(f"{name}._weight_scale").float()
        offset = tensors.pop(f"{name}._weight_zero_point", torch.zeros(1))
        if scales.shape != (len(codes), 1) or offset.any():
            raise UserError(f"the weight of {name} has no scale for each row; quantise it by rows, symmetrically")
        found[name] = codes.view(torch.uint8), scales
    return found


def from_bitsandbytes(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """As `from_torchao`."""
    found = {}
    for name in [key.removesuffix(NF4_STATE) for key in tensors if key.endswith(NF4_STATE)]:
        state = json.loads(bytes(tensors.pop(name + NF4_STATE).tolist()))
        codes, scales, levels = (tensors.pop(f"{name}.weight{part}") for part in ("", ".absmax", ".quant_map"))
        (rows, columns), block = state["shape"], state["blocksize"]
        if columns % block or not torch.allclose(levels, nf4_levels(), atol=1e-6):
            raise UserError(f"the weight of {name} has {columns} inputs in blocks of {block}; give blocks within rows")
        found[name] = codes.view(rows, columns // 2), scales.float().view(rows, columns // block)
    return found
