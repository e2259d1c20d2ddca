"""The report: whole, self-contained, escaped, and its verdict follows the numbers."""

import json
import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stepfold.display import results_table
from stepfold.errors import UserError
from stepfold.evaluation.curves import curves_from_rows, moving, plot_curves, quality_svgs
from stepfold.evaluation.protocol import Scores
from stepfold.evaluation.report import render_html, spread, write_report
from stepfold.evaluation.verdict import METRICS, NOT_FINITE, Figure, best_steps, curves_over_calls, figures, sentences

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


def scores(
    accuracy: float, fd: float, agreement: float | None = 0.1, diversity: float = 0.4, calls: int | None = None
) -> dict[str, float | None]:
    return Scores(accuracy, 30.0, fd, diversity, agreement, 3.0, calls).to_json()


@pytest.fixture
def report(tmp_path: Path) -> dict:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "grid.png")
    return {
        "title": f"Run {HOSTILE}",
        "command": f"stepfold distill --prompts {HOSTILE}",
        "versions": {"torch": "2.13.0"},
        "config": {"optimizer": {"lr": 1e-4}, "prompt": HOSTILE, "guidance": [4, 4.5]},
        "protocol": {"n": 500, "guidance": 4.5},
        "teacher_calls_per_step": 2,
        "facts": ["2026-01-02", f"device {HOSTILE}"],
        "use": [("Sample", f"stepfold sample {HOSTILE}")],
        "preset": "demo",
        "changed": {"training": {"steps": 3}, "seed": HOSTILE},
        "teacher": {
            "1": scores(0.02, 0.15),
            "20": scores(0.86, 0.03, 0),
            "2": scores(0.4, 0.1),
            "4": scores(0.7, 0.08),
        },
        "student": {"1": scores(0.7138, 0.04, 0.3), "2": scores(0.75, 0.039, 0.4, 0.44)},
        "reals": {"accuracy": 0.98, "diversity": 0.45},
        "stages_sec": {HOSTILE: 4.0, "distil": 754.0, "images": 0.0},
        "peak_memory_gib": 1.234,
        "curves": {
            HOSTILE: [[i, 1 / (i + 1)] for i in range(1000)],
            "few": [[1, 2.0], [2, float("nan")], [3, 1.0]],
            "none": [],
            "same": [[1, 1.0], [2, 1.0]],
        },
        "images": {f"same noise, {HOSTILE}": "grid.png"},
    }


def test_page_is_whole_and_escaped(tmp_path: Path, report: dict):
    html = write_report(tmp_path, report)[1].read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags and "<script" not in html
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    text = "".join(page.text)
    # two titles, fact, use, command, change, setting, stage, caption twice (its head), curve: all shown as they are
    assert text.count(HOSTILE) == 10
    assert page.tags.count("svg") == 4 and page.tags.count("img") == 1


def test_page_loads_nothing_from_outside(tmp_path: Path, report: dict):
    html = write_report(tmp_path, report)[1].read_text(encoding="utf-8")
    assert "://" not in html and "@import" not in html and "<link" not in html
    page = Page(html)
    sources = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset") and value]
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in sources)
    assert b64decode(next(s for s in sources if s[0] == "d").split(",")[1]) == (tmp_path / "grid.png").read_bytes()
    referred = {value for name, value in page.attributes if name == "id"}
    assert {value[1:] for value in sources if value[0] == "#"} | set(re.findall(r"url\(#(\w+)\)", html)) <= referred


def table_of(html: str) -> list[list[str]]:
    body = html[html.index('<table class="results">') : html.index("<dl>")]
    return [re.findall(r"<(?:th|td|b)[^>]*>([^<]+)<", row) for row in re.split("<tr[^>]*>", body)[1:]]


