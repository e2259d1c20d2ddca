"""Anima: a modular folder is read as data, and diffusers' own modular pipeline reads what we write."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import tiny
import tiny_anima
import torch
from diffusers.models.transformers import transformer_cosmos
from peft import LoraConfig, get_peft_model_state_dict

from stepfold.config import TeacherSettings, validate
from stepfold.errors import UserError
from stepfold.export.pipeline import save_student
from stepfold.sampling.consistency import sample_consistency
from stepfold.sections import LoraSettings
from stepfold.students.loading import load_student
from stepfold.students.lora import lora_student
from stepfold.students.whole import new_student
from stepfold.teachers import anima
from stepfold.teachers.loading import load_any_pipeline, load_teacher
from stepfold.teachers.oracle import agreement
from stepfold.teachers.safety import MODULAR_INDEX

PROMPTS = ["red heart", "a dog on blue background"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny_anima.make_anima, tmp_path_factory.mktemp("anima") / "pipeline")


def settings(folder: Path) -> TeacherSettings:
    return TeacherSettings(source=str(folder), height=16, width=24, max_tokens=48)


def in_diffusers(folder: Path) -> Any:
    """diffusers' own modular pipeline."""
    pipe = diffusers.ModularPipeline.from_pretrained(str(folder))
    pipe.load_components()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise_of(teacher: Any) -> torch.Tensor:
    return torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))


def test_the_folder_that_we_write_is_one_of_diffusers(folder: Path, tmp_path: Path) -> None:
    """Wherever it lies then; its guider is in it, and its loop is that of the wrapped teacher."""
    moved = shutil.copytree(folder, tmp_path / "moved")
    pipe, teacher = in_diffusers(moved), load_teacher(settings(moved), "cpu")
    assert type(pipe) is diffusers.AnimaModularPipeline and pipe.guider.config.guidance_scale == 4.0
    noise = noise_of(teacher)
    call = dict(height=16, width=24, num_inference_steps=3, max_sequence_length=48)
    theirs = pipe(prompt=PROMPTS, latents=noise[:, :, None].clone(), output="latents", **call).squeeze(2)
    assert teacher.default_guidance == 4.0 and teacher.time_scale == 1
    made = teacher.pipe(PROMPTS, latents=noise[:, :, None].clone(), output_type="latent", return_dict=False, **call)[0]
    torch.testing.assert_close(made.squeeze(2), theirs, rtol=0, atol=1e-5)
    assert type(load_any_pipeline(moved, "cpu")).__name__ == "AnimaModularPipeline"


@pytest.mark.parametrize("lora", [0, 4])
def test_diffusers_takes_a_students_steps(folder: Path, tmp_path: Path, lora: int) -> None:
    """Called as the card says, after the lines of its README; two steps with fresh noise between them."""
    teacher = load_teacher(settings(folder), "cpu")
    student = lora_student(teacher, lora) if lora else new_student(teacher)
    with torch.no_grad():
        for parameter in (p for p in student.transformer.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn_like(parameter)
    config = validate(
        {"prompts": "prompts.txt", "teacher": settings(folder).model_dump(mode="json"), "student": {"lora": lora}}
    )
    card = save_student(teacher, student, tmp_path / "student", config, tiny.recipe(teacher), "a cat")
    pipe = in_diffusers(folder if lora else tmp_path / "student")
    if lora:
        kind = getattr(diffusers, card.scheduler)
        pipe.scheduler = kind.from_pretrained(tmp_path / "student", subfolder="scheduler")
        pipe.load_lora_weights(tmp_path / "student")
        pipe.guider = pipe.guider.new(guidance_scale=1.0)
    assert pipe.guider.config.guidance_scale == 1
    noise = noise_of(teacher)
    torch.manual_seed(5)
    theirs = pipe(prompt=PROMPTS, latents=noise[:, :, None].clone(), output="latents", **card.calls[2]).squeeze(2)
    again, read, _ = load_student(tmp_path / "student", "cpu")

    def fresh(i: int) -> torch.Tensor:
        return 0.5 * torch.randn(noise[:, :, None].shape).squeeze(2)

    torch.manual_seed(5)
    times = again.student_times(2, "consistency")
    x0 = sample_consistency(read, 0.5 * noise, again.encode(PROMPTS), torch.full((2,), 2.0), times, fresh, 0.5)
    assert (x0 / 0.5 - theirs).norm() < 1e-4 * theirs.norm()


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    index = folder / MODULAR_INDEX
    found = json.loads(index.read_text())
    edit(found)
    index.write_text(json.dumps(found))


def hinted(part: str, *hint: str) -> Callable[[dict[str, Any]], Any]:
    return lambda index: index[part][2].update(type_hint=hint)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (hinted("transformer", "my_module", "Mine"), "part 'transformer' comes from 'my_module', whose code would be"),
        (lambda index: index.update(control=index["vae"]), "says of 'control' no class with subfolder 'control'"),
        (lambda index: index["vae"][2].update(subfolder="vae_2"), "says of 'vae' no class with subfolder 'vae'; save"),
        (lambda index: index.pop("text_conditioner"), "lacks the part 'text_conditioner'; AnimaModularPipeline reads "),
        (lambda index: index.update(_class_name="Flux3ModularPipeline"), "is in modular parts that are not known"),
        (lambda index: index.update(_class_name=["mine", "Mine"]), "is a pipeline with code of its own"),
    ],
)
def test_an_index_of_other_parts_is_one_line(
    folder: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], Any], said: str
) -> None:
    changed = shutil.copytree(folder, tmp_path / "changed")
    change(changed, edit)
    with pytest.raises(UserError, match=said) as caught:
        load_teacher(settings(changed), "cpu")
    assert "\n" not in str(caught.value)


