"""What is read of run folders: finished ones, ones that go on, and broken ones."""

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
from filelock import FileLock

from stepfold.commands.runs import runs as list_runs
from stepfold.config import from_yaml, to_yaml
from stepfold.errors import Caution, UserError
from stepfold.students.card import read_card
from stepfold.training.opening import with_steps
from stepfold.web import markup
from stepfold.web.runs import (
    compared,
    curves_of,
    find_runs,
    newest,
    preview_at,
    read_run,
    report_of,
    scores_of,
    stamp,
    time_left,
)


def test_runs_are_found_and_nothing_else(runs: Path) -> None:
    assert find_runs(runs) == ["binary", "broken", "deeper/second", "first", "leak"]
    assert find_runs(runs / "nowhere") == []
    assert newest(runs, ["first", "deeper/second"]) == "deeper/second"


@pytest.mark.parametrize(
    "name", ["..", "../secret", "link", "foreign", "/etc", "first/../first", "", None, 3, ["first"]]
)
def test_no_other_folder_is_read(runs: Path, name: object) -> None:
    with pytest.raises(UserError, match="There is no run"):
        read_run(runs, name)


def test_a_finished_run(runs: Path) -> None:
    run = read_run(runs, "deeper/second")
    assert (run.state, run.step, run.steps, run.previews, run.problem) == ("finished", 3, 3, (0, 1, 2, 3), "")
    assert run.progress == "finished, 3 steps"
    assert "<h1>second: few-step student of" in report_of(run)
    svgs = curves_of([run, read_run(runs, "first")])
    assert {"loss", "grad_norm", "lr"} <= set(svgs)
    assert "var(--accent)" in svgs["loss"] and "var(--other)" in svgs["loss"]
    assert compared(read_run(runs, "first"), run) == {"seed": (0, 7)}


def test_latent_errors_of_several_steps_with_fresh_noise_are_left_out(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "first", tmp_path / "first")
    for noisy, kept in ((False, True), (True, False)):
        report = {"student": {"4": {"latent_error": 0.5, "accuracy": 0.9}}, "fresh_noise": noisy}
        (tmp_path / "first" / "report.json").write_text(json.dumps(report))
        steps, scores = scores_of(read_run(tmp_path, "first"))
        assert steps == 4 and scores["accuracy"] == 0.9 and ("latent_error" in scores) is kept


def test_a_run_that_is_made_longer_goes_on(runs: Path, tmp_path: Path) -> None:
    """It was "finished, 5 of 9", and its earlier student was exported without a word."""
    run = tmp_path / "first"
    shutil.copytree(runs / "first", run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_card(run)
    (run / "config.yaml").write_text(to_yaml(with_steps(from_yaml(run / "config.yaml"), 9)))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 0.1}) + "\n")
    found = read_run(tmp_path, "first")
    assert (found.state, found.step, found.steps) == ("stopped", 5, 9)
    card = run / "student" / "stepfold.json"
    whole = card.read_text()
    card.write_text(json.dumps(json.loads(whole) | {"config": {"training": [3]}}))
    assert read_card(run).config["training"] == [3]  # damaged, which is no traceback
    card.write_text(whole)
    with pytest.warns(Caution, match="first has gone on to step 5, and its student is still of step 3"):
        read_card(run)


def test_a_run_whose_student_is_gone_is_not_finished(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "first", tmp_path / "first", ignore=shutil.ignore_patterns("student"))
    assert read_run(tmp_path, "first").progress == "stopped, step 3 of 3"


