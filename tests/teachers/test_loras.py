"""Whatever wrote a LoRA: a teacher's weights gain what its file says, or it is refused with its layer."""

import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offline import cached, offline_hub
from safetensors.torch import save_file
from torch import Tensor, nn

from stepfold.config import TeacherSettings
from stepfold.errors import UserError
from stepfold.prompts.conditions import conditions_key
from stepfold.teachers.fingerprints import teacher_fingerprint
from stepfold.teachers.lora_merging import merge_lora

State = dict[str, Tensor]
MAKERS = {
    "sd1": tiny.make_sd1,
    "sdxl": tiny.make_sdxl,
    "flux": tiny.make_flux,
    "wan": tiny.make_wan,
    "sd3": tiny.make_sd3,
}
ATTENTION = ("attn1.to_q", "attn2.to_v", "ff.net.2")


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    """A pipeline of each kind, to merge into; `gains` puts it back."""
    return {name: make() for name, make in MAKERS.items()}


def network_of(pipe: Any) -> nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def parameters(pipe: Any) -> State:
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {f"{part}.{name}": p for part, network in parts.items() for name, p in network.named_parameters()}


@torch.no_grad()
def gains(pipe: Any, *loras: tuple[Path, float]) -> State:
    """What every weight of the pipeline gains, of those that change; the pipeline is then as it was."""
    before = {name: p.clone() for name, p in parameters(pipe).items()}
    try:
        for file, scale in loras:
            merge_lora(pipe, str(file), scale, lambda: None)
        after = {name: p.clone() for name, p in parameters(pipe).items()}
    finally:
        for name, p in parameters(pipe).items():
            p.copy_(before[name])
    return {name: after[name] - old for name, old in before.items() if not torch.equal(after[name], old)}


def assert_gains(found: State, expected: State, tolerance: float = 1e-4) -> None:
    """That those weights and no others gain so much; rounding is of the weights, which are of about 1."""
    assert found.keys() == expected.keys()
    for name, gain in expected.items():
        assert (found[name] - gain).norm() <= tolerance * gain.norm() + 1e-6 * gain.numel() ** 0.5, name


def write(folder: Path, state: Mapping[str, Tensor], said: Mapping[str, str] | None = None, name: str = "lora") -> Path:
    file = folder / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, file, {"format": "pt", **(said or {})})
    return file


def weights(pipe: Any, *ends: str) -> State:
    """Layer -> weight, of the network's layers whose names end so."""
    return {name: m.weight.detach() for name, m in network_of(pipe).named_modules() if name.endswith(ends)}


