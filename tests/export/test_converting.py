"""Checkpoints under their original names become pipelines; what is in a pickle besides tensors is not run."""

import os
import re
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import Flux2Transformer2DModel, SanaPipeline, SanaSprintPipeline, StableDiffusionPipeline
from forms import cases
from safetensors.torch import save_file
from tiny import enliven, make_sana, sana_transformer
from torch import Tensor

from stepfold.errors import UserError
from stepfold.export.converting import NETWORK, convert, precision_of, read_original, usual_precision
from stepfold.export.single_file import original_state
from stepfold.teachers.folders import load_index, stored_dtype

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
    with pytest.raises(UserError, match=r"there is no file .*none\.pth; give a checkpoint"):
        convert(tmp_path / "none.pth", str(tiny_sana), tmp_path / "out", 1000)


FAMILIES: dict[str, Callable[[], Any]] = {
    "sd1": tiny.make_sd1, "sdxl": tiny.make_sdxl, "sd3": tiny.make_sd3, "flux": tiny.make_flux,
    "flux2": tiny.make_flux2_klein, "lumina": tiny.make_lumina2, "pixart": tiny.make_pixart, "wan": tiny.make_wan,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "prefix"), cases(product(FAMILIES, (True, False)), short=[("sd1", True), ("flux", True), ("wan", False)])
)
def test_a_network_of_any_family_is_read_to_the_bit(family: str, prefix: bool, tmp_path: Path) -> None:
    """As trainers and model sites save it, alone; a trainer's wrappers are taken off its names."""
    base = tiny.save(FAMILIES[family], tmp_path / "base")
    pipe = FAMILIES[family]()
    part = "unet" if "unet" in pipe.components else "transformer"
    network = getattr(pipe, part)
    enliven(network)
    bare = {name.removeprefix(NETWORK): value.contiguous() for name, value in original_state(network).items()}
    named = {f"{NETWORK if prefix else '_orig_mod.'}{name}": value.clone() for name, value in bare.items()}
    save_file(named, tmp_path / "model.safetensors")
    kind = convert(tmp_path / "model.safetensors", str(base), tmp_path / "out")
    assert kind == type(pipe).__name__
    made: Any = type(pipe).from_pretrained(tmp_path / "out")
    theirs, ours = network.state_dict(), getattr(made, part).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    gone = sorted(named)[0]
    for state, match in (
        ({name: value for name, value in named.items() if name != gone}, "the checkpoint has no "),
        (named | {f"{gone[: gone.index('.') + 1]}more.weight": torch.zeros(1)}, "more.weight, and 0 more"),
        (named | {f"{gone}.scale_weight": torch.zeros(1)}, "scaled fp8: give the file in bf16"),
    ):
        save_file(state, tmp_path / "other.safetensors")
        with pytest.raises(UserError, match=match):
            convert(tmp_path / "other.safetensors", str(base), tmp_path / "refused")


def whole_sd1(pipe: Any) -> dict[str, Tensor]:
    """A Stable Diffusion 1 as one file: the autoencoder and the text encoder under their authors' names too."""
    state = dict(original_state(pipe.unet))
    for name, value in pipe.text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    levels = len(pipe.vae.config.block_out_channels)
    for name, value in pipe.vae.state_dict().items():
        theirs = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        theirs = theirs.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
        for ours, other in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
            if f"mid_block.attentions.0.{ours}." in theirs:
                theirs = theirs.replace(f"mid_block.attentions.0.{ours}", f"mid.attn_1.{other}")
                value = value[..., None, None] if value.ndim == 2 else value
        theirs = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", theirs)
        theirs = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", theirs)
        up = r"up_blocks\.(\d)\."
        theirs = re.sub(up + r"resnets\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", theirs)
        theirs = re.sub(up + r"upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", theirs)
        theirs = theirs.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        state[f"first_stage_model.{theirs}"] = value
    return {name: value.contiguous().clone() for name, value in state.items()}