def test_table(tmp_path: Path, report: dict):
    """Equal numbers of steps stand together, each row with its network calls; the student's best steps are bold."""
    html = write_report(tmp_path, report)[1].read_text(encoding="utf-8")
    rows = table_of(html)
    assert [row[0] for row in rows] == [
        "Sampler", "Student, 1 step", "Teacher, 1 step", "Student, 2 steps", "Teacher, 2 steps", "Teacher, 4 steps",
        "Teacher, 20 steps", "Real images",
    ]  # fmt: skip
    assert rows[0][1:] == ["Calls an image", "Accuracy", "CLIP score", "FD (n = 500)", "Diversity", "Latent MSE"]
    assert rows[1][1:] == ["1", "0.714", "30.0", "0.0400", "0.400", "0.300"]
    assert rows[2][1] == "2" and rows[6][1] == "40" and rows[7][1:] == ["–", "0.980", "–", "–", "0.450", "–"]
    assert re.findall("<b>([^<]*)</b></td>", html) == ["0.300", "0.750", "0.0390", "0.440"]
    shown = [metric for key, metric in METRICS.items() if key not in ("latent_error", "fd_imagenet")]
    assert all(f"<dt>{metric.label}" in html for metric in shown)
    assert "<dt>Latent error</dt>" not in html and "FD-ImageNet" not in html
    assert "12 min 34 s" in html and "1.23 GiB" in html and '<th scope="row">images</th>' not in html


def test_pictures_come_first_and_the_last_leads(tmp_path: Path, report: dict):
    for step in range(7):
        Image.fromarray(np.full((30, 1000, 3), step, np.uint8)).save(tmp_path / f"{step}.png")
    images = {f"Step {step}": f"{step}.png" for step in range(7)}
    html = write_report(tmp_path, report | {"images": images})[1].read_text(encoding="utf-8")
    captions = re.findall("<figcaption>(Step .)<", html)
    assert captions == ["Step 0", "Step 2", "Step 3", "Step 5"] and spread(range(3), 4) == [0, 1, 2]
    assert html.index("<h2>Step 6</h2>") < html.index("Step 0") < html.index('<table class="results">')
    sizes = [
        Image.open(BytesIO(b64decode(data))).width for data in re.findall('src="data:image/png;base64,([^"]*)"', html)
    ]
    assert sizes == [1000, 720, 720, 720, 720]


def test_curves_say_what_they_are_and_those_that_do_not_move_are_left_out(report: dict):
    assert list(moving(report["curves"])) == [HOSTILE, "few"]
    assert list(moving({"lr": [[0, 1], [1, 2]], "x": [[0, 1], [1, 2]], "latent_error": [[0, 2.0], [1, 1.0]]})) == [
        "latent_error", "lr", "x",
    ]  # fmt: skip


def test_quality_stands_over_network_calls_beside_the_teachers(tmp_path: Path, report: dict):
    """At equal calls, not at equal steps; a row's own count comes before the teacher's calls a step."""
    found = curves_over_calls(report)
    assert found["accuracy"] == {
        "student": [(1, 0.7138), (2, 0.75)], "teacher": [(2, 0.02), (4, 0.4), (8, 0.7), (40, 0.86)],
    }  # fmt: skip
    assert list(found) == ["accuracy", "fd"]
    own = report | {"teacher": {"4": scores(0.7, 0.08, calls=4)}}
    assert curves_over_calls(own)["fd"]["teacher"] == [(4, 0.08)] and "<td>4</td>" in render_html(own, tmp_path)
    assert not curves_over_calls({"student": report["student"], "teacher": {"20": {"latent_error": None}}})
    del report["teacher_calls_per_step"]
    assert not curves_over_calls(report)


def test_the_report_draws_student_and_teacher_at_1_2_4_and_8_steps(tmp_path: Path):
    """Of any teacher the latent error; the reference, whose error is none, is no point."""
    rows = {
        who: {str(k): {"latent_error": each / k} for k in (1, 2, 4, 8)}
        for who, each in (("student", 0.4), ("teacher", 1.2))
    }
    rows["teacher"]["20"] = {"latent_error": None}
    html = render_html({"title": "map", "teacher_calls_per_step": 2, **rows}, tmp_path)
    (svg,) = re.findall("<svg.*?</svg>", html[html.index('class="grid quality"') :], re.DOTALL)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"student", "teacher", "network calls an image", "1", "2", "4", "8", "16"} <= {*texts} and "40" not in texts
    lines = re.findall(
        r'<path d="([^"]*)"[^>]*style="fill: none; ([^"]*stroke: (?:var\(--accent\)|currentColor)[^"]*)"', svg
    )
    drawn = {("dash" in style, path.count("L") + 1) for path, style in lines if path.count("L") > 1}
    assert drawn == {(True, 4), (False, 4)}


