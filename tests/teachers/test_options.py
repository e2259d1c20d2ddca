"""docs/pipeline-options.md says of every argument and config field of the supported pipelines what becomes of it."""

import inspect
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import tiny_anima
import tiny_chroma
import tiny_ernie_image
import tiny_hunyuan
import tiny_hunyuan_image
import tiny_kandinsky
import tiny_prx
import tiny_qwen
import tiny_z_image
import torch
from forms import cases

from stepfold.config import TeacherSettings
from stepfold.errors import UserError
from stepfold.students.whole import new_student
from stepfold.teachers.loading import FAMILIES, load_teacher
from stepfold.teachers.oracle import agreement
from stepfold.teachers.schedules import CLIP_SETTINGS, CLIPS, FLOW, OBEYED, ONLY, SAMPLING, VP

PAGE = Path(__file__).parents[2] / "docs" / "pipeline-options.md"
NETWORKS = (
    "ChromaTransformer2DModel", "DiTTransformer2DModel", "Flux2Transformer2DModel", "FluxTransformer2DModel",
    "HunyuanVideo15Transformer3DModel", "Kandinsky5Transformer3DModel", "SanaVideoTransformer3DModel",
    "Krea2Transformer2DModel", "LongCatImageTransformer2DModel", "Lumina2Transformer2DModel",
    "PixArtTransformer2DModel", "QwenImageTransformer2DModel", "SD3Transformer2DModel", "SanaTransformer2DModel",
    "UNet2DConditionModel", "WanTransformer3DModel",
    "ErnieImageTransformer2DModel", "PRXTransformer2DModel", "ZImageTransformer2DModel",
    "HunyuanImageTransformer2DModel",
    "CosmosTransformer3DModel",
)  # fmt: skip
CLASSES = {
    "Networks": NETWORKS,
    "Autoencoders": (
        "AutoencoderDC",
        "AutoencoderKL",
        "AutoencoderKLFlux2",
        "AutoencoderKLHunyuanVideo",
        "AutoencoderKLHunyuanImage",
        "AutoencoderKLHunyuanVideo15",
        "AutoencoderKLQwenImage",
        "AutoencoderKLWan",
    ),
    "Schedulers": (*VP, *FLOW, "SCMScheduler"),
    "Pipelines": tuple(FAMILIES),
}

PIPELINES: dict[str, Any] = {kind.__name__: kind for family in FAMILIES.values() for kind in family.pipelines}
"""Those of diffusers; of modular ones the parts and the call that they have here."""