def test_a_whole_model_is_read_with_its_autoencoder_and_its_text_encoder(tmp_path: Path) -> None:
    """People's fine-tunes change the text encoder too; the base's would be another model, silently."""
    base = tiny.save(tiny.make_sd1, tmp_path / "base")
    pipe = tiny.make_sd1()
    torch.manual_seed(5)
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        enliven(network)
    state = whole_sd1(pipe) | {"model_ema.decay": torch.ones(()), "alphas_cumprod": torch.ones(1000)}
    save_file(state, tmp_path / "whole.safetensors")
    kept: Any = StableDiffusionPipeline.from_pretrained(base)
    for network_only in (False, True):
        out = tmp_path / f"out {network_only}"
        convert(tmp_path / "whole.safetensors", str(base), out, network_only=network_only)
        made: Any = StableDiffusionPipeline.from_pretrained(out)
        source = {"unet": pipe, "vae": kept if network_only else pipe, "text_encoder": kept if network_only else pipe}
        for part, wanted in source.items():
            theirs, ours = getattr(wanted, part).state_dict(), getattr(made, part).state_dict()
            assert ours.keys() == theirs.keys(), part
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_each_part_keeps_its_own_precision(dtype: Any, tmp_path: Path) -> None:
    """The file's network is in float16 and the base's text encoder in bfloat16; nothing grows to float32."""
    base = tiny.make_sd1()
    base.text_encoder.to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base", safe_serialization=True)
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors").unlink()  # the base's own is not read
    state = {name: value.half().contiguous() for name, value in original_state(tiny.make_sd1().unet).items()}
    save_file(state, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", str(tmp_path / "base"), tmp_path / "out", dtype=dtype)
    wanted = {"unet": torch.float16, "text_encoder": torch.bfloat16, "vae": torch.float32}
    if dtype:
        wanted |= dict.fromkeys(("unet", "text_encoder"), torch.bfloat16)
    assert {part: stored_dtype(tmp_path / "out" / part) for part in wanted} == wanted
    made: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "out")  # in float32
    theirs = {name: value.to(wanted["unet"]).float() for name, value in state.items()}
    ours = original_state(made.unet)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name].float(), theirs[name]) for name in theirs)


def test_eight_bits_become_bfloat16() -> None:
    eight = torch.ones(2).to(torch.float8_e4m3fn)
    assert usual_precision(eight).dtype == torch.bfloat16 and usual_precision(torch.ones(2).half()).dtype == torch.half
    assert usual_precision(torch.ones(2).double()).dtype == torch.float32
    assert (
        precision_of({"a": torch.ones(3).half(), "b": torch.ones(2), "n": torch.ones(9, dtype=torch.int64)})
        == torch.half
    )


