"""One's own LoRA in few steps: a file that carries both, or the step-saver beside a style in plain diffusers."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forms import cases
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepfold.config import TeacherSettings
from stepfold.errors import UserError
from stepfold.export.beside import card_of, workflow_of
from stepfold.export.lora_keys import renamed
from stepfold.jobs.exporting import run_export
from stepfold.students.card import read_card, write_card
from stepfold.students.loading import load_merged
from stepfold.students.lora import LORA_WEIGHTS
from stepfold.teachers.loading import load_teacher
from stepfold.teachers.pipeline import PipelineTeacher

State = dict[str, Tensor]
StudentOf = Callable[..., Path]

FAMILIES: dict[str, tuple[str, ...]] = {
    "sdxl": ("diffusers", "comfy", "kohya", "peft"),
    "flux": ("diffusers", "peft"),
    "sd1": ("diffusers", "comfy", "kohya", "peft"),
    "sd3": ("diffusers", "peft"),
    "flux2": ("diffusers", "comfy", "kohya", "peft"),
    "z-image": ("diffusers", "comfy", "kohya", "peft"),
    "qwen": ("diffusers", "comfy", "kohya", "peft"),
    "wan": ("diffusers", "comfy", "kohya", "peft"),
    "wan 2.2 ti2v": ("diffusers", "comfy", "kohya", "peft"),
}
"""Family -> layouts that people have LoRAs of it in."""
SCALE = 0.8


@pytest.fixture(scope="module")
def teacher_of(student_of: StudentOf) -> Callable[[str], PipelineTeacher]:
    """Family -> the base model; stays as it is."""
    made: dict[str, PipelineTeacher] = {}

    def make(family: str) -> PipelineTeacher:
        if family not in made:
            settings = read_card(student_of(family, lora=4)).teacher_settings()
            made[family] = load_teacher(settings, "cpu")
        return made[family]

    return make


def pair(rank: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Down [R, I, ...] and up [O, R, ...] of a weight of that shape."""
    return 0.2 * torch.randn(rank, *shape[1:]), 0.2 * torch.randn(shape[0], rank, *[1] * (len(shape) - 2))


def style_of(teacher: PipelineTeacher, layers: list[str], keys: str, folder: Path) -> Path:
    """A LoRA on some of the network's layers in a layout, of SDXL on a text encoder too; PEFT's has alpha 4, rank 2."""
    part, ends = teacher.network_part, ("lora_A", "lora_B")
    state: State = {}
    for layer in layers:
        matrices = pair(2, *teacher.transformer.get_submodule(layer).weight.shape)
        state |= {f"{part}.{layer}.{end}.weight": value for end, value in zip(ends, matrices, strict=True)}
    if keys == "peft":
        folder.mkdir()
        state = {f"base_model.model.{name.removeprefix(f'{part}.')}": value for name, value in state.items()}
        save_file(state, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
        return folder
    if keys != "diffusers":
        state = renamed(state, teacher.transformer, part, keys)  # type: ignore[arg-type]
    if part == "unet":
        state |= of_text_encoder(teacher.pipe.text_encoder, keys)
    file = folder.with_suffix(".safetensors")
    save_file({name: value.contiguous() for name, value in state.items()}, file, {"format": "pt"})
    return file


def of_text_encoder(encoder: nn.Module, keys: str) -> State:
    """Matrices on the queries; kohya's alpha is half the rank."""
    state: State = {}
    for layer, module in encoder.named_modules():
        if layer.endswith("q_proj"):
            assert isinstance(module, nn.Linear)
            down, up = pair(2, *module.weight.shape)
            if keys == "kohya":
                name = f"lora_te1_text_model_{layer.removeprefix('text_model.').replace('.', '_')}"
                state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                state[f"{name}.alpha"] = torch.tensor(1.0)
            else:
                state |= {f"text_encoder.{layer}.lora_A.weight": down, f"text_encoder.{layer}.lora_B.weight": up}
    return state


def layers_of(student: Path, every: int = 2) -> list[str]:
    """Some of the layers that the step-saver changes."""
    names = [name.partition(".")[2] for name in load_file(student / LORA_WEIGHTS) if name.endswith(".lora_A.weight")]
    return [name.removesuffix(".lora_A.weight") for name in sorted(names)][::every]


def with_style(step_saver: Path, style: Path, folder: Path) -> Path:
    """The same matrices as the student of a teacher that has a LoRA."""
    shutil.copytree(step_saver, folder)
    card = read_card(folder)
    theirs = card.config["teacher"] | {"lora": [{"source": str(style), "scale": SCALE}]}
    config = card.config | {"teacher": theirs}
    write_card(folder, card.model_copy(update={"config": config, "base": ""}))
    return folder


def fused(pipe: Any, *loras: tuple[Path, float]) -> Any:
    """The pipeline with LoRAs in its weights, by plain diffusers."""
    names = [f"lora{i}" for i in range(len(loras))]
    for name, (source, _) in zip(names, loras, strict=True):
        pipe.load_lora_weights(source, adapter_name=name)
    pipe.set_adapters(names, [scale for _, scale in loras])
    pipe.fuse_lora(components=[*pipe.get_list_adapters()], adapter_names=names)
    pipe.unload_lora_weights()
    return pipe


def assert_same(found: Any, wanted: Any, base: Any) -> None:
    """That a network is another one, which is not the base model's."""
    states = found.state_dict(), wanted.state_dict(), base.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, atol=2e-5, rtol=1e-4)
    moved = [name for name, value in states[2].items() if not torch.allclose(value, states[1][name], atol=1e-3)]
    assert moved