def pair(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Down [R, I, ...] and up [O, R, ...]."""
    return 0.1 * torch.randn(rank, *weight.shape[1:]), 0.1 * torch.randn(len(weight), rank, *[1] * (weight.ndim - 2))


def product(up: Tensor, down: Tensor) -> Tensor:
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def norms(weight: Tensor, axes: tuple[int, ...]) -> Tensor:
    return weight.square().sum(dim=axes[: weight.ndim - 1], keepdim=True).sqrt()


def kohya(layer: str) -> str:
    return f"lora_unet_{layer.replace('.', '_')}"


def of_kohya(pipe: Any, *ends: str, rank: int = 8, alpha: float = 4.0) -> tuple[State, State]:
    """A file under the names of kohya's scripts, and what it means."""
    state, expected = {}, {}
    for layer, weight in weights(pipe, *ends).items():
        down, up = pair(weight, rank)
        state |= {f"{kohya(layer)}.lora_down.weight": down, f"{kohya(layer)}.lora_up.weight": up}
        state[f"{kohya(layer)}.alpha"] = torch.tensor(alpha)
        expected[f"unet.{layer}.weight"] = alpha / rank * product(up, down)
    return state, expected


def of_peft(pipe: Any, start: str, *ends: str, rank: int = 4, scaling: float = 1.0) -> tuple[State, State]:
    """A file under the network's own names after `start`, without alphas, and what it means at a scaling."""
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    state, expected = {}, {}
    for layer, weight in weights(pipe, *ends).items():
        down, up = pair(weight, rank)
        state |= {f"{start}{layer}.lora_A.weight": down, f"{start}{layer}.lora_B.weight": up}
        expected[f"{part}.{layer}.weight"] = scaling * product(up, down)
    return state, expected


Case = tuple[State, State, dict[str, str]]


def convolutions(pipe: Any) -> Case:
    """LoCon."""
    state, expected = of_kohya(pipe, *ATTENTION, "proj_in", "proj_out")
    more, gain = of_kohya(pipe, "resnets.0.conv1", "time_emb_proj", rank=4, alpha=1.0)
    return state | more, expected | gain, {}


def tucker(pipe: Any) -> Case:
    """LoCon with a third matrix in the middle."""
    state, expected = {}, {}
    for layer, weight in weights(pipe, "resnets.0.conv1").items():
        down, up, mid = (
            torch.randn(3, weight.shape[1], 1, 1),
            torch.randn(len(weight), 3, 1, 1),
            torch.randn(3, 3, 3, 3),
        )
        parts = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": mid, "alpha": torch.tensor(1.5)}
        state |= {f"{kohya(layer)}.{name}": 0.1 * value if name != "alpha" else value for name, value in parts.items()}
        gain = 0.5e-3 * torch.einsum("or,rshw,si->oihw", up[..., 0, 0], mid, down[..., 0, 0])
        expected[f"unet.{layer}.weight"] = gain
    return state, expected, {}


def whole_differences(pipe: Any) -> Case:
    state, expected = of_kohya(pipe, "attn1.to_q")
    for layer, weight in weights(pipe, "transformer_blocks.0.norm1").items():
        state |= {f"{kohya(layer)}.diff": torch.full_like(weight, 0.5), f"{kohya(layer)}.diff_b": 0.2 * weight}
        expected |= {f"unet.{layer}.weight": torch.full_like(weight, 0.5), f"unet.{layer}.bias": 0.2 * weight}
    return state, expected, {}


def dora(pipe: Any, *, by_column: bool = False, names: str = "kohya", end: str = "attn1.to_q") -> Case:
    """The norm of each row of the result, or each column, is the magnitude."""
    state, expected = {}, {}
    axes = (0, 2, 3) if by_column else (1, 2, 3)
    for layer, weight in weights(pipe, end).items():
        down, up = pair(weight, 4)
        merged = weight + product(up, down)
        magnitude = 1.3 * norms(weight, axes)
        expected[f"unet.{layer}.weight"] = magnitude * merged / norms(merged, axes) - weight
        if names == "kohya":
            parts = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": magnitude}
            state |= {f"{kohya(layer)}.{name}": value for name, value in parts.items()}
        else:
            parts = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": magnitude.flatten()}
            state |= {f"unet.{layer}.{name}": value for name, value in parts.items()}
    return state, expected, {}


def sgm(pipe: Any) -> Case:
    """The names of XL's authors, with DoRA, which diffusers leaves out."""
    names = {"down_blocks.1.attentions.0.": "input_blocks_3_1_", "mid_block.attentions.0.": "middle_block_1_"}
    state, expected, _ = dora(pipe)
    theirs = {}
    for key, value in state.items():
        for ours, other in names.items():
            if key.startswith(kohya(ours)):
                theirs[key.replace(kohya(ours), f"lora_unet_{other}")] = value
    return (
        theirs,
        {name: gain for name, gain in expected.items() if name.startswith(tuple(f"unet.{n}" for n in names))},
        {},
    )


def alpha_in_json(pipe: Any) -> Case:
    state, expected = of_peft(pipe, "unet.", *ATTENTION, scaling=4)
    return state, expected, {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 16})}


def alpha_in_flat_metadata(pipe: Any) -> Case:
    state, expected = of_peft(pipe, "unet.", *ATTENTION, scaling=4)
    return state, expected, {"unet.lora_alpha": "16", "unet.r": "4"}


