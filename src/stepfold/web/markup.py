"""The page's own pieces of HTML. Whatever comes from outside goes through `Markup.format`, which escapes it."""

import base64
import re
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

from markupsafe import Markup
from PIL import Image

from stepfold.errors import UserError
from stepfold.evaluation.curves import meaning
from stepfold.evaluation.report import duration
from stepfold.web.drawing import TEACHER_STEPS, Drawing, Models, Paces, Request, Walk
from stepfold.web.race import Race, as_gif, as_png, times
from stepfold.web.runs import (
    Run,
    compared,
    count_of,
    curves_of,
    preview_at,
    quality_of,
    report_of,
    scores_of,
    time_left,
)

SCORES = {
    "latent_error": "latent error {:.3f}",
    "accuracy": "accuracy {:.1%}",
    "clip_score": "CLIP score {:.1f}",
    "fd": "FD {:.4f}",
    "diversity": "diversity {:.3f}",
}
SIDES = ("a", "b")
OVER_CALLS = "against the teacher at as many network calls: solid the student, dashed the teacher"


def join(parts: Iterable[str]) -> Markup:
    """Pieces one after another."""
    return Markup("").join(parts)


def address_of(picture: Image.Image) -> str:
    """A picture as a data address, so that the page has no files to ask for."""
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def note(text: Any) -> Markup:
    """A short message."""
    return Markup('<p class="note" role="status">{}</p>').format(str(text))


def fine(text: str) -> Markup:
    """A text to be read once."""
    return Markup('<p class="fine">{}</p>').format(text)


def top(models: Models) -> Markup:
    """The head of the page: what it runs."""
    return Markup("<h1>stepfold</h1><p>{}</p>").format(models.about)


def explained(models: Models) -> Markup:
    """What the models know, and what the numbers mean, for who asks."""
    known = Markup('<p class="fine">{}</p>').format(models.vocabulary) if models.vocabulary else Markup("")
    return known + Markup('<details class="fine"><summary>What the numbers mean</summary>{}</details>').format(
        models.fine_print
    )


def by_then(teacher: Drawing | None) -> str:
    """How far the teacher's own clock had come when the student was done."""
    if teacher is None:
        return "done in the teacher's first step"
    return f"done when the teacher had taken {teacher.steps} of {counted(teacher.of, 'step')}"


def panel(who: str, request: Request, drawing: Drawing, beside: str = "") -> Markup:
    """Pictures with what they cost, and a bar of the steps taken; `beside` is what the other one had done by then."""
    pictures = join(
        Markup('<img src="{}" alt="{}">').format(address_of(picture), f"{who}, seed {seed}: {request.prompt}")
        for seed, picture in zip(request.seeds, drawing.pictures, strict=True)
    )
    taken = counted(drawing.of, "step")
    return Markup(
        '<section class="panel" aria-label="{who}" data-steps="{steps}">'
        '<div class="head"><h2>{who}</h2><span>{taken}</span></div>'
        '<div class="pictures n{count}">{pictures}</div>'
        '<div class="bar" aria-hidden="true"><div style="width: {share}%"></div></div>'
        '<p class="cost"><b>{ms}</b> ms<span>{calls}</span><span>{beside}</span></p></section>'
    ).format(
        who=who,
        steps=drawing.steps,
        taken=taken if drawing.whole else f"{drawing.steps} of {taken}",
        count=len(drawing.pictures),
        pictures=pictures,
        share=f"{100 * drawing.steps / drawing.of:.0f}",
        ms=f"{1000 * drawing.sec:,.0f}",
        calls=calls_in_words(drawing),
        beside=beside,
    )


def calls_in_words(drawing: Drawing) -> str:
    """How often the network was called, per picture; both branches of guidance are calls."""
    said = counted(drawing.calls, "network call")
    return said + (" an image" if len(drawing.pictures) > 1 else "")


def headline(models: Models, request: Request, paces: Paces) -> Markup:
    """`40 calls → 1, 14 times as fast`, from medians of what this page drew; empty until both have drawn."""
    (ours, ours_n), (theirs, theirs_n) = (paces.median(who, request) for who in ("student", "teacher"))
    if ours is None or theirs is None:
        return Markup("")
    return Markup('<p class="ratio"><b>{} → {}</b> calls, <b>{}×</b> as fast<span>{}</span></p>').format(
        TEACHER_STEPS * models.branches, request.steps, times(theirs / ours),
        f"measured here: medians of the teacher's {theirs_n} and the student's {counted(ours_n, 'drawing')} of "
        f"{counted(request.count, 'image')}",
    )  # fmt: skip


