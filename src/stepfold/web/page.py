"""The page's layout: which control calls what. It asks nothing of other hosts, and serves no file of the disk."""

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stepfold.errors import UserError
from stepfold.web import markup
from stepfold.web.drawing import (
    FIRST_SEED,
    GAMMA_LABEL,
    MAX_GUIDANCE,
    MAX_PICTURES,
    MAX_PROMPT,
    MAX_SEED,
    MAX_STEPS,
    PICTURES_LABEL,
    SEED_LABEL,
    STEPS_LABEL,
    TEACHER_STEPS,
    Models,
    Paces,
    checked,
    draw_both,
    draw_strip,
)
from stepfold.web.race import run_race
from stepfold.web.runs import Run, find_runs, last_preview, newest, read_run, stamp, stride
from stepfold.web.training import LOOPBACK, Training, is_foreign

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
try:
    import gradio as gr
except ImportError:
    raise UserError("the page needs gradio: pip install 'gradio>=6.29,<7'") from None

QUEUE, REFRESH_SEC = 64, 3
NAMES = json.dumps(["prompt", "steps", "guidance", "seed", "images", "gamma"])  # of the inputs, in the page's address
KEEP_IN_ADDRESS = (
    f"(...values) => {{ const kept = new URLSearchParams(); {NAMES}.forEach((name, i) => kept.set(name, values[i])); "
    "history.replaceState(null, '', '?' + kept); }"
)
TAKE_FROM_ADDRESS = (
    f"(...values) => {{ const kept = new URLSearchParams(location.search); return {NAMES}.map((name, i) => "
    "!kept.has(name) ? values[i] : i === 0 ? kept.get(name) : Number(kept.get(name))); }"
)
NOBODY = ("none", "")  # of a list: what it shows, and its value, which is no run's name
FIRST = "Drawing …"
BUSY = (
    "Too many are waiting here, or the page does not answer. Wait a little, then change something or reload the page."
)
LARGEST_POST = 2**16  # bytes
LAUNCHES = 3
STYLE = Path(__file__).with_name("page.css")
SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
SERVED = (
    "app_id", "cancel", "heartbeat/", "info", "login_check", "queue/", "reset", "startup-events", "theme.css", "token",
    "user",
)  # fmt: skip
"""What of gradio's own interface the page calls. The rest (files, uploads, proxies, streams) is closed."""
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
PRIVATE: Any = {"api_visibility": "private", "show_progress": "hidden", "preprocess": False}
"""Values come as the browser sends them; what is wrong with them is said on the page, not in gradio's own words."""
ONE_AT_A_TIME: Any = {"concurrency_id": "draw", "concurrency_limit": 1}
READING: Any = {"concurrency_id": "runs", "concurrency_limit": 1}


def build(models: Models, runs: Path, training: Training | None = None) -> Any:
    """The page as gradio Blocks.

    Args:
        models: what the first tab draws with.
        runs: the folder whose runs the second tab shows.
        training: what the second tab may start; None for nothing.
    """
    with gr.Blocks(title="stepfold", analytics_enabled=False) as page:
        gr.HTML(markup.top(models), elem_id="top")
        with gr.Tabs():
            with gr.Tab("Draw"):
                _draw_tab(page, models)
            with gr.Tab("Runs") as tab:
                _runs_tab(tab, runs, training)
    return page.queue(max_size=QUEUE, default_concurrency_limit=1, api_open=False)


class Parts(NamedTuple):
    """What the tab shows and listens to: inputs are prompt, steps, guidance, seed, number of images, fresh noise."""

    inputs: list[Any]
    student: Any
    teacher: Any
    ratio: Any
    walk: Any
    extra: Any
    as_strip: Any
    as_race: Any


