"""Prompts, names and commands that look like code: they stay text, in file names, in the shell and in a browser."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from browser import find_browser
from PIL import Image

from stepfold.config import load_config
from stepfold.display import Display
from stepfold.evaluation.report import write_report
from stepfold.jobs.distilling import run_distill

HOSTILE = (
    "<script>document.title='OWNED'</script>",
    "<img src=x onerror=\"document.title='OWNED'\">",
    "'\"><svg onload=document.title='OWNED'>",
    "</title></style><script>document.title='OWNED'</script>",
    "{{ 7 * 191 }}{% for x in y %}",
    "../../../escaped",
    "$(touch RAN); `touch RAN`; | touch RAN",
    "CON / a\\b : * ? | ..",
)


def dom(page: Path, profile: Path) -> str:
    """The page's DOM after its scripts have run, in a real browser."""
    chromium = find_browser()
    if chromium is None:
        pytest.skip("there is no chromium")
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=2000",
    )
    done = subprocess.run(
        [chromium, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "<html" in done.stdout, done.stderr[-500:]
    return done.stdout


@pytest.mark.long
def test_a_report_of_hostile_words_shows_them_as_text(tmp_path: Path) -> None:
    """Also that the browser would run a script: the same words unescaped change the title."""
    bare = tmp_path / "bare.html"
    bare.write_text(f"<html><title>fine</title><body>{HOSTILE[0]}</body></html>")
    assert "<title>OWNED</title>" in dom(bare, tmp_path / "profile")

    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "grid.png")
    words = "\n".join(HOSTILE)
    report = {
        "title": words,
        "command": words,
        "config": {key: key for key in HOSTILE},
        "protocol": {"hash": words, "n": 2},
        "versions": {words: words},
        "stages_sec": dict.fromkeys(HOSTILE, 1.0),
        "curves": {key: [[0, 1.0], [1, 2.0]] for key in HOSTILE},
        "images": dict.fromkeys(HOSTILE, "grid.png"),
        "prompts": {"file": words},
    }
    page = dom(write_report(tmp_path, report)[1], tmp_path / "profile")
    assert "<title>OWNED" not in page
    assert page.count("&lt;script&gt;document.title='OWNED'&lt;/script&gt;") >= 7
    assert "<script>document" not in page and '<img src="x"' not in page and "<svg onload" not in page
    assert "1337" not in page and "{{ 7 * 191 }}" in page  # not taken for a template


def test_a_run_on_hostile_prompts(tiny_sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No prompt becomes part of a file's name, nothing is run, and the report shows as text whatever it quotes."""
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "<script>document.title='OWNED'<" / "x.txt"
    prompts.parent.mkdir()
    prompts.write_text("\n".join(HOSTILE) + "\n")
    config = load_config(
        "default",
        [
            "training.steps=2", "training.preview_every=1", "training.prompts_per_step=4", "training.precision=no",
            "training.walk_precision=no", "space.route_steps=3", "space.filter_rule=off", "teacher.max_tokens=32",
            "optimiser.name=adamw", "evaluation.n=0",
        ],
        teacher__source=str(tiny_sana),
        prompts=str(prompts),
    )  # fmt: skip
    out = tmp_path / "runs" / "<b onclick=alert(1)>"
    run_distill(config, out, resume=False, display=Display(quiet=True), command="stepfold " + HOSTILE[0])
    names = [str(path.relative_to(out)) for path in out.rglob("*")]
    assert len(names) > 20
    for word in ("OWNED", "escaped", "touch", "CON", "script", "7 * 191"):
        assert not [name for name in names if word in name], word
    assert sorted(path.name for path in tmp_path.iterdir()) == [prompts.parent.name, "runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [out.name]
    card = json.loads((out / "student" / "stepfold.json").read_text())
    assert HOSTILE[0] in card["example"]  # the words themselves are kept
    page = dom(out / "report.html", tmp_path / "profile")
    assert "<title>OWNED" not in page and "<script>document" not in page and "<b onclick" not in page
    assert "&lt;script&gt;document.title" in page
