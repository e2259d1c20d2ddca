"""`stepfold sample`, and how a run decides what its student is sampled with."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from typer.testing import CliRunner

from stepfold.cli import app
from stepfold.config import Config, TeacherSettings, load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.jobs.distilling import run_distill
from stepfold.jobs.sampling import run_sample
from stepfold.randomness import generator
from stepfold.students.card import read_card
from stepfold.students.loading import load_student
from stepfold.teachers.loading import load_teacher

SETTINGS = (
    "teacher.height=32", "teacher.width=32", "teacher.max_tokens=24", "space.route_steps=4", "space.filter_rule=off",
    "training.steps=3", "training.prompts_per_step=2", "training.preview_every=3", "optimiser.name=adamw",
    "optimiser.lr=1e-3", "training.precision=no", "training.walk_precision=no", "objective=velocity",
)  # fmt: skip


def settings(teacher: Path, prompts: Path, *changes: str) -> Config:
    return load_config("default", [*SETTINGS, *changes], teacher__source=str(teacher), prompts=str(prompts))


@pytest.fixture(scope="module")
def run(tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of velocity matching."""
    folder = tmp_path_factory.mktemp("velocity")
    (folder / "prompts.txt").write_text("\n".join(tiny.PROMPTS))
    config = settings(tiny_sana, folder / "prompts.txt", "space.guidance=[4.5]")
    run_distill(config, folder / "run", resume=False, display=Display(quiet=True), command="test")
    return folder / "run"


def test_a_run_of_velocity_matching_leaves_a_flow_student(run: Path) -> None:
    """`stepfold sample` and the saved pipeline, called as the card says, draw the same picture in four steps."""
    card = read_card(run / "student")
    assert card.recipe.sampler == "flow" and card.pipeline == "SanaPipeline"
    assert card.scheduler == "FlowMatchEulerDiscreteScheduler"
    assert sorted(path.name for path in (run / "previews").iterdir())[-1] == "step_000003.png"
    (ours,) = run_sample(run / "student", ["red heart"], steps=4, seed=0, guidance=None, device="cpu")
    teacher, _, _ = load_student(run / "student", "cpu")
    pipe: Any = getattr(diffusers, card.pipeline).from_pretrained(run / "student")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(**teacher.inputs(["red heart"], [generator(0, "sample", 0)]), **card.calls[4]).images[0]
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_another_sampler_is_one_line(run: Path, tmp_path: Path) -> None:
    command = ["sample", str(run / "student"), "red heart", "--out", str(tmp_path / "x.png")]
    assert CliRunner().invoke(app, [*command, "--sampler", "flow"]).exit_code == 0
    for sampler, reason in (("consistency", "points at the mean"), ("euler", "choose consistency, flow, flow_map")):
        result = CliRunner().invoke(app, [*command, "--sampler", sampler])
        assert isinstance(result.exception, UserError) and reason in str(result.exception)
        assert "\n" not in str(result.exception)
    result = CliRunner().invoke(app, ["sample", str(run / "student"), "a" * 5000, str(run / "config.yaml")])
    assert "config.yaml is a file, and a prompt is a text" in str(result.exception)