def _parts(models: Models) -> Parts:
    usual = min(MAX_GUIDANCE, max(least := models.teacher.no_guidance, models.card.recipe.guidance))
    prompt = gr.Textbox(models.examples[0], label="Prompt", max_lines=4, max_length=MAX_PROMPT, elem_id="prompt")
    with gr.Row(elem_id="examples"):
        for text in models.examples:
            gr.Button(text, size="sm").click(None, None, prompt, js=f"() => {json.dumps(text)}", **PRIVATE)
        gr.Button("Random prompt", size="sm", elem_id="random").click(models.random_prompt, None, prompt, **PRIVATE)
    with gr.Row(elem_id="bench"):
        with gr.Row(elem_id="pair"):
            student = gr.HTML(markup.waiting("Student", FIRST), min_width=120, elem_id="student")
            teacher = gr.HTML(markup.waiting("Teacher"), min_width=120, elem_id="teacher")
        with gr.Column(elem_id="controls", min_width=150):
            steps = gr.Slider(1, MAX_STEPS, models.usual_steps, step=1, label=STEPS_LABEL, buttons=[], min_width=150)
            guidance = gr.Slider(least, MAX_GUIDANCE, usual, step=0.5, label=models.guidance_label, buttons=[],
                                 min_width=150)  # fmt: skip
            count = gr.Slider(
                1, MAX_PICTURES, models.usual_count, step=1, label=PICTURES_LABEL, buttons=[], min_width=150
            )
            seed = gr.Number(FIRST_SEED, label=SEED_LABEL, precision=0, minimum=0, maximum=MAX_SEED, min_width=150)
            gamma = gr.Slider(
                0, 1, 0, step=0.05, label=GAMMA_LABEL, visible=models.takes_gamma, buttons=[], min_width=150
            )
            gr.Button("New seed", size="sm", elem_id="dice").click(
                None, None, seed, js=f"() => Math.floor(Math.random() * {MAX_SEED})", **PRIVATE
            )
            gr.HTML(markup.explained(models))
    ratio = gr.HTML(elem_id="ratio")
    with gr.Row(elem_id="more"):
        as_strip = gr.Button("1, 2, 4, 8 steps", size="sm", elem_id="as-strip")
        as_race = gr.Button("The race, to share", size="sm", elem_id="as-race")
    extra = gr.HTML(elem_id="extra")
    with gr.Accordion("The teacher's walk", open=False, elem_id="walk"):
        walk = gr.HTML(markup.note("It appears when the teacher has finished."))
    return Parts([prompt, steps, guidance, seed, count, gamma], student, teacher, ratio, walk, extra, as_strip, as_race)


def _draw_tab(page: Any, models: Models) -> None:
    inputs, student, teacher, ratio, walk, extra, as_strip, as_race = _parts(models)
    paces = Paces()
    newest: dict[str | None, Any] = {}
    """session -> what it asked for last, until that is drawn"""

    async def asks(text: Any, k: Any, scale: Any, first: Any, n: Any, gamma: Any, request: gr.Request) -> list[Any]:
        """Notes it as it arrives, before the queue, in which a newer drawing might overtake it; nothing is kept out."""
        newest[request.session_hash] = text, k, scale, first, n, gamma
        return [gr.validate(True, "")] * len(inputs)

    async def nothing(*values: Any) -> None:
        """All has been done by `asks`."""

    def both(text: Any, k: Any, scale: Any, first: Any, n: Any, gamma: Any, request: gr.Request) -> Iterator[Any]:
        """The student's picture, then the teacher's as it forms; nothing more once something newer is asked for."""
        values = text, k, scale, first, n, gamma

        def is_old() -> bool:
            return newest.get(request.session_hash) != values

        if is_old():
            return
        shown: Any = None
        with _in_words() as said:
            asked = checked(models, *values)
            step_sec = paces.median("teacher", asked)[0]
            for ours, theirs in draw_both(models, asked, step_sec and step_sec / TEACHER_STEPS, is_old):
                if is_old() and not ours:  # the student follows every key
                    return
                seen = markup.walk_view(theirs.walk) if theirs and theirs.walk else gr.skip()
                if ours:
                    paces.note("student", asked, ours.sec)
                    shown = markup.panel("Student", asked, ours, markup.by_then(theirs) if step_sec else "")
                if theirs and theirs.whole:
                    paces.note("teacher", asked, theirs.sec)
                yield (
                    shown if ours else gr.skip(),
                    markup.panel("Teacher", asked, theirs) if theirs else gr.skip(),
                    seen,
                    markup.headline(models, asked, paces) if theirs and theirs.whole else gr.skip(),
                )
        if not is_old():
            leaves(request)
        if said.text and shown:
            yield gr.skip(), markup.waiting("Teacher", said.text), gr.skip(), gr.skip()
        elif said.text:
            yield markup.waiting("Student", said.text), markup.waiting("Teacher"), gr.skip(), ""

    def strip(*values: Any) -> Any:
        with _in_words() as said:
            asked = checked(models, *values)
            return markup.strip_view(asked, draw_strip(models, asked))
        return markup.note(said.text)

    def race(*values: Any) -> Iterator[Any]:
        yield markup.note("Racing: student and teacher draw alone, up to three times each.")
        with _in_words() as said:
            yield markup.race_view(run_race(models, checked(models, *values)))
        if said.text:
            yield markup.note(said.text)

    def leaves(request: gr.Request) -> None:
        newest.pop(request.session_hash, None)

    changes = [each.change for each in inputs]
    gr.on(changes, nothing, inputs, None, trigger_mode="multiple", validator=asks, concurrency_limit=None, **PRIVATE)
    drawn = gr.on([page.load, *changes], both, inputs, [student, teacher, walk, ratio], trigger_mode="always_last",
                  validator=asks, **ONE_AT_A_TIME, **PRIVATE)  # fmt: skip
    as_strip.click(strip, inputs, extra, **ONE_AT_A_TIME, **PRIVATE)
    as_race.click(race, inputs, extra, **ONE_AT_A_TIME, **PRIVATE)
    gr.on(changes, None, inputs, None, js=KEEP_IN_ADDRESS, **PRIVATE)
    page.load(None, inputs, inputs, js=TAKE_FROM_ADDRESS, **PRIVATE)
    busy = json.dumps(markup.waiting("Student", BUSY))
    drawn.failure(None, None, student, js=f"() => {busy}", **PRIVATE)
    page.unload(leaves)


