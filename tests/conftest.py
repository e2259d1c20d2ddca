"""Tiny saved pipelines and a file of prompts, for all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import short_ends
from forms import in_part
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))  # torch is loaded in them, not in what hands out tests
if WORKERS > 1:  # each with its share of the cores, and so the processes that its tests start
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


LONGEST = (
    "test_processes.py", "test_onnx.py", "test_families.py", "test_benchmarks.py", "test_runs.py", "test_retiming.py",
    "test_distill.py", "test_mixture.py", "test_contract.py", "test_export.py", "test_blocks.py", "test_installing.py",
    "test_support_matrix.py", "test_api.py", "test_kills.py", "test_resume.py", "test_pipelines.py",
)  # fmt: skip
"""Files of long forms, those with minutes of them first."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", help="K/N: the long forms of part K of N; continuous integration runs one at a time")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long forms are handed out file by file: the longest first, so that no worker begins one when all else is done."""
    if part := config.option.part:
        chosen = [item.get_closest_marker("long") is None or in_part(item.path.name, item.name, part) for item in items]
        left_out = [item for item, runs in zip(items, chosen, strict=True) if not runs]
        items[:] = [item for item, runs in zip(items, chosen, strict=True) if runs]
        config.hook.pytest_deselected(items=left_out)
    if config.option.markexpr == "long":
        items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """Fixtures that outlive a test draw the same numbers whichever test comes first, in whichever process."""
    if fixturedef.scope != "function":
        import torch

        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # some library sets it, and tables are folded to it
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _short_ends() -> Iterator[None]:
    """What a run ends with took two thirds of one of three steps. Tests of previews and reports call them themselves,
    and processes do all of it, unless they are forked."""
    with pytest.MonkeyPatch.context() as patch:
        short_ends(patch)
        yield


@pytest.fixture(scope="session")
def tiny_sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved SanaPipeline folder, 32 x 32 pixels, latents 4 x 8 x 8. Shared: copy it before changing anything."""
    from tiny import make_sana

    folder = tmp_path_factory.mktemp("teacher") / "tiny_sana"
    make_sana().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def first_sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as the first published ones are: its time counts to 1000, and nothing norms queries and keys."""
    from tiny import make_sana

    folder = tmp_path_factory.mktemp("teacher") / "first_sana"
    make_sana(timestep_scale=1.0, qk_norm=None).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    """A dozen prompts, one a line."""
    from tiny import PROMPTS

    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path
