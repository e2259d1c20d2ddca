"""What the page may start: checked choices, one run at a time, at this machine alone, and nothing unless asked for."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import typer.main
from browser import find_browser

from stepfold.cli import app, main
from stepfold.errors import UserError
from stepfold.web.training import (
    Training,
    Wishes,
    check_host,
    goes_on,
    is_foreign,
    log_of,
    offered,
    plan,
    resume,
    start,
    states,
    stop,
    wishes_of,
)

FORM = ("mine", "emoji", "", "demo", "20", "", "", "")
LIKE_STEPFOLD = """
import json, os, signal, sys, time
from pathlib import Path
words = sys.argv[1:]
folder = Path(__file__).parent
(folder / f"{words[0]}.json").write_text(json.dumps(words))
if "explode" in words:
    sys.exit("error: the teacher is not there")
if words[0] == "plan":
    print("one step  0.10 s  measured")
    sys.exit()
out = Path(words[words.index("--out") + 1])
def ask(*_):
    print("stopped; the state is saved.", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, ask)
out.mkdir(exist_ok=True)
(out / "config.yaml").write_text("prompts: x.txt\\ntraining: {steps: 9}\\n")
(out / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\\n')
(folder / "ready").touch()
time.sleep(60)
"""
"""A program with its words that writes what a run would, and waits to be stopped."""


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    program = tmp_path / "program" / "stepfold.py"
    program.parent.mkdir()
    program.write_text(LIKE_STEPFOLD)
    found = offered(tmp_path / "runs", [])
    found.root.mkdir()
    found.program = (sys.executable, "-S", str(program))
    yield found
    for process in found.processes.values():
        process.kill()
        process.wait()


def until(what: Callable[[], Any], sec: float = 60.0) -> Any:
    end = time.monotonic() + sec
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def words_of(training: Training, command: str) -> list[str]:
    text = (Path(training.program[-1]).parent / f"{command}.json").read_text()
    return json.loads(text) if text else []  # which the program has begun to write


def ready(training: Training) -> bool:
    return (Path(training.program[-1]).parent / "ready").is_file()


def test_a_run_is_planned_started_stopped_and_resumed(training: Training) -> None:
    """The words are those of the commands, which parse them; the run's log says how far it is."""
    wishes = wishes_of(training, "mine", "emoji", "", "demo", "20", " 4", "64.0", "1e-4")
    changes = ("training.steps=20", "student.lora=4", "teacher.height=64", "teacher.width=64", "optimiser.lr=0.0001")
    assert wishes == Wishes("mine", "emoji", "", "demo", changes)
    with pytest.raises(UserError, match="this run is not planned"):
        start(training, wishes)
    assert "0.10 s" in plan(training, wishes)
    with pytest.raises(UserError, match="this run is not planned with these settings; plan it first"):
        start(training, wishes_of(training, *FORM))
    start(training, wishes)
    assert goes_on(training) == ["mine"] and states(training) == [("mine", "starting")]
    until(lambda: ready(training))
    options = ["--preset", "demo", "--teacher", "emoji", *(word for each in changes for word in ("--set", each))]
    assert words_of(training, "plan") == ["plan", "--quiet", *options]
    started = words_of(training, "distill")
    assert started == ["distill", *options, "--out", str(training.root / "mine")]
    for words in (words_of(training, "plan"), started):
        command = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
        command.make_context(words[0], words[1:])
    for act in (lambda: plan(training, wishes), lambda: resume(training, "mine")):
        with pytest.raises(UserError, match="mine goes on; wait for it or stop it first"):
            act()
    stop(training, "mine")
    assert until(lambda: training.processes["mine"].poll()) == 130
    assert log_of(training, "mine").read_text() == "stopped; the state is saved.\n"
    assert states(training) == [("mine", "stopped, step 1 of 9")] and goes_on(training) == []
    with pytest.raises(UserError, match="'mine' does not run, or not from this page; stop others where"):
        stop(training, "mine")
    resume(training, "mine")
    settings = str(training.root / "mine" / "config.yaml")
    expected = ["distill", "--preset", settings, "--out", str(training.root / "mine"), "--resume"]
    until(lambda: words_of(training, "distill") == expected)


def test_a_run_that_is_stopped_before_its_first_step_has_not_failed(training: Training) -> None:
    """No handler is there yet, so the signal ends it."""
    Path(training.program[-1]).write_text(LIKE_STEPFOLD.replace("signal.signal(", "print("))
    training.planned.add(wishes := wishes_of(training, *FORM))
    start(training, wishes)
    until(lambda: ready(training))
    stop(training, "mine")
    assert training.processes["mine"].wait() == -15 and states(training) == [("mine", "stopped, step 1 of 9")]


def test_a_run_that_fails_says_why(training: Training) -> None:
    wishes = Wishes("mine", "emoji", "", "explode", ())
    with pytest.raises(UserError, match=r"^the teacher is not there$"):
        plan(training, wishes)
    with pytest.raises(UserError, match="this run is not planned"):
        start(training, wishes)
    training.planned.add(wishes)
    start(training, wishes)
    training.processes["mine"].wait()
    assert states(training) == [("mine", "failed: the teacher is not there")]


@pytest.mark.parametrize("name", ["", "../mine", "a/b", ".hidden", "/etc", "mine\n", "-rf", "x" * 65, None, 3, ["a"]])
def test_a_name_leads_to_no_other_folder(name: Any, training: Training) -> None:
    with pytest.raises(UserError, match="the run has no name of letters, digits, - and _; give it one"):
        wishes_of(training, name, *FORM[1:])


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (1, "/etc", "'/etc' is none of the teacher that this page offers"),
        (1, "live:X", "'live:X' is none of the teacher"),
        (2, "/etc/passwd", "'/etc/passwd' is none of the prompts that this page offers"),
        (3, "/tmp/mine.yaml", "'/tmp/mine.yaml' is none of the preset"),
        (3, ["demo"], "is none of the preset"),
        (4, "0", "setting training.steps is 0: Input should be greater than or equal to 1"),
        (4, "2.5", "setting training.steps is 2.5: "),
        (4, "20; rm -rf /", "training.steps is '20; rm -rf /'; give a number"),
        (4, 20, "training.steps is '20'; give a number"),
        (4, None, "training.steps is 'None'; give a number"),
        (4, "20 # y", "training.steps is '20 # y'; give a number"),
        (5, "-1", "setting student.lora is -1: Input should be greater than or equal to 0"),
        (6, "1e12", "setting teacher.height is 1000000000000: "),
        (7, "0", "setting optimiser.lr is 0: Input should be greater than 0"),
        (7, "inf", "optimiser.lr is 'inf'; give a number"),
        (7, "nan", "optimiser.lr is 'nan'; give a number"),
    ],
)
def test_what_a_browser_sends_is_checked(place: int, value: Any, said: str, training: Training) -> None:
    """Choices by the lists, settings by their own validation, with its words."""
    form = list(FORM)
    form[place] = value
    with pytest.raises(UserError, match=re.escape(said)):
        wishes_of(training, *form)


