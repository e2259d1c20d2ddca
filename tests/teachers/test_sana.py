"""The Sana family: against diffusers' own pipeline, and against damaged folders."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import SanaPipeline
from torch import Tensor

from stepfold.config import TeacherSettings
from stepfold.errors import UserError
from stepfold.sampling.teacher import sample_teacher
from stepfold.students.card import CARD
from stepfold.students.loading import load_student
from stepfold.students.saving import save_whole
from stepfold.students.whole import new_student
from stepfold.teachers.contract import Condition
from stepfold.teachers.loading import load_teacher
from stepfold.teachers.sana import SanaTeacher, SprintTeacher

PROMPTS = ["red heart", "dog on blue background", "pizza on a white plate"]

INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


@pytest.fixture(scope="module")
def teacher(tiny_sana: Path) -> SanaTeacher:
    return SanaTeacher(tiny_sana, max_tokens=300)


@pytest.fixture(scope="module")
def pipeline(tiny_sana: Path) -> Any:
    return load_pipeline(tiny_sana)


def load_pipeline(folder: Path) -> Any:
    pipe: Any = SanaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_latents(pipe: Any, noise: Tensor, guidance: float, steps: int) -> Tensor:
    return pipe(
        PROMPTS, num_inference_steps=steps, guidance_scale=guidance, latents=noise, output_type="latent", height=32,
        width=32, use_resolution_binning=False,
    ).images  # fmt: skip


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_the_wrapped_teacher_samples_what_its_pipeline_samples(teacher: SanaTeacher, pipeline: Any, guidance: float):
    noise = torch.randn(3, *teacher.latent_shape)
    expected = pipeline_latents(pipeline, noise, guidance, 4)
    x0 = sample_teacher(
        teacher, teacher.sigma_data * noise, teacher.encode(PROMPTS), torch.full((3,), guidance), num_steps=4
    )
    torch.testing.assert_close(x0 / teacher.sigma_data, expected, rtol=0, atol=1e-4)
    assert (expected - noise).abs().mean() > 0.1


def test_the_shift_of_the_pipelines_scheduler_is_the_teachers(copy_of_tiny: Path, teacher: SanaTeacher):
    edited(copy_of_tiny, "scheduler/scheduler_config.json", shift=3.0)
    shifted, pipe = SanaTeacher(copy_of_tiny), load_pipeline(copy_of_tiny)
    noise, guidance = torch.randn(3, *teacher.latent_shape), torch.full((3,), 4.5)
    condition = teacher.encode(PROMPTS)
    ours = sample_teacher(shifted, shifted.sigma_data * noise, condition, guidance, num_steps=4)
    torch.testing.assert_close(ours / shifted.sigma_data, pipeline_latents(pipe, noise, 4.5, 4), rtol=0, atol=1e-4)
    unshifted = sample_teacher(teacher, teacher.sigma_data * noise, condition, guidance, num_steps=4)
    assert (ours - unshifted).abs().mean() > 0.01


def test_the_pipelines_own_picture_is_the_decoded_sample(teacher: SanaTeacher, pipeline: Any):
    noise = torch.randn(3, *teacher.latent_shape)
    options = dict(num_inference_steps=2, height=32, width=32, use_resolution_binning=False)
    expected = pipeline(PROMPTS, latents=noise, output_type="pt", **options).images
    guidance = torch.full((3,), teacher.default_guidance)
    x0 = sample_teacher(teacher, teacher.sigma_data * noise, teacher.encode(PROMPTS), guidance, num_steps=2)
    torch.testing.assert_close(teacher.decode(x0), expected, rtol=0, atol=1e-4)


def untrimmed(teacher: SanaTeacher, prompts: list[str]) -> Condition:
    """What the pipeline itself gives the network: 300 tokens, with the encoder's output at masked positions too."""
    embeds, mask, *_ = teacher.pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, complex_human_instruction=INSTRUCTION
    )
    return Condition(embeds, mask)