def stabilised(pipe: Any) -> Case:
    """Rank-stabilised: alpha over the root of the rank."""
    state, expected = of_peft(pipe, "unet.", *ATTENTION, scaling=8)
    return state, expected, {"unet.lora_alpha": "16", "unet.use_rslora": "True"}


def two_ranks(pipe: Any) -> Case:
    """Without an alpha anywhere, which is the rank then."""
    state, expected = of_peft(pipe, "unet.", "attn1.to_q", rank=8)
    more, gain = of_peft(pipe, "unet.", "ff.net.2", rank=2)
    return state | more, expected | gain, {}


def old_names(pipe: Any) -> Case:
    """Of diffusers before it used PEFT."""
    state, expected = of_peft(pipe, "unet.", "attn1.to_q")
    old = {"to_q.lora_A.": "processor.to_q_lora.down.", "to_q.lora_B.": "processor.to_q_lora.up."}
    return {n.replace(end, old[end]): v for n, v in state.items() for end in old if end in n}, expected, {}


def fused(pipe: Any) -> Case:
    """kohya's names of FLUX: queries, keys and values are one layer."""
    layers = [f"transformer_blocks.0.attn.to_{c}" for c in "qkv"]
    found = weights(pipe, *layers)
    together = torch.cat([found[layer] for layer in layers])
    down, up = pair(together, 4)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    parts = (0.5 * up @ down).split([len(found[layer]) for layer in layers])
    return state, {f"transformer.{n}.weight": gain for n, gain in zip(layers, parts, strict=True)}, {}


def norm_of_wan(pipe: Any) -> Case:
    """The third norm of its authors is the second in diffusers."""
    state, expected, said = wan(pipe)
    state["diffusion_model.blocks.0.norm3.diff"] = torch.full((24,), 0.5)
    return state, expected | {"transformer.blocks.0.norm2.weight": torch.full((24,), 0.5)}, said


def authors(names: str) -> Callable[[Any], Case]:
    """The names of Stable Diffusion 3's authors, in which the halves of the last layer are the other way round."""

    def made(pipe: Any) -> Case:
        sizes = {name: network_of(pipe).get_submodule(name).weight.detach() for name in AUTHORS.values()}
        state, expected = {}, {}
        for original, ours in AUTHORS.items():
            down, up = pair(sizes[ours], 4)
            layer = f"lora_unet_{original.replace('.', '_')}" if names == "kohya" else f"diffusion_model.{original}"
            ends = ("lora_down", "lora_up") if names == "kohya" else ("lora_A", "lora_B")
            state |= {f"{layer}.{ends[0]}.weight": down, f"{layer}.{ends[1]}.weight": up}
            gain = up @ down
            if original.startswith("final_layer"):
                gain = torch.cat(gain.chunk(2)[::-1])
            expected[f"transformer.{ours}.weight"] = gain
        return state, expected, {}

    return made