@pytest.mark.parametrize("family", cases(FAMILIES, short=["sdxl"]))
def test_the_style_in_the_file_or_beside_it(
    family: str, student_of: StudentOf, teacher_of: Callable[[str], PipelineTeacher], tmp_path: Path
) -> None:
    """On plain base both are the student: the one file, and the step-saver and the style by `set_adapters`."""
    step_saver, base = student_of(family, lora=4), teacher_of(family)
    for keys in FAMILIES[family]:
        # Of Wan diffusers reads kohya's names for whole blocks alone, as trainers write them.
        layers = layers_of(step_saver, 1 if keys == "kohya" and base.frames else 2)
        style = style_of(base, layers, keys, tmp_path / f"style {keys}")
        student = with_style(step_saver, style, tmp_path / f"student {keys}")
        file = run_export(student, "lora", tmp_path / f"{keys}.safetensors", force=False, with_loras=True)
        merged, _, card = load_merged(student, "cpu")
        loras = [[(file, 1.0)]]
        if keys == "diffusers":
            loras.append([(style, SCALE), (step_saver, 1.0)])
        for each in loras:
            pipe = fused(type(base.pipe).from_pretrained(card.teacher), *each)
            assert_same(getattr(pipe, base.network_part), merged.transformer, base.transformer)
            if base.network_part == "unet" and keys != "peft":
                assert_same(pipe.text_encoder, merged.pipe.text_encoder, base.pipe.text_encoder)


def test_under_comfyuis_names_and_with_one_workflow(
    student_of: StudentOf, teacher_of: Callable[[str], PipelineTeacher], tmp_path: Path
) -> None:
    step_saver, base = student_of("flux2", lora=4), teacher_of("flux2")
    style = style_of(base, layers_of(step_saver), "kohya", tmp_path / "style")
    student = with_style(step_saver, style, tmp_path / "student")
    file = run_export(student, "lora", tmp_path / "mine.safetensors", force=False, keys="comfy", with_loras=True)
    merged, _, card = load_merged(student, "cpu")
    settings = TeacherSettings(**card.config["teacher"] | {"lora": str(file)})
    assert_same(load_teacher(settings, "cpu").transformer, merged.transformer, base.transformer)
    kinds = [node["class_type"] for node in json.loads(workflow_of(file).read_text()).values()]
    assert "LoraLoader" not in kinds and kinds.count("LoraLoaderModelOnly") == 1
    text = " ".join(card_of(file).read_text().split())
    assert f"carries the LoRAs that the teacher had: `{style}:0.8`. Load it on the base model without them." in text
    adapter = run_export(student, "lora", tmp_path / "adapter", force=False, keys="peft", with_loras=True)
    ranks = {len(v) for n, v in load_file(adapter / "adapter_model.safetensors").items() if ".lora_A." in n}
    assert ranks == {json.loads((adapter / "adapter_config.json").read_text())["r"]}
    assert "fuse_lora" not in (adapter / "README.md").read_text()


TEXT_ENCODERS = {
    ("sdxl", "kohya"): ("lora_te1_text_model_", "lora_te2_text_model_"),
    ("sdxl", "comfy"): ("text_encoder.text_model.", "text_encoder_2.text_model."),
    ("sd1", "kohya"): ("lora_te_text_model_",),
    ("sd1", "comfy"): ("text_encoder.text_model.",),
    ("flux", "kohya"): ("lora_te1_text_model_",),
    ("flux", "comfy"): ("text_encoder.text_model.",),
}
"""As in `LoRANetwork` of kohya's scripts and `model_lora_keys_clip` of ComfyUI."""