def test_trimmed_conditions_give_the_velocity_of_the_pipelines_300_tokens(teacher: SanaTeacher):
    condition, whole = teacher.encode(PROMPTS), untrimmed(teacher, PROMPTS)
    length = condition.mask.shape[1]
    assert whole.mask.shape[1] == 300 and length < 40
    assert torch.equal(whole.mask[:, :length], condition.mask) and not whole.mask[:, length:].any()
    assert whole.embeds[:, length:].abs().max() > 0.1
    x, guidance = teacher.sigma_data * torch.randn(3, *teacher.latent_shape), torch.tensor([1.0, 4.5, 8.0])
    for t in (torch.full((3,), 0.1), torch.full((3,), 1.5)):
        a, b = (teacher.velocity(x, t, c, guidance) for c in (condition, whole))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_prompts_get_the_instruction_and_the_null_prompt_does_not(teacher: SanaTeacher):
    assert "User Prompt" in INSTRUCTION[-1]
    plain, *_ = teacher.pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, complex_human_instruction=None)
    condition = teacher.encode(PROMPTS)
    assert (plain[:, : condition.mask.shape[1]] - condition.embeds).abs().max() > 0.1
    *_, null, null_mask = teacher.pipe.encode_prompt("anything", do_classifier_free_guidance=True)
    ours = teacher.null(condition)
    length = int(null_mask.sum())
    assert torch.equal(ours.mask, null_mask[:, :length].expand(3, -1))
    torch.testing.assert_close(ours.embeds, null[:, :length].expand(3, -1, -1), rtol=0, atol=1e-6)


def test_the_null_prompts_mask(tiny_sana: Path, teacher: SanaTeacher):
    """`own` stops where the null prompt stops; `prompt` looks at as many positions as the prompt has."""
    prompt_mask = SanaTeacher(tiny_sana, max_tokens=300, null_mask="prompt")
    condition = teacher.encode(PROMPTS)
    own, prompt = teacher.null(condition), prompt_mask.null(condition)
    assert torch.equal(prompt.mask, condition.mask)
    assert own.mask.sum(1).tolist() == [1, 1, 1]  # <bos>
    assert len(set(prompt.mask.sum(1).tolist())) > 1
    torch.testing.assert_close(prompt.embeds[:, :1], own.embeds, rtol=0, atol=1e-6)
    x, t = teacher.sigma_data * torch.randn(3, *teacher.latent_shape), torch.full((3,), 1.0)
    for scale, differ in ((1.0, False), (4.5, True)):
        a, b = (who.velocity(x, t, condition, torch.full((3,), scale)) for who in (teacher, prompt_mask))
        assert bool((a - b).abs().max() > 1e-2) == differ


def test_a_large_picture_is_decoded_alone(teacher: SanaTeacher, monkeypatch: pytest.MonkeyPatch):
    counts: list[int] = []
    decode = teacher._vae().decode
    monkeypatch.setattr(teacher._vae(), "decode", lambda x, **named: counts.append(len(x)) or decode(x, **named))
    x0 = 0.5 * torch.randn(5, *teacher.latent_shape)
    together = teacher.decode(x0)
    monkeypatch.setattr("stepfold.teachers.pipeline.DECODED_AT_ONCE", 2 * teacher.height * teacher.width)
    in_pairs = teacher.decode(x0)
    monkeypatch.setattr("stepfold.teachers.pipeline.DECODED_AT_ONCE", 1)
    teacher.decode(x0)
    assert counts == [5, 2, 2, 1, 1, 1, 1, 1, 1]
    torch.testing.assert_close(in_pairs, together, rtol=0, atol=1e-5)


def test_a_student_is_written_without_a_place_for_its_encoders_on_the_device(tiny_sana: Path, tmp_path: Path):
    """What was not in memory during training is read to be written, and goes to no GPU."""
    whole = SanaTeacher(tiny_sana)
    teacher = SanaTeacher(tiny_sana, network_only=True, null=whole.null_condition)
    student, teacher.device = new_student(teacher), torch.device("meta")
    save_whole(teacher, student, tmp_path / "student", tiny.recipe(teacher))
    assert SprintTeacher(tmp_path / "student").decode(torch.zeros(1, *whole.latent_shape)).isfinite().all()


