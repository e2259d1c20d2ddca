"""MJHQ-30k's path: its layout, FID against scipy on features of our own, a tiny CLIP of the real class."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from clips import WORDS
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from stepfold.errors import UserError
from stepfold.evaluation import mjhq
from stepfold.evaluation.mjhq import MjhqProtocol, draw_all, inception_features, load_clip, measure, open_mjhq
from stepfold.evaluation.pipelines import Drawer
from stepfold.teachers.loading import load_any_pipeline

NUM = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty pictures in MJHQ-30k's layout."""
    rng, rows = np.random.default_rng(0), {}
    for i in range(NUM):
        category = ("animals", "art")[i % 2]
        path = tmp_path / "mjhq" / "mjhq30k_imgs" / category / f"id{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
        rows[f"id{i}"] = {"category": category, "prompt": f"a {WORDS[1 + i % 5]}"}
    (tmp_path / "mjhq" / "meta_data.json").write_text(json.dumps(rows))
    return tmp_path / "mjhq"


def local_features(largest: list[int] | None = None) -> Callable[[Tensor], Tensor]:
    """Six numbers a picture, made here; notes how many came at once."""
    weights = torch.randn(3 * 4, 6, generator=torch.Generator().manual_seed(0)).double()

    def features(pictures: Tensor) -> Tensor:
        assert pictures.dtype == torch.uint8
        if largest is not None:
            largest.append(len(pictures))
        small = torch.nn.functional.adaptive_avg_pool2d(pictures.double() / 255, 2)
        return small.flatten(1) @ weights

    return features


def test_fid_is_scipys_and_memory_does_not_grow(folder: Path, tmp_path: Path, clip: Path) -> None:
    data, seen, rng = open_mjhq(folder, NUM), [], np.random.default_rng(1)
    features = local_features(seen)
    fakes = []
    for i, key in enumerate(data.keys):
        path = tmp_path / f"{key}.png"
        Image.fromarray(rng.integers(0, 6 * i + 1, (20, 28, 3), dtype=np.uint8)).save(path)
        fakes.append(path)
    reals = mjhq.real_moments(data, features, tmp_path / "reals.safetensors", lambda count: None)
    scores = measure(fakes, data, reals, features, load_clip(str(clip), "cpu"), lambda count: None)

    def statistics(paths: list[Path]) -> tuple[Any, Any]:
        pictures = [torch.from_numpy(np.array(Image.open(p).convert("RGB"))).permute(2, 0, 1)[None] for p in paths]
        rows = torch.cat([local_features()(picture) for picture in pictures]).numpy()
        return rows.mean(0), np.cov(rows, rowvar=False)

    (a, cov_a), (b, cov_b) = statistics(fakes), statistics(data.paths)
    root = np.asarray(scipy.linalg.sqrtm(cov_a @ cov_b)).real
    by_scipy = ((a - b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert scores["fid"] == pytest.approx(by_scipy, rel=1e-4)
    assert scores["n"] == NUM and 0 <= scores["clip_score"] <= 100
    assert max(seen) == mjhq.BATCH < NUM
    again = mjhq.real_moments(data, lambda pictures: pytest.fail("drawn twice"), tmp_path / "reals.safetensors", print)
    assert again.count == NUM and torch.equal(again.mean, reals.mean)


def test_the_clip_score_is_each_pictures_own(folder: Path, clip: Path) -> None:
    data, scorer = open_mjhq(folder, 4), load_clip(str(clip), "cpu")
    scorer.model.text_projection.weight.data.neg_()  # else every cosine is negative, and so 0
    pictures = [mjhq.read(path) for path in data.paths]
    together = scorer.score(pictures, data.prompts)
    alone = torch.cat([scorer.score([p], [t]) for p, t in zip(pictures, data.prompts, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    assert (together > 1).sum() >= 2
    assert not torch.allclose(together, scorer.score(pictures, data.prompts[::-1]), atol=1e-3)


def test_pictures_are_drawn_once(folder: Path, tiny_sana: Path, tmp_path: Path) -> None:
    data, pipe = open_mjhq(folder, 3), Drawer(load_any_pipeline(tiny_sana, "cpu"))
    paths = draw_all(pipe, data, tmp_path / "out", 1, None, 0, lambda count: None)
    before = {path: path.read_bytes() for path in paths}
    paths[1].unlink()
    times = {path: path.stat().st_mtime_ns for path in (paths[0], paths[2])}
    ticks: list[int] = []
    assert draw_all(pipe, data, tmp_path / "out", 1, None, 0, ticks.append) == paths
    assert {path: path.stat().st_mtime_ns for path in times} == times and sum(ticks) == 3
    once = np.array(Image.open(io.BytesIO(before[paths[1]])), dtype=int)
    assert abs(once - np.array(Image.open(paths[1]), dtype=int)).max() <= 1  # it was alone in its batch this time


def test_what_is_missing_is_named_with_its_place(folder: Path, tmp_path: Path, clip: Path) -> None:
    with pytest.raises(UserError, match=r"meta_data.json is missing; put MJHQ-30k's .*mjhq30k_imgs/CATEGORY/ID.jpg"):
        open_mjhq(tmp_path, 4)
    with pytest.raises(UserError, match="has 40 prompts, fewer than n = 41"):
        open_mjhq(folder, 41)
    (folder / "mjhq30k_imgs" / "art" / "id3.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 5 real pictures are missing, first .*id3.jpg"):
        open_mjhq(folder, 5)
    assert len(open_mjhq(folder, 3).paths) == 3
    (folder / "meta_data.json").write_text("[]")
    with pytest.raises(UserError, match="give MJHQ-30k's own"):
        open_mjhq(folder, 1)
    with pytest.raises(UserError, match=r"inception.safetensors is missing; .*weights-inception-2015-12-05"):
        inception_features(tmp_path / "inception.safetensors", "cpu")
    (tmp_path / "weights.pth").write_bytes(b"pickle")
    with pytest.raises(UserError, match="no safetensors file"):
        inception_features(tmp_path / "weights.pth", "cpu")
    with pytest.raises(UserError, match="does not load"):
        load_clip(str(tmp_path), "cpu")


def test_without_torch_fidelity_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    save_file({"w": torch.zeros(1)}, tmp_path / "inception.safetensors")
    with pytest.raises(UserError, match=r"pip install torch-fidelity"):
        inception_features(tmp_path / "inception.safetensors", "cpu")


def test_the_hash_changes_with_what_matters() -> None:
    fields: dict[str, Any] = dict(n=30_000, seed=0, images_sha256="a", inception_sha256="b", clip="c")
    protocol = MjhqProtocol(**fields)
    others = [MjhqProtocol(**fields | {name: "other"}) for name in fields]
    assert len({p.hash() for p in (protocol, *others)}) == 1 + len(fields)
    assert protocol.hash() == MjhqProtocol(**fields).hash()
