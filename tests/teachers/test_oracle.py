"""Teachers beside their pipelines' own loops: one row for each class of scheduler. Families are in test_contract.py."""

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from forms import cases

from stepfold.maths.formulations import vp_times
from stepfold.teachers.oracle import Agreement, agreement
from stepfold.teachers.sana import SanaTeacher
from stepfold.teachers.schedules import FLOW, VP
from stepfold.teachers.stable_diffusion import StableDiffusionXLTeacher

from .test_schedules import AS_FLOW, DDPM, make

PROMPTS = ["red heart"]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionXLTeacher:
    folder = tiny.save(tiny.make_sdxl, tmp_path_factory.mktemp("sdxl") / "pipeline")
    return StableDiffusionXLTeacher(folder, height=16, width=32)


@pytest.fixture(scope="module")
def sana(tiny_sana: Path) -> SanaTeacher:
    return SanaTeacher(tiny_sana, max_tokens=48)


def with_scheduler(teacher: Any, scheduler: Any) -> Any:
    """The teacher as its folder would make it, had its pipeline this scheduler."""
    teacher.pipe.scheduler = scheduler
    teacher.schedule = teacher.read_schedule()
    teacher.plain_predict = teacher.predict = teacher.predictor()
    return teacher


def beside_its_pipeline(teacher: Any) -> Agreement:
    return agreement(teacher, PROMPTS, teacher.encode(PROMPTS), torch.full((1,), 4.0), num_steps=8)


@pytest.mark.parametrize("name", cases(VP, short=list(VP)[::3]))
def test_a_network_is_called_as_its_own_scheduler_calls_it(sdxl: StableDiffusionXLTeacher, name: str) -> None:
    found = beside_its_pipeline(with_scheduler(sdxl, make(name, **DDPM)))
    assert found.network < 1e-4 and found.schedule < 0.05 and found.end < 0.05 and not found.left_out


@pytest.mark.parametrize("name", FLOW)
def test_a_flow_network_is_called_as_its_own_scheduler_calls_it(sana: SanaTeacher, name: str) -> None:
    found = beside_its_pipeline(with_scheduler(sana, make(name, **AS_FLOW, shift=3.0, flow_shift=3.0)))
    assert found.network < 1e-4 and found.schedule < 0.05 and found.end < 0.05


def test_what_was_misread_shows(sdxl: StableDiffusionXLTeacher) -> None:
    """The faults that once passed: another schedule's betas, and another prediction."""
    teacher = with_scheduler(sdxl, make("EulerDiscreteScheduler", **DDPM))
    right = teacher.schedule
    times = vp_times(diffusers.DDPMScheduler().alphas_cumprod)
    for wrong in ({"times": times}, {"prediction": "v_prediction"}):
        teacher.schedule = dataclasses.replace(right, **wrong)
        teacher.plain_predict = teacher.predict = teacher.predictor()
        found = beside_its_pipeline(teacher)
        assert max(found.schedule, found.end) > 0.2, wrong


def test_clipping_is_left_out_and_said(sdxl: StableDiffusionXLTeacher) -> None:
    scheduler = diffusers.DDIMScheduler(**DDPM, thresholding=True)  # clip_sample is on by default
    found = beside_its_pipeline(with_scheduler(sdxl, scheduler))
    assert found.left_out == "clip_sample and thresholding" and max(found.schedule, found.end) < 0.05
    assert sdxl.pipe.scheduler is scheduler and scheduler.config.clip_sample  # as it was
