"""The page in a real browser. It asks no other host for anything, and nothing that it is given breaks it."""

import json
import re
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import pytest
from browser import find_browser

from stepfold.errors import UserError
from stepfold.web.drawing import Models, draw_student, draw_teacher, load_models

PATIENCE = 20_000  # milliseconds; two busy cores are slow


@pytest.fixture(scope="module")
def served(runs: Path) -> Iterator[tuple[Any, str]]:
    """The page of the bundled student, and its address; whatever the server connects to must be this machine."""
    pytest.importorskip("gradio", reason="the page needs gradio (extra web)")
    from stepfold.web.page import build, serve

    outside: list[Any] = []
    connect = socket.socket.connect

    def watched(self: socket.socket, to: Any) -> Any:
        if isinstance(to, tuple) and to[0] not in ("127.0.0.1", "localhost", "::1"):
            outside.append(to)
        return connect(self, to)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched)
        patch.setattr(Models, "usual_count", 1)  # nine take two busy cores too long
        page = build(load_models(Path("emoji-student"), None, "cpu"), runs)
        yield page, serve(page, "127.0.0.1", None)
        page.close()
    assert outside == []


@pytest.fixture(scope="module")
def address(served: tuple[Any, str]) -> str:
    return served[1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright (extra dev)")
    path = find_browser()
    if path is None:
        pytest.skip("browser tests need a chromium; on Debian: apt install chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end there must have been no request to another host, no failed one and no error."""
    pages, asked, wrong = [], [], []

    def open_(width: int = 1200, height: int = 900, **settings: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **settings)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.on("response", lambda response: wrong.append(response.url) if response.status >= 400 else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        page.wait_for_selector('#teacher [data-steps="20"]')
        pages.append(context)
        return page

    yield open_
    for context in pages:
        context.close()
    assert asked and [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert wrong == []


def both(page: Any, prompt: str, count: int = 1) -> list[str]:
    """Waits until student and teacher show this many whole pictures of a prompt; returns their addresses."""
    shown = page.wait_for_function(
        """([prompt, count]) => {
            const places = ['#student img', '#teacher [data-steps="20"] img'];
            const found = places.map(place => [...document.querySelectorAll(place)]);
            const whole = found.every(all => all.length === count && all.every(img => img.alt.endsWith(': ' + prompt)));
            return whole && found.flat().map(img => img.src);
        }""",
        arg=[prompt, count],
    )
    return shown.json_value()


def costs_of_both(page: Any) -> list[str]:
    """What the whole pictures of student and teacher cost; the teacher's may be drawn once more for the last key."""
    shown = page.wait_for_function(
        """() => {
            const costs = [...document.querySelectorAll('.cost')].map(cost => cost.innerText);
            return costs.length === 2 && costs[1].includes('40 network calls') && costs;
        }"""
    )
    return shown.json_value()


def test_typing_draws_two_pictures(open_page: Callable[..., Any]) -> None:
    page = open_page()
    prompt = page.get_by_label("Prompt")
    first = both(page, prompt.input_value())
    prompt.fill("")
    prompt.press_sequentially("pizza on white background", delay=30)
    second = both(page, "pizza on white background")
    assert len({*first, *second}) == 4
    costs = costs_of_both(page)
    assert "1 network call" in costs[0] and "40 network calls" in costs[1]
    ours, theirs = (int(text.split(" ms")[0].replace(",", "")) for text in costs)
    assert 0 < ours < theirs


def test_the_student_follows_every_key_and_the_teacher_forms(open_page: Callable[..., Any]) -> None:
    """While one types, the student's picture changes; the teacher's previews of the last prompt come in order."""
    page = open_page()
    page.evaluate(
        """() => { window.seen = [];
            new MutationObserver(() => {
                const student = document.querySelector('#student img');
                const panel = document.querySelector('#teacher [data-steps]');
                const teacher = document.querySelector('#teacher img');
                window.seen.push([student?.alt, teacher?.alt, Number(panel?.dataset.steps)]);
            }).observe(document.querySelector('#pair'), {subtree: true, childList: true, attributes: true}); }"""
    )
    prompt, typed = page.get_by_label("Prompt"), ""
    prompt.fill("")
    for piece in ("fox", " on green", " background"):  # the next keys wait for no more than the student's picture
        prompt.press_sequentially(piece, delay=30)
        typed += piece
        page.locator(f'#student img[alt="Student, seed 2: {typed}"]').wait_for()
    both(page, "fox on green background")
    seen = page.evaluate("window.seen")
    students = list(dict.fromkeys(student for student, *_ in seen if student))
    assert len(students) >= 3 and students[-1].endswith(": fox on green background")
    steps = [steps for _, teacher, steps in seen if teacher and teacher.endswith(": fox on green background")]
    assert steps == sorted(steps) and steps[0] < 20 == steps[-1]


def test_a_picture_that_is_drawn_is_shown_although_a_newer_prompt_waits(
    open_page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stepfold.web import drawing as module

    begun, go = threading.Event(), threading.Event()

    def student(models: Any, request: Any) -> Any:
        if request.prompt == "pizza":
            begun.set()
            go.wait(PATIENCE / 1000)
        return draw_student(models, request)

    page = open_page()
    monkeypatch.setattr(module, "draw_student", student)
    page.evaluate(
        """() => { window.seen = [];
            new MutationObserver(() => window.seen.push(document.querySelector('#student img')?.alt))
                .observe(document.querySelector('#pair'), {subtree: true, childList: true, attributes: true}); }"""
    )
    page.get_by_label("Prompt").fill("pizza")
    assert begun.wait(PATIENCE / 1000)
    with page.expect_response(lambda response: "queue/join" in response.url):
        page.get_by_label("Prompt").fill("fox")
    go.set()
    both(page, "fox")
    assert "Student, seed 2: pizza" in page.evaluate("window.seen")


def enter(page: Any, label: str, value: str) -> None:
    page.get_by_label(label, exact=True).fill(value)
    page.keyboard.press("Enter")


def test_every_control_changes_what_it_names(open_page: Callable[..., Any]) -> None:
    """Guidance the teacher's picture alone, as this student was taught one scale; seed, pictures and steps the rest."""
    page = open_page()
    prompt = page.get_by_label("Prompt").input_value()
    ours, theirs = both(page, prompt)
    enter(page, "number input for Teacher's guidance", "6")
    page.wait_for_function("before => document.querySelector('#teacher img').src !== before", arg=theirs)
    again = both(page, prompt)
    assert again[0] == ours and again[1] != theirs
    enter(page, "Seed", "7")
    page.locator('#teacher [data-steps="20"] img[alt*="seed 7:"]').wait_for()
    assert not {*both(page, prompt)} & {*again, theirs}
    enter(page, "number input for Images", "3")
    assert len(set(both(page, prompt, 3))) == 6
    assert "seed 9" in page.locator("#student img").last.get_attribute("alt")
    enter(page, "number input for Student's steps", "4")
    page.get_by_text("4 network calls an image", exact=True).wait_for()
    both(page, prompt, 3)
    page.get_by_text("The teacher's walk").click()
    pictures = page.locator(".walk img:visible")
    pictures.first.wait_for()
    assert pictures.count() == 14
    assert page.locator(".walk li").first.inner_text().split() == ["t", "=", "1.57", "1.00"]


def test_the_head_says_what_runs_and_the_ratio_what_was_measured(open_page: Callable[..., Any]) -> None:
    page = open_page()
    assert "Student of emoji after 6,000 training steps, taught at guidance 3" in page.locator("#top").inner_text()
    assert "320 names on 12 background colours" in page.locator("#controls").inner_text()
    said = page.locator(".ratio").inner_text()
    assert re.search(r"^40 → 1 calls, [\d.,]+× as fast", said), said
    assert re.search(r"medians of the teacher's \d+ and the student's \d+ drawings? of 1 image$", said), said
    widths = page.locator(".panel .bar div").evaluate_all("bars => bars.map(bar => bar.style.width)")
    assert widths == ["100%", "100%"]


def test_a_random_prompt_a_new_seed_and_an_address_that_keeps_them(open_page: Callable[..., Any]) -> None:
    page = open_page()
    prompt = page.get_by_label("Prompt")
    before = prompt.input_value()
    page.locator("#random").click()
    page.wait_for_function("before => document.querySelector('#prompt textarea').value !== before", arg=before)
    page.locator("#dice").click()
    page.wait_for_function("() => new URLSearchParams(location.search).get('seed') > 2")
    chosen, address = prompt.input_value(), page.url
    both(page, chosen)
    page.goto(address)
    first = both(page, chosen)
    assert page.get_by_label("Seed", exact=True).input_value() in address and len(first) == 2


def test_more_steps_and_the_race_can_be_saved(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.locator("#as-strip").click()
    page.locator(".strip img").first.wait_for()
    assert page.locator(".strip span").all_inner_texts() == ["1 step", "2 steps", "4 steps", "8 steps"]
    assert page.locator(".strip img").first.get_attribute("src") == page.locator("#student img").get_attribute("src")
    page.locator("#as-race").click()
    page.locator(".race img").wait_for()
    for name, start in (("race.gif", b"GIF89a"), ("race.png", b"\x89PNG")):
        with page.expect_download() as kept:
            page.locator(f"a[download='{name}']").click()
        assert kept.value.suggested_filename == name
        assert Path(kept.value.path()).read_bytes().startswith(start)
    enter(page, "Seed", "-4")
    page.locator("#student .panel .note").wait_for()
    page.locator("#as-race").click()
    page.locator("#extra .note", has_text="Seed must be a number").wait_for()


def test_examples_draw(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.get_by_text("rocket on black background").click()
    both(page, "rocket on black background")


def test_bad_input_is_a_message(open_page: Callable[..., Any], capfd: Any) -> None:
    """In the student's panel, naming the control; both panels stay, and a right value draws again."""
    page = open_page()
    prompt = page.get_by_label("Prompt")
    start = prompt.input_value()
    for label, named, wrong, right in (
        ("number input for Student's steps", "Student's steps", "99", "1"),
        ("Seed", "Seed", "-5", "3"),
        ("number input for Teacher's guidance", "Teacher's guidance", "50", "3"),
    ):
        enter(page, label, wrong)
        page.locator("#student .panel .note", has_text=f"{named} must be a number from ").wait_for()
        page.locator("#teacher .panel .blank").wait_for()
        enter(page, label, right)
        both(page, start)
    assert page.locator(".toast-body").count() == 0 and "Traceback" not in capfd.readouterr().err
    prompt.fill("")
    page.locator("#student .panel .note", has_text="Type a prompt.").wait_for()
    assert page.locator("#pair h2").all_inner_texts() == ["Student", "Teacher"]
    prompt.fill("x" * 400)
    assert len(prompt.input_value()) == 300
    prompt.evaluate(
        """box => {
            box.removeAttribute('maxlength'); box.value = 'y'.repeat(400); box.dispatchEvent(new Event('input'));
        }"""
    )
    page.get_by_text("The prompt has 400 characters; 300 is the most.").wait_for()
    prompt.fill("a cat")
    both(page, "a cat")
    assert page.get_by_text("Traceback").count() == 0


@pytest.mark.parametrize(
    "prompt",
    ["<script>document.title='bad'</script>", "<img src=x onerror=\"document.title='bad'\">", "${document.title='bad'}",
     "{{document.title='bad'}}", "</section><b>bold</b>"],
)  # fmt: skip
def test_a_prompt_is_text_and_nothing_else(open_page: Callable[..., Any], prompt: str) -> None:
    page = open_page()
    page.get_by_label("Prompt").fill(prompt)
    both(page, prompt)
    assert page.title() == "stepfold"
    assert page.locator("#pair script, #pair b:text('bold'), #pair [onerror]").count() == 0


def choose(page: Any, dropdown: str, name: str) -> None:
    page.locator(f"{dropdown} input").click()
    page.locator(dropdown).get_by_role("option", name=name, exact=True).click()


def test_a_visitor_does_not_wait_for_what_another_has_overtaken(
    open_page: Callable[..., Any], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One visitor asks for twelve drawings at once: the last alone is drawn, and then the next visitor's."""
    from stepfold.web import drawing as module

    begun: list[Any] = []
    ended: list[Any] = []
    all_asked = threading.Event()

    def student(models: Any, request: Any) -> Any:
        begun.append((request.prompt, request.seed))
        all_asked.wait(PATIENCE / 1000)
        return draw_student(models, request)

    def teacher(models: Any, request: Any) -> Iterator[Any]:
        for drawing in draw_teacher(models, request):
            ended.extend([(request.prompt, request.seed)] * drawing.whole)
            yield drawing

    monkeypatch.setattr(module, "draw_student", student)
    monkeypatch.setattr(module, "draw_teacher", teacher)
    events = json.loads(raw(address, "config"))["dependencies"]
    event = next(event["id"] for event in events if (len(event["inputs"]), len(event["outputs"])) == (6, 4))
    for seed in range(12):
        values = {"data": ["fox", 1, 3, seed, 2, 0], "fn_index": event, "session_hash": "busy"}
        raw(address, "gradio_api/queue/join", json.dumps(values).encode(), **{"Content-Type": "application/json"})
    all_asked.set()
    page = open_page()
    last = [("fox", 11), (page.get_by_label("Prompt").input_value(), 2)]
    assert begun[-2:] == last == ended and len(begun) <= 3


def test_who_finds_the_queue_full_is_told(browser: Any, served: tuple[Any, str], monkeypatch: Any) -> None:
    page, address = served
    context = browser.new_context()
    try:
        with monkeypatch.context() as full:
            full.setattr(page._queue, "max_size", 0)
            visitor = context.new_page()
            visitor.set_default_timeout(PATIENCE)
            visitor.goto(address)
            visitor.locator("#student .panel .note", has_text="reload the page").wait_for()
        visitor.reload()
        both(visitor, visitor.get_by_label("Prompt").input_value())
    finally:
        context.close()


def test_a_desk_shows_pictures_and_controls_at_once(open_page: Callable[..., Any]) -> None:
    page = open_page(1280, 800)
    enter(page, "number input for Images", "8")
    both(page, page.get_by_label("Prompt").input_value(), 8)
    student, teacher, controls = (page.locator(f"{part}").bounding_box() for part in (
        "#student .panel", "#teacher .panel", "#controls"))  # fmt: skip
    assert 0 < teacher["x"] - student["x"] - student["width"] < 40
    assert teacher["x"] + teacher["width"] < controls["x"]
    assert controls["y"] + controls["height"] < 800
    assert len({button.bounding_box()["y"] for button in page.locator("#examples button").all()}) == 1
    for place in (".min_value", ".fine", ".cost span", "#controls label span"):
        assert contrast(page, place) >= 4.5, place


def contrast(page: Any, place: str) -> float:
    """Of the first such text to what is behind it, as WCAG 2 has it."""
    colours = page.locator(f"{place}:visible").first.evaluate(
        """element => {
            const numbers = colour => colour.match(/[0-9.]+/g).map(Number);
            let behind = element;
            while (behind && numbers(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
            return [numbers(getComputedStyle(element).color),
                    behind ? numbers(getComputedStyle(behind).backgroundColor) : [255, 255, 255]];
        }"""
    )
    bright, dark = sorted((luminance(colour[:3]) for colour in colours), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(colour: list[float]) -> float:
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_runs_are_shown_and_compared(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.get_by_role("tab", name="Runs").click()
    page.locator(".run.a h3", has_text="deeper/second").wait_for()
    choose(page, "#run-a", "first")
    page.locator(".run.a h3", has_text="first").wait_for()
    choose(page, "#run-b", "deeper/second")
    page.locator(".run.b h3", has_text="deeper/second").wait_for()
    assert page.locator(".run p").all_inner_texts() == ["finished, 3 steps"] * 2
    page.get_by_text("Settings that differ").click()
    assert page.locator(".differ td:visible").all_inner_texts() == ["0", "7"]
    assert page.locator(".differ table").evaluate("table => getComputedStyle(table).borderTopWidth") == "0px"
    page.locator(".logged summary").click()
    assert page.get_by_role("img", name="loss over the steps of first and deeper/second", exact=True).count() == 1
    assert "learning rate" in page.locator(".logged").inner_text()
    assert page.get_by_label("Reset").count() == 0
    assert page.locator(".previews figcaption").all_inner_texts() == ["first, step 3", "deeper/second, step 3"]
    for typed, step in (("1", 1), ("999", 3)):
        enter(page, "number input for Previews at step", typed)
        page.get_by_text(f"deeper/second, step {step}").wait_for()
    page.get_by_label("Show the report").check()
    page.locator("iframe").nth(1).wait_for()
    for i, title in enumerate(("first", "second")):
        assert title in page.frame_locator("iframe").nth(i).locator("h1").inner_text()


def test_broken_runs_leave_the_page_whole(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.get_by_role("tab", name="Runs").click()
    page.locator(".run.a").wait_for()
    choose(page, "#run-a", "broken")
    page.get_by_text("The settings cannot be read").wait_for()
    page.get_by_text("The preview of step 1 is no PNG.").wait_for()
    page.get_by_label("Show the report").check()
    assert page.frame_locator("iframe").first.locator("h1").inner_text() == "hello"
    assert page.title() == "stepfold"
    choose(page, "#run-a", "first")
    page.locator(".run.a h3", has_text="first").wait_for()


def test_a_run_that_goes_on_is_followed(open_page: Callable[..., Any], runs: Path) -> None:
    """New rows, new previews and new runs appear by themselves."""
    going, other = runs / "going", runs / "later"
    shutil.copytree(runs / "first", going)
    try:
        (going / "previews" / "step_000003.png").unlink()
        rows = (going / "metrics.jsonl").read_text().splitlines(keepends=True)
        (going / "metrics.jsonl").write_text(rows[0])
        page = open_page()
        page.get_by_role("tab", name="Runs").click()
        page.locator(".run.a").wait_for()
        choose(page, "#run-a", "going")
        page.get_by_text("stopped, step 1 of 3", exact=True).wait_for()
        page.get_by_text("going, step 2").wait_for()
        (going / "metrics.jsonl").write_text("".join(rows))
        shutil.copy(runs / "first" / "previews" / "step_000003.png", going / "previews")
        shutil.copytree(runs / "first", other)
        page.get_by_text("finished, 3 steps").wait_for()
        page.get_by_text("going, step 3").wait_for()
        choose(page, "#run-b", "later")
        page.locator(".run.b h3", has_text="later").wait_for()
    finally:
        shutil.rmtree(going)
        shutil.rmtree(other, ignore_errors=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(open_page: Callable[..., Any], scheme: str) -> None:
    page = open_page(390, color_scheme=scheme)
    page.get_by_text("The teacher's walk").click()
    page.locator(".walk img:visible").first.wait_for()
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) <= 390
    boxes = [page.locator(f"{place} img").first.bounding_box() for place in ("#student", "#teacher")]
    assert all(box["width"] > 150 for box in boxes) and boxes[0]["y"] == boxes[1]["y"] < 600
    page.get_by_role("tab", name="Runs").click()
    page.locator(".curves svg").first.wait_for()
    for box in page.locator("input:is([type=range], [type=number]):visible, label:has([type=checkbox]):visible").all():
        assert box.bounding_box()["height"] >= 24, box
    page.get_by_label("Show the report").check()
    assert page.locator("iframe").first.bounding_box()["width"] > 370
    page.locator("#run-b input").click()
    menu = page.locator("#run-b .options").evaluate("menu => getComputedStyle(menu).backgroundColor")
    assert menu.startswith("rgb("), menu  # no alpha, so it is 1
    assert page.evaluate(width) <= 390
    red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")[:3]
    assert (max(red, green, blue) < 60) == (scheme == "dark")


def test_it_can_be_used_from_the_keyboard(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.get_by_label("Prompt").focus()
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.innerText")
        )
    for name in ("Student's steps", "Teacher's guidance", "number input for Images", "Seed"):
        assert any(name in str(label) for label in reached), reached
    assert any("The teacher's walk" in str(label) for label in reached), reached
    page.get_by_role("tab", name="Runs").focus()
    page.keyboard.press("Enter")
    page.locator(".previews img").wait_for()
    reached = {}
    for _ in range(16):
        page.keyboard.press("Tab")
        label, outline = page.evaluate(
            """(seen => [seen.getAttribute('aria-label') || seen.closest('label')?.innerText || seen.innerText,
                         getComputedStyle(seen).outlineStyle])(document.activeElement)"""
        )
        reached[label.strip()] = outline
    for name in ("Run", "Compare with", "number input for Previews at step", "deeper/second, step 3"):
        assert name in reached, reached
    assert reached["range slider for Previews at step"] == "solid" == reached["Show the report"], reached


REFUSED = (
    "gradio_api/file=/etc/passwd", "gradio_api/file=../../../../etc/passwd", "gradio_api/file=..%2f..%2fetc%2fpasswd",
    "gradio_api/file%3D/etc/passwd", "gradio_api/file/etc/passwd", "file=/etc/passwd", "file/etc/passwd",
    "gradio_api/proxy=https://example.org/", "gradio_api/info/../file=/etc/passwd", "gradio_api//file=/etc/passwd",
    "static/../../../../etc/passwd", "assets/..%2f..%2f..%2fetc%2fpasswd", "gradio_api/upload",
    "gradio_api/custom_component/x/client/component/style.css", "gradio_api/runs",
    "gradio_api/stream/a/b/c/playlist-file",
)  # fmt: skip


@pytest.mark.parametrize("path", REFUSED)
def test_no_file_is_served(address: str, runs: Path, path: str) -> None:
    for tried in (path, path.replace("/etc/passwd", str(runs / "prompts.txt"))):
        with pytest.raises(HTTPError) as refused:
            raw(address, tried)
        assert refused.value.code in (400, 403, 404, 405), tried


def raw(address: str, path: str, data: bytes | None = None, **headers: str) -> bytes:
    with urlopen(HttpRequest(address + path, data=data, headers=headers), timeout=30) as answer:
        return answer.read()


def test_nothing_can_be_uploaded_or_called_as_an_api(address: str) -> None:
    for path in ("gradio_api/upload", "gradio_api/call/both", "gradio_api/run/both", "gradio_api/api/both"):
        with pytest.raises(HTTPError) as refused, urlopen(HttpRequest(address + path, data=b"{}"), timeout=30):
            pass
        assert refused.value.code == 404, path


def test_large_requests_and_other_names_are_refused(address: str) -> None:
    """A name of another site that leads here (DNS rebinding) is not served."""
    large = HttpRequest(address + "gradio_api/queue/join", data=b" " * (2**16 + 1))
    with pytest.raises(HTTPError) as refused, urlopen(large, timeout=30):
        pass
    assert refused.value.code == 413
    assert raw(address, "", Host="localhost")
    with pytest.raises(HTTPError) as refused:
        raw(address, "", Host="evil.example")
    assert refused.value.code == 400


def test_the_browser_is_told_to_ask_nobody_else(address: str) -> None:
    with urlopen(address, timeout=30) as answer:
        assert answer.headers["content-security-policy"].startswith("default-src 'self' ")
        assert "frame-ancestors 'self'" in answer.headers["content-security-policy"]


def test_a_slow_first_answer_is_waited_for(monkeypatch: pytest.MonkeyPatch, runs: Path) -> None:
    """gradio gives up on a page that does not answer within three seconds, as on a busy machine."""
    pytest.importorskip("gradio", reason="the page needs gradio (extra web)")
    from stepfold.web.page import LAUNCHES, serve

    class Page:
        def __init__(self, slow: int) -> None:
            self.slow, self.closed = slow, 0

        def launch(self, **settings: Any) -> Any:
            if self.closed < self.slow:
                raise ValueError("When localhost is not accessible, a shareable link must be created.")
            return None, "address", None

        def close(self, verbose: bool) -> None:
            self.closed += 1

    assert serve(Page(LAUNCHES - 1), "127.0.0.1", None) == "address"
    with pytest.raises(UserError, match="this machine is busy, so try again"):
        serve(Page(LAUNCHES), "127.0.0.1", None)


def test_a_taken_port_is_one_line(address: str, runs: Path) -> None:
    from stepfold.web.page import build, serve

    port = int(address.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(UserError, match=f"cannot serve at --host 127.0.0.1 --port {port} .*choose another --port"):
        serve(build(load_models(Path("emoji-student"), None, "cpu"), runs), "127.0.0.1", port)


@pytest.mark.parametrize("names", [["first"], []])
def test_there_is_no_report_where_there_are_no_runs(runs: Path, tmp_path: Path, names: list[str]) -> None:
    pytest.importorskip("gradio", reason="the page needs gradio (extra web)")
    from stepfold.web.page import build

    page = build(load_models(Path("emoji-student"), None, "cpu"), runs if names else tmp_path)
    boxes = [part["props"] for part in page.config["components"] if part["props"].get("label") == "Show the report"]
    assert [box["visible"] for box in boxes] == [bool(names)]


def test_the_command_serves_at_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless told otherwise; and with the teacher that is named."""
    pytest.importorskip("gradio", reason="the page needs gradio (extra web)")
    from stepfold.cli import main
    from stepfold.web import page

    seen: list[Any] = []

    class Page:
        def block_thread(self) -> None:
            seen.append("waits")

    def build(models: Any, runs: Path, training: Any) -> Page:
        seen.append((Path(models.teacher.source).parts[-2], models.teacher is models.pipeline, runs))
        return Page()

    def serve(page: Any, host: str, port: int | None, own_alone: bool) -> str:
        seen.append((host, port, own_alone))
        return "address"

    monkeypatch.setattr(page, "build", build)
    monkeypatch.setattr(page, "serve", serve)
    for arguments, own in ([], True), (["--teacher", "emoji"], False):
        seen.clear()
        monkeypatch.setattr(sys, "argv", ["stepfold", "demo", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        assert seen == [("emoji", own, Path("runs")), ("127.0.0.1", None, False), "waits"]


def test_without_gradio_the_command_says_what_to_install(no_gradio: None, capsys: Any, monkeypatch: Any) -> None:
    from stepfold.cli import main

    monkeypatch.setattr(sys, "argv", ["stepfold", "demo"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: the page needs gradio: pip install 'gradio>=6.29,<7'\n"
