"""The wheel that is built from the sdist, installed apart from the repository, does the main job by itself."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from stepfold import __version__

REPOSITORY = Path(__file__).parents[1]
MADE_HERE = ("__pycache__", ".ruff_cache", ".hypothesis")


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_in(folder: Path) -> set[str]:
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {path.as_posix() for path in paths if not set(path.parts) & set(MADE_HERE)}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist's content."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=REPOSITORY)
    with tarfile.open(folder / f"stepfold-{__version__}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"stepfold-{__version__}"


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=unpacked)
    return folder / f"stepfold-{__version__}-py3-none-any.whl"


def test_sdist_and_wheel_hold_every_file_of_the_package(unpacked: Path, wheel: Path) -> None:
    expected = files_in(REPOSITORY / "src" / "stepfold")
    assert any(name.endswith(".safetensors") for name in expected)
    assert files_in(unpacked / "src" / "stepfold") == expected
    with zipfile.ZipFile(wheel) as archive:
        packed = {name.removeprefix("stepfold/") for name in archive.namelist() if name.startswith("stepfold/")}
    assert packed == expected
    assert (unpacked / "LICENSE").exists() and (unpacked / "Makefile").exists()


@pytest.mark.long
def test_installed_wheel_distils_and_samples(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel, cwd=work)
    stepfold, env = site / "bin" / "stepfold", {"PYTHONPATH": str(site)}
    where = run(sys.executable, "-c", "import stepfold; print(stepfold.__file__)", cwd=work, **env)
    assert Path(where.strip()) == site / "stepfold" / "__init__.py"
    steps = ("training.steps=2", "training.prompts_per_step=1", "space.route_steps=4", "evaluation.n=8")
    settings = [part for change in steps for part in ("--set", change)]
    run(stepfold, "distill", "--preset", "demo", *settings, "--out", "run", "--quiet", cwd=work, **env)
    assert (work / "run" / "report.html").exists()
    run(stepfold, "sample", "run/student", "red heart", "--out", "heart.png", cwd=work, **env)
    assert (work / "heart.png").stat().st_size > 100