def test_an_image_is_kept_unless_its_name_is_given(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample.png").write_bytes(b"of yesterday")
    command = ["sample", str(run / "student"), "red heart", "--steps", "1"]
    said = [CliRunner().invoke(app, command).stdout.split()[-1] for _ in range(2)]
    assert said == ["sample-2.png", "sample-3.png"] and (tmp_path / "sample.png").read_bytes() == b"of yesterday"
    assert CliRunner().invoke(app, [*command, "--out", "sample.png"]).exit_code == 0
    assert (tmp_path / "sample.png").read_bytes() == (tmp_path / "sample-2.png").read_bytes()


def test_a_lora_that_its_pipeline_cannot_sample_is_refused_before_the_run(tmp_path: Path, prompts_file: Path) -> None:
    sprint = tiny.save(tiny.make_sprint, tmp_path / "sprint")
    config = settings(sprint, prompts_file, "student.lora=4")
    with pytest.raises(UserError, match="SanaSprintPipeline adds fresh noise at each step"):
        run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
    assert not (tmp_path / "run").exists()


def test_the_teacher_may_take_the_first_step(run: Path, tmp_path: Path) -> None:
    """Its images are others than the student's own, and the same each time; one step or a race is refused."""
    options: dict[str, Any] = dict(seed=0, guidance=None, device="cpu")
    own, hybrid, again = (
        run_sample(run / "student", ["red heart"], steps=2, first_step=who, **options)[0].tobytes()
        for who in ("student", "teacher", "teacher")
    )
    assert hybrid == again != own
    with pytest.raises(UserError, match="2 steps or more"):
        run_sample(run / "student", ["red heart"], steps=1, first_step="teacher", **options)
    race = ["sample", str(run), "red heart", "--first-step", "teacher", "--race", str(tmp_path / "race.gif")]
    assert "leave out --first-step" in str(CliRunner().invoke(app, race).exception)


def test_a_student_that_has_its_guidance_inside_is_a_teacher_of_half_the_cost(run: Path) -> None:
    """It is no longer told a scale; its velocity is the one that it was taught at its trajectories' scale."""
    teacher = load_teacher(
        TeacherSettings(source=str(run / "student"), height=32, width=32, max_tokens=24, guidance="none"), "cpu"
    )
    assert type(teacher).__name__ == "SanaTeacher" and teacher.guidance_kind == "none"
    _, student, card = load_student(run / "student", "cpu")
    x, t = 0.5 * torch.randn(2, *teacher.latent_shape), torch.tensor([0.4, 1.2])
    condition, scale = teacher.encode(["red heart", "a cat"]), torch.full((2,), card.recipe.guidance)
    rows: list[int] = []
    teacher.transformer.register_forward_hook(lambda module, args, out: rows.append(len(out[0])))
    ours = teacher.velocity(x, t, condition, scale)
    with torch.no_grad():
        told = 0.5 * student(x / 0.5, t, condition, scale)
    torch.testing.assert_close(ours, told, rtol=1e-4, atol=1e-5)
    assert rows == [2]


@pytest.mark.parametrize(
    ("recipe", "student", "said"),
    [
        ({"times": {"1": [], "2": []}}, {}, "is a student sampled by consistency, which has no trajectories"),
        ({"sampler": "flow_map", "times": {"1": [], "2": []}}, {}, "sampled by flow map, which has no trajectories"),
        ({"sampler": "flow", "times": {"4": []}}, {}, "is a student for one number of steps, which has no"),
        ({"sampler": "flow", "times": {"1": [], "2": []}}, {"lora": 4}, "is a LoRA; make it whole first: stepfold exp"),
        ({"sampler": "flow", "times": {"1": [], "2": []}}, {}, ""),
    ],
)
def test_a_student_whose_network_is_no_velocity_is_no_teacher(
    recipe: dict[str, Any], student: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """It was walked at times that it does not know, without a word."""
    (tmp_path / "stepfold.json").write_text(json.dumps({"recipe": recipe, "config": {"student": student}}))
    with pytest.raises(UserError, match=said or "has no model_index.json"):
        load_teacher(TeacherSettings(source=str(tmp_path)), "cpu")


@pytest.mark.parametrize("name", ["", "pytorch_lora_weights.safetensors"])
def test_nor_is_its_file_a_lora_of_a_teacher(name: str, tmp_path: Path) -> None:
    """One that has its guidance inside is: its network is a velocity at all times."""
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"none")
    for recipe, said in (
        ({"times": {"1": [], "2": []}}, "is a student sampled by consistency, which has no trajectories"),
        ({"sampler": "flow", "times": {"1": [], "2": []}}, "does not load"),
    ):
        (tmp_path / "stepfold.json").write_text(json.dumps({"recipe": recipe, "config": {"student": {"lora": 4}}}))
        with pytest.raises(UserError, match=rf"LoRA '\S+{name}' {said}"):
            load_teacher(TeacherSettings(source="emoji", lora=str(tmp_path / name)), "cpu")  # type: ignore[arg-type]