def test_guidance_moves_away_from_the_unconditional_velocity_in_proportion(tiny_sana: Path, teacher: SanaTeacher):
    """v_u + w (v_c - v_u), each branch from a teacher without guidance."""
    plain, condition = SanaTeacher(tiny_sana, max_tokens=300, guidance_kind="none"), teacher.encode(PROMPTS)
    x, t, w = teacher.sigma_data * torch.randn(3, *teacher.latent_shape), torch.full((3,), 1.0), torch.ones(3)
    v_cond, v_null = plain.velocity(x, t, condition, w), plain.velocity(x, t, teacher.null(condition), w)
    scale = torch.tensor([0.0, 2.5, 6.0])
    expected = v_null + scale[:, None, None, None] * (v_cond - v_null)
    torch.testing.assert_close(teacher.velocity(x, t, condition, scale), expected, rtol=0, atol=1e-5)


def test_a_student_has_every_weight_of_its_teacher(teacher: SanaTeacher):
    student = new_student(teacher)
    ours, theirs = student.transformer.state_dict(), teacher.transformer.state_dict()
    for name, value in theirs.items():
        assert torch.equal(ours.pop(name.replace("time_embed.emb.timestep", "time_embed.timestep")), value), name
    assert {name.rsplit(".", 2)[0] for name in ours} == {"time_embed.guidance_embedder"}
    assert student.transformer.config.guidance_embeds and student.transformer.config.timestep_scale == 1.0
    assert not teacher.transformer.config.guidance_embeds  # the teacher's own config is left alone


def test_size_comes_from_the_transformer_or_the_settings(tiny_sana: Path):
    assert SanaTeacher(tiny_sana).latent_shape == (4, 8, 8)
    wide = load_teacher(TeacherSettings(source=str(tiny_sana), width=64, max_tokens=20), "cpu")
    assert wide.latent_shape == (4, 8, 16) and wide.black_latent(wide.latent_shape).shape == (4, 8, 16)
    for width in (50, 48):  # 48 suits the autoencoder, but SanaSprintPipeline would refuse it after the training
        with pytest.raises(UserError, match=f"width is {width}, .* multiple of 32"):
            SanaTeacher(tiny_sana, width=width)


# Folders that are not as they should be


def edited(folder: Path, file: str, **changes: object) -> None:
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | changes))


@pytest.fixture
def copy_of_tiny(tiny_sana: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sana, tmp_path / "teacher"))


