"""sCM over a folder of images, through the whole command's function."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from stepfold.config import Config, load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.images.reading import open_images
from stepfold.jobs.distilling import run_distill
from stepfold.teachers.sana import SanaTeacher
from stepfold.training.runs import read_metrics

Settings = Callable[..., Config]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five plain pictures of 40 x 30 and their captions."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "images"
    path.mkdir()
    for i in range(5):
        Image.new("RGB", (40, 30), (50 * i, 10, 200 - 40 * i)).save(path / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) for i in range(5)]
    (path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return path


def over_images(settings: Settings, folder: Path, *changes: str) -> Config:
    space = ("space.kind=images", f"space.images={folder}", "space.route=logit_normal")
    return settings(*space, *changes, prompts=None)


@pytest.mark.long
def test_cached_latents_are_the_same_run(tmp_path: Path, settings: Settings, folder: Path) -> None:
    rows = {}
    for cache in ("false", "true"):
        config = over_images(settings, folder, f"space.cache_latents={cache}")
        run_distill(config, tmp_path / cache, resume=False, display=Display(quiet=True), command="")
        rows[cache] = read_metrics(tmp_path / cache)
        assert (tmp_path / cache / "latents.safetensors").exists() == (cache == "true")
    assert len(rows["true"]) == 4
    for once, cached in zip(rows["false"], rows["true"], strict=True):
        assert cached["loss"] == pytest.approx(once["loss"], rel=1e-3) and cached["grad_norm"] > 0


def test_the_latents_are_the_pictures(tmp_path: Path, settings: Settings, folder: Path, teacher: SanaTeacher) -> None:
    config = over_images(settings, folder, "space.cache_latents=true", "training.steps=1")
    run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="")
    kept, images = load_file(tmp_path / "run" / "latents.safetensors")["x0"], open_images(folder)
    for i in range(5):
        alone = teacher.encode_pictures(images.picture(i, 32, 32)[None])[0]
        torch.testing.assert_close(kept[i], alone, rtol=1e-4, atol=1e-5)
    record = json.loads((tmp_path / "run" / "prompts.json").read_text())
    assert record["count"] == 5 and record["file"] == str(folder)


def test_sana_sprint_over_images(tmp_path: Path, settings: Settings, folder: Path) -> None:
    config = over_images(settings, folder, "adversarial.weight=0.5", "training.steps=2")
    result = run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="")
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1] and all(row["discriminator_loss"] > 0 for row in rows)
    assert set(result["stages_sec"]) >= {"data", "text", "images", "teacher", "student forward", "adversarial"}


@pytest.mark.parametrize(
    "changes",
    [("space.images=somewhere",), ("space.kind=endpoints", "space.images=somewhere")],
)
def test_the_kind_and_the_folder_go_together(settings: Settings, changes: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="give both or neither"):
        settings(*changes)


def test_captions_are_the_prompts(settings: Settings) -> None:
    with pytest.raises(UserError, match="leave --prompts out"):
        settings("space.kind=images", "space.images=somewhere")


def test_a_preset_over_images_asks_for_the_folder(tmp_path: Path) -> None:
    for preset in ("scm", "sana-sprint"):
        with pytest.raises(UserError, match=r"needs a folder of images; add --set space.images=FOLDER"):
            run_distill(load_config(preset), tmp_path / "run", resume=False, display=Display(quiet=True), command="")
    assert not (tmp_path / "run").exists()


def test_a_run_knows_its_pictures(tmp_path: Path, settings: Settings, folder: Path) -> None:
    """Another picture under the same name and caption went unseen."""
    config = over_images(settings, folder, "training.steps=1")
    run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="")
    (folder / "1.png").touch()
    run_distill(config, tmp_path / "run", resume=True, display=Display(quiet=True), command="")
    size = (folder / "1.png").stat().st_size
    Image.new("RGB", (40, 30), (50, 10, 161)).save(folder / "1.png")
    assert (folder / "1.png").stat().st_size == size
    with pytest.raises(UserError, match=r"the content of .*images \(images\) has changed since this run began"):
        run_distill(config, tmp_path / "run", resume=True, display=Display(quiet=True), command="")