def test_two_runs_of_one_teacher_share_its_curve():
    student, other, teacher = [(1, 0.4), (2, 0.3)], [(1, 0.5), (2, 0.2)], [(2, 0.9), (4, 0.7)]
    a, b = ({"latent_error": {"student": each, "teacher": teacher}} for each in (student, other))
    apart = {"latent_error": {"student": other, "teacher": [(2, 0.8), (4, 0.7)]}}
    (shared,), (separate,) = (quality_svgs(reports).values() for reports in ([a, b], [a, apart]))
    assert shared.count("stroke-dasharray") == 1 and separate.count("stroke-dasharray") == 2
    assert "var(--other)" in shared and ">student<" not in shared and not quality_svgs([{}, {}])


def test_json_is_the_report(tmp_path: Path, report: dict):
    path = write_report(tmp_path / "new" / "folder", report | {"images": {}})[0]
    read = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read["student"] == report["student"] and read["title"] == report["title"]
    assert read["curves"]["few"] == [[1, 2.0], [2, None], [3, 1.0]]


def test_three_figures_follow_the_numbers(report: dict):
    """Against the teacher as the student was taught, where that is another one than the protocol's."""
    assert figures(report) == [
        Figure("83%", "of the teacher's accuracy in one step", "0.714 against 0.860: the teacher, 20 steps"),
        Figure("40 → 1", "network calls an image: the teacher's, the student's",
               "the teacher's 20 steps call its network 2 times each"),
        Figure("0.40", "diversity; real images have 0.45, and closest is best", "the teacher has 0.40"),
    ]  # fmt: skip
    taught = figures(report | {"teacher at guidance 3": {"20": scores(0.964, 0.011)}})
    assert (taught[0].big, taught[0].detail) == ("74%", "0.714 against 0.964: the teacher at guidance 3, 20 steps")
    assert figures({"student": {"4": {"accuracy": 0.0}}, "teacher": {"20": {"accuracy": 0.0}}}) == [
        Figure("0.000", "accuracy in 4 steps", "0.000 against 0.000: the teacher, 20 steps")
    ]


def test_the_latent_error_stands_beside_the_line_to_beat(tmp_path: Path):
    report = {
        "title": "own",
        "teacher": {"20": {"latent_error": None}, "1": {"latent_error": 0.9}, "2": {"latent_error": 0.2}},
        "student": {"1": {"latent_error": 0.5}, "2": {"latent_error": 0.3}},
        "teacher_calls_per_step": 1,
        "protocol": {"n": 2, "guidance": 4.5, "prompts": "2 held-out prompts"},
    }
    assert [(figure.big, figure.label) for figure in figures(report)] == [
        ("0.50", "latent error in one step"),
        ("20 → 1", "network calls an image: the teacher's, the student's"),
        ("0.90", "latent error of the untrained teacher in one step"),
    ]
    assert sentences(report) == [
        "Latent error: the student beats the untrained teacher at 1 step, not at 2 steps.",
        "Measured on 2 held-out prompts, at guidance 4.5.",
    ]
    assert best_steps(report, "latent_error") == 2
    (first, *_) = figures(report | {"usual_steps": 2})
    assert (first.big, first.label) == ("0.30", "latent error in 2 steps")  # it was always the fewest
    assert figures(report | {"usual_steps": 3}) == figures(report)  # which was not measured
    noisy = report | {"usual_steps": 2, "fresh_noise": True}  # so that its two steps draw another image
    assert [(figure.big, figure.label) for figure in figures(noisy)] == [
        ("0.50", "latent error in one step"),
        ("20 → 2", "network calls an image: the teacher's, the student's"),
        ("0.90", "latent error of the untrained teacher in one step"),
    ]
    assert sentences(noisy)[0] == "Latent error: the student is better than the teacher itself in one step."
    alone = noisy | {"student": {"2": {"latent_error": 0.3}}}  # which does not compare with the teacher's 0.2
    assert not any("latent error" in figure.label for figure in figures(alone))
    level = noisy | {"student": {"1": {"latent_error": 0.9001}}, "usual_steps": 1}
    assert sentences(level)[0] == "Latent error: the student is level with the teacher itself in one step."
    unlearned = level | {"config": {"objective": "discrete"}, "curves": {"latent_error": [[0, 0.474], [2, 0.473]]}}
    assert sentences(unlearned)[1].startswith("Previews: the latent error of one step is 0.473, and was 0.474 before")
    for other in ({"config": {"objective": "decoupled"}}, {"curves": {"latent_error": [[0, 0.474], [2, 0.3]]}}):
        assert sentences(unlearned | other) == sentences(level)
    for course, rate in (([0.474, 0.473], "a higher optimiser.lr"), ([0.58, 1.483], "a lower optimiser.lr")):
        grown = unlearned | {"curves": {"latent_error": list(enumerate(course))}}
        assert rate in sentences(grown)[1], course  # a run that diverged was told to take a higher one
    lost = unlearned | {"student": {"1": {"latent_error": float("nan"), "clip_score": None}}}
    assert sentences(lost) == [NOT_FINITE]
    caption = str(results_table(noisy).caption)
    assert "compare at one step alone" in caption and results_table(report).caption is None
    for one, said in ((noisy, True), (report, False)):
        assert ("compare at one step alone" in write_report(tmp_path, one)[1].read_text(encoding="utf-8")) is said
    html = write_report(tmp_path, report)[1].read_text(encoding="utf-8")
    assert [row[:3] for row in table_of(html)] == [
        ["Sampler", "Calls an image", "Latent error"],
        ["Student, 1 step", "1", "0.500"], ["Teacher, 1 step", "1", "0.900"],
        ["Student, 2 steps", "2", "0.300"], ["Teacher, 2 steps", "2", "0.200"],
        ["Teacher, 20 steps (reference)", "20", "–"],
    ]  # fmt: skip
    for ours, end in (((0.1, 0.1), "is better than the untrained teacher at every"), ((1.0, 1.0), "is no better")):
        student = {str(k): {"latent_error": error} for k, error in zip((1, 2), ours, strict=True)}
        assert end in sentences(report | {"student": student})[0]