@pytest.mark.parametrize(("family", "keys"), cases(TEXT_ENCODERS, short=[("sdxl", "kohya"), ("sdxl", "comfy")]))
def test_text_encoders_under_kohyas_and_comfyuis_names(
    family: str, keys: Any, student_of: StudentOf, teacher_of: Callable[[str], PipelineTeacher], tmp_path: Path
) -> None:
    step_saver, base = student_of(family, lora=4), teacher_of(family)
    firsts = TEXT_ENCODERS[family, keys]
    encoders = ("text_encoder", "text_encoder_2")[: len(firsts)]
    style = style_of(base, layers_of(step_saver), "diffusers", tmp_path / "style")
    state, wanted = load_file(style), set[str]()
    for part, first in zip(encoders, firsts, strict=True):
        for name, module in getattr(base.pipe, part).named_modules():
            if "encoder.layers." in name and isinstance(module, nn.Linear):
                down, up = pair(2, *module.weight.shape)
                state |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
                layer = name.removeprefix("text_model.")
                wanted.add(first + (layer.replace(".", "_") if keys == "kohya" else layer))
    save_file(state, style, {"format": "pt"})
    student = with_style(step_saver, style, tmp_path / "student")
    file = run_export(student, "lora", tmp_path / "mine.safetensors", force=False, keys=keys, with_loras=True)
    ends = re.compile(r"\.(alpha|lora_\w+\.weight)$")
    assert {name for name in (ends.sub("", key) for key in load_file(file)) if name.startswith(firsts)} == wanted
    (node,) = (node for node in json.loads(workflow_of(file).read_text()).values() if "Lora" in node["class_type"])
    assert node["class_type"] == "LoraLoader" and node["inputs"]["strength_clip"] == 1.0
    if family == "flux":  # of its network diffusers reads kohya's names at the published widths alone
        return
    merged, _, card = load_merged(student, "cpu")
    settings = TeacherSettings(**card.config["teacher"] | {"lora": str(file)})
    found = [load_teacher(settings, "cpu").pipe]
    if keys == "kohya":
        found.append(fused(type(base.pipe).from_pretrained(card.teacher), (file, 1.0)))
    for pipe in found:
        for part in (*encoders, "unet"):
            assert_same(getattr(pipe, part), getattr(merged.pipe, part), getattr(base.pipe, part))


def test_what_cannot_be_carried_is_refused(
    student_of: StudentOf, teacher_of: Callable[[str], PipelineTeacher], tmp_path: Path
) -> None:
    step_saver, base = student_of("sdxl", lora=4), teacher_of("sdxl")
    out, layers = tmp_path / "x.safetensors", layers_of(step_saver)

    def refused(student: Path, said: str, to: str = "lora", **options: Any) -> None:
        place = out.with_suffix("") if options.get("keys") == "peft" else out
        with pytest.raises(UserError, match=said) as caught:
            run_export(student, to, place, force=False, with_loras=True, **options)
        assert "\n" not in str(caught.value) and not out.exists()

    refused(step_saver, r"its teacher had no LoRA to carry; leave --with-loras out")
    refused(step_saver, r"--with-loras is for --to lora without --steps; leave it out", to="pipeline")
    refused(step_saver, r"--with-loras is for --to lora without --steps; leave it out", steps=2)
    student = with_style(step_saver, style_of(base, layers, "kohya", tmp_path / "te"), tmp_path / "a")
    beside = run_export(student, "lora", tmp_path / "z.safetensors", force=False, keys="kohya")
    said = " ".join(card_of(beside).read_text().split())
    assert f"on top of the LoRAs that the teacher had: `{tmp_path / 'te.safetensors'}:{SCALE}`. Load those too" in said
    assert "it is `sgm_uniform`" in said and "The size is 32 x 32." in said
    assert beside.stat().st_mode == card_of(beside).stat().st_mode
    refused(student, r"changes text encoders, and PEFT's folder is of the network alone; leave --keys", keys="peft")
    file = run_export(student, "lora", tmp_path / "y.safetensors", force=False, with_loras=True)
    assert "under other names; export with --keys kohya." in card_of(file).read_text()
    style = style_of(base, layers, "kohya", tmp_path / "dora")
    state = load_file(style)
    name = next(name for name in state if name.endswith("lora_up.weight"))
    magnitude = name.replace("lora_up.weight", "dora_scale")
    save_file(state | {magnitude: torch.ones(len(state[name]), 1)}, style, {"format": "pt"})
    refused(with_style(step_saver, style, tmp_path / "b"), r"dora_scale, which is no pair of matrices; leave --with-")
