"""Damaged students: a cut file, or one that does not have the student's own tensors, is refused wherever it is used."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from forms import cases
from safetensors.torch import load_file, save_file

from stepfold.config import load_config
from stepfold.errors import NonFiniteError, UserError
from stepfold.export.hub import hub_card
from stepfold.export.pipeline import save_student
from stepfold.jobs.exporting import run_export
from stepfold.jobs.sampling import run_sample
from stepfold.students.card import CARD, read_card, write_card
from stepfold.students.intact import digest_of
from stepfold.students.loading import load_merged, load_student
from stepfold.students.lora import LORA_WEIGHTS, lora_shapes, lora_student
from stepfold.students.starting import make_student
from stepfold.students.two_times import EMBEDDER
from stepfold.teachers.loading import load_teacher

Damage = Callable[[Path], None]


def cut(file: Path) -> None:
    os.truncate(file, 2000)


def cut_at_the_end(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 4)


def changed(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    def damage(file: Path) -> None:
        save_file({name: value.contiguous() for name, value in change(load_file(file)).items()}, file)

    return damage


def halved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(weights.items())[: len(weights) // 2])


def with_kohyas_names(file: Path) -> None:
    other = run_export(file.parent, "lora", file.parent.parent / "kohya.safetensors", force=True, keys="kohya")
    shutil.copy(other, file)


NAMES = r"(is not this student's: it (lacks|has) .*|holds other tensors than this student's.*); copy the student folder"
CUT = r"is damaged \(.*\); copy the student folder again"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "cut": (cut, CUT),
    "cut at the end": (cut_at_the_end, CUT),
    "other names": (changed(lambda w: {name.replace("unet.", "model."): w[name] for name in w}), NAMES),
    "kohya's names": (with_kohyas_names, NAMES),
    "half of it": (changed(halved), NAMES),
    "one more": (changed(lambda w: w | {"unet.more.lora_A.weight": torch.ones(4, 4)}), NAMES),
    "another rank": (changed(lambda w: {name: w[name] if "lora_B" in name else w[name][:2] for name in w}), NAMES),
}
USES: dict[str, Callable[[Path, Path], Any]] = {
    "load": lambda folder, out: load_student(folder, "cpu"),
    "merge": lambda folder, out: load_merged(folder, "cpu"),
    "push": lambda folder, out: hub_card(folder, "you/student"),
    **{
        f"to {to}": lambda folder, out, to=to: run_export(folder, to, out, force=True)
        for to in ("pipeline", "onnx", "openvino", "web", "anyflow")
    },
    **{
        f"to {to}": lambda folder, out, to=to: run_export(folder, to, out.with_suffix(".safetensors"), force=True)
        for to in ("lora", "single-file")
    },
    **{
        f"to {keys}": lambda folder, out, keys=keys: run_export(
            folder, "lora", out if keys == "peft" else out.with_suffix(".safetensors"), force=True, keys=keys
        )
        for keys in ("kohya", "comfy", "peft")
    },
}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA student of a tiny SDXL, with weights that moved."""
    folder = tmp_path_factory.mktemp("sdxl")
    return finished(tiny.save(tiny.make_sdxl, folder / "teacher"), folder / "student", 4)


