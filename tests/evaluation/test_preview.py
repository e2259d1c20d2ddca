"""Preview grids."""

from pathlib import Path

import torch
from PIL import Image

from stepfold.evaluation.preview import save_grid, thinned


def test_pictures_keep_their_proportions(tmp_path: Path) -> None:
    save_grid({"wide": torch.zeros(3, 3, 10, 25), "too": torch.ones(3, 3, 10, 25)}, tmp_path / "grid.png", cell=20)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.height == 40 and (grid.width - 3 * 50) == 132  # the names' column


def test_a_thinned_filmstrip_has_its_first_and_last_frame() -> None:
    frames = torch.arange(9.0).repeat_interleave(4).expand(2, 3, 5, 36)
    assert thinned(frames, 9, 3)[0, 0, 0].tolist() == [0.0] * 4 + [4.0] * 4 + [8.0] * 4
    assert torch.equal(thinned(frames, 9, 20), frames) and torch.equal(thinned(frames, 1, 3), frames)
