"""The single file is what diffusers' own loaders for original checkpoints take it for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ChromaTransformer2DModel,
    ErnieImageTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import load_file
from torch import Tensor

from stepfold.errors import UserError
from stepfold.export.converting import convert
from stepfold.export.single_file import original_state
from stepfold.jobs.exporting import run_export
from stepfold.students.loading import load_merged

from .conftest import relative

SDXL: dict[str, Any] = dict(
    block_out_channels=(320, 640, 1280), cross_attention_dim=2048, transformer_layers_per_block=(1, 2, 10),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    attention_head_dim=[5, 10, 20],
)  # fmt: skip
SD35: dict[str, Any] = dict(qk_norm="rms_norm", dual_attention_layers=tuple(range(13)), num_layers=24)
READ = ("sd1", "sdxl", "sd3", "first sana", "wan", "z-image", "qwen")
KLEIN: dict[str, Any] = dict(
    num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
)  # fmt: skip
WAN_SMALL: dict[str, Any] = dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)
WAN_22_5B: dict[str, Any] = dict(in_channels=48, out_channels=48, num_attention_heads=24, ffn_dim=14336, num_layers=30)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        pytest.param(UNet2DConditionModel, dict(cross_attention_dim=768), id="sd1"),
        pytest.param(UNet2DConditionModel, SDXL, id="sdxl"),
        pytest.param(SD3Transformer2DModel, dict(num_layers=24), id="sd3"),
        pytest.param(SD3Transformer2DModel, SD35, id="sd3.5-medium"),
        pytest.param(FluxTransformer2DModel, dict(guidance_embeds=True), id="flux-dev"),
        pytest.param(FluxTransformer2DModel, {}, id="flux-schnell"),
        pytest.param(Flux2Transformer2DModel, KLEIN, id="flux2-klein-4b"),
        pytest.param(Flux2Transformer2DModel, {}, id="flux2-dev"),
        pytest.param(SanaTransformer2DModel, {}, id="sana-1.6b"),
        pytest.param(Lumina2Transformer2DModel, {}, id="lumina-2"),
        pytest.param(WanTransformer3DModel, WAN_SMALL, id="wan-1.3b"),
        pytest.param(WanTransformer3DModel, {}, id="wan-14b"),
        pytest.param(ZImageTransformer2DModel, {}, id="z-image"),
        pytest.param(WanTransformer3DModel, WAN_22_5B, id="wan-2.2-5b"),
        pytest.param(QwenImageTransformer2DModel, {}, id="qwen-image"),
        pytest.param(ChromaTransformer2DModel, {}, id="chroma"),
        pytest.param(ErnieImageTransformer2DModel, {}, id="ernie-image"),
    ],
)
def test_networks_of_real_size_come_back_to_the_bit(kind: Any, config: dict[str, Any]) -> None:
    """The map moves rows, so a row is one random number here: so many, and all different, at every published size."""
    with torch.device("meta"):
        network = kind(**config)
    rows = {name: torch.rand(value.shape[0], dtype=torch.float64) for name, value in network.state_dict().items()}
    network.state_dict = lambda: rows
    original = original_state(network)
    read = SINGLE_FILE_LOADABLE_CLASSES[kind.__name__]["checkpoint_mapping_fn"]
    again = read(checkpoint=dict(original), config=network.config)
    assert again.keys() == rows.keys()
    assert [name for name, value in rows.items() if not torch.equal(again[name], value)] == []


def test_names_are_those_of_the_checkpoints(student_of: Callable[..., Path]) -> None:
    """Spot checks, one of each family, beside what diffusers reads."""
    wanted = {
        "sd1": "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "sdxl": "model.diffusion_model.label_emb.0.0.weight",
        "sd3": "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
        "flux": "double_blocks.0.img_attn.norm.key_norm.scale",
        "flux2": "single_blocks.0.norm.key_norm.scale",
        "lumina": "context_refiner.0.attention_norm1.weight",
        "wan": "blocks.0.self_attn.norm_q.weight",
        "z-image": "noise_refiner.0.attention.q_norm.weight",
        "qwen": "transformer_blocks.0.attn.add_q_proj.weight",
        "chroma": "distilled_guidance_layer.norms.0.scale",
    }
    for family, name in wanted.items():
        teacher, _, _ = load_merged(student_of(family), "cpu")
        assert name in original_state(teacher.transformer)


PIPE = "pipe = diffusers.DiffusionPipeline.from_pretrained(folder)"
NETWORK = """
index = json.load(open(folder + "/model_index.json"))
part = "unet" if "unet" in index else "transformer"
kind = getattr(diffusers, index[part][1])
network = kind.from_single_file({file!r}, config=folder, subfolder=part, local_files_only=True)
pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **{{part: network}})
"""


def test_pixart_has_the_names_of_its_authors() -> None:
    """diffusers has no loader for them that could be asked; names and shapes of their XL/2 network instead."""
    with torch.device("meta"):
        network = PixArtTransformer2DModel(
            cross_attention_dim=1152, caption_channels=4096, use_additional_conditions=False
        )
    d = 1152
    whole = {
        "x_embedder.proj": (d, 4, 2, 2), "t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d),
        "t_block.1": (6 * d, d), "final_layer.linear": (32, d),
        "y_embedder.y_proj.fc1": (d, 4096), "y_embedder.y_proj.fc2": (d, d),
    }  # fmt: skip
    block = {
        "attn.qkv": (3 * d, d), "attn.proj": (d, d), "cross_attn.q_linear": (d, d), "cross_attn.kv_linear": (2 * d, d),
        "cross_attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d),
    }  # fmt: skip
    whole |= {f"blocks.{i}.{name}": shape for i in range(28) for name, shape in block.items()}
    wanted = {f"{name}.weight": shape for name, shape in whole.items()}
    wanted |= {f"{name}.bias": shape[:1] for name, shape in whole.items()}
    wanted |= {"final_layer.scale_shift_table": (2, d)} | {f"blocks.{i}.scale_shift_table": (6, d) for i in range(28)}
    assert {name: tuple(value.shape) for name, value in original_state(network).items()} == wanted

    rows = {name: torch.full((1,), float(i)) for i, name in enumerate(network.state_dict())}
    network.state_dict = lambda: rows
    joined = original_state(network)
    for original, attention, parts in (("attn.qkv", "attn1", "qkv"), ("cross_attn.kv_linear", "attn2", "kv")):
        order = [float(rows[f"transformer_blocks.5.{attention}.to_{part}.weight"]) for part in parts]
        assert joined[f"blocks.5.{original}.weight"].tolist() == order


@pytest.mark.long
def test_a_fresh_process_draws_the_students_latents(
    student_of: Callable[..., Path],
    fresh: Callable[..., dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    """FLUX and Lumina are not here: diffusers' loaders know their published widths only."""
    pipes = {}
    for family in READ:
        student = student_of(family)
        file = run_export(student, "single-file", tmp_path / f"{family}.safetensors", force=False)
        pipes[family] = student, PIPE
        pipes[f"{family} file"] = student, NETWORK.format(file=str(file))
    merged = run_export(student_of("sd1", 4), "pipeline", tmp_path / "merged", force=False)
    file = run_export(student_of("sd1", 4), "single-file", tmp_path / "merged.safetensors", force=False)
    pipes |= {"lora": (merged, PIPE), "lora file": (merged, NETWORK.format(file=str(file)))}
    drawn = fresh(pipes)
    for name in drawn:
        if not name.endswith(" file"):
            assert relative(drawn[f"{name} file"], drawn[name]) < 1e-4, name
    assert relative(drawn["lora"], drawn["sd1"]) > 1e-2