def rows_of(title: str) -> list[list[str]]:
    """The names in the first column of the table under a title, row by row."""
    section = re.split(r"\n##", PAGE.read_text().split(f"# {title}\n", 1)[1], maxsplit=1)[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    return [re.findall(r"`(\w+)`", row) for row in rows]


def parameters(functions: Iterable[Any]) -> set[str]:
    return {name for function in functions for name in inspect.signature(function).parameters} - {"self"}


def holds(title: str, there: set[str]) -> bool:
    said = [name for row in rows_of(title) for name in row]
    return len(said) == len(set(said)) and set(said) == there


def test_the_page_has_every_argument_and_no_other() -> None:
    assert holds("Arguments of a call", parameters(kind.__call__ for kind in PIPELINES.values()))


@pytest.mark.parametrize("title", CLASSES)
def test_the_page_has_every_field_and_no_other(title: str) -> None:
    kinds = (PIPELINES.get(name) or getattr(diffusers, name) for name in CLASSES[title])
    assert holds(title, parameters(kind.__init__ for kind in kinds))


def test_the_page_sorts_a_schedulers_options_as_the_code_does() -> None:
    network, flow, only, clips, sampling = map(set, rows_of("Schedulers"))
    assert (network | flow, only, clips, sampling) == (OBEYED, set(ONLY), CLIPS | CLIP_SETTINGS, SAMPLING)


def changed(make: Callable[[], Any], part: str, fields: dict[str, Any]) -> Any:
    """The pipeline with other values in a part's config."""
    pipe = make()
    old = getattr(pipe, part)
    plain = {name: value for name, value in old.config.items() if not name.startswith("_")}
    setattr(pipe, part, type(old)(**plain | fields))
    return pipe


def load(make: Callable[[], Any], part: str, fields: dict[str, Any], folder: Path) -> Any:
    tiny.save(partial(changed, make, part, fields), folder)
    call: dict[str, Any] = {"height": 32, "width": 32, "max_tokens": 48}
    if "Wan" in type(make()).__name__ or make is tiny_kandinsky.make_kandinsky_video:
        call["frames"] = 5
    if make in (tiny.make_sd1, tiny.make_sdxl):
        del call["max_tokens"]
    return load_teacher(TeacherSettings(source=str(folder), **({} if make is tiny.make_dit else call)), "cpu")


REFUSED: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    "time_cond_proj_dim": (tiny.make_sd1, "unet", {"time_cond_proj_dim": 16}),
    "class_embed_type": (tiny.make_sd1, "unet", {"class_embed_type": "timestep"}),
    "num_class_embeds": (tiny.make_sdxl, "unet", {"num_class_embeds": 5}),
    "encoder_hid_dim_type": (tiny.make_sd1, "unet", {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 20}),
    "dual_cross_attention": (tiny.make_sd1, "unet", {"dual_cross_attention": True}),
    "addition_embed_type": (tiny.make_sd1, "unet", {"addition_embed_type": "text", "addition_embed_type_num_heads": 4}),
    "use_additional_conditions": (tiny.make_pixart, "transformer", {"use_additional_conditions": True}),
    "num_embeds_ada_norm": (tiny.make_dit, "transformer", {"num_embeds_ada_norm": 500}),
    "patch_size": (tiny.make_flux, "transformer", {"patch_size": 2}),
    "guidance_embeds": (tiny.make_sana, "transformer", {"guidance_embeds": True}),
    "use_meanflow": (tiny_hunyuan.make_hunyuan_video, "transformer", {"use_meanflow": True}),
    "guidance_embeds, with": (tiny_hunyuan_image.make_hunyuan_image, "transformer", {"guidance_embeds": True}),
    "use_meanflow, of images": (tiny_hunyuan_image.make_hunyuan_image, "transformer", {"use_meanflow": True}),
    "img_context_dim_in": (tiny_anima.make_anima, "transformer", {"img_context_dim_in": 8}),
    "patch_size_t": (tiny_hunyuan.make_hunyuan_video, "transformer", {"patch_size_t": 2}),
    "visual_cond": (tiny_kandinsky.make_kandinsky_image, "transformer", {"visual_cond": True}),
    "zero_cond_t": (tiny_qwen.make_qwen_image, "transformer", {"zero_cond_t": True}),
    "use_additional_t_cond": (tiny_qwen.make_qwen_image, "transformer", {"use_additional_t_cond": True}),
    "use_layer3d_rope": (tiny_qwen.make_qwen_image, "transformer", {"use_layer3d_rope": True}),
    "image_dim": (tiny.make_wan, "transformer", {"image_dim": 8}),
    "siglip_feat_dim": (tiny_z_image.make_z_image, "transformer", {"siglip_feat_dim": 8}),
    "all_patch_size": (
        tiny_z_image.make_z_image,
        "transformer",
        {"all_patch_size": [1, 2], "all_f_patch_size": [1, 1]},
    ),
    "all_f_patch_size": (tiny_z_image.make_z_image, "transformer", {"all_f_patch_size": [2]}),
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_network_that_asks_for_more_than_a_text_is_refused(field: str, tmp_path: Path) -> None:
    """A latent consistency model was distilled as if it embedded nothing; others failed inside of a run."""
    with pytest.raises(
        UserError, match=rf"this \w+'s config has {field.split(',')[0]}=.*: .*; use a plain text-to-image model"
    ):
        load(*REFUSED[field], tmp_path / "pipeline")


@pytest.mark.parametrize(
    "make",
    [
        tiny.make_sd1,
        tiny.make_sd3,
        tiny.make_flux,
        tiny.make_lumina2,
        tiny.make_sana,
        tiny.make_wan,
        tiny_chroma.make_chroma,
    ],
)
def test_channels_that_do_not_fit_are_refused(make: Callable[[], Any], tmp_path: Path) -> None:
    part = "unet" if make is tiny.make_sd1 else "transformer"
    taken = getattr(make(), part).config.in_channels
    with pytest.raises(UserError, match=rf"takes {taken} channels and gives {2 * taken}: .*; use a plain"):
        load(make, part, {"out_channels": 2 * taken}, tmp_path / "wide")
    with pytest.raises(UserError, match=r"draws latents of 8 channels, but the autoencoder beside it decodes 4; use "):
        load(make, part, {"in_channels": 2 * taken, "out_channels": 2 * taken}, tmp_path / "another")


def test_parts_that_do_not_belong_together_are_one_line(tmp_path: Path) -> None:
    """Each loads, and the network breaks on the texts: a traceback from inside of a layer."""
    teacher = load(tiny.make_pixart, "transformer", {"caption_channels": None}, tmp_path / "pipeline")
    x, guidance = torch.randn(1, *teacher.latent_shape), torch.ones(1)
    with pytest.raises(UserError, match=r"cannot be called with what its text encoders give \(mat1 and mat2 .* parts "):
        teacher.velocity(x, torch.ones(1), teacher.encode(["red heart"]), guidance)


OBEYED_FIELDS: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    "sd 1": (
        tiny.make_sd1, "unet",
        dict(
            center_input_sample=True, flip_sin_to_cos=False, freq_shift=1, dropout=0.5, act_fn="gelu", norm_eps=1e-3,
            only_cross_attention=True, mid_block_scale_factor=2, transformer_layers_per_block=2, conv_in_kernel=1,
            use_linear_projection=True, upcast_attention=True, resnet_skip_time_act=True, resnet_out_scale_factor=2.0,
            time_embedding_type="fourier", timestep_post_act="silu", attention_type="gated", sample_size=16,
        ),
    ),
    "sdxl": (
        tiny.make_sdxl, "unet",
        dict(
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=12 + 6 * 8, time_embedding_dim=32,
            resnet_time_scale_shift="scale_shift", mid_block_type="UNetMidBlock2DSimpleCrossAttn", dropout=0.5,
            time_embedding_act_fn="silu", downsample_padding=0,
        ),
    ),
    "sana": (
        tiny.make_sana, "transformer",
        dict(
            patch_size=2, interpolation_scale=2.0, qk_norm=None, timestep_scale=1.0, attention_bias=True, dropout=0.5,
            norm_elementwise_affine=True, norm_eps=1e-3, mlp_ratio=3.0, sample_size=16,
        ),
    ),
    "sd3": (
        tiny.make_sd3, "transformer",
        dict(patch_size=1, qk_norm=None, dual_attention_layers=(0,), sample_size=12, pos_embed_max_size=32),
    ),
    "flux": (tiny.make_flux, "transformer", dict(guidance_embeds=False, axes_dims_rope=(8, 4, 4))),
    "flux 2": (
        tiny.make_flux2, "transformer",
        dict(guidance_embeds=False, axes_dims_rope=(2, 6, 6, 2), rope_theta=500, eps=1e-3, mlp_ratio=2.0),
    ),
    "pixart": (
        tiny.make_pixart, "transformer",
        dict(
            out_channels=4, dropout=0.5, attention_bias=False, patch_size=1, activation_fn="gelu", sample_size=16,
            norm_elementwise_affine=True, norm_eps=1e-3, interpolation_scale=2, num_embeds_ada_norm=500,
        ),
    ),
    "dit": (
        tiny.make_dit, "transformer",
        dict(out_channels=4, dropout=0.5, attention_bias=False, patch_size=1, activation_fn="gelu", norm_eps=1e-3),
    ),
    "lumina 2": (
        tiny.make_lumina2, "transformer",
        dict(scaling_factor=2.0, norm_eps=1e-3, ffn_dim_multiplier=1.5, patch_size=1, axes_lens=(400, 64, 64)),
    ),
    "wan": (
        tiny.make_wan, "transformer",
        dict(cross_attn_norm=False, qk_norm=None, eps=1e-3, patch_size=(1, 1, 1), rope_max_seq_len=64),
    ),
    "qwen image": (
        tiny_qwen.make_qwen_image, "transformer", dict(patch_size=1, out_channels=16, axes_dims_rope=(8, 4, 4)),
    ),
    "kandinsky video": (
        tiny_kandinsky.make_kandinsky_video, "transformer",
        dict(visual_cond=False, axes_dims=(2, 4, 6), attention_type="flash", attention_window=3, num_text_blocks=1),
    ),
    "chroma": (tiny_chroma.make_chroma, "transformer", dict(axes_dims_rope=(8, 4, 4), approximator_layers=1)),
    "longcat": (tiny_qwen.make_longcat, "transformer", dict(axes_dims_rope=[8, 4, 4])),
    "krea 2": (
        tiny_qwen.make_krea2, "transformer",
        dict(rope_theta=100.0, norm_eps=1e-3, axes_dims_rope=(8, 4, 4), num_layerwise_text_blocks=2),
    ),
    "ernie-image": (
        tiny_ernie_image.make_ernie_image, "transformer",
        dict(eps=1e-3, patch_size=2, rope_theta=100, rope_axes_dim=(8, 4, 4)),
    ),
    "prx": (
        tiny_prx.make_prx, "transformer",
        dict(
            time_factor=1.0, time_max_period=100, bottleneck_size=6, resolution_embeds=False, theta=100, mlp_ratio=3.0,
            axes_dim=[4, 12], patch_size=1,
        ),
    ),
    "z-image": (
        tiny_z_image.make_z_image, "transformer",
        dict(
            t_scale=1.0, qk_norm=False, norm_eps=1e-3, rope_theta=100.0, n_refiner_layers=2, axes_dims=[4, 8, 4],
            axes_lens=[100, 40, 16],
        ),
    ),
    "anima": (
        tiny_anima.make_anima, "transformer",
        dict(
            extra_pos_embed_type="learnable", rope_scale=(2.0, 1.0, 2.0), max_size=(4, 40, 40),
            use_crossattn_projection=True, crossattn_proj_in_channels=20, encoder_hidden_states_channels=20,
        ),
    ),
    "hunyuan image": (
        tiny_hunyuan_image.make_hunyuan_image, "transformer",
        dict(patch_size=(2, 1), rope_theta=100.0, rope_axes_dim=(4, 12), num_refiner_layers=2, text_embed_2_dim=None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", cases(OBEYED_FIELDS, short=["sd 1", "pixart"]))
def test_a_network_of_other_fields_is_its_pipelines(family: str, tmp_path: Path) -> None:
    """The teacher is what the pipeline calls, and the student starts as the teacher, though it could drop units."""
    teacher = load(*OBEYED_FIELDS[family], tmp_path / "pipeline")
    prompts = list(teacher.examples[:2]) or ["red heart", "dog on blue background"]
    condition, guidance = teacher.encode(prompts), torch.full((2,), 3.0)
    if teacher.guidance_kind == "none":
        guidance = torch.ones(2)
    assert agreement(teacher, prompts, condition, guidance, 4).network < (1e-3 if teacher.rounds else 1e-4)
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([0.5, 1.2])
    student = new_student(teacher)
    F = teacher.velocity(x, t, condition, torch.full((2,), teacher.no_guidance)) / teacher.sigma_data
    torch.testing.assert_close(
        student(x / teacher.sigma_data, t, condition, torch.ones(2)), F, rtol=1e-4, atol=1e-4 * float(F.abs().max())
    )


AUTOENCODERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "sd 1": (
        tiny.make_sd1,
        dict(
            scaling_factor=0.3, shift_factor=0.4, latents_mean=[1.0, 2, 3, 4], latents_std=[1.0, 2, 3, 4],
            force_upcast=False, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
        ),
    ),
    "sdxl": (tiny.make_sdxl, dict(shift_factor=0.4, latents_mean=[1.0, 2, 3, 4])),  # no deviations: not read
    "sd3": (tiny.make_sd3, dict(scaling_factor=1.6, shift_factor=0.4, latents_mean=[1.0, 2, 3, 4], sample_size=64)),
    "lumina 2": (tiny.make_lumina2, dict(scaling_factor=0.3, shift_factor=0.4, use_post_quant_conv=False)),
    "pixart": (tiny.make_pixart, dict(scaling_factor=0.3, shift_factor=0.4)),
    "flux 2": (tiny.make_flux2_klein, dict(batch_norm_eps=0.5, batch_norm_momentum=0.3, use_quant_conv=False)),
    "qwen image": (tiny_qwen.make_qwen_image, dict(latents_mean=[1.0, 2, 3, 4], latents_std=[1.0, 2, 3, 4])),
    "chroma": (tiny_chroma.make_chroma, dict(scaling_factor=0.3, shift_factor=0.4)),
    "longcat": (tiny_qwen.make_longcat, dict(scaling_factor=0.3, shift_factor=0.4)),
    "kandinsky image": (tiny_kandinsky.make_kandinsky_image, dict(scaling_factor=0.3, shift_factor=0.4)),
    "krea 2": (tiny_qwen.make_krea2, dict(latents_mean=[1.0, 2, 3, 4], latents_std=[1.0, 2, 3, 4])),
    "ernie-image": (tiny_ernie_image.make_ernie_image, dict(batch_norm_eps=0.5, batch_norm_momentum=0.3)),
    "prx": (tiny_prx.make_prx, dict(scaling_factor=0.3, shift_factor=0.4, latents_mean=[1.0, 2, 3, 4])),
    "z-image": (tiny_z_image.make_z_image, dict(scaling_factor=0.3, shift_factor=0.4, latents_mean=[1.0, 2, 3, 4])),
    "hunyuan image": (tiny_hunyuan_image.make_hunyuan_image, dict(scaling_factor=0.3)),
    "anima": (tiny_anima.make_anima, dict(latents_mean=[1.0, 2, 3, 4], latents_std=[1.0, 2, 3, 4])),
}  # fmt: skip


@pytest.mark.parametrize("family", cases(AUTOENCODERS, short=["sd 1"]))
def test_pictures_of_another_autoencoder_are_the_pipelines(family: str, tmp_path: Path) -> None:
    make, fields = AUTOENCODERS[family]
    teacher = load(make, "vae", fields, tmp_path / "pipeline")
    call = teacher.usual_call() | teacher.own_steps(2) | teacher.own_guidance(teacher.no_guidance)
    draws = [torch.Generator().manual_seed(i) for i in range(2)]
    latents = teacher.latents_of(teacher.pipe, ["a", "b"], draws, **call)
    draws = [torch.Generator().manual_seed(i) for i in range(2)]
    made = teacher.pipe(**teacher.inputs(["a", "b"], draws), output_type="pt", **call)
    theirs = getattr(made, teacher.output)
    torch.testing.assert_close(teacher.decode(teacher.sigma_data * latents), theirs.float(), rtol=0, atol=1e-5)
