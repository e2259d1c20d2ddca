"""Our consistency sampler with somebody else's student: adaptive-terrain-diffusion 0.4.1, an onnx graph of EDM's form.

Its conventions, as its wheel has them (terrain_diffusion/generator.py):

- `noisy` float32 [B, 1, 128, 128] is x_0 + sigma n with n of standard deviation 1 (EDM, variance exploding), unscaled;
  the graph scales it itself.
- `sigma` float32 [B] in [0.002, 80]; sampling starts at 80, from noise alone.
- `difficulty` float32 [B]: (label - 1) / 99 of a label of 1 to 100.
- `denoised` is x_0 in [-1, 1]: an asinh of heights, whose sigma_data is 0.5.

TrigFlow's t is atan(sigma / sigma_data), x is cos t times theirs, and F = (cos t x - denoised) / (sin t sigma_data).

STEPFOLD_TERRAIN is a folder that holds the package, such as the wheel unpacked.
"""

import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stepfold.sampling.consistency import predict_data, sample_consistency

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = 0.5, 0.002, 80.0
GRAPH = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
TIMES = {calls: [math.atan(s / SIGMA_DATA) for s in (80.0, 2.0, 0.8, 0.3)[:calls]] for calls in (1, 2, 4)}


def graph() -> Path | None:
    """The graph's file, without importing its package; None where it is not there."""
    spec = find_spec("terrain_diffusion")
    places = [os.environ.get("STEPFOLD_TERRAIN"), str(Path(spec.origin).parents[1]) if spec and spec.origin else None]
    return next((path for place in places if place and (path := Path(place) / GRAPH).is_file()), None)


pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(graph() is None, reason="adaptive-terrain-diffusion 0.4.1 is not there (STEPFOLD_TERRAIN)"),
]


@pytest.fixture(scope="module")
def denoise() -> Any:
    """(noisy, sigma, difficulty) -> denoised, their own call."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(graph()), options, providers=["CPUExecutionProvider"])

    def call(*given: Tensor) -> Tensor:
        names = ("noisy", "sigma", "difficulty")
        feeds = {name: value.numpy().astype(np.float32) for name, value in zip(names, given, strict=True)}
        return torch.from_numpy(session.run(["denoised"], feeds)[0])

    return call


def as_student(denoise: Any) -> Any:
    """Their graph as a student in TrigFlow; the difficulty takes the guidance's place."""

    def student(x_unit: Tensor, t: Tensor, condition: Any, difficulty: Tensor) -> Tensor:
        cos, sin = t.cos().view(-1, 1, 1, 1), t.sin().view(-1, 1, 1, 1)
        x = SIGMA_DATA * x_unit
        return (cos * x - denoise(x / cos, SIGMA_DATA * t.tan(), difficulty)) / (sin * SIGMA_DATA)

    return student


def noise(seed: int) -> Tensor:
    return SIGMA_DATA * torch.randn(2, 1, 128, 128, generator=torch.Generator().manual_seed(seed))


DIFFICULTY = torch.tensor([0.1, 0.9])


def test_it_is_sampled_in_one_two_and_four_calls(denoise: Any) -> None:
    """One call is the package's own; more calls give other terrain, whose difficulty raises it as much."""
    student, made = as_student(denoise), {}
    nothing: Any = None
    for calls, times in TIMES.items():
        made[calls] = sample_consistency(student, noise(0), nothing, DIFFICULTY, times, noise, SIGMA_DATA)
        assert made[calls].isfinite().all() and made[calls].abs().max() < 1.5
        easy, hard = made[calls].mean((1, 2, 3)).tolist()
        assert hard > easy + 0.2
    own = denoise(noise(0) * SIGMA_MAX / SIGMA_DATA, torch.full((2,), SIGMA_MAX), DIFFICULTY)
    torch.testing.assert_close(made[1], own, atol=1e-3, rtol=0)
    assert all((made[calls] - made[1]).abs().max() > 0.01 for calls in (2, 4))


def test_it_is_a_consistency_function(denoise: Any) -> None:
    """The identity at sigma_min, and nearly one on its own images with a little noise: its time is read rightly."""
    x0 = denoise(noise(0) * SIGMA_MAX / SIGMA_DATA, torch.full((2,), SIGMA_MAX), DIFFICULTY)
    torch.testing.assert_close(denoise(x0, torch.full((2,), SIGMA_MIN), DIFFICULTY), x0, atol=1e-3, rtol=0)
    errors = []
    for sigma in (0.02, 0.2, 2.0):
        t = torch.full((2,), math.atan(sigma / SIGMA_DATA))
        wide: Tensor = t.view(-1, 1, 1, 1)
        again: Any = (as_student(denoise), wide.cos() * x0 + wide.sin() * noise(1), t, None, DIFFICULTY, SIGMA_DATA)
        errors.append((predict_data(*again) - x0).square().mean().sqrt().item())
    assert errors[0] < errors[1] < errors[2] and errors[2] < 0.15