def strip_view(request: Request, drawings: Sequence[tuple[int, Drawing]]) -> Markup:
    """The student's first picture in several numbers of steps, side by side."""
    columns = join(
        Markup('<li><span>{}</span><img src="{}" alt="{}"></li>').format(
            counted(steps, "step"), address_of(drawing.pictures[0]),
            f"Student, {counted(steps, 'step')}, seed {request.seed}: {request.prompt}",
        )
        for steps, drawing in drawings
    )  # fmt: skip
    return Markup('<ol class="walk strip">{}</ol>').format(columns)


def race_view(race: Race) -> Markup:
    """The race as an animation, with links that save it and its photo finish."""
    gif, png = (base64.b64encode(data).decode() for data in (as_gif(race), as_png(race)))
    return Markup(
        '<figure class="race"><img src="data:image/gif;base64,{gif}" alt="{said}"><figcaption>{said} '
        '<a download="race.gif" href="data:image/gif;base64,{gif}">Save the GIF</a> '
        '<a download="race.png" href="data:image/png;base64,{png}">Save the photo finish (PNG)</a></figcaption>'
        "</figure>"
    ).format(gif=gif, png=png, said=f"{race.prompt}: {race.said}.")


def counted(number: int, what: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {what}{'s' * (number != 1)}"


def waiting(who: str, message: str = "") -> Markup:
    """A panel that has no picture to show: it comes, or the message says why not."""
    return Markup(
        '<section class="panel" aria-label="{who}"><div class="head"><h2>{who}</h2></div>'
        '<div class="pictures n1"><div class="blank">{said}</div></div><p class="cost">&nbsp;</p></section>'
    ).format(who=who, said=note(message) if message else "")


def walk_view(walk: Walk) -> Markup:
    """The pictures and the equivalent noise along the teacher's walk."""
    columns = join(
        Markup(
            '<li><span>t = {t}</span><img src="{picture}" alt="x_0 seen from t = {t}">'
            '<img class="map" src="{noise}" alt="equivalent noise at t = {t}"><span>{similarity}</span></li>'
        ).format(t=f"{t:.2f}", picture=address_of(picture), noise=address_of(noise), similarity=f"{similarity:.2f}")
        for t, picture, noise, similarity in zip(walk.t, walk.pictures, walk.noises, walk.similarity, strict=True)
    )
    return Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="The teacher\'s walk"><ol class="walk">{}</ol></div>'
        "<p class='fine'>From noise (left) to picture (right), first seed. Above: the picture x<sub>0</sub> that the "
        "teacher's velocity points at from there. Below: one channel of the equivalent noise (x<sub>t</sub> &minus; "
        "cos t x<sub>0</sub>) / sin t, with the x<sub>0</sub> where the walk ends, and its cosine similarity to the "
        "noise that the walk began with. A picture noised afresh would have similarity 1 at every t; on the teacher's "
        "own walk it falls, and the student learns from the states on it (arXiv:2511.20410, Figs. 3, 8 and 9).</p>"
    ).format(columns)


def summary(runs: Sequence[Run]) -> Markup:
    """What the runs are at, and where their settings differ."""
    cards = join(_card(side, run) for side, run in zip(SIDES, runs, strict=False))
    counts = {found.get("n") for _, found in map(scores_of, runs) if "fd" in found}
    if len(counts) > 1:
        cards += note("These runs were measured with different numbers n of pictures: their FD do not compare.")
    if len(runs) < 2:
        return Markup('<div class="sides">{}</div>').format(cards)
    rows = join(
        Markup("<tr><th scope='row'>{}</th><td>{}</td><td>{}</td></tr>").format(
            breakable(name), *(breakable(short(value)) for value in values)
        )
        for name, values in compared(*runs).items()
    )
    table = Markup(
        "<details class='differ'><summary>Settings that differ</summary><div class='scroll'><table><thead><tr>"
        "<th scope='col'>setting</th><th scope='col' class='a'>{}</th><th scope='col' class='b'>{}</th></tr></thead>"
        "<tbody>{}</tbody></table></div></details>"
    ).format(*(breakable(run.name) for run in runs), rows)
    return Markup('<div class="sides">{}</div>{}').format(cards, table if rows else "")