def test_a_teacher_in_thousands_is_read_rightly_and_its_student_stays_a_sana_pipeline(
    copy_of_tiny: Path, teacher: SanaTeacher
):
    """timestep_scale 1: the network's time counts to 1000, and the wrapped teacher still equals its pipeline."""
    edited(copy_of_tiny, "transformer/config.json", timestep_scale=1.0)
    thousands, pipe = SanaTeacher(copy_of_tiny), load_pipeline(copy_of_tiny)
    noise = torch.randn(3, *teacher.latent_shape)
    condition, guidance = thousands.encode(PROMPTS), torch.full((3,), 4.5)
    x0 = sample_teacher(thousands, 0.5 * noise, condition, guidance, num_steps=2)
    torch.testing.assert_close(x0 / 0.5, pipeline_latents(pipe, noise, 4.5, 2), rtol=0, atol=1e-3)
    assert (x0 - sample_teacher(teacher, 0.5 * noise, condition, guidance, num_steps=2)).abs().max() > 0.01
    assert not thousands.student_reads_guidance and thousands.student_class("consistency") is SanaPipeline


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
    "index is not json": (lambda f: (f / "model_index.json").write_text("{,"), "not valid JSON"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]"), "describes no pipeline"),
    "index is binary": (lambda f: (f / "model_index.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "part missing": (lambda f: shutil.rmtree(f / "text_encoder"), "lacks its part 'text_encoder'"),
    "weights missing": (lambda f: next((f / "transformer").glob("*.safetensors")).unlink(), "does not load"),
    "weights cut short": (
        lambda f: (w := next((f / "transformer").glob("*.safetensors"))).write_bytes(w.read_bytes()[:5000]),
        "does not load",
    ),
    "pickle for weights": (
        lambda f: next((f / "transformer").glob("*.safetensors")).rename(f / "transformer" / "pytorch_model.bin"),
        "holds a pickle",
    ),
    "pickle beside weights": (lambda f: (f / "vae" / "old.ckpt").write_bytes(b""), "holds a pickle"),
    "pickle in a folder below": (
        lambda f: ((f / "vae" / "a").mkdir(), (f / "vae" / "a" / "b.pt").write_bytes(b"")),
        "holds a pickle",
    ),
    "another pipeline": (lambda f: edited(f, "model_index.json", _class_name="FluxPipeline"), "is a FluxPipeline"),
    "no class": (lambda f: edited(f, "model_index.json", _class_name=None), "is a None"),
    "unknown part class": (
        lambda f: edited(f, "model_index.json", transformer=["diffusers", "NoSuchModel"]),
        "does not load",
    ),
    "code of its own": (
        lambda f: edited(f, "model_index.json", transformer=["evil", "Model"]),
        "does not load",
    ),
    "weights of another shape": (
        lambda f: edited(f, "transformer/config.json", caption_channels=48),
        "does not load",
    ),
    "config is not json": (lambda f: (f / "transformer" / "config.json").write_text("nonsense"), "does not load"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_one_line_of_error(copy_of_tiny: Path, kind: str):
    damage, message = DAMAGE[kind]
    damage(copy_of_tiny)
    with pytest.raises(UserError, match=message) as caught:
        SanaTeacher(copy_of_tiny)
    assert "\n" not in str(caught.value)


def test_nothing_is_there(tmp_path: Path):
    with pytest.raises(UserError, match="neither a pipeline folder nor a hub id") as caught:
        SanaTeacher(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)


def test_a_folder_is_a_student_only_with_its_card(tiny_sana: Path):
    with pytest.raises(UserError, match=CARD):
        load_student(tiny_sana, "cpu")


def test_a_students_card_must_be_readable(copy_of_tiny: Path):
    for text in ("{", "{}", "[]"):
        (copy_of_tiny / CARD).write_text(text)
        with pytest.raises(UserError, match=CARD):
            load_student(copy_of_tiny, "cpu")


def test_features_are_the_blocks_outputs_with_a_gradient_to_the_latent(teacher: SanaTeacher):
    condition, guidance = teacher.encode(PROMPTS), torch.full((3,), 4.5)
    x, t = 0.5 * torch.randn(3, *teacher.latent_shape), torch.tensor([0.2, 0.9, 1.5])
    seen: list[Tensor] = []
    handle = teacher.transformer.proj_out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    maps = teacher.features(x.requires_grad_(), t, condition, guidance)
    handle.remove()
    assert [tuple(m.shape) for m in maps] == [(3, 64, width) for width in teacher.feature_widths]
    assert not any(block._forward_hooks for block in teacher.transformer.transformer_blocks)
    assert not torch.equal(maps[0], maps[1])
    maps[-1].sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert len(seen) == 1 and len(seen[0]) == 3  # one unguided call, and the last map is what the output is made of
    modulated = torch.nn.functional.layer_norm(maps[-1], maps[-1].shape[-1:], eps=1e-6)
    similarity = torch.cosine_similarity(modulated.flatten(1), seen[0].flatten(1))
    assert (similarity > 0.5).all(), similarity


def test_checkpoints_older_than_guidance_embedding_can_be_distilled(tmp_path: Path) -> None:
    """A published config names only the settings of its day; diffusers fills in the rest."""
    pipe = tiny.make_sana()
    pipe.transformer = tiny.sana_transformer(qk_norm=None)
    folder = tmp_path / "old"
    pipe.save_pretrained(folder, safe_serialization=True)
    config = folder / "transformer" / "config.json"
    values = json.loads(config.read_text())
    for key in ("guidance_embeds", "guidance_embeds_scale", "qk_norm"):
        del values[key]
    config.write_text(json.dumps(values))
    student = new_student(SanaTeacher(folder, max_tokens=16))
    assert student.transformer.config.guidance_embeds