def test_code_in_a_modular_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(folder, tmp_path / "mine")
    (mine / "blocks.py").write_text("raise SystemExit('run')\n")
    (mine / "modular_config.json").write_text(json.dumps({"auto_map": {"ModularPipelineBlocks": "blocks.Mine"}}))
    with pytest.raises(UserError, match=r"with code of its own, modular_config.json, which is not run; give one of"):
        load_teacher(settings(mine), "cpu")


def test_a_guider_that_the_folder_lacks_is_diffusers_own(folder: Path, tmp_path: Path) -> None:
    """As published folders lack it; so do those of which nothing was loaded before they were saved lack classes."""
    without = shutil.copytree(folder, tmp_path / "without")
    change(without, lambda index: (index.pop("guider"), index["vae"].__setitem__(slice(0, 2), [None, None])))
    shutil.rmtree(without / "guider")
    assert load_teacher(settings(without), "cpu").default_guidance == in_diffusers(without).guider.guidance_scale == 4


def test_what_the_network_cannot_do_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="72 x 24 pixels are more than this network's 64 x 64; give a smaller"):
        load_teacher(settings(folder).model_copy(update={"height": 72}), "cpu")
    with pytest.raises(UserError, match="max_tokens is 65, but this pipeline reads 64 tokens of a prompt; leave it"):
        load_teacher(settings(folder).model_copy(update={"max_tokens": 65}), "cpu")
    masked = tiny.save(partial(tiny_anima.make_anima, concat_padding_mask=True), tmp_path / "masked")
    if not diffusers.utils.is_torchvision_available():
        with pytest.raises(UserError, match="needs torchvision for its padding mask; install torchvision"):
            load_teacher(settings(masked), "cpu")


def test_a_lora_on_the_teacher_is_merged_into_it(folder: Path, tmp_path: Path) -> None:
    """The merged teacher's samples are those of diffusers' pipeline with the LoRA loaded."""
    pipe = in_diffusers(folder)
    layers = [
        name for name, m in pipe.transformer.named_modules() if isinstance(m, torch.nn.Linear) and "block" in name
    ]
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=layers, init_lora_weights=False))
    matrices = get_peft_model_state_dict(pipe.transformer)
    plain = load_teacher(settings(folder), "cpu")
    plain.pipe.save_lora_weights(tmp_path, transformer_lora_layers=matrices)
    merged = load_teacher(settings(folder).model_copy(update={"lora": (LoraSettings(source=str(tmp_path)),)}), "cpu")
    call: Any = dict(height=16, width=24, num_inference_steps=2, max_sequence_length=48)
    noise = noise_of(plain)[:, :, None]
    theirs = pipe(prompt=PROMPTS, latents=noise.clone(), output="latents", **call)
    without, ours = (
        each.pipe(PROMPTS, latents=noise.clone(), output_type="latent", return_dict=False, **call)[0]
        for each in (plain, merged)
    )
    assert (ours - theirs).norm() < 1e-4 * theirs.norm() < 1e-2 * (without - theirs).norm()


def test_the_padding_mask_is_that_of_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published networks have it. Where torchvision is not installed, its nearest neighbours are torch's here."""
    if not diffusers.utils.is_torchvision_available():
        resize = SimpleNamespace(resize=lambda mask, size, interpolation: torch.nn.functional.interpolate(mask, size))
        stand_in = SimpleNamespace(functional=resize, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
        monkeypatch.setattr(transformer_cosmos, "transforms", stand_in, raising=False)
        monkeypatch.setattr(anima, "is_torchvision_available", lambda: True)
    folder = tiny.save(partial(tiny_anima.make_anima, concat_padding_mask=True), tmp_path / "masked")
    teacher = load_teacher(settings(folder), "cpu")
    assert agreement(teacher, PROMPTS, teacher.encode(PROMPTS), torch.full((2,), 4.0), 3).network < 1e-4
