"""Preview grids."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from stepfold.commands.distill import run_distill
from stepfold.config import load_config
from stepfold.display import Display
from stepfold.evaluation import preview
from stepfold.evaluation.measure import teacher_sampler
from stepfold.evaluation.preview import save_grid, thinned


def test_pictures_keep_their_proportions(tmp_path: Path) -> None:
    save_grid({"wide": torch.zeros(3, 3, 10, 25), "too": torch.ones(3, 3, 10, 25)}, tmp_path / "grid.png", cell=20)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.height == 40 and (grid.width - 3 * 50) == 132  # the names' column


def test_a_thinned_filmstrip_has_its_first_and_last_frame() -> None:
    frames = torch.arange(9.0).repeat_interleave(4).expand(2, 3, 5, 36)
    assert thinned(frames, 9, 3)[0, 0, 0].tolist() == [0.0] * 4 + [4.0] * 4 + [8.0] * 4
    assert torch.equal(thinned(frames, 9, 20), frames) and torch.equal(thinned(frames, 1, 3), frames)


def test_a_run_shows_eight_prompts_and_the_teachers_twenty_steps(
    tiny_sana: Path,
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The previews of a run as users have them, which the other tests shorten; the teacher is drawn once."""
    steps: list[int] = []
    monkeypatch.setattr(preview, "NUM_PREVIEWS", 8)
    monkeypatch.setattr(
        preview, "teacher_sampler", lambda teacher, count: steps.append(count) or teacher_sampler(teacher, count)
    )
    changes = ("training.steps=1", "training.preview_every=1", "space.route_steps=2", "training.prompts_per_step=1")
    config = load_config("default", changes, teacher__source=str(tiny_sana), prompts=str(prompts_file))
    run_distill(config, tmp_path / "run", resume=False, display=Display(), command="test")
    assert steps == [20, 1]
    found = re.findall(r"step (\d): preview written, .* against the teacher's 20: ([\d.]+)", capsys.readouterr().err)
    assert [step for step, _ in found] == ["0", "1"] and all(0 < float(error) < 10 for _, error in found)
    for path in (tmp_path / "run" / "previews").glob("*.png"):
        with Image.open(path) as grid:
            assert grid.size == (132 + 8 * 96, 5 * 96)  # teacher at 20 and 1 steps, student at 1, 2 and 4