def test_a_folder_that_is_there_is_not_started_in(training: Training, tmp_path: Path) -> None:
    (training.root / "mine").mkdir()
    (training.root / "mine" / "holiday.txt").write_text("")
    with pytest.raises(UserError, match="mine is not empty and holds no run"):
        wishes_of(training, *FORM)
    (training.root / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="link is a link; choose another name"):
        wishes_of(training, "link", *FORM[1:])
    (training.root / ".logs").symlink_to(tmp_path)
    training.planned.add(wishes := wishes_of(training, "new", *FORM[1:]))
    with pytest.raises(UserError, match=r"is a link; remove it"):
        start(training, wishes)


@pytest.mark.parametrize("name", ["../secret", "link", "foreign", "/etc", None, 3])
def test_no_other_folder_is_resumed(name: Any, runs: Path) -> None:
    with pytest.raises(UserError, match="There is no run"):
        resume(Training(runs, (), ()), name)
    with pytest.raises(UserError, match="first is finished, 3 steps; there is nothing to resume"):
        resume(Training(runs, (), ()), "first")


def test_the_command_line_says_what_is_offered(tmp_path: Path, prompts_file: Path, tiny_sana: Path) -> None:
    found = offered(tmp_path, [str(prompts_file), str(tiny_sana), "owner/model"])
    assert found.teachers == ("emoji", str(tiny_sana), "owner/model") and found.prompts == ("", str(prompts_file))
    wishes = wishes_of(found, "mine", str(tiny_sana), str(prompts_file), "default", *[""] * 4)
    assert wishes.options()[2:] == ["--teacher", str(tiny_sana), "--prompts", str(prompts_file)]
    with pytest.raises(UserError, match="prompts is missing"):
        wishes_of(found, "mine", str(tiny_sana), "", "default", *[""] * 4)
    for wrong in ("./nothing.txt", "my/nothing.txt", "nothing", "a/b/c"):
        with pytest.raises(UserError, match=re.escape(f"--offer {wrong} is not there; give a pipeline folder")):
            offered(tmp_path, [wrong])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--allow-training", "--host", "192.0.2.1"], "--allow-training starts programs on this machine, so it is not"),
        (["--offer", "emoji"], "--offer is for --allow-training; give both or neither"),
        (["--allow-training", "--offer", "nowhere.txt"], "--offer nowhere.txt is not there"),
    ],
)
def test_the_command_refuses_before_anything_is_loaded(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["stepfold", "demo", "nowhere", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and said in told and told.count("\n") == 1
    for host in ("127.0.0.1", "localhost", "::1"):
        check_host(host)


@pytest.mark.parametrize(
    ("headers", "foreign"),
    [
        ({}, False),  # a program, which no site can make send anything
        ({"origin": "http://127.0.0.1:7860", "sec-fetch-site": "same-origin"}, False),
        ({"origin": "http://127.0.0.1:7861"}, True),
        ({"origin": "http://evil.example"}, True),
        ({"origin": "null"}, True),
        ({"sec-fetch-site": "cross-site"}, True),
        ({"sec-fetch-site": "same-site"}, True),
    ],
)
def test_requests_of_other_pages_are_known(headers: dict[str, str], foreign: bool) -> None:
    sent = {name.encode(): value.encode() for name, value in headers.items()}
    assert is_foreign({b"host": b"127.0.0.1:7860", **sent}) is foreign


@pytest.fixture(scope="module")
def models() -> Any:
    from stepfold.web.drawing import load_models

    pytest.importorskip("gradio", reason="the page needs gradio (extra web)")
    return load_models(Path("emoji-student"), None, "cpu")


def labels(page: Any) -> set[str]:
    found = (part["props"] for part in page.config["components"])
    return {str(each.get("label") or each.get("value")) for each in found}


def test_the_form_is_off_unless_asked_for(models: Any, training: Training) -> None:
    from stepfold.web.page import build

    ours = {"Start a run", "Plan", "Start", "Stop the chosen run", "Resume the chosen run", "Name of the run"}
    assert not ours & labels(build(models, training.root))
    assert ours <= labels(build(models, training.root, training))


def test_the_handlers_say_what_was_done(models: Any, training: Training) -> None:
    from stepfold.web.page import _in_words
    from stepfold.web.training_tab import Handlers

    handlers = Handlers(training, _in_words)
    (refused,) = handlers.plan("../x", *FORM[1:])
    assert "the run has no name of letters, digits, - and _; give it one" in refused
    first, second = handlers.plan(*FORM)
    assert "Planning" in first and "<pre>one step  0.10 s  measured\n</pre>" in second
    assert "mine starts" in handlers.start(*FORM)[0]
    until(lambda: ready(training))
    assert "<b>mine</b> starting" in handlers.state()
    said, state = handlers.of_run(stop, "stops", "mine")
    assert "mine stops." in said and "<b>mine</b>" in state
    until(lambda: training.processes["mine"].poll() is not None)
    assert "stopped, step 1 of 9" in handlers.state()
    assert "There is no run" in handlers.of_run(resume, "resumes", "../etc")[0]


@pytest.fixture
def served(models: Any, training: Training) -> Iterator[str]:
    from stepfold.web.page import build, serve

    page = build(models, training.root, training)
    yield serve(page, "127.0.0.1", None, own_alone=True)
    page.close()


def posted(address: str, body: Any, **headers: str) -> int:
    data, told = json.dumps(body).encode(), {"Content-Type": "application/json"} | headers
    try:
        with urlopen(Request(address + "gradio_api/queue/join", data=data, headers=told), timeout=30) as answer:
            return answer.status
    except HTTPError as error:
        return error.code


def test_a_request_of_another_site_starts_nothing(served: str, training: Training) -> None:
    """gradio by itself runs it, and only keeps the answer from the other site: as the server does without our guard."""
    from stepfold.web.page import build, serve

    def event(page: Any, name: str) -> dict[str, Any]:
        number = next(i for i, fn in page.fns.items() if str(fn.fn).find(f"Handlers.{name}") >= 0)
        return {"fn_index": number, "session_hash": "x", "data": [*FORM], "event_data": None, "trigger_id": None}

    from stepfold.web.drawing import load_models

    open_to_all = build(load_models(Path("emoji-student"), None, "cpu"), training.root, training)
    address = serve(open_to_all, "127.0.0.1", None)
    body = event(open_to_all, "plan")
    try:
        assert posted(address, body, Origin="http://evil.example") == 200
        until(lambda: (Path(training.program[-1]).parent / "plan.json").is_file())
    finally:
        open_to_all.close()
    (Path(training.program[-1]).parent / "plan.json").unlink()
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
                    {"Origin": "http://evil.example", "Content-Type": "text/plain"}):  # fmt: skip
        assert posted(served, body, **headers) == 403
    assert posted(served, body, Origin=served.rstrip("/")) == 200
    until(lambda: (Path(training.program[-1]).parent / "plan.json").is_file())


SOONER = """
import sys
from stepfold.cli import main
if sys.argv[1] == "plan":
    sys.argv += ["--timed-steps", "2", "--set", "evaluation.n=0"]
main()
"""
"""`stepfold`, whose plan is a short one."""


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_run_of_the_bundled_teacher_in_a_browser(models: Any, tmp_path: Path) -> None:
    """Plan, start, stop and resume with the real commands, by the buttons."""
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright (extra dev)")
    path = find_browser()
    if path is None:
        pytest.skip("browser tests need a chromium; on Debian: apt install chromium")
    from stepfold.web.page import build, serve

    training = offered(tmp_path / "runs", [])
    (tmp_path / "sooner.py").write_text(SOONER)
    training.program = (sys.executable, str(tmp_path / "sooner.py"))
    page = build(models, training.root, training)
    address = serve(page, "127.0.0.1", None, own_alone=True)
    try:
        with playwright.sync_playwright() as started:
            chromium = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
            tab = chromium.new_page(viewport={"width": 1200, "height": 1000})
            tab.set_default_timeout(300_000)
            tab.goto(address)
            tab.get_by_role("tab", name="Runs").click()
            tab.get_by_text("Start a run", exact=True).click()
            tab.get_by_label("Name of the run").fill("mine")
            if shots := os.environ.get("STEPFOLD_SHOTS"):
                tab.screenshot(path=f"{shots}/form.png", full_page=True)
            tab.get_by_label("Optimiser steps").fill("2000")
            tab.get_by_role("button", name="Plan", exact=True).click()
            tab.locator("#training-said pre", has_text="peak memory").wait_for()
            if shots:
                tab.screenshot(path=f"{shots}/plan.png", full_page=True)
            tab.get_by_role("button", name="Start", exact=True).click()
            tab.locator("#training-state", has_text=re.compile(r"mine running, step [1-9]\d* of 2,000")).wait_for()
            tab.locator("#about", has_text="running").wait_for()
            if shots:
                tab.screenshot(path=f"{shots}/running.png", full_page=True)
            tab.get_by_role("button", name="Stop the chosen run").click()
            tab.locator("#training-state", has_text="mine stopped").wait_for()
            assert training.processes["mine"].wait() == 130
            saved = max(int(folder.name) for folder in (training.root / "mine" / "checkpoints").iterdir())
            assert saved > 0
            tab.get_by_role("button", name="Resume the chosen run").click()
            tab.locator("#training-state", has_text=re.compile(r"mine running, step [1-9]\d* of 2,000")).wait_for()
            chromium.close()
    finally:
        for process in training.processes.values():
            process.terminate()
            process.wait()
        page.close()
    shutil.rmtree(training.root)