def test_sentences_follow_the_numbers(report: dict):
    assert sentences(report) == [
        "FD: the student in one step is better than the teacher at 1, 2 and 4 steps.",
        "Measured on 500 images a row, at guidance 4.5.",
    ]
    for fd, end in ((0.12, "at 1 step."), (0.09, "at 1 and 2 steps."), (0.02, "at every measured number of steps.")):
        assert sentences(report | {"student": {"1": scores(0.5, fd)}})[0].endswith(f"is better than the teacher {end}")
    worse = sentences(report | {"student": {"1": scores(0.5, 9.0)}})[0]
    assert worse.endswith("is worse than the teacher at every measured number of steps.")
    few = report | {"protocol": report["protocol"] | {"n": 8}}
    assert sentences(few)[0] == "FD: 8 images rank nothing; evaluate 100 or more."


def test_the_teacher_at_the_scale_that_the_student_was_taught(tmp_path: Path, report: dict):
    report |= {"teacher at guidance 3": {"20": scores(0.964, 0.011)}}
    html = write_report(tmp_path, report)[1].read_text(encoding="utf-8")
    assert "Teacher at guidance 3, 20 steps" in html
    assert "teacher at guidance 3 20 steps" in list(results_table(report).columns[0].cells)


def test_where_nothing_was_measured_the_report_says_what_to_run(tmp_path: Path, report: dict):
    empty = report | {"student": {}, "teacher": {}, "next_command": "stepfold evaluate runs/x/student"}
    assert figures(empty) == [] and sentences(empty) == ["No student has been measured."]
    html = write_report(tmp_path, empty)[1].read_text(encoding="utf-8")
    assert "This measures it: <code>stepfold evaluate runs/x/student</code>" in html and "results" not in html.split(
        "</style>"
    )[1].split("<h2>Training")[0].replace("Results", "")


def test_what_differs_from_the_preset_comes_before_all_settings(tmp_path: Path, report: dict):
    html = write_report(tmp_path, report)[1].read_text(encoding="utf-8")
    assert html.index("differ from the preset demo") < html.index("training.steps") < html.index("All settings")


def test_smallest_report(tmp_path: Path):
    page = Page(write_report(tmp_path, {"title": "Nothing yet"})[1].read_text())
    assert "table" not in page.tags and "No student has been measured." in "".join(page.text)


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
