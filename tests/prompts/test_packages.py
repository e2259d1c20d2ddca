"""Prompts that people have: those of VBench, and the phrases of clip-interrogator, from their packages.

They are fetched as a user would, with pip, and skipped where it finds none. Neither package is installed or run.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stepfold.cli import app
from stepfold.prompts.reading import open_prompts

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=["vbench==0.1.5", "clip-interrogator==0.6.0"])
def unpacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    fetched = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, request.param],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if fetched.returncode:
        pytest.skip(f"pip found no {request.param}: {fetched.stderr[-200:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def prompts(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["prompts", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_prompts_of_packages_are_described_cleaned_and_split(unpacked: Path, tmp_path: Path) -> None:
    """Each difference between a file and its clean form is one that `stats` counts."""
    if (file := unpacked / "vbench" / "VBench_full_info.json").is_file():
        total, different, blank = 946, 944, 0
    else:
        file, total, different, blank = unpacked / "clip_interrogator" / "data" / "flavors.txt", 100_969, 100_953, 1
    said = prompts("stats", file)
    for name, count in (("prompts", total), ("different", different), ("blank", blank)):
        assert f"{name} {count:,}" in " ".join(said.split()), said
    prompts("clean", file, "--out", tmp_path / "clean.txt")
    clean = open_prompts(tmp_path / "clean.txt")
    assert len(clean) == different == len({clean.prompt(i) for i in range(len(clean))})
    prompts("split", tmp_path / "clean.txt", "--test", "0.25", "--out", tmp_path / "split")
    parts = [open_prompts(tmp_path / "split" / name) for name in ("train.txt", "test.txt")]
    train, test = ({part.prompt(i) for i in range(len(part))} for part in parts)
    assert not train & test and len(train) + len(test) == different