@pytest.fixture(scope="module")
def flow_map(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow map with all weights."""
    folder = tmp_path_factory.mktemp("sd3")
    return finished(tiny.save(tiny.make_sd3, folder / "teacher"), folder / "student", 0)


def finished(source: Path, folder: Path, rank: int) -> Path:
    sizes = ["teacher.height=32", "teacher.width=32", "teacher.max_tokens=24"]
    two = [] if rank else ["student.times=two", "target.rule=uniform"]
    config = load_config(
        "default", [f"teacher.source={source}", f"student.lora={rank}", "prompts=x", "objective=discrete", *sizes, *two]
    )
    teacher = load_teacher(config.teacher, "cpu")
    student = make_student(teacher, config.student, config.teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    sampler = "consistency" if rank else "flow_map"
    save_student(teacher, student, folder, config, tiny.recipe(teacher, sampler), "red heart")
    return folder


def damaged(student: Path, folder: Path, name: str, damage: Damage) -> Path:
    shutil.copytree(student, folder / "student")
    damage(folder / "student" / name)
    return folder / "student"


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("use", cases(USES, short=["load", "merge", "to lora", "to single-file"]))
def test_a_damaged_lora_is_refused_wherever_it_is_used(lora: Path, tmp_path: Path, what: str, use: str) -> None:
    """peft leaves out names that it does not know, and starts at nothing where there are none: the teacher."""
    damage, said = DAMAGES[what]
    folder = damaged(lora, tmp_path, LORA_WEIGHTS, damage)
    with pytest.raises(UserError, match=said):
        USES[use](folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("what", DAMAGES)
def test_an_early_card_does_not_hide_it(lora: Path, tmp_path: Path, what: str) -> None:
    """Cards without digests: a LoRA that would be copied alone is compared with the teacher's layers."""
    damage, said = DAMAGES[what]
    folder = damaged(lora, tmp_path, LORA_WEIGHTS, damage)
    card = read_card(folder).model_copy(update={"digests": {}})
    (folder / CARD).write_text(card.model_dump_json())
    for keys in ("diffusers", "peft"):
        out = tmp_path / f"out{'' if keys == 'peft' else '.safetensors'}"
        with pytest.raises(UserError, match=said):
            run_export(folder, "lora", out, force=True, keys=keys)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("use", ["load", "push", "to pipeline"])
@pytest.mark.parametrize("damage", [cut, Path.unlink, changed(halved)])
def test_a_damaged_embedder_is_refused(flow_map: Path, tmp_path: Path, damage: Damage, use: str) -> None:
    """`--to pipeline` copies the folder of a student with all weights as it is."""
    folder = damaged(flow_map, tmp_path, f"{EMBEDDER}.safetensors", damage)
    said = r"does not load \(.*\); copy|holds other tensors|is damaged \(.*\); copy|lacks target_embedder"
    with pytest.raises(UserError, match=said):
        USES[use](folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_not_finite_are_refused(lora: Path, tmp_path: Path) -> None:
    damage = changed(lambda w: w | {next(iter(w)): torch.full_like(next(iter(w.values())), torch.nan)})
    with pytest.raises(UserError, match=r"is damaged \(unet\..* is not finite\); copy the student folder again"):
        load_student(damaged(lora, tmp_path, LORA_WEIGHTS, damage), "cpu")


@pytest.mark.parametrize("make", [tiny.make_sdxl, tiny.make_sd3, tiny.make_sana, tiny.make_flux])
@pytest.mark.parametrize("convolutions", [False, True])
def test_the_expected_names_and_shapes_are_those_that_peft_makes(
    make: Callable[[], Any], convolutions: bool, tmp_path: Path
) -> None:
    from peft import get_peft_model_state_dict

    source = tiny.save(make, tmp_path / "teacher")
    settings = load_config("default", [f"teacher.source={source}", "prompts=x", "teacher.height=32"]).teacher
    teacher = load_teacher(settings.model_copy(update={"width": 32, "max_tokens": 24}), "cpu")
    expected = lora_shapes(teacher, teacher.transformer, 4, convolutions)
    student: Any = lora_student(teacher, 4, convolutions=convolutions, for_export=False)
    made = get_peft_model_state_dict(student.transformer)
    assert {f"{teacher.network_part}.{name}": tuple(value.shape) for name, value in made.items()} == expected
    digest = digest_of(expected)
    assert digest == digest_of(dict(reversed(expected.items()))) != digest_of({**expected, "more": (1,)})


def test_a_card_is_of_the_files_beside_it(lora: Path, tmp_path: Path) -> None:
    """Written somewhere else, it knows those again."""
    assert set(read_card(lora).digests) == {LORA_WEIGHTS}
    write_card(tmp_path, read_card(lora))
    assert read_card(tmp_path).digests == {}


def test_a_whole_student_that_samples_nan_makes_no_image(flow_map: Path, tmp_path: Path) -> None:
    """It was an image, black or grey, and exit code 0."""
    damage = changed(lambda weights: {name: torch.full_like(value, torch.nan) for name, value in weights.items()})
    folder = damaged(flow_map, tmp_path, "transformer/diffusion_pytorch_model.safetensors", damage)
    with pytest.raises(NonFiniteError, match=r"student samples numbers that are not finite, so there is no image"):
        run_sample(folder, ["a cat"], steps=1, seed=0, guidance=None, device="cpu")
