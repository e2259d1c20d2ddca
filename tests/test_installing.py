"""The wheel that is built from the sdist, installed apart from the repository, does the main job by itself."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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


def optional_parts(page: str) -> list[tuple[str, ...]]:
    """The rows of a page's table of extras."""
    table = (REPOSITORY / page).read_text().split("| extra | adds | packages |\n|---|---|---|\n")[1].split("\n\n")[0]
    return [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in table.splitlines()]


def test_the_tables_of_optional_parts_are_those_of_the_package() -> None:
    """README and the first page of the documentation have one table: each extra, and the packages that it installs."""
    rows = optional_parts("README.md")
    assert rows == optional_parts("docs/index.md")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = {
        name: sorted(Requirement(each).name for each in needs if not each.startswith("stepfold["))
        for name, needs in project["optional-dependencies"].items()
    }
    told = {name: packages for names, _, packages in rows for name in re.findall(r"`(\w+)`", names)}
    assert list(told) == list(dict.fromkeys(told)) and told.keys() == extras.keys()
    assert {name: ", ".join(extras[name] or extras["fid"]) for name, said in told.items() if said} == {
        name: said for name, said in told.items() if said
    }
    assert {name for name, said in told.items() if not said} == {"docs", "audit", "fuzz", "dev"}


def test_the_version_is_said_once_everywhere() -> None:
    said = {
        "README.md": r"stepfold is at version (\S+), an",
        "CITATION.cff": r"^version: (\S+)$",
        "CHANGELOG.md": r"^## \[(\d\S*)\] - ",
    }
    for page, where in said.items():
        assert re.findall(where, (REPOSITORY / page).read_text(), re.MULTILINE)[0] == __version__, page
    date = re.findall(r"^date-released: (\S+)$", (REPOSITORY / "CITATION.cff").read_text(), re.MULTILINE)
    assert f"## [{__version__}] - {date[0]}" in (REPOSITORY / "CHANGELOG.md").read_text()


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
    assert all((unpacked / name).exists() for name in ("LICENSE", "Makefile", "CITATION.cff"))


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