AUTHORS = {
    "joint_blocks.0.x_block.mlp.fc1": "transformer_blocks.0.ff.net.0.proj",
    "joint_blocks.0.context_block.attn.proj": "transformer_blocks.0.attn.to_add_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}


def fused_with_magnitudes(pipe: Any) -> Case:
    state, expected, _ = fused(pipe)
    found = {name: parameters(pipe)[name].detach() for name in expected}
    state["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"] = torch.cat(
        [1.3 * weight.norm(dim=1, keepdim=True) for weight in found.values()]
    )
    for name, weight in found.items():
        merged = weight + expected[name]
        expected[name] = 1.3 * weight.norm(dim=1, keepdim=True) * merged / merged.norm(dim=1, keepdim=True) - weight
    return state, expected, {}


def with_text_encoder(make: Callable[[Any], Case], prefix: str = "lora_te1", part: str = "text_encoder") -> Any:
    """Beside layers of a network that go by other names."""

    def made(pipe: Any) -> Case:
        state, expected, said = make(pipe)
        for layer, module in getattr(pipe, part).named_modules():
            if layer.endswith("q_proj"):
                down, up = pair(module.weight.detach(), 2)
                name = f"{prefix}_text_model_{layer.removeprefix('text_model.').replace('.', '_')}"
                state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                state[f"{name}.alpha"] = torch.tensor(1.0)
                expected[f"{part}.{layer}.weight"] = 0.5 * up @ down
        return state, expected, said

    return made


def ai_toolkit(pipe: Any, alpha: float | None = None) -> Case:
    ends = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp")
    state, expected = of_peft(pipe, "transformer.", *ends, scaling=alpha / 4 if alpha else 1)
    if alpha:
        state |= {f"transformer.{layer}.alpha": torch.tensor(alpha) for layer in weights(pipe, *ends)}
    return state, expected, {}


def wan(pipe: Any, *, biases: bool = False, alpha: float | None = None) -> Case:
    """The names of Wan's authors; with differences of biases, and zeros of norms, as some trainers write them."""
    names = {"attn1.to_q": "self_attn.q", "attn1.to_v": "self_attn.v", "attn2.to_k": "cross_attn.k"}
    state, expected = {}, {}
    for ours, theirs in names.items():
        for layer, weight in weights(pipe, ours).items():
            down, up = pair(weight, 4)
            name = f"diffusion_model.{layer.replace(ours, theirs)}"
            state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            expected[f"transformer.{layer}.weight"] = (alpha or 4) / 4 * up @ down
            if alpha:
                state[f"{name}.alpha"] = torch.tensor(alpha)
            if biases:
                state |= {f"{name}.diff_b": torch.full(weight.shape[:1], 0.3)}
                state |= {"diffusion_model.blocks.0.norm3.diff": torch.zeros(24)}
                expected[f"transformer.{layer}.bias"] = torch.full(weight.shape[:1], 0.3)
    return state, expected, {}


def musubi(pipe: Any) -> Case:
    """musubi-tuner's names of some layers of Wan's blocks; diffusers reads such a file of whole blocks alone."""
    state, expected, said = wan(pipe, alpha=2.0)
    renamed = {}
    for name, value in state.items():
        layer, end = name.removeprefix("diffusion_model.").rsplit(".", 1 if name.endswith(".alpha") else 2)[0], name
        renamed[f"lora_unet_{layer.replace('.', '_')}{end[len('diffusion_model.') + len(layer) :]}"] = value
    return renamed, expected, said


def half(pipe: Any) -> Case:
    """In bfloat16: the file's own numbers count, not a product of theirs that is rounded."""
    state, expected = of_kohya(pipe, *ATTENTION)
    state = {name: value.bfloat16() for name, value in state.items()}
    for layer in weights(pipe, *ATTENTION):
        down, up = (state[f"{kohya(layer)}.lora_{end}.weight"].float() for end in ("down", "up"))
        expected[f"unet.{layer}.weight"] = 0.5 * up @ down
    return state, expected, {}


LAYOUTS: dict[str, tuple[str, Callable[[Any], Case]]] = {
    "kohya, SD 1": ("sd1", lambda pipe: (*of_kohya(pipe, *ATTENTION), {})),
    "kohya, SD XL": ("sdxl", lambda pipe: (*of_kohya(pipe, *ATTENTION), {})),
    "LoCon": ("sdxl", convolutions),
    "LoCon, Tucker": ("sd1", tucker),
    "whole differences": ("sd1", whole_differences),
    "DoRA, kohya": ("sdxl", dora),
    "DoRA of columns": ("sdxl", lambda pipe: dora(pipe, by_column=True, end="ff.net.2")),
    "DoRA of a convolution": ("sdxl", lambda pipe: dora(pipe, end="resnets.0.conv1")),
    "DoRA of a convolution's columns": ("sd1", lambda pipe: dora(pipe, by_column=True, end="resnets.0.conv1")),
    "DoRA, PEFT": ("sdxl", lambda pipe: dora(pipe, names="peft")),
    "SGM": ("sdxl", sgm),
    "alpha in json": ("sdxl", alpha_in_json),
    "alpha in flat metadata": ("sdxl", alpha_in_flat_metadata),
    "rank-stabilised": ("sd1", stabilised),
    "two ranks": ("sdxl", two_ranks),
    "old diffusers": ("sd1", old_names),
    "bfloat16": ("sd1", half),
    "FLUX, kohya": ("flux", fused),
    "FLUX, kohya, DoRA": ("flux", fused_with_magnitudes),
    "FLUX, kohya, text encoder": ("flux", with_text_encoder(fused)),
    "SGM, text encoder": ("sdxl", with_text_encoder(sgm, "lora_te2", "text_encoder_2")),
    "FLUX, ai-toolkit": ("flux", ai_toolkit),
    "FLUX, alpha": ("flux", lambda pipe: ai_toolkit(pipe, 8.0)),
    "Wan": ("wan", wan),
    "Wan, alpha": ("wan", lambda pipe: wan(pipe, alpha=2.0)),
    "Wan, musubi-tuner": ("wan", musubi),
    "Wan, a norm": ("wan", norm_of_wan),
    "SD 3, kohya": ("sd3", authors("kohya")),
    "SD 3, ComfyUI": ("sd3", authors("comfy")),
    "Wan, biases": ("wan", lambda pipe: wan(pipe, biases=True, alpha=2.0)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_weight_gains_what_the_file_says(layout: str, pipes: dict[str, Any], tmp_path: Path) -> None:
    family, make = LAYOUTS[layout]
    state, expected, said = make(pipes[family])
    file = write(tmp_path, state, said)
    assert len(expected) > 0
    assert_gains(gains(pipes[family], (file, 1.0)), expected)
    assert_gains(gains(pipes[family], (file, -0.4)), {name: -0.4 * gain for name, gain in expected.items()})


def test_what_plain_diffusers_merges_alike(pipes: dict[str, Any], tmp_path: Path) -> None:
    """kohya's notes in the header are no other alpha; names of Stable Diffusion 3 that only we know are not loaded."""
    kohyas, _ = of_kohya(pipes["sdxl"], *ATTENTION)
    peft, _ = of_peft(pipes["sd3"], "transformer.", "attn.to_q", scaling=1)
    ours = {
        f"lora_transformer_{name.removeprefix('transformer.').removesuffix(f'.{end}.weight').replace('.', '_')}"
        f".lora_{'down' if end == 'lora_A' else 'up'}.weight": value
        for name, value in peft.items()
        for end in ("lora_A", "lora_B")
        if name.endswith(f"{end}.weight")
    }
    cases = {
        "kohya": ("sdxl", kohyas, {"ss_network_alpha": "16", "ss_network_dim": "4"}, True),
        "said": ("sdxl", of_peft(pipes["sdxl"], "unet.", *ATTENTION, scaling=1)[0], {"lora_alpha": "4"}, False),
        "diffusers": ("sd3", peft, {}, True),
        "onetrainer": ("sd3", ours, {}, False),
    }
    for name, (family, state, said, alike) in cases.items():
        pipe = copy.deepcopy(pipes[family])
        assert merge_lora(pipe, str(write(tmp_path, state, said, name=name)), 1.0, lambda: None) is alike, name
        if family == "sd3":  # what diffusers itself makes of the file
            theirs = copy.deepcopy(pipes[family])
            theirs.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors")
            assert bool(theirs.get_list_adapters()) is alike, name


def test_several_are_merged_one_after_the_other(pipes: dict[str, Any], tmp_path: Path) -> None:
    (first, a), (second, b) = (of_kohya(pipes["sd1"], *ATTENTION) for _ in range(2))
    files = write(tmp_path, first, name="first"), write(tmp_path, second, name="second")
    found = gains(pipes["sd1"], (files[0], 0.8), (files[1], 1.0))
    assert_gains(found, {name: 0.8 * gain + b[name] for name, gain in a.items()})


def test_a_folder_of_pefts_own(pipes: dict[str, Any], tmp_path: Path) -> None:
    """Its config says alpha, for some layers another one."""
    state, expected = of_peft(pipes["sdxl"], "base_model.model.", *ATTENTION, scaling=4)
    write(tmp_path, state, name="adapter_model")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "alpha_pattern": {"ff.net.2": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    expected = {name: gain / 8 if "ff.net.2" in name else gain for name, gain in expected.items()}
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert_gains(gains(pipes["sdxl"], (source, 1.0)), expected)
    for change, said in {
        "LOKR": r"is a LOKR by its config, .*; merge it with the tool that made it",
        "pissa": r"began as pissa, which changes the weights under it; save it again as a plain LoRA",
    }.items():
        key = "peft_type" if change == "LOKR" else "init_lora_weights"
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {key: change}))
        with pytest.raises(UserError, match=said):
            gains(pipes["sdxl"], (tmp_path, 1.0))


def test_a_whole_network_is_named(pipes: dict[str, Any], tmp_path: Path) -> None:
    """It was sent to "the tool that made it"."""
    file = write(tmp_path, {"model.diffusion_model.input_blocks.0.0.bias": torch.ones(4)})
    with pytest.raises(UserError, match=r"no part of a LoRA; a whole network becomes a teacher with stepfold convert"):
        gains(pipes["sdxl"], (file, 1.0))


def test_peft_is_not_needed(pipes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    state, expected, _ = fused(pipes["flux"])
    assert_gains(gains(pipes["flux"], (write(tmp_path, state), 1.0)), expected)


def other_method(name: str, *ends: str) -> Callable[[Any], Case]:
    def make(pipe: Any) -> Case:
        return {f"lycoris_{name}.{end}": torch.randn(4, 4) for end in ends}, {}, {}

    return make


def changed(make: Callable[[Any], Case], change: Callable[[State], Any], **said: str) -> Callable[[Any], Case]:
    def made(pipe: Any) -> Case:
        state, expected, metadata = make(pipe)
        change(state)
        return state, expected, metadata | said

    return made


def usual(pipe: Any) -> Case:
    return (*of_kohya(pipe, "attn1.to_q"), {})


def bare(pipe: Any) -> Case:
    return (*of_peft(pipe, "unet.", "attn1.to_q"), {})


def first(state: State) -> str:
    return next(iter(state))


REFUSED: dict[str, tuple[str, Callable[[Any], Case], str]] = {
    "LoKr": ("sdxl", other_method("x", "lokr_w1", "lokr_w2", "alpha"), r"LoKr \(lycoris_x\.lokr_w1\)"),
    "LoHa": ("sdxl", other_method("x", "hada_w1_a", "hada_w1_b"), r"LoHa .* give the merged pipeline as the teacher"),
    "an embedding": (
        "sdxl",
        changed(usual, lambda s: s.update({"bundle_emb.me.clip_l": torch.ones(2, 3)})),
        "embedding",
    ),
    "something else": (
        "sd1",
        changed(usual, lambda s: s.update({"a.b": torch.ones(2)})),
        "holds a.b, which is nothing of",
    ),
    "half a pair": ("sd1", changed(usual, lambda s: s.pop(first(s))), r"lacks a part of lora_unet_\S+to_q"),
    "another model": (
        "flux",
        lambda _: usual(tiny.make_sd1()),
        r"no place for 4 of its 4 layers|does not know the names",
    ),
    "another width": (
        "sd1",
        changed(usual, lambda s: s.update({first(s): torch.ones(8, 3)})),
        r"layer lora_unet_\S+: its weight is \[32, 3\], the teacher's has 32 columns; give one that was made for",
    ),
    "another rank": (
        "sd1",
        changed(usual, lambda s: s.update({first(s): torch.ones(3, 32)})),
        r"up \[32, 8\] does not go with down \[3, 32\]",
    ),
    "nothing but zeros": (
        "sd1",
        lambda _: ({"lora_unet_x.diff": torch.zeros(3)}, {}, {}),
        "changes nothing: .*; leave it",
    ),
    "no rows": (
        "sd1",
        changed(usual, lambda s: s.update({first(s): torch.ones(0, 32)})),
        "is damaged: lora_unet_.* has a matrix without rows",
    ),
    "not finite": (
        "sd1",
        changed(usual, lambda s: s[first(s)].mul_(float("nan"))),
        "is damaged: lora_unet_.* not finite",
    ),
    "alpha unknown": (
        "sd1",
        changed(bare, len, ss_network_alpha="16"),
        "ss_network_alpha 16 and its rank is 4, but it has",
    ),
    "two alphas": (
        "sd1",
        changed(usual, len, lora_alpha="16"),
        r"alpha is 4 beside its matrices and 16 in the metadata; delete one",
    ),
    "pattern": (
        "sd1",
        changed(bare, len, lora_adapter_metadata=json.dumps({"unet.lora_alpha": 4, "unet.alpha_pattern": {".*q": 2}})),
        r"its alpha_pattern '\.\*q' is an expression",
    ),
    "magnitudes": (
        "sd1",
        changed(usual, lambda s: s.update({first(s).replace("lora_down.weight", "dora_scale"): torch.ones(5)})),
        r"its magnitudes \[5\] are neither of the rows nor of the columns",
    ),
    "columns of fused layers": (
        "flux",
        changed(fused, lambda s: s.update({first(s).replace("lora_down.weight", "dora_scale"): torch.ones(1, 32)})),
        r"its magnitudes \[1, 32\] are neither",
    ),
    "a norm that Wan lacks": (
        "wan",
        changed(wan, lambda s: s.update({"diffusion_model.blocks.0.norm9.diff": torch.ones(24)})),
        r"no place for 1 of its 7 layers, such as diffusion_model\.blocks\.0\.norm9; .*, or a copy without those",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_merged_is_refused_with_its_layer(case: str, pipes: dict[str, Any], tmp_path: Path) -> None:
    family, make, said = REFUSED[case]
    state, _, metadata = make(pipes[family])
    with pytest.raises(UserError, match=said) as caught:
        gains(pipes[family], (write(tmp_path, state, metadata), 1.0))
    assert "\n" not in str(caught.value) and "pip install" not in str(caught.value)


def test_a_folder_of_several_epochs_is_asked_about(pipes: dict[str, Any], tmp_path: Path) -> None:
    state, _ = of_kohya(pipes["sd1"], "attn1.to_q")
    for epoch in ("mine-000001", "mine-000002"):
        write(tmp_path, state, name=epoch)
    with pytest.raises(
        UserError, match=r"holds 2 files: mine-000001\.safetensors, mine-000002\.\S+; name one, \S+/FILE"
    ):
        gains(pipes["sd1"], (tmp_path, 1.0))


def test_loras_of_the_hub(pipes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched before needs no network; one of several files is named."""
    hub = offline_hub(tmp_path / "hub", monkeypatch)
    state, expected = of_kohya(pipes["sd1"], "attn1.to_q")
    (tmp_path / "repository").mkdir()
    write(tmp_path / "repository", state, name="one")
    snapshot = cached(tmp_path / "repository", hub)
    assert_gains(gains(pipes["sd1"], (Path("some/where"), 1.0)), expected)
    write(snapshot, state, name="two")
    with pytest.raises(UserError, match=r"holds 2 files: one\S+ two\.safetensors; name one, some/where/FILE"):
        gains(pipes["sd1"], (Path("some/where"), 1.0))
    assert_gains(gains(pipes["sd1"], (Path("some/where/two.safetensors"), 1.0)), expected)
    with pytest.raises(UserError, match=r"LoRA 'some/thing' does not load \("):
        gains(pipes["sd1"], (Path("some/thing"), 1.0))


def test_scales_count_where_a_teacher_is_known_again(tmp_path: Path) -> None:
    """One LoRA at full strength is what it was in earlier versions."""

    def keys(lora: Any) -> tuple[Any, str]:
        settings = TeacherSettings.model_validate({"lora": lora})
        return conditions_key(settings, "")["lora"], teacher_fingerprint(settings, network_only=True)

    file = str(write(tmp_path, {"a": torch.ones(1)}))
    assert keys(None)[0] is None and keys(file)[0] == file and keys(f"{file}:1") == keys(file)
    several = [keys(lora) for lora in (None, file, f"{file}:0.8", [file, file], [file, f"{file}:0.8"])]
    assert len({key for key, _ in several}) == len({print_ for _, print_ in several}) == len(several)


one_pipe = cache(tiny.make_sd1)
Layers = st.lists(st.integers(0, 40), min_size=1, max_size=5, unique=True)


@st.composite
def files(draw: st.DrawFn, pipe: Any) -> Iterator[Any]:
    """A random file for a UNet: state, metadata, what it means in float64."""
    modules = [(n, m.weight.detach()) for n, m in pipe.unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    names, dtype = draw(st.sampled_from(["kohya", "peft"])), draw(st.sampled_from([torch.float32, torch.float16]))
    where = draw(st.sampled_from(["file", "nowhere", "flat", "json"]))
    alpha, seed = draw(st.sampled_from([0.5, 1.0, 3.0, 16.0])), draw(st.integers(0, 2**20))
    random = torch.Generator().manual_seed(seed)
    state, expected = {}, {}
    for i in draw(Layers):
        layer, weight = modules[i % len(modules)]
        rank = draw(st.integers(1, 6))
        axes = draw(st.sampled_from([None, (1, 2, 3), (0, 2, 3)] if names == "kohya" else [None, (1, 2, 3)]))
        down = (0.1 * torch.randn(rank, *weight.shape[1:], generator=random)).to(dtype)
        up = (0.1 * torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=random)).to(dtype)
        start = kohya(layer) if names == "kohya" else f"unet.{layer}"
        ends = ("lora_down.weight", "lora_up.weight") if names == "kohya" else ("lora_A.weight", "lora_B.weight")
        state |= {f"{start}.{ends[0]}": down, f"{start}.{ends[1]}": up}
        if where == "file":
            state[f"{start}.alpha"] = torch.tensor(alpha)
        merged = weight.double() + (rank if where == "nowhere" else alpha) / rank * product(up.double(), down.double())
        if axes:
            size = norms(weight, axes) * (1 + torch.rand((), generator=random))
            state[f"{start}.dora_scale" if names == "kohya" else f"{start}.lora_magnitude_vector"] = (
                size if names == "kohya" else size.flatten()
            )
            merged = size.double() * merged / norms(merged, axes)
        expected[f"unet.{layer}.weight"] = (merged - weight.double()).float()
    said = {
        "flat": {"unet.lora_alpha": f"{alpha}"},
        "json": {"lora_adapter_metadata": f'{{"unet.lora_alpha": {alpha}}}'},
    }
    return state, said.get(where, {}), expected


def check_random(folder: Path, data: st.DataObject) -> None:
    pipe = one_pipe()
    state, said, expected = data.draw(files(pipe))
    scale = data.draw(st.sampled_from([1.0, 0.8, -2.0]))
    found = gains(pipe, (write(folder, state, said), scale))
    assert_gains(found, {name: scale * gain for name, gain in expected.items()}, tolerance=1e-3)


@settings(max_examples=25)
@given(data=st.data())
def test_a_random_lora_is_merged_by_its_own_arithmetic(data: st.DataObject, tmp_path_factory: Any) -> None:
    check_random(tmp_path_factory.getbasetemp(), data)


@pytest.mark.long
@settings(max_examples=300)
@given(data=st.data())
def test_random_loras_are_merged_by_their_own_arithmetic(data: st.DataObject, tmp_path_factory: Any) -> None:
    check_random(tmp_path_factory.getbasetemp(), data)
