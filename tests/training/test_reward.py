"""A reward in the loop, on the tiny teacher: through its decoder, from its step on; the report names what measures."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clips import save_clip
from torch import Tensor

from stepfold import assets
from stepfold.config import Config, load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.jobs.distilling import open_score, run_distill
from stepfold.jobs.finishing import raised_score
from stepfold.prompts.reading import PromptFile, open_prompts
from stepfold.students.whole import new_student
from stepfold.teachers.sana import SanaTeacher
from stepfold.training.accelerators import make_accelerator
from stepfold.training.distill import distill
from stepfold.training.runs import checkpoints, read_metrics

Settings = Callable[..., Config]
ON = ("reward.weight=10", "reward.from_step=2", "rollout.steps=1")


@pytest.fixture
def prompts(prompts_file: Path) -> PromptFile:
    return open_prompts(prompts_file)


def brightness(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    assert len(pictures) == len(prompts) and pictures.shape[1] == 3
    return pictures.mean((1, 2, 3))


def run(config: Config, folder: Path, teacher: SanaTeacher, prompts: PromptFile, score: Any) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(config.seed)
    student, black = new_student(teacher), torch.zeros(teacher.latent_shape)
    distill(config, folder, teacher, student, prompts, [black], make_accelerator("no"), score=score)
    return {name: value.clone() for name, value in student.state_dict().items()}


def test_it_begins_at_its_step_and_resumes_to_the_bit(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    told: list[Sequence[str]] = []

    def score(pictures: Tensor, texts: Sequence[str]) -> Tensor:
        told.append(texts)
        return brightness(pictures, texts)

    config = settings(*ON)
    ours, plain = run(config, tmp_path / "run", teacher, prompts, score), settings()
    theirs = run(plain, tmp_path / "plain", teacher, prompts, None)
    rows, without = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "plain")
    assert ["rollout/reward" in row for row in rows] == [False, False, True, True] and rows[:2] == without[:2]
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    known = {prompts.prompt(i) for i in range(len(prompts))}
    assert [len(texts) for texts in told] == [2, 2] and set().union(*told) <= known
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    again = run(config, tmp_path / "run", teacher, prompts, score)
    assert all(torch.equal(value, again[name]) for name, value in ours.items())
    assert read_metrics(tmp_path / "run") == rows
    with pytest.raises(UserError, match=r"reward\.weight needs a score"):
        run(config, tmp_path / "none", teacher, prompts, None)


def test_the_gradient_comes_through_the_decoder(teacher: SanaTeacher) -> None:
    x0 = teacher.sigma_data * torch.randn(2, *teacher.latent_shape)
    plain = teacher.decode(x0)
    x0.requires_grad_(True)
    pictures = teacher.decode(x0, with_gradient=True)
    assert torch.equal(pictures.detach(), plain) and not teacher.decode(x0).requires_grad
    (gradient,) = torch.autograd.grad(brightness(pictures, ["", ""]).sum(), x0)
    size = 0.02 * gradient / gradient.abs().max()
    with torch.no_grad():
        up, down = (brightness(teacher.decode(x0 + sign * size), ["", ""]).sum() for sign in (1, -1))
    slope = float((gradient * size).sum())
    assert float(up - down) == pytest.approx(2 * slope, rel=0.1) and slope > 0


def test_the_report_names_what_was_raised_and_what_measures(
    tmp_path: Path, tiny_sana: Path, settings: Settings
) -> None:
    clip = save_clip(tmp_path / "clip")
    config = settings(*ON, f"reward.clip={clip}", "reward.from_step=0", "training.steps=1")
    result = run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
    assert f"trained to raise the score of {clip}, measured by the latent error" in result["facts"]
    (row,) = read_metrics(tmp_path / "run")
    assert -1 <= row["rollout/reward"] <= 1
    bundled = load_config("demo", ["reward.weight=0.1", f"reward.clip={clip}"])
    assert raised_score(bundled).endswith("measured by the bundled evaluator") and not raised_score(load_config("demo"))


def test_the_bundled_evaluator_is_no_reward_of_its_own_teacher() -> None:
    teacher: Any = SimpleNamespace(frames=1, device="cpu")
    config = load_config("demo", ["reward.weight=0.1", f"reward.clip={assets.JUDGE}"])
    with pytest.raises(UserError, match="has the weights of the evaluator"):
        open_score(config, teacher)
    assert open_score(load_config("demo", [f"reward.clip={assets.JUDGE}"]), teacher) is None
    unmeasured = load_config("demo", ["reward.weight=0.1", f"reward.clip={assets.JUDGE}", "evaluation.n=0"])
    assert open_score(unmeasured, teacher) is not None
    with pytest.raises(UserError, match=r"give the folder of a CLIP as reward\.clip"):
        open_score(load_config("demo", ["reward.weight=0.1"]), teacher)
    with pytest.raises(UserError, match="this teacher makes videos"):
        open_score(unmeasured, SimpleNamespace(frames=5, device="cpu"))  # type: ignore[arg-type]
