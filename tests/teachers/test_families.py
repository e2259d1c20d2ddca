"""Every family through the commands: doctor, encode, distil, sample, and the student in plain diffusers."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from stepfold import doctor
from stepfold.config import TeacherSettings, load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.jobs import run_distill, run_encode, run_sample
from stepfold.randomness import normal
from stepfold.teachers.loading import CARD, load_teacher
from stepfold.training.runs import read_metrics

SMALL = TeacherSettings(height=16, width=32, max_tokens=24)

FAMILIES: dict[str, Callable[[], Any]] = {
    "sd3": tiny.make_sd3,
    "flux dev": tiny.make_flux,
    "flux schnell": partial(tiny.make_flux, guidance_embeds=False),
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(FAMILIES[request.param], tmp_path_factory.mktemp("family") / "pipeline")


def settings(folder: Path, prompts: Path, *sets: str) -> Any:
    return load_config(
        "default",
        [
            f"teacher.source={folder}", f"prompts={prompts}", "teacher.height=16", "teacher.width=32",
            "teacher.max_tokens=24", "space.route_steps=4", "space.filter_rule=off", "training.steps=3",
            "training.prompts_per_step=2", "training.preview_every=1000", "optimiser.name=adamw", "optimiser.lr=1e-3",
            "optimiser.warmup=0", "training.precision=no", "training.rollout_precision=no", "objective=discrete", *sets,
        ],
    )  # fmt: skip


@pytest.mark.parametrize("objective", ["discrete", "continuous"])
def test_a_teacher_is_distilled_and_its_student_drawn(
    folder: Path, prompts_file: Path, tmp_path: Path, objective: str
) -> None:
    """From folder and prompts to a student; plain diffusers draws the same picture, called as the card says."""
    config, run = settings(folder, prompts_file, f"objective={objective}"), tmp_path / "run"
    run_distill(config, run, resume=False, display=Display(quiet=True), command="test")
    assert all(math.isfinite(row["loss"]) for row in read_metrics(run)) and len(read_metrics(run)) == 3
    network = next((run / "student" / "transformer").glob("*.safetensors"))
    before = load_file(next((folder / "transformer").glob("*.safetensors")))
    after = load_file(network)
    unmoved = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert not {
        name
        for name in unmoved
        if not any(part in name for part in ("add_q_proj", "norm_added_q", "pos_embed.pos_embed"))
    }

    card = json.loads((run / "student" / CARD).read_text())
    (ours,) = run_sample(run / "student", ["red heart"], steps=1, seed=0, guidance=None, device="cpu")
    teacher = load_teacher(config.teacher, "cpu")
    pipe: Any = getattr(diffusers, card["pipeline"]).from_pretrained(run / "student")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.stack([normal(teacher.latent_shape, 0, "sample", 0)])
    theirs = pipe("red heart", latents=teacher.pack(noise), **card["calls"]["1"]).images[0]
    assert ours.size == theirs.size == (32, 16)
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_conditions_from_disk_are_those_of_the_encoders(folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    config = settings(folder, prompts_file)
    run_encode(config.teacher, prompts_file, tmp_path / "cache", batch=5, display=Display(quiet=True), device="cpu")
    cached = settings(folder, prompts_file, f"conditions={tmp_path / 'cache'}")
    losses = []
    for name, each in (("whole", config), ("cached", cached)):
        run_distill(each, tmp_path / name, resume=False, display=Display(quiet=True), command="test")
        losses.append([row["loss"] for row in read_metrics(tmp_path / name)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.05)  # the cache is in bfloat16


def test_doctor_understands_it(folder: Path) -> None:
    findings = {
        finding.check: finding for finding in doctor.examine(SMALL.model_copy(update={"source": str(folder)}), "cpu")
    }
    wrong = {check for check, finding in findings.items() if not finding.ok}
    # Their time counts to 1000 and these networks' weights are large: dF/dt explodes, as it should be told.
    assert wrong <= {"size of dF/dt (root mean square)", "tangent backends agree"}
    assert "relative difference" in findings["wrapped teacher = pipeline's own sampler, 4 steps"].number


def test_several_scales_need_a_network_that_can_be_told(folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    config = settings(folder, prompts_file, "space.guidance=[3.0, 5.0]")
    if load_teacher(config.teacher, "cpu").student_reads_guidance:
        run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
    else:
        with pytest.raises(UserError, match=r"has 2 scales, but this teacher's network takes none.*give one, for"):
            run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
        assert not (tmp_path / "run").exists()
