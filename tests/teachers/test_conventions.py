"""What doctor, cards and the page of teachers say of a pipeline is so."""

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from stepfold.config import TeacherSettings
from stepfold.maths.formulations import flow_time
from stepfold.teachers.conventions import conventions, unshifted
from stepfold.teachers.loading import load_teacher
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.teachers.sana import SanaTeacher

SCALE, TIME, OUTPUT = "guidance scale s and weight w", "timesteps of the network", "output of the network"


@pytest.fixture
def teacher(tiny_sana: Path) -> SanaTeacher:
    return SanaTeacher(tiny_sana, max_tokens=32)


def loaded(make: Any, folder: Path) -> PipelineTeacher:
    return load_teacher(TeacherSettings(source=str(tiny.save(make, folder)), max_tokens=32, height=32, width=32), "cpu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, r"s = 4\.5 of the pipeline is w = 4\.5 of v_u \+ w \(v_c - v_u\); s = 1 turns guidance off"),
        (
            {"default_guidance": 4.0, "no_guidance": 0.0, "guidance_weight": lambda s: s + 1},
            r"s = 4 .* w = 5 of .*; s = 0 turns",
        ),
        ({"guidance_kind": "embedded"}, r"the network is told s, 4\.5 by default; one call"),
        ({"guidance_kind": "none"}, r"no guidance"),
    ],
)
def test_a_scale_means_a_weight(teacher: SanaTeacher, change: dict[str, Any], said: str) -> None:
    for name, value in change.items():
        setattr(teacher, name, value)
    assert re.match(said, conventions(teacher)[SCALE])


def test_the_networks_time_counts_to_one_or_to_1000(teacher: SanaTeacher, first_sana: Path) -> None:
    assert conventions(teacher)[TIME] == "in [0, 1], noise at 1"
    other = load_teacher(TeacherSettings(source=str(first_sana), max_tokens=64), "cpu")
    assert conventions(other)[TIME] == "in [0, 1000], noise at 1000"


def test_noise_levels_are_said_with_the_shift_and_without(teacher: SanaTeacher) -> None:
    assert conventions(teacher)["noise levels, 4 steps"] == "1, 0.7071, 0.5, 0.2929; no shift"
    teacher.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    said = conventions(teacher)
    assert said["noise levels, 1 step"] == "1; before a scheduler's shift of 3: 1"
    assert (
        said["noise levels, 4 steps"]
        == "1, 0.7071, 0.5, 0.2929; before a scheduler's shift of 3: 1, 0.4459, 0.25, 0.1213"
    )
    levels = flow_time(torch.tensor(teacher.student_times(4, "consistency"))).double()
    teacher.pipe.scheduler.set_timesteps(sigmas=unshifted(levels.tolist(), 3.0))
    torch.testing.assert_close(teacher.pipe.scheduler.sigmas[:-1].double(), levels, atol=1e-6, rtol=0)
    teacher.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.02)
    assert conventions(teacher)["noise levels, 2 steps"].endswith("cannot take them, since it ends at 0.02")


def test_a_networks_noise_is_no_velocity(tmp_path: Path) -> None:
    said = conventions(loaded(tiny.make_sd1, tmp_path / "sd1"))
    assert said[OUTPUT].startswith("noise z") and said[TIME] == "in [0, 1000], noise at 1000"
    assert said["noise levels, 4 steps"] == "timesteps 999, 759, 499, 259 of LCMScheduler; no shift"
    assert conventions(loaded(tiny.make_sd2, tmp_path / "sd2"))[OUTPUT] == "v = cos t z - sin t x_0"


def test_only_the_times_of_a_student_are_said(teacher: SanaTeacher) -> None:
    said = conventions(teacher, {2: [1.5, 0.5]}, "flow")
    assert [name for name in said if name.startswith("noise levels")] == ["noise levels, 2 steps"]
    first, second = flow_time(torch.tensor([1.5, 0.5], dtype=torch.float64)).tolist()
    assert said["noise levels, 2 steps"] == f"{first:.4g}, {second:.4g}; no shift"
