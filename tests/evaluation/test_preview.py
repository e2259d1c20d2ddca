"""Preview grids."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFont

from stepfold.config import load_config
from stepfold.display import Display
from stepfold.evaluation import preview
from stepfold.evaluation.measure import teacher_sampler
from stepfold.evaluation.preview import cell_height, errors_over_steps, notes_of, save_grid, thinned, wrapped
from stepfold.jobs.distilling import run_distill


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
    assert [step for step, _ in found] == ["0", "1"]
    for path in (tmp_path / "run" / "previews").glob("*.png"):
        with Image.open(path) as grid:
            wide = 132 + 8 * 128  # a cell of four times the picture's own 32 pixels
            rows = 5 * 128  # teacher at 20 and 1 steps, student at 1, 2 and 4
            assert grid.width == wide and rows < grid.height <= rows + 8 + 3 * 18  # below up to three lines of prompt
        notes = notes_of(path)
        assert len(notes["prompts"]) == 8 and set(notes["latent_error"]) == {"1", "2", "4"}
    points = errors_over_steps(tmp_path / "run")
    assert [step for step, _ in points] == [0, 1] and all(0 < error < 10 for _, error in points)
    assert [f"{error:.3f}" for _, error in points] == [error for _, error in found]  # said as it is kept
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["curves"]["latent_error"] == points


def test_what_a_picture_says_of_itself_is_read_or_left(tmp_path: Path) -> None:
    save_grid(
        {"a": torch.zeros(1, 3, 8, 8)}, tmp_path / "previews" / "step_000003.png", notes={"latent_error": {"1": 2}}
    )
    assert errors_over_steps(tmp_path) == [[3, 2.0]]
    (tmp_path / "previews" / "step_000004.png").write_text("no picture")
    save_grid({"a": torch.zeros(1, 3, 8, 8)}, tmp_path / "previews" / "step_000005.png")
    save_grid({"a": torch.zeros(1, 3, 8, 8)}, tmp_path / "previews" / "step_000006.png", notes={"latent_error": "x"})
    assert errors_over_steps(tmp_path) == [[3, 2.0]]


def test_prompts_fit_above_their_columns() -> None:
    assert wrapped("red heart", 200, 13, 3) == ["red heart"]
    lines = wrapped("a very long prompt about a horse that rides on an astronaut through the evening", 118, 13, 3)
    assert len(lines) == 3 and lines[-1].endswith("…") and lines[0].startswith("a very")
    assert all(ImageFont.load_default(13).getlength(line) <= 118 for line in lines)
    (line,) = wrapped("x" * 100, 118, 13, 3)
    assert line.endswith("…") and len(line) < 30
    assert wrapped("", 118, 13, 3) == []


def test_small_pictures_are_shown_large_enough_and_large_ones_small() -> None:
    assert [cell_height(height) for height in (32, 64, 100, 256, 1024)] == [128, 128, 192, 192, 192]
