"""Run folders that real runs left, and a student of the tiny teacher."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from stepfold.config import load_config
from stepfold.display import Display
from stepfold.jobs.distilling import run_distill

CHANGES = (
    "training.steps=3", "training.preview_every=1", "training.precision=no", "training.walk_precision=no",
    "space.route_steps=2", "teacher.max_tokens=32", "evaluation.n=0",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a browser is for `make test-long`."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def runs(tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs of three steps, `first` and `deeper/second`, and beside them what is broken or not ours."""
    root = tmp_path_factory.mktemp("web") / "runs"
    root.mkdir()
    prompts = root / "prompts.txt"
    prompts.write_text("red heart\na cat\nrocket\n")
    for name, seed in (("first", 0), ("deeper/second", 7)):
        changes = [*CHANGES, f"seed={seed}"]
        config = load_config("default", changes, teacher__source=str(tiny_sana), prompts=str(prompts))
        (root / name).parent.mkdir(exist_ok=True)
        run_distill(config, root / name, resume=False, display=Display(quiet=True), command="stepfold distill")
    broken = root / "broken"
    (broken / "previews").mkdir(parents=True)
    (broken / "config.yaml").write_text("{: nonsense\n")
    (broken / "metrics.jsonl").write_text('3\n{"step": 0, "loss": 0.5}\n{"step": "x"}\n{"loss": 1}\n{"step": 1, "lo')
    (broken / "previews" / "step_000001.png").write_text("no picture")
    (broken / "previews" / "step_x.png").write_text("")
    (broken / "report.html").write_text("<script>document.title = 'taken over'</script><h1>hello</h1>")
    (broken / "report.json").write_text("[1]")
    binary = root / "binary"
    binary.mkdir()
    (binary / "config.yaml").write_bytes(b"\xff\xfe\0")
    (binary / "metrics.jsonl").write_bytes(b"\xff\xfe\0")
    for folder in (broken, binary):
        os.utime(folder / "metrics.jsonl", (0, 0))
    (root / "foreign").mkdir()
    (root / "foreign" / "holiday.txt").write_text("nothing of ours")
    secret = root.parent / "secret"
    shutil.copytree(root / "first", secret)
    (root / "link").symlink_to(secret, target_is_directory=True)
    leak = root / "leak"
    leak.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "report.html"):
        (leak / name).symlink_to(secret / name)
    return root


@pytest.fixture(scope="session")
def tiny_student(runs: Path) -> Path:
    """A student folder of a whole pipeline."""
    return runs / "first" / "student"


@pytest.fixture
def no_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where gradio is not installed."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "stepfold.web.page", raising=False)
