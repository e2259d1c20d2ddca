"""Finished students of every family, and plain diffusers in a process of its own."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

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
import tiny_sana_video
import tiny_wan22
import tiny_z_image
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from stepfold.config import load_config
from stepfold.export.pipeline import save_student
from stepfold.students.loading import load_student
from stepfold.students.lora import lora_student
from stepfold.students.whole import new_student
from stepfold.teachers.contract import SamplerName
from stepfold.teachers.loading import load_teacher


def retimed(pipe: Any) -> Any:
    """A pipeline whose network reads times in [0, 1], as `stepfold retime` leaves one."""
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(1, shift=3.0)
    return pipe


FAMILIES: dict[str, Callable[[], Any]] = {
    "sd3": tiny.make_sd3,
    "flux": tiny.make_flux,
    "sd1": tiny.make_sd1,
    "sdxl": tiny.make_sdxl,
    "flux2": tiny.make_flux2_klein,
    "flux2 dev": tiny.make_flux2,
    "v sdxl": partial(tiny.make_sdxl, prediction_type="v_prediction"),
    "v sdxl from noise": partial(
        tiny.make_sdxl, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "pixart": tiny.make_pixart,
    "dit": tiny.make_dit,
    "lumina": tiny.make_lumina2,
    "wan": tiny.make_wan,
    "wan 2.2 ti2v": tiny_wan22.make_ti2v,
    "wan 2.2 a14b": tiny_wan22.make_a14b,
    "sana video": tiny_sana_video.make_sana_video,
    "hunyuan video": tiny_hunyuan.make_hunyuan_video,
    "kandinsky image": tiny_kandinsky.make_kandinsky_image,
    "kandinsky video": tiny_kandinsky.make_kandinsky_video,
    "sprint": tiny.make_sprint,
    "qwen": tiny_qwen.make_qwen_image,
    "chroma": tiny_chroma.make_chroma,
    "longcat": tiny_qwen.make_longcat,
    "krea": tiny_qwen.make_krea2,
    "ernie-image": tiny_ernie_image.make_ernie_image,
    "prx": tiny_prx.make_prx,
    "z-image": tiny_z_image.make_z_image,
    "hunyuan image": tiny_hunyuan_image.make_hunyuan_image,
    "anima": tiny_anima.make_anima,
    "retimed sd3": lambda: retimed(tiny.make_sd3()),
    "retimed flux": lambda: retimed(tiny.make_flux()),
    "retimed flux2": lambda: retimed(tiny.make_flux2_klein()),
}
SMALLER: dict[str, Callable[..., Any]] = {
    "sana": tiny.make_sana,
    "sd3": tiny.make_sd3,
    "flux": tiny.make_flux,
    "flux2": tiny.make_flux2_klein,
    "pixart": tiny.make_pixart,
    "lumina": tiny.make_lumina2,
    "wan": tiny.make_wan,
    "qwen": tiny_qwen.make_qwen_image,
    "longcat": tiny_qwen.make_longcat,
    "krea": tiny_qwen.make_krea2,
    "kandinsky video": tiny_kandinsky.make_kandinsky_video,
    "ernie-image": tiny_ernie_image.make_ernie_image,
    "prx": tiny_prx.make_prx,
    "z-image": tiny_z_image.make_z_image,
    "hunyuan image": tiny_hunyuan_image.make_hunyuan_image,
}
"""Families whose students may have fewer blocks than the teacher, which has three here."""


@pytest.fixture(scope="session")
def student_of(tiny_sana: Path, first_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family, LoRA rank, depth, sampler) -> a student folder, not its teacher any more."""
    made: dict[tuple[str, int, float, str], Path] = {}
    sanas = {"sana": tiny_sana, "first sana": first_sana}

    def make(family: str, lora: int = 0, depth: float = 1.0, sampler: SamplerName = "consistency") -> Path:
        key = family, lora, depth, sampler
        if key not in made:
            folder = tmp_path_factory.mktemp("student")
            if depth != 1:
                source = tiny.save(partial(SMALLER[family], num_layers=3), folder / "teacher")
            else:
                source = sanas.get(family) or tiny.save(FAMILIES[family], folder / "teacher")
            made[key] = finished(source, folder / "student", lora, depth, sampler)
        return made[key]

    return make


def finished(source: Path, folder: Path, lora: int, depth: float = 1.0, sampler: SamplerName = "consistency") -> Path:
    """A student as a run leaves it, with weights that moved."""
    two_times = sampler == "flow_map"
    changes = [
        f"teacher.source={source}", f"student.lora={lora}", f"student.depth={depth}", "prompts=prompts.txt",
        f"student.times={'two' if two_times else 'one'}", "objective=discrete",
    ]  # fmt: skip
    sizes = ["teacher.height=32", "teacher.width=32", "teacher.max_tokens=24"]
    config = load_config("default", [*changes, *sizes])
    teacher = load_teacher(config.teacher, "cpu")
    if lora:
        student = lora_student(teacher, lora, two_times=two_times)
    else:
        student = new_student(teacher, depth, two_times=two_times)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    save_student(
        teacher, student, folder, config, tiny.recipe(teacher, sampler), (teacher.examples or ["red heart"])[-1]
    )
    return folder


def run_alone(script: str) -> None:
    """In a fresh process, which knows nothing of stepfold and reaches no network."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", script + "\nassert not [n for n in sys.modules if n.startswith('stepfold')]"],
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr


START = """
import json, sys
from inspect import signature
import diffusers, torch
from safetensors.torch import load_file, save_file

tensors = load_file({file!r})
drawn = {{}}

def draw(name, folder, pipe, steps):
    with open(folder + "/stepfold.json") as file:
        card = json.load(file)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(7)
    call = card["calls"][str(steps)]
    told = {{"class_labels" if "class_labels" in signature(pipe.__call__).parameters else "prompt": card["example"]}}
    made = pipe(**told, latents=tensors[name], output_type="latent", return_dict=False, **call)[0]
    drawn[name] = made.contiguous()
"""


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[dict[str, tuple[Path, str]]], dict[str, torch.Tensor]]:
    """Name -> (student folder, lines that make `pipe`) to name -> latents, by one fresh process of plain diffusers."""

    def draw(pipes: dict[str, tuple[Path, str]], steps: int = 2) -> dict[str, torch.Tensor]:
        file = tmp_path / "latents.safetensors"
        noise, lines = {}, [START.format(file=str(file))]
        for name, (folder, code) in pipes.items():
            teacher, _, _ = load_student(folder, "cpu")
            shape = (1, *teacher.latent_shape)
            noise[name] = teacher.given(start(shape)).contiguous()
            lines += [f"folder = {str(folder)!r}", code, f"draw({name!r}, folder, pipe, {steps})"]
        save_file(noise, file)
        run_alone("\n".join([*lines, f"save_file(drawn, {str(file)!r})"]))
        return load_file(file)

    return draw


def start(shape: tuple[int, ...]) -> torch.Tensor:
    """The unit noise that `fresh` draws from."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|."""
    return float((a - b).norm() / b.norm())
