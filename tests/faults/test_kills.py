"""The short form of `benchmarks/kills.py`: a few kills at random moments, and SIGTERM."""

import json
from pathlib import Path

import pytest
from forked import Forked

KILLS = Path(__file__).parents[2] / "benchmarks" / "kills.py"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_what_is_killed_and_resumed_ends_as_what_was_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "kills.json"
    options = ["--kills", "4", "--only", "distill", "encode", "SIGTERM", "--out", str(out)]
    code, words = Forked(options, tmp_path / "log", program=[str(KILLS)]).finish(800)
    assert code == 0, words[-3000:]
    result = json.loads(out.read_text())
    for kind, kills in (("distill", 4), ("encode", 2)):
        assert result[kind]["kills"] >= kills and result[kind]["differences"] == []
    assert result["distill"]["steps lost"]["max"] <= result["distill"]["checkpoint every"]
    assert result["SIGTERM"]["exit codes"] == {"130": 1}
    assert result["SIGTERM"]["steps lost"]["max"] == 0
