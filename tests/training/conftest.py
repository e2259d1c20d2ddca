"""The tiny teacher in process, and settings under which a few steps of it take a second."""

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from stepfold.config import Config, TeacherSettings, load_config
from stepfold.teachers.loading import load_teacher
from stepfold.teachers.sana import SanaTeacher

FAST = (
    "training.precision=no",
    "training.walk_precision=no",
    "training.steps=4",
    "training.prompts_per_step=2",
    "training.checkpoint_every=2",
    "training.preview_every=1000",
    "space.route_steps=4",
    "space.filter_rule=off",
    "teacher.max_tokens=32",
    "optimiser.name=adamw",
    "optimiser.lr=1e-3",
    "objective=continuous",
    "consistency.r_warmup=0",
    "evaluation.n=0",
)


@pytest.fixture(scope="session")
def teacher(tiny_sana: Path) -> SanaTeacher:
    return load_teacher(TeacherSettings(source=str(tiny_sana), max_tokens=32), "cpu")


@pytest.fixture
def settings(tiny_sana: Path, prompts_file: Path) -> Callable[..., Config]:
    """`settings("training.steps=9")`: the fast settings, changed."""

    def make(*changes: str, prompts: str | None = str(prompts_file)) -> Config:
        return load_config("default", [*FAST, *changes], teacher__source=str(tiny_sana), prompts=prompts)

    return make


@contextmanager
def no_file_longer_than(num_bytes: int) -> Iterator[None]:
    """A real write error, from the kernel, as a full disk gives one: EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def full_disk() -> Callable[[int], object]:
    """`with full_disk(20_000):` no file may grow beyond that many bytes."""
    return no_file_longer_than


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder."""
    from safetensors.torch import load_file

    return {
        f"{file.stem}.{name}": value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.fixture
def tensors() -> Callable[[Path], dict[str, torch.Tensor]]:
    return state_of


@pytest.fixture
def leftovers() -> Callable[[Path], list[str]]:
    """Names of half-written files and folders below a folder."""

    def find(folder: Path) -> list[str]:
        return [name for _, folders, files in os.walk(folder) for name in (*folders, *files) if name.endswith(".part")]

    return find