def test_a_run_that_goes_on(runs: Path, tmp_path: Path) -> None:
    """Running while its lock is held, stopped after; each new row and preview changes the stamp."""
    folder = tmp_path / "mine"
    shutil.copytree(runs / "first", folder)
    shutil.rmtree(folder / "student")
    (folder / "report.html").unlink()
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(rows[:2]) + rows[2][:7])
    with FileLock(folder / ".lock"):
        assert read_run(tmp_path, "mine").progress == "running, step 2 of 3"
        before = stamp(tmp_path, ["mine", "nothing"])
        assert stamp(tmp_path, ["mine", "nothing"]) == before
        (folder / "metrics.jsonl").write_text("".join(rows))
        after = stamp(tmp_path, ["mine", "nothing"])
        assert read_run(tmp_path, "mine").step == 3 and after != before
        shutil.copy(folder / "previews" / "step_000003.png", folder / "previews" / "step_000009.png")
        assert stamp(tmp_path, ["mine", "nothing"]) != after
    assert read_run(tmp_path, "mine").progress == "stopped, step 3 of 3"
    shutil.copytree(folder, tmp_path / "another")
    assert "another" in stamp(tmp_path, [])


def test_broken_runs_say_what_is_wrong(runs: Path) -> None:
    broken = read_run(runs, "broken")
    assert (broken.state, broken.step, broken.steps, broken.previews) == ("stopped", 1, None, (1,))
    assert broken.problem.startswith("The settings cannot be read: ")
    with pytest.raises(UserError, match="step 1 is no PNG"):
        preview_at(broken, 1)
    assert list(curves_of([broken])) == ["loss"]
    binary = read_run(runs, "binary")
    assert (binary.state, binary.step) == ("stopped", 0)  # no line of it is a row
    assert compared(broken, binary) == {} and curves_of([binary]) == {}
    html = markup.summary([broken, binary]) + markup.previews([broken, binary], 1) + markup.reports([broken, binary])
    assert "is no PNG" in html and "binary has no previews yet" in html and "binary has no report yet" in html


def test_links_out_of_a_run_are_not_followed(runs: Path) -> None:
    leak = read_run(runs, "leak")
    assert (leak.step, leak.has_report, leak.problem) == (0, False, "The settings are not there.")
    with pytest.raises(UserError, match="not there"):
        report_of(leak)


def test_previews_are_a_slider_over_time(runs: Path) -> None:
    run = read_run(runs, "first")
    found = [preview_at(run, step) for step in (0, 1.5, 2, 99, -5)]
    assert [step for step, _ in filter(None, found)] == [0, 1, 2, 3, 0]
    assert all(address.startswith("data:image/png;base64,iVBOR") for _, address in filter(None, found))


def test_a_report_may_run_and_fetch_nothing(runs: Path) -> None:
    page = report_of(read_run(runs, "broken"))
    assert page.startswith("<!doctype html><meta http-equiv='Content-Security-Policy' content=\"default-src 'none';")
    html = markup.reports([read_run(runs, "broken")])
    assert 'sandbox=""' in html and "<script" not in html and "&lt;script&gt;" in html


def test_settings_read_as_in_yaml() -> None:
    values = (None, True, False, (3.0, None), 1e-4, "bf16", "x" * 80)
    told = [markup.short(value) for value in values]
    assert told == ["none", "true", "false", "[3.0, none]", "0.0001", "bf16", "x" * 59 + "…"]
    assert markup.breakable("space.route_steps<b>") == "space.<wbr>route_<wbr>steps&lt;b&gt;"


def test_curves_have_names(runs: Path) -> None:
    html = markup.curves([read_run(runs, "first"), read_run(runs, "deeper/second")])
    assert html.index("<b>latent_<wbr>error</b>") < html.index("<details class='logged'>") < html.index("<b>loss</b>")
    assert 'role="img" aria-label="lr over the steps of first and deeper/second"' in html
    assert "<span>learning rate</span>" in html and "aria-hidden" not in html


def test_the_students_quality_stands_over_network_calls(runs: Path, tmp_path: Path) -> None:
    """Beside the teacher's at as many, before all that was logged; a report of nonsense has none."""
    rows = {
        "student": {k: {"fd": 0.1 / int(k), "calls": int(k)} for k in "1248"},
        "teacher": {"4": {"fd": 0.2, "calls": 8}},
    }
    for name, report in (("a", rows), ("b", {"student": {"1": {"fd": "x", "calls": 1e300}}, "teacher": 3})):
        shutil.copytree(runs / "first", tmp_path / name)
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    html = markup.curves([read_run(tmp_path, "a"), read_run(tmp_path, "b")])
    assert html.index("<b>FD</b>") < html.index("<b>latent_<wbr>error</b>") and "solid the student, dashed" in html
    assert 'role="img" aria-label="FD over network calls of a and b"' in html
    assert "solid the student" not in markup.curves([read_run(tmp_path, "b")])