def _runs_tab(tab: Any, root: Path, training: Training | None) -> None:
    names = find_runs(root)
    with gr.Row():
        a = gr.Dropdown(names, value=newest(root, names), label="Run", min_width=150, elem_id="run-a")
        b = gr.Dropdown([NOBODY, *names], value=NOBODY[1], label="Compare with", min_width=150, elem_id="run-b")
    timer = gr.Timer(REFRESH_SEC, active=False)
    if training:
        from stepfold.web.training_tab import training_form  # which imports gradio too

        training_form(training, a, timer, _in_words, PRIVATE)
    about = gr.HTML(markup.note("Reading the runs …"), elem_id="about")
    at = gr.Slider(0, 1, 1, step=1, label="Previews at step", visible=False, buttons=[], elem_id="at")
    grids = gr.HTML(elem_id="grids")
    curves = gr.HTML(elem_id="curves")
    wanted = gr.Checkbox(False, label="Show the report", visible=bool(names), elem_id="wanted")
    reports = gr.HTML()
    last = gr.State(("", 0))

    def chosen(*values: Any) -> list[Run]:
        return [read_run(root, name) for name in values if name in find_runs(root)]

    def menus(first: Any, there: list[str]) -> list[Any]:
        value = first if first in there else newest(root, there)
        return [gr.Dropdown(there, value=value), gr.Dropdown([NOBODY, *there])]

    def slider(runs: Sequence[Run], top: int, step: float) -> Any:
        return gr.Slider(0, max(top, 1), step, step=stride(runs), visible=any(run.previews for run in runs))

    def show(first: Any, second: Any, wants: Any) -> list[Any]:
        with _in_words() as said:
            there, runs = find_runs(root), chosen(first, second)
            top = last_preview(runs)
            lists = menus(first, there)
            if not runs:
                text = "Choose a run." if there else f"No runs in {root} yet; stepfold distill makes one."
                return [*lists, markup.note(text), "", slider([], 0, 0), "", gr.Checkbox(visible=False), "",
                        (stamp(root, ()), 0)]  # fmt: skip
            report = markup.reports(runs) if wants else ""
            seen = (stamp(root, (first, second)), top)
            about, drawn, grids = markup.summary(runs), markup.curves(runs), markup.previews(runs, top)
            return [*lists, about, drawn, slider(runs, top, top), grids, gr.Checkbox(visible=True), report, seen]
        return [gr.skip(), gr.skip(), markup.note(said.text), *[gr.skip()] * 6]

    def again(first: Any, second: Any, step: Any, before: Any) -> list[Any]:
        with _in_words() as said:
            now = stamp(root, (first, second))
            if now == before[0]:
                return [gr.skip()] * 7
            there, runs = find_runs(root), chosen(first, second)
            lists = menus(first, there)
            if not runs:
                return [*lists, *[gr.skip()] * 4, (now, 0)]
            top = last_preview(runs)
            at_step = top if _number(step) >= before[1] else _number(step)  # who looks at the last one goes on to do so
            moved = slider(runs, top, at_step) if top != before[1] else gr.skip()
            about, drawn, grids = markup.summary(runs), markup.curves(runs), markup.previews(runs, at_step)
            return [*lists, about, drawn, moved, grids, (now, top)]
        return [gr.skip(), gr.skip(), markup.note(said.text), *[gr.skip()] * 4]

    def slide(first: Any, second: Any, step: Any) -> Any:
        with _in_words() as said:
            return markup.previews(chosen(first, second), _number(step))
        return markup.note(said.text)

    def report(first: Any, second: Any, wants: Any) -> Any:
        with _in_words() as said:
            return markup.reports(chosen(first, second)) if wants else ""
        return markup.note(said.text)

    whole = [a, b, about, curves, at, grids, wanted, reports, last]
    gr.on([tab.select, a.change, b.change], show, [a, b, wanted], whole, **READING, **PRIVATE)
    tab.select(lambda: gr.Timer(active=True), None, timer, **PRIVATE)
    timer.tick(again, [a, b, at, last], [a, b, about, curves, at, grids, last], **READING, **PRIVATE)
    at.change(slide, [a, b, at], grids, trigger_mode="always_last", **READING, **PRIVATE)
    wanted.change(report, [a, b, wanted], reports, **READING, **PRIVATE)


