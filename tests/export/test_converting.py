"""Checkpoints under their original names become pipelines; what is in a pickle besides tensors is not run."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaPipeline, SanaSprintPipeline
from safetensors.torch import save_file
from tiny import enliven, make_sana, sana_transformer
from torch import Tensor

from stepfold.errors import UserError
from stepfold.export.converting import convert
from stepfold.export.single_file import original_state

PARTS = {
    "attn1.norm_q.weight": "attn.q_norm.weight",
    "attn1.norm_k.weight": "attn.k_norm.weight",
    "attn2.norm_q.weight": "cross_attn.q_norm.weight",
    "attn2.norm_k.weight": "cross_attn.k_norm.weight",
}
TIME = {
    "time_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.guidance_embedder.linear_1": "cfg_embedder.mlp.0",
    "time_embed.guidance_embedder.linear_2": "cfg_embedder.mlp.2",
}


def original(network: Any, qk_norm: bool, guidance: bool) -> dict[str, Tensor]:
    """The network as its authors' training code would save it."""
    state = dict(network.state_dict())
    changed = {}
    for i in range(network.config.num_layers if qk_norm else 0):
        for ours, theirs in PARTS.items():
            changed[f"blocks.{i}.{theirs}"] = state[f"transformer_blocks.{i}.{ours}"]
    for ours, theirs in TIME.items() if guidance else ():
        for leaf in ("weight", "bias"):
            changed[f"{theirs}.{leaf}"] = state[f"{ours}.{leaf}"]
    plain = sana_transformer(qk_norm=None, num_layers=network.config.num_layers)
    plain.load_state_dict({name: state.get(name, value) for name, value in plain.state_dict().items()})
    common = original_state(plain)
    extra = {"logvar_linear.weight": torch.zeros(1, 64), "logvar_linear.bias": torch.zeros(1)} if guidance else {}
    return common | changed | extra


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checkpoint_becomes_a_pipeline(tmp_path: Path, qk_norm: bool, guidance: bool, suffix: str) -> None:
    """Bit for bit the network that was saved, three blocks where the base has two; its time as it was said."""
    norm = "rms_norm_across_heads" if qk_norm else None
    network: Any = sana_transformer(qk_norm=norm, guidance_embeds=guidance, num_layers=3)
    enliven(network)
    make_sana().save_pretrained(tmp_path / "base", safe_serialization=True)
    state, file = original(network, qk_norm, guidance), tmp_path / f"sana{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": state, "epoch": 3}, file)
    else:
        save_file({name: value.contiguous().clone() for name, value in state.items()}, file)
    kind = convert(file, str(tmp_path / "base"), tmp_path / "out", 1)
    assert kind == ("SanaSprintPipeline" if guidance else "SanaPipeline")
    pipe: Any = (SanaSprintPipeline if guidance else SanaPipeline).from_pretrained(tmp_path / "out")
    assert pipe.transformer.config.timestep_scale == 0.001 and pipe.transformer.config.qk_norm == norm
    theirs, ours = network.state_dict(), pipe.transformer.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_does_not_fit_is_named(tiny_sana: Path, tmp_path: Path) -> None:
    network: Any = sana_transformer(qk_norm=None)
    whole = original(network, qk_norm=False, guidance=False)

    def refused(state: Any, match: str, base: Path = tiny_sana) -> None:
        torch.save(state, tmp_path / "sana.pth")
        with pytest.raises(UserError, match=match) as caught:
            convert(tmp_path / "sana.pth", str(base), tmp_path / "out", 1000)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    refused({n: v for n, v in whole.items() if n != "x_embedder.proj.weight"}, r"has no x_embedder\.proj\.weight")
    refused(whole | {"blocks.0.lora.weight": torch.zeros(1)}, r"has blocks\.0\.lora\.weight, and 0 more")
    refused(whole | {"t_block.1.bias": torch.zeros(7)}, r"t_block\.1\.bias has 7 rows.*give a --base of the same size")
    refused([1, 2], "something else than named tensors")
    with pytest.raises(UserError, match="no checkpoint that can be read safely"):
        convert(tmp_path / "none.pth", str(tiny_sana), tmp_path / "out", 1000)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.folder,)


def test_nothing_in_a_checkpoint_is_run(tiny_sana: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": Trap(tmp_path / "trapped")}, tmp_path / "sana.pth")
    with pytest.raises(UserError, match="no checkpoint that can be read safely"):
        convert(tmp_path / "sana.pth", str(tiny_sana), tmp_path / "out", 1000)
    assert not (tmp_path / "trapped").exists()