def test_the_time_that_is_left_follows_the_pace(runs: Path, tmp_path: Path) -> None:
    """Of a run that goes on: the steps since the last preview that is older, by the times of both files."""
    folder = tmp_path / "mine"
    shutil.copytree(runs / "first", folder)
    (folder / "previews" / "step_000003.png").unlink()
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(rows[:2]))
    os.utime(folder / "previews" / "step_000001.png", (1000, 1000))
    os.utime(folder / "metrics.jsonl", (1040, 1040))
    assert time_left(read_run(tmp_path, "mine")) is None
    with FileLock(folder / ".lock"):
        run = read_run(tmp_path, "mine")
        assert time_left(run) == pytest.approx(40)
        assert "running, step 2 of 3, about 40.0 s left" in markup.summary([run])


def test_scores_and_bad_names_are_escaped(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(runs / "first", folder)
    scores = {"1": {"accuracy": 0.5, "fd": 0.01, "agreement": None}, "4": {"accuracy": 0.9}}
    (folder / "report.json").write_text(json.dumps({"student": scores, "protocol": {"n": 1500}}))
    html = markup.summary([read_run(tmp_path, folder.name)])
    assert "<p>1 step: accuracy 50.0%, FD 0.0100 (n = 1,500)</p>" in html and "<img" not in html


def test_fd_of_different_n_never_stand_together(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """16 pictures gave 0.80 where 500 gave 0.017, in one column."""
    for name, n, fd in (("a", 16, 0.8), ("b", 500, 0.017), ("c", 500, 0.018), ("d", "many", 0.5)):
        shutil.copytree(runs / "first", tmp_path / name)
        report = {"student": {"1": {"accuracy": 0.5, "fd": fd}}, "protocol": {"n": n}}
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    list_runs(tmp_path, json_file=tmp_path / "runs.json")
    head, *rows = capsys.readouterr().out.splitlines()
    titles = ("FD (n = 16)", "FD (n = 500)", "FD  ")
    expected = (("0.8000", titles[0]), ("0.0170", titles[1]), ("0.0180", titles[1]), ("0.5000", titles[2]))
    for row, (value, title) in zip(rows, expected, strict=True):
        assert row.index(value) == head.index(title) and len(re.findall(r" 0\.", row)) == 1, row
    told = json.loads((tmp_path / "runs.json").read_text())
    assert [run["scores"]["1"].get("n") for run in told] == [16, 500, 500, None]
    a, b, c = (read_run(tmp_path, name) for name in "abc")
    assert "different numbers n of pictures" in markup.summary([a, b])
    assert "different numbers" not in markup.summary([b, c])


def test_the_command_lists_what_is_there(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a table for people, and as json with the same in it."""
    list_runs(runs, json_file=tmp_path / "runs.json")
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["first"][:2] == ["finished", "3"] and lines["binary"][0] == "stopped"
    told = {run["name"]: run for run in json.loads((tmp_path / "runs.json").read_text())}
    assert list(told) == find_runs(runs)
    assert (told["first"]["state"], told["first"]["step"], told["first"]["steps"]) == ("finished", 3, 3)
    assert told["broken"]["problem"]
    assert (told["first"]["method"], told["first"]["student"]) == ("continuous on generation", "all weights")
    assert told["broken"]["method"] == "" and told["first"]["n"] is None


def test_the_command_says_where_there_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    list_runs(tmp_path)
    assert "no runs in" in capsys.readouterr().out
    with pytest.raises(UserError, match="nowhere is no folder; name the one"):
        list_runs(tmp_path / "nowhere")