def _number(value: Any) -> float:
    """What stands in a number box; where that is none, more than any."""
    return value if isinstance(value, int | float) else math.inf


@dataclass
class _Said:
    text: str = ""


@contextmanager
def _in_words() -> Iterator[_Said]:
    """A user's mistake becomes `text`; of anything else the page says so much and the terminal shows the rest."""
    said = _Said()
    try:
        yield said
    except UserError as error:
        said.text = str(error)
    except Exception:
        logging.getLogger("stepfold").exception("while drawing the page")
        said.text = "That did not work; the terminal says why."


class Closed:
    """ASGI middleware: closes what the page does not use, and lets the browser ask no other host for anything."""

    def __init__(self, app: Any, own_alone: bool = False) -> None:
        self.app, self.own_alone = app, own_alone

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        headers = dict(scope["headers"])
        foreign = self.own_alone and scope["method"] != "GET" and is_foreign(headers)
        refused = 403 if foreign else _refusal(scope["method"], scope["path"], headers)
        if refused:
            plain = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": refused, "headers": plain})
            return await send({"type": "http.response.body", "body": b"not here\n"})
        return await self.app(scope, receive, guarded)


def _refusal(method: str, path: str, headers: dict[bytes, bytes]) -> int:
    """The status that a request is refused with, or 0."""
    if _is_closed(path):
        return 404
    length = headers.get(b"content-length", b"")
    return 413 if method == "POST" and not (length.isdigit() and int(length) <= LARGEST_POST) else 0


def _is_closed(path: str) -> bool:
    name = path.lstrip("/")
    if name.startswith("gradio_api/"):
        return not name.removeprefix("gradio_api/").startswith(SERVED)
    return name.startswith(("file", "proxy", "upload", "stream", "custom_component", "dev/"))


def serve(page: Any, host: str, port: int | None, own_alone: bool = False) -> str:
    """Begins to serve in a thread of its own; returns the address. `own_alone`: its own pages' requests alone count.

    Raises:
        UserError: the port is taken, or the host is none of this machine's.
    """
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    hosts = [*LOOPBACK] if host in LOOPBACK else ["*"]  # no other site's name may lead to this machine's own address
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(Closed, own_alone=own_alone)]
    theme = gr.themes.Base(
        primary_hue="sky", neutral_hue="zinc", radius_size="md",
        font=list(SYSTEM_FONTS), font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    )  # fmt: skip
    settings: Any = dict(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, show_error=False,
        inbrowser=False, footer_links=[], run_history=False, allowed_paths=[], max_file_size=1, ssr_mode=False,
        mcp_server=False, pwa=False, enable_monitoring=False, strict_cors=True, theme=theme,
        css=STYLE.read_text(encoding="utf-8"), app_kwargs={"middleware": guards, "openapi_url": None},
    )  # fmt: skip
    try:
        for _ in range(LAUNCHES):
            try:
                return page.launch(**settings)[1]
            except ValueError:  # gradio looks at its own page and gives up after three seconds; the next look is faster
                page.close(verbose=False)
        raise UserError("the page did not answer itself within three seconds; this machine is busy, so try again")
    except OSError as error:
        place = f"--host {host}" + (f" --port {port}" if port else "")
        raise UserError(f"cannot serve at {place} ({error}); choose another --port, or leave --host out") from None
