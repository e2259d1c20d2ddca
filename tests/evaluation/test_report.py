"""The report: whole, self-contained, escaped, and its verdict follows the numbers."""

import json
import re
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stepfold.display import results_table
from stepfold.errors import UserError
from stepfold.evaluation.protocol import Scores
from stepfold.evaluation.report import METRICS, curves_from_rows, plot_curves, verdict, write_report

HOSTILE = "<script>alert(1)</script>\"' onload=x $\\frac{$ & ünïcode"
VOID = {"meta", "img", "link", "br"}


class Page(HTMLParser):
    """Collects tags, text and attributes, and fails on tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def scores(accuracy: float, fd: float, agreement: float | None = 0.1, speed: float = 3.0) -> dict[str, float | None]:
    return Scores(accuracy, 30.0, fd, 0.4, agreement, speed).to_json()


@pytest.fixture
def report(tmp_path: Path) -> dict:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "grid.png")
    return {
        "title": f"Run {HOSTILE}",
        "command": f"stepfold distill --prompts {HOSTILE}",
        "versions": {"torch": "2.13.0"},
        "config": {"optimizer": {"lr": 1e-4}, "prompt": HOSTILE, "guidance": [4, 4.5]},
        "protocol": {"n": 500},
        "teacher": {
            "1": scores(0.02, 0.15),
            "20": scores(0.86, 0.03, 0),
            "2": scores(0.4, 0.1),
            "4": scores(0.7, 0.08),
        },
        "student": {"1": scores(0.7138, 0.04, None, 42.0), "2": scores(0.75, 0.039)},
        "reals": {"accuracy": 0.98, "diversity": 0.45},
        "stages_sec": {HOSTILE: 4.0, "distil": 754.0},
        "peak_memory_gib": 1.234,
        "curves": {HOSTILE: [[i, 1 / (i + 1)] for i in range(1000)], "few": [[1, 2.0], [2, float("nan")]], "none": []},
        "images": {f"same noise, {HOSTILE}": "grid.png"},
    }


def test_page_is_whole_and_escaped(tmp_path: Path, report: dict):
    html = write_report(tmp_path, report)[1].read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags and "<script" not in html
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    text = "".join(page.text)
    assert text.count(HOSTILE) == 7  # two titles, command, setting, stage, caption, curve: all shown as they are
    assert page.tags.count("svg") == 2 and page.tags.count("img") == 1


def test_page_loads_nothing_from_outside(tmp_path: Path, report: dict):
    html = write_report(tmp_path, report)[1].read_text(encoding="utf-8")
    assert "://" not in html and "@import" not in html and "<link" not in html
    page = Page(html)
    sources = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset") and value]
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in sources)
    assert b64decode(next(s for s in sources if s[0] == "d").split(",")[1]) == (tmp_path / "grid.png").read_bytes()
    referred = {value for name, value in page.attributes if name == "id"}
    assert {value[1:] for value in sources if value[0] == "#"} | set(re.findall(r"url\(#(\w+)\)", html)) <= referred


def test_table(tmp_path: Path, report: dict):
    html = write_report(tmp_path, report)[1].read_text(encoding="utf-8")
    body = html[html.index('<table class="results">') : html.index("<dl>")]
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)<", row) for row in body.split("<tr>")[1:]]
    assert [row[0] for row in rows] == [
        "Sampler", "Student, 2 steps", "Student, 1 step",
        "Teacher, 20 steps", "Teacher, 4 steps", "Teacher, 2 steps", "Teacher, 1 step", "Real pictures",
    ]  # fmt: skip
    assert rows[2][1:] == ["0.714", "30.0", "0.040", "0.400", "–", "42.0"]
    assert rows[7][1:] == ["0.980", "–", "–", "0.450", "–", "–"]
    assert all(f"<dt>{label}</dt>" in html for label, _ in METRICS.values())
    assert "12 min 34 s" in html and "1.23 GiB" in html


def test_json_is_the_report(tmp_path: Path, report: dict):
    path = write_report(tmp_path / "new" / "folder", report | {"images": {}})[0]
    read = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read["student"] == report["student"] and read["title"] == report["title"]
    assert read["curves"]["few"] == [[1, 2.0], [2, None]]


def test_verdict_follows_the_numbers(report: dict):
    assert verdict(report) == (
        "One step: 83% of the teacher's accuracy (0.714 against 0.860 at 20 steps); FD 0.040 against 0.150 for the "
        "teacher's one step; diversity 100% of the teacher's; 14.0 times as many images per second. "
        "Its FD is better than the teacher's at 1, 2 and 4 steps."
    )
    for fd, end in ((0.12, "at 1 step."), (0.09, "at 1 and 2 steps."), (0.02, "at every measured step count.")):
        assert verdict(report | {"student": {"1": scores(0.5, fd)}}).endswith(f"is better than the teacher's {end}")
    worse = verdict(report | {"student": {"1": scores(0.5, 9.0)}})
    assert worse.endswith("Its FD is worse than the teacher's at every measured step count.")


def test_the_teacher_at_the_scale_that_the_student_was_taught(tmp_path: Path, report: dict):
    report |= {"teacher at guidance 3": {"20": scores(0.964, 0.011)}}
    assert verdict(report).endswith(
        " The teacher at guidance 3, as the student was taught: accuracy 0.964, FD 0.011 at 20 steps."
    )
    html = write_report(tmp_path, report)[1].read_text(encoding="utf-8")
    assert "Teacher at guidance 3, 20 steps" in html
    assert "teacher at guidance 3 20 steps" in list(results_table(report).columns[0].cells)


def test_verdict_where_numbers_are_missing(report: dict):
    assert "no student has been measured" in verdict(report | {"student": {}})
    assert verdict({"teacher": {"20": scores(0.0, 0.1)}, "student": {"4": {"accuracy": 0.0}}}) == (
        "4 steps: accuracy (0.000 against 0.000 at 20 steps)."
    )


def test_smallest_report(tmp_path: Path):
    page = Page(write_report(tmp_path, {"title": "Nothing yet"})[1].read_text())
    assert "table" not in page.tags and "Nothing to compare" in "".join(page.text)


def test_failures_leave_the_old_report(tmp_path: Path, report: dict):
    before = [path.read_bytes() for path in write_report(tmp_path, {"title": "old"})]
    with pytest.raises(UserError, match=r"missing\.png: image of the report is not readable"):
        write_report(tmp_path, report | {"images": {"x": "missing.png"}})
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match="is not a PNG"):
        write_report(tmp_path, report | {"images": {"x": "text.png"}})
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path / "text.png", {"title": "a file where the folder should be"})
    assert [(tmp_path / name).read_bytes() for name in ("report.json", "report.html")] == before
    assert not list(tmp_path.glob(".*"))


def test_curves(tmp_path: Path):
    rows = [{"step": i, "loss": 2.0 ** -(i % 50), "lr": 1e-5, "note": "text", "done": True} for i in range(600)]
    rows[3]["eval $x"] = 0.5
    curves = curves_from_rows(rows)
    assert {name: len(points) for name, points in curves.items()} == {"loss": 600, "lr": 600, "eval $x": 1}
    assert curves["loss"][2] == [2, 0.25]
    plot_curves(rows, tmp_path / "curves.png")
    drawn = np.asarray(Image.open(tmp_path / "curves.png").convert("L"))
    assert drawn.shape[1] > 1000 and (drawn < 128).mean() > 0.002