def test_what_a_file_says_of_itself_is_heard(tmp_path: Path) -> None:
    base = tiny.save(tiny.make_sdxl, tmp_path / "base")
    pipe = tiny.make_sdxl()
    state = {name: value.contiguous() for name, value in original_state(pipe.unet).items()}
    save_file(state | {"v_pred": torch.empty(0)}, tmp_path / "v.safetensors")
    with pytest.raises(UserError, match="says that it predicts v, but the base's network predicts 'epsilon'"):
        convert(tmp_path / "v.safetensors", str(base), tmp_path / "out")
    save_file(state | {"odd.weight": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"has odd\.weight, and 0 more, that belong to no part that is known"):
        convert(tmp_path / "odd.safetensors", str(base), tmp_path / "out")
    with pytest.raises(UserError, match=r"--base is missing: .* such as stabilityai/stable-diffusion-xl-base-1\.0$"):
        convert(tmp_path / "odd.safetensors", None, tmp_path / "out")
    flux = tiny.make_flux()
    encoders = {"text_encoders.t5xxl.shared.weight": torch.zeros(2)}
    whole = {f"{NETWORK}{name}": value.contiguous() for name, value in original_state(flux.transformer).items()}
    save_file(whole | encoders, tmp_path / "flux.safetensors")
    flux_base = str(tiny.save(tiny.make_flux, tmp_path / "flux"))
    with pytest.raises(
        UserError, match="the text encoders in a FluxPipeline's file are not read here; add --network-only"
    ):
        convert(tmp_path / "flux.safetensors", flux_base, tmp_path / "out")
    assert convert(tmp_path / "flux.safetensors", flux_base, tmp_path / "out", network_only=True) == "FluxPipeline"


@pytest.mark.parametrize("is_distilled", [False, True])
def test_what_the_base_says_of_itself_stays(is_distilled: bool, tmp_path: Path) -> None:
    """FLUX.2 klein says in its index alone whether it is distilled."""
    base = tiny.save(partial(tiny.make_flux2_klein, is_distilled=is_distilled), tmp_path / "base")
    network: Any = Flux2Transformer2DModel.from_pretrained(base / "transformer")
    file = tmp_path / "klein.safetensors"
    save_file({name: value.contiguous() for name, value in original_state(network).items()}, file)
    assert convert(file, str(base), tmp_path / "out") == "Flux2KleinPipeline"
    assert load_index(str(tmp_path / "out"))["is_distilled"] is is_distilled


@pytest.mark.parametrize("end", ["lora_down.weight", "lora_A.weight", "lora_A.default.weight", "lora.up.weight"])
def test_a_lora_is_no_checkpoint(tmp_path: Path, end: str) -> None:
    """The likeliest mistake of someone with a LoRA: it was asked for the weights of a whole network."""
    save_file({f"unet.down.attn1.to_q.{end}": torch.ones(2, 2)}, tmp_path / "mine.safetensors")
    with pytest.raises(
        UserError, match=r"mine\.safetensors is a LoRA and not a network; .* --teacher-lora .*mine\.safe"
    ):
        read_original(tmp_path / "mine.safetensors")


def test_the_average_is_asked_about(tiny_sana: Path, tmp_path: Path) -> None:
    network: Any = sana_transformer(qk_norm=None)
    state = original(network, qk_norm=False, guidance=False)
    average = {name: value + 1 for name, value in state.items()}
    file = tmp_path / "sana.pth"
    torch.save(
        {"state_dict": {f"module.{n}": v for n, v in state.items()}, "state_dict_ema": average, "epoch": 3}, file
    )
    with pytest.raises(UserError, match="holds its last weights and their average; choose with --weights last or ema"):
        convert(file, str(tiny_sana), tmp_path / "out", 1000)
    for weights, more in (("last", 0), ("ema", 1)):
        out = tmp_path / weights
        convert(file, str(tiny_sana), out, 1000, weights)  # type: ignore[arg-type]
        made = SanaPipeline.from_pretrained(out).transformer.state_dict()
        assert torch.equal(made["proj_out.bias"], network.state_dict()["proj_out.bias"] + more)
    torch.save({"state_dict": state}, file)
    with pytest.raises(UserError, match="the checkpoint has no such weights; it has last: --weights last"):
        convert(file, str(tiny_sana), tmp_path / "none", 1000, "ema")


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


def test_a_file_in_the_place_of_a_folder_is_told_how_to_become_one(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(UserError, match=r"is one file, .*stepfold convert \S*/model\.safetensors --base PIPELINE"):
            load_index(str(source))


@pytest.mark.parametrize(("name", "said"), [("prompts.txt", "is no checkpoint; give one of"), ("a.pth", "read safely")])
@pytest.mark.parametrize("text", ["a red fox\nan owl\n", "hello world", "(lp0"])
def test_a_text_is_no_checkpoint(tmp_path: Path, name: str, said: str, text: str) -> None:
    """torch's reader ends in a traceback of its own for some of them."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        read_original(tmp_path / name)