@pytest.mark.parametrize(
    ("family", "marks"), [("sdxl", set()), ("v sdxl", {"v_pred"}), ("v sdxl from noise", {"v_pred", "ztsnr"})]
)
def test_a_file_says_what_its_network_predicts(
    family: str, marks: set[str], student_of: Callable[..., Path], tmp_path: Path
) -> None:
    """By the empty tensors that ComfyUI and the web UIs look for; without them the pictures are noise there."""
    state = load_file(run_export(student_of(family), "single-file", tmp_path / "student.safetensors", force=False))
    assert {name for name in state if not name.startswith("model.diffusion_model.")} == marks
    assert all(state[name].numel() == 0 for name in marks)


def test_what_diffusers_cannot_read_our_own_converter_can(
    student_of: Callable[..., Path], tiny_sana: Path, tmp_path: Path
) -> None:
    """Norms of queries and keys, as in Sana 1.5, and an embedded guidance, as in Sana-Sprint."""
    student = student_of("sana")
    file = run_export(student, "single-file", tmp_path / "sana.safetensors", force=False)
    convert(file, str(tiny_sana), tmp_path / "again", 1)
    kind: Any = SanaTransformer2DModel
    ours, theirs = (
        kind.from_pretrained(folder / "transformer").state_dict() for folder in (student, tmp_path / "again")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(".norm_q." in name for name in ours) and any("guidance" in name for name in ours)


def test_what_has_no_place_is_refused(student_of: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no single-file layout of a DiTTransformer2DModel .* --to pipeline"):
        run_export(student_of("dit"), "single-file", tmp_path / "x.safetensors", force=False)
    assert list(tmp_path.iterdir()) == []
    with torch.device("meta"):
        from_pictures = WanTransformer3DModel(image_dim=8)
    with pytest.raises(UserError, match=r"has no place for condition_embedder\.image_embedder\S+; use --to pipeline"):
        original_state(from_pictures)
