import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from stepfold.errors import UserError
from stepfold.images.reading import open_images


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make(folder: Path, rows: list[dict[str, str]]) -> Path:
    folder.mkdir()
    for i, row in enumerate(rows):
        colour = (255, 0, 0) if i == 0 else (0, 0, 255)
        Image.new("RGB", (40 + 20 * i, 40), colour).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


ROWS = [{"file_name": "a.png", "text": "red"}, {"file_name": "b.png", "text": "blue"}]


def test_pictures_go_with_their_captions(tmp_path: Path):
    images = open_images(make(tmp_path / "set", ROWS))
    assert len(images) == 2
    by_caption = {images.prompt(i): images.picture(i, 32, 64) for i in range(2)}
    assert by_caption["red"].shape == (3, 32, 64) and by_caption["red"].dtype == torch.float32
    for caption, colour in (("red", [1, 0, 0]), ("blue", [0, 0, 1])):
        assert torch.equal(by_caption[caption].mean((1, 2)), torch.tensor(colour).float())


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"file_name": "a.png"}], "every line needs a `text`"),
        ([{"file_name": "a.png", "text": ""}], "every line needs a `text`"),
    ],
)
def test_rows_without_captions_are_refused(tmp_path: Path, rows: list[dict[str, str]], said: str):
    with pytest.raises(UserError, match=said):
        open_images(make(tmp_path / "set", rows))


def test_what_is_no_image_folder_is_named(tmp_path: Path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match=r"metadata.jsonl"):
            open_images(path)
    folder = make(tmp_path / "set", ROWS)
    (folder / "metadata.jsonl").write_text("{{{\n")
    with pytest.raises(UserError, match="not readable as an image folder"):
        open_images(folder)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_broken_picture_is_named(tmp_path: Path, damage: str):
    folder = make(tmp_path / "set", ROWS)
    images = open_images(folder)
    broken = next(i for i in range(2) if images.prompt(i) == "red")
    if damage == "cut":
        (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:60])
    else:
        (folder / "a.png").unlink()
    with pytest.raises(UserError, match=f"picture {broken} cannot be read"):
        images.picture(broken, 32, 32)


def test_the_library_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make(tmp_path / "set", ROWS)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install datasets"):
        open_images(folder)