def _card(side: str, run: Run) -> Markup:
    share = 100 * min(1.0, run.step / run.steps) if run.steps else 0
    steps, scores = scores_of(run)
    said = [form.format(scores[name]) for name, form in SCORES.items() if name in scores]
    count, left = count_of(run), time_left(run)
    on = f" (n = {count:,})" if count else ""
    return Markup(
        '<section class="run {side}" aria-label="{name}"><h3>{name}</h3><p>{progress}</p>'
        '<div class="bar" aria-hidden="true"><div style="width: {share}%"></div></div>{scores}{problem}</section>'
    ).format(
        side=side,
        name=run.name,
        progress=run.progress + (f", about {duration(left)} left" if left is not None else ""),
        share=f"{share:.0f}",
        scores=Markup("<p>{}: {}{}</p>").format(counted(steps, "step"), ", ".join(said), on) if said else "",
        problem=note(run.problem) if run.problem else "",
    )


def plan_view(name: str, said: str) -> Markup:
    """What `stepfold plan` said of a run."""
    return Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="Plan of {name}"><pre>{said}</pre></div>'
    ).format(name=name, said=said)


def started(runs: Sequence[tuple[str, str]]) -> Markup:
    """The runs that the page started, each with what it does."""
    rows = join(Markup("<li><b>{}</b> {}</li>").format(breakable(name), said) for name, said in runs)
    return Markup('<ul class="started">{}</ul>').format(rows) if runs else Markup("")


def breakable(name: str) -> Markup:
    """A name that may go on in a new line after a dot, an underscore or a slash."""
    return Markup("<wbr>").join(re.split(r"(?<=[._/])(?=.)", name))


def short(value: Any) -> str:
    """A setting's value as yaml has it, cut where it is long; nothing is `none`."""
    text = _plain(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return str(value)


def curves(runs: Sequence[Run]) -> Markup:
    """What the runs reached and logged, a panel each: over network calls first, then over steps; the rest folded."""
    names = " and ".join(run.name for run in runs)
    reached = [
        Markup("<figure><figcaption><b>{}</b><span>{}</span></figcaption>{}</figure>").format(
            name, OVER_CALLS, _labelled(svg, f"{name} over network calls of {names}")
        )
        for name, svg in quality_of(runs).items()
    ]
    figures = {
        name: Markup("<figure><figcaption><b>{}</b><span>{}</span></figcaption>{}</figure>").format(
            breakable(name), meaning(name), _labelled(svg, f"{name} over the steps of {names}")
        )
        for name, svg in curves_of(runs).items()
    }
    if not figures and not reached:
        return note("Nothing logged yet.")
    first = [*reached, *[figures.pop(name) for name in ("latent_error",) if name in figures]]
    lead = Markup('<div class="curves">{}</div>').format(join(first)) if first else Markup("")
    rest = Markup("<details class='logged'{}><summary>{}</summary><div class='curves'>{}</div></details>").format(
        "" if first else Markup(" open"), counted(len(figures), "other curve"), join(figures.values())
    )
    return lead + (rest if figures else Markup(""))


def _labelled(svg: str, label: str) -> Markup:
    """An SVG element of matplotlib's as a picture with a name."""
    rest = svg.removeprefix('<svg aria-hidden="true" ')
    return Markup('<svg role="img" aria-label="{}" {}').format(label, Markup(rest))  # noqa: S704 - drawn from numbers


def previews(runs: Sequence[Run], step: float) -> Markup:
    """The last preview grid of each run up to a step."""

    def one(side: str, run: Run) -> Markup:
        try:
            found = preview_at(run, step)
        except UserError as error:
            return note(error)
        if found is None:
            return note(f"{run.name} has no previews yet.")
        return Markup(
            '<figure class="{side}"><figcaption>{name}, step {step}</figcaption><div class="scroll" tabindex="0" '
            'role="region" aria-label="{name}, step {step}"><img src="{address}" alt="teacher and student at step '
            '{step}, same prompts and noise"></div></figure>'
        ).format(side=side, name=run.name, step=f"{found[0]:,}", address=found[1])

    return Markup('<div class="previews">{}</div>').format(join(map(one, SIDES, runs)))


def reports(runs: Sequence[Run]) -> Markup:
    """The reports, in frames that may run nothing."""

    def one(side: str, run: Run) -> Markup:
        try:
            page = report_of(run)
        except UserError as error:
            return note(f"{run.name}: {error}" if run.has_report else f"{run.name} has no report yet.")
        return Markup('<iframe class="{}" sandbox="" title="report of {}" srcdoc="{}"></iframe>').format(
            side, run.name, page
        )

    return Markup('<div class="reports">{}</div>').format(join(map(one, SIDES, runs)))
