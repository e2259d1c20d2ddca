"""The example of somebody else's score network, on a made-up file of the same layout: the package is not needed."""

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inside import example
from torch import Tensor

from stepfold.errors import UserError
from stepfold.teachers.contract import Condition
from stepfold.teachers.module import ModuleTeacher

SIZE = 8
PATCHES = 4


@pytest.fixture(scope="module")
def galaxies() -> Any:
    return example("galaxies")


def layout() -> list[tuple[int, ...]]:
    mlps = [
        shape for width in (PATCHES, 64) for shape in ((512, width), (512,), (width, 512), (width,))
    ]  # fmt: skip
    norms = [(64, PATCHES)] * 2 + [(PATCHES, 64)] * 2
    return [(64, 2, 4, 4), (64, 1, 1), (1, 64, 4, 4), (1, 1, 1), *([*mlps, *norms] * 4), (64, PATCHES), (64, PATCHES)]


def arrays() -> list[np.ndarray]:
    draws = np.random.default_rng(0)
    return [(draws.standard_normal(shape) / 8).astype(np.float32) for shape in layout()] + [np.array(10.0)]


def file_of(some: list[np.ndarray]) -> bytes:
    file = io.BytesIO()
    for array in some:
        np.save(file, array)
    return file.getvalue()


def by_hand(some: list[np.ndarray], image: np.ndarray, t: float) -> np.ndarray:
    """The mixer in numpy: patches, blocks, and each output pixel as a sum over the dilated input."""
    left = iter(some)

    def norm(y: np.ndarray) -> np.ndarray:
        return (y - y.mean()) / np.sqrt(y.var() + 1e-5)

    def linear(y: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return y @ weight.T + bias

    kernel, bias, out_kernel, out_bias = (next(left) for _ in range(4))
    both = np.stack([image, np.full_like(image, t / 10)])
    y = np.zeros((64, PATCHES))
    for i in range(PATCHES):
        row, column = 4 * (i // 2), 4 * (i % 2)
        y[:, i] = np.einsum("ocij,cij->o", kernel, both[:, row : row + 4, column : column + 4]) + bias[:, 0, 0]
    for _ in range(4):
        p1, pb1, p2, pb2, c1, cb1, c2, cb2, w1, b1, w2, b2 = (next(left) for _ in range(12))
        y = y + linear(np.maximum(linear(norm(y) * w1 + b1, p1, pb1), 0), p2, pb2)
        y = (y.T + linear(np.maximum(linear(norm(y.T) * w2 + b2, c1, cb1), 0), c2, cb2)).T
    y = norm(y) * next(left) + next(left)
    dilated = np.zeros((64, SIZE + 6, SIZE + 6))
    dilated[:, 3 : SIZE + 3 : 4, 3 : SIZE + 3 : 4] = y.reshape(64, 2, 2)
    out = np.zeros((SIZE, SIZE))
    for row in range(SIZE):
        for column in range(SIZE):
            out[row, column] = (out_kernel[0] * dilated[:, row : row + 4, column : column + 4]).sum()
    return out + out_bias[0]


def test_the_mixer_is_the_one_of_the_file(galaxies: Any) -> None:
    some = arrays()
    mixer = galaxies.load_mixer(file_of(some), SIZE).double()
    images = torch.randn(2, 1, SIZE, SIZE, dtype=torch.float64)
    ours = mixer(images, torch.tensor([0.5, 7.0], dtype=torch.float64))
    for image, t, found in zip(images, (0.5, 7.0), ours, strict=True):
        np.testing.assert_allclose(found[0].detach().numpy(), by_hand(some, image[0].numpy(), t), atol=1e-10)


def test_files_that_are_not_it_are_refused_in_a_line(galaxies: Any) -> None:
    some, pickled = arrays(), io.BytesIO()
    np.save(pickled, np.array([print], dtype=object), allow_pickle=True)
    for data, said in (
        (file_of(some)[:-40], r"array 55 of the file is none \("),
        (file_of(some[:3]) + pickled.getvalue(), r"array 4 of the file is none \(Object arrays cannot be loaded"),
        (file_of(some[:-2]), r"the file has 53 arrays, and a mixer 54 and its last time"),
        (file_of([*some[:-1], np.array(1.0)]), r"the file has 55 arrays, and a mixer 54 and its last time"),
    ):
        with pytest.raises(UserError, match=said) as refused:
            galaxies.load_mixer(data, SIZE)
        assert "\n" not in str(refused.value)
    with pytest.raises(
        UserError, match=r"patches\.0\.weight should have shape \(512, 16\), but the file has \(512, 4\)"
    ):
        galaxies.load_mixer(file_of(some), 2 * SIZE)


def test_its_teacher_is_that_of_the_denoiser_that_its_score_makes(galaxies: Any, wheel: Path) -> None:
    """As EDM: D = x + sigma^2 / sqrt(1 + sigma^2) score(x / sqrt(1 + sigma^2), log(1 + sigma^2))."""
    teacher = galaxies.teacher_of(wheel, "HSC32")
    mixer, std = teacher.network.double(), 0.82

    def denoiser(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        sigma = sigma[:, None, None, None]
        root = torch.sqrt(1 + sigma**2)
        return x + sigma**2 / root * mixer(x / root, torch.log1p(sigma[:, 0, 0, 0] ** 2))

    edm = ModuleTeacher(
        torch.nn.Identity(), lambda prompts: Condition.whole(torch.ones(len(prompts), 1, 1)), (1, SIZE, SIZE), "edm",
        sigma_max=148.0, data_std=std,
    )  # fmt: skip
    edm._network = denoiser  # type: ignore[assignment]
    t = torch.tensor([0.1, 0.7, 1.2, 1.5, 1.564], dtype=torch.float64)
    x = 0.5 * torch.randn(5, 1, SIZE, SIZE, dtype=torch.float64)
    condition = Condition.whole(torch.ones(5, 1, 1))
    with torch.no_grad():
        torch.testing.assert_close(
            teacher.velocity(x, t, condition, None), edm.velocity(x, t, condition, None), rtol=0, atol=1e-9
        )
    assert math.tan(teacher.start_time) * std == pytest.approx(148.4, abs=0.1)


def test_the_students_network_begins_as_the_score_of_a_gaussian(galaxies: Any) -> None:
    """Of N(0, std^2), whose denoiser is c_skip x; what its net says is then added c_out times."""
    std, t = 0.82, torch.tensor([1e-3, 0.4, 3.0, 9.9], dtype=torch.float64)
    network = galaxies.Denoiser(galaxies.load_mixer(file_of(arrays()), SIZE), std).double()
    x = torch.randn(4, 1, SIZE, SIZE, dtype=torch.float64)
    alpha2 = torch.exp(-t)[:, None, None, None]
    torch.testing.assert_close(network(x, t), -x / (alpha2 * std**2 + 1 - alpha2), rtol=1e-9, atol=0)
    torch.nn.init.ones_(network.net.last.bias)  # which adds c_out to the denoiser
    alpha, sigma = alpha2.sqrt(), (1 - alpha2).sqrt()
    with torch.no_grad():
        data = (x + sigma**2 * network(x, t)) / alpha
    level = sigma / alpha
    added = data - std**2 / (level**2 + std**2) * x / alpha
    torch.testing.assert_close(added, (level * std / (level**2 + std**2).sqrt()).expand_as(added), rtol=1e-6, atol=1e-9)


@pytest.fixture
def wheel(galaxies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "galaxygrad-0.2.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("galaxygrad/made_up.eqx", file_of(arrays()))
    monkeypatch.setitem(galaxies.NETWORKS, "HSC32", ("made_up.eqx", SIZE, 0.82))
    return path


@pytest.mark.long
@pytest.mark.parametrize("method", ["matching", "discrete"])
def test_the_example_runs_and_tells_its_numbers(
    method: str,
    galaxies: Any,
    wheel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(galaxies, "REFERENCE_STEPS", 3)
    out = tmp_path / "out"
    options = ["--method", method, "--minutes", "0", "--samples", "40", "--wheel", str(wheel), "--out", str(out)]
    rows = galaxies.main(options)
    said = capsys.readouterr().out.splitlines()
    assert "states no licence" in said[0]
    assert [name.split(",")[0] for name in rows] == ["teacher", "the same", *["teacher"] * 4, *["student"] * 3]
    assert all(samples.shape == (40, 1, SIZE, SIZE) and samples.isfinite().all() for samples in rows.values())
    assert len([line for line in said if line.count("|") == 6]) == 2 + len(rows)
    assert (out / "galaxies.png").is_file() and (out / "stage1" / "student.safetensors").is_file()


def test_distances_and_shapes_are_those_of_known_images(galaxies: Any) -> None:
    reference = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    distance = galaxies.Distance(reference)
    along = distance.axes[:, 0].reshape(1, 1, 8, 8).float()
    assert distance(reference) == pytest.approx(0, abs=1e-8)
    assert distance(reference + 3 * along) == pytest.approx(9, rel=1e-5)
    place = torch.arange(33) - 16.0
    wide, high, std = 3.0, 2.0, 0.5
    flux = 0.7 * torch.exp(-((place[None] - 1) ** 2) / (2 * wide**2) - place[:, None] ** 2 / (2 * high**2))
    found = galaxies.shapes((torch.log1p(flux) / (0.1 * std))[None, None], std)
    xx, yy = (1 / (1 / each**2 + 1 / (33 / 5) ** 2) for each in (wide, high))
    assert found["flux"][0] == pytest.approx(0.7 * 2 * math.pi * wide * high, rel=1e-3)
    assert found["size"][0] == pytest.approx(math.sqrt((xx + yy) / 2), rel=1e-3)
    assert found["ellipticity"][0] == pytest.approx((xx - yy) / (xx + yy), rel=1e-3)
