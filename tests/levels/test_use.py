"""What is printed for diffusers draws our latents in the real pipelines; what a file holds is checked."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy
import pytest
import tiny
import torch
from forms import cases
from tiny_hunyuan_image import make_hunyuan_image
from tiny_qwen import make_qwen_image

from stepfold.commands.schedule import start_noise, usual_levels
from stepfold.config import TeacherSettings
from stepfold.errors import UserError
from stepfold.levels.record import Row, comfyui_guidance, end_of, lines_for, read_schedule, write_schedule
from stepfold.levels.solvers import velocity_of
from stepfold.teachers.loading import load_teacher

LEVELS = [1.0, 0.9083, 0.6207, 0.2519, 0.0]
WEIGHTS = [[], [0.3119], [0.1067, -0.2003], [0.0071, 0.1013, 0.4159]]
FAMILIES: dict[str, Callable[[], Any]] = {
    "sana": tiny.make_sana,
    "sd3": tiny.make_sd3,
    "flux": tiny.make_flux,
    "lumina": tiny.make_lumina2,
    "wan": tiny.make_wan,
    "sd1": tiny.make_sd1,
    "qwen": make_qwen_image,
    "hunyuan": make_hunyuan_image,
}


def row_of(solver: str, teacher: Any) -> Row:
    first = usual_levels(teacher, 4)["the scheduler's"][0]
    levels = [first, *LEVELS[1:]]
    return Row(solver, 4, levels, 0.1, 0.2, "even", True, WEIGHTS if solver == "calibrated" else [])


@pytest.mark.parametrize(
    ("family", "solver"),
    cases(
        [
            (family, solver)
            for family in FAMILIES
            for solver in ("euler", "unipc", "calibrated")
            if family != "sd1" or solver == "euler"
        ],
        short=[
            ("sana", "euler"),
            ("flux", "unipc"),
            ("qwen", "euler"),
            ("hunyuan", "euler"),
            ("sd3", "calibrated"),
            ("sd1", "euler"),
        ],
    ),
)
def test_plain_diffusers_draws_our_latents(family: str, solver: str, tmp_path: Path) -> None:
    """The schedulers of SD3 (shift 3) and FLUX (by size) would shift the levels again; FLUX drops UniPC's."""
    folder = tiny.save(FAMILIES[family], tmp_path / "pipeline")
    frames = 5 if family == "wan" else None
    settings = TeacherSettings(source=str(folder), height=32, width=32, frames=frames, max_tokens=24)
    teacher: Any = load_teacher(settings, "cpu")
    row = row_of(solver, teacher)
    noise = start_noise(teacher, 0, range(1))
    scale = 2.0
    ours = end_of(row, velocity_of(teacher, teacher.encode(["red heart"]), scale, 1), noise)
    lines = lines_for(teacher, row, scale)["diffusers"].splitlines()
    pipe, own = teacher.pipe, teacher.pipe.scheduler
    unit = start_noise(teacher, 0, range(1)) if teacher.ode == "flow" else unit_noise(teacher)
    usual = {name: value for name, value in teacher.usual_call().items() if name not in teacher.fixed_options}
    extra = {"latents": teacher.given(unit), "output_type": "latent", "return_dict": False} | usual
    names = {"diffusers": diffusers, "numpy": numpy, "pipe": pipe, "prompt": "red heart", "extra": extra}
    exec("\n".join([*lines[:-1], f"made = {lines[-1].removesuffix(')')}, **extra)"]), names)
    theirs = teacher.made(names["made"][0])
    assert (theirs - ours).norm() / ours.norm() < 1e-4
    pipe.scheduler = own
    even = Row(solver, 4, usual_levels(teacher, 4)["the scheduler's"], 0.1, 0.2, "even", True, row.weights)
    other = end_of(even, velocity_of(teacher, teacher.encode(["red heart"]), scale, 1), noise)
    assert (theirs - other).norm() / ours.norm() > 2e-3


def test_a_pipeline_that_takes_no_levels_has_no_lines(tmp_path: Path) -> None:
    """DiT's drew from noise of another size, had it taken them."""
    folder = tiny.save(tiny.make_dit, tmp_path / "pipeline")
    teacher: Any = load_teacher(TeacherSettings(source=str(folder)), "cpu")
    lines = lines_for(teacher, row_of("euler", teacher), 2.0)
    assert lines["diffusers"] == "# none: DiTPipeline takes no noise levels" and not lines["comfyui"]


@pytest.mark.parametrize(
    ("kind", "off", "said"),
    [
        ("classifier_free", 1.0, "CFG 4"),
        ("classifier_free", 0.0, "CFG 5"),
        ("embedded", 1.0, "CFG 1, FluxGuidance 4"),
        ("none", 1.0, "CFG 1"),
    ],
)
def test_comfyui_is_told_the_guidance(kind: str, off: float, said: str) -> None:
    """Its CFG is 1 where guidance is off; scales of some pipelines are 0 there."""
    assert comfyui_guidance(SimpleNamespace(guidance_kind=kind, no_guidance=off), 4.0) == said


def unit_noise(teacher: Any) -> torch.Tensor:
    from stepfold.randomness import normal

    return normal(teacher.latent_shape, 0, "schedule noise", 0)[None]


def test_a_file_is_read_back_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    rows = [
        Row("euler", 4, LEVELS, 0.1, 0.2, "even", True),
        Row("calibrated", 4, LEVELS, 0.1, 0.2, "even", True, WEIGHTS),
    ]
    write_schedule(path, {"teacher": "emoji"}, rows, [])
    assert read_schedule(path) == ({"teacher": "emoji"}, rows)
    good = json.loads(path.read_text())
    for change in (
        {"levels": [1.0, 0.9, 0.95, 0.2, 0.0]},
        {"levels": LEVELS[:-1]},
        {"levels": [1.2, *LEVELS[1:]]},
        {"solver": "heun"},
    ):
        path.write_text(json.dumps(good | {"rows": [good["rows"][0] | change]}))
        with pytest.raises(UserError, match="; make it again with `stepfold schedule`"):
            read_schedule(path)
    path.write_text(json.dumps(good | {"rows": [good["rows"][1] | {"weights": WEIGHTS[:2]}]}))
    with pytest.raises(UserError, match="without a weight for each earlier step"):
        read_schedule(path)
    for text in ("[]", "{", json.dumps(good | {"rows": [good["rows"][0] | {"more": 1}]})):
        path.write_text(text)
        with pytest.raises(UserError, match="is no file of `stepfold schedule`"):
            read_schedule(path)
