"""The page's own pieces of HTML. Whatever comes from outside goes through `Markup.format`, which escapes it."""

import base64
import re
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

from markupsafe import Markup
from PIL import Image

from stepfold.errors import UserError
from stepfold.web.drawing import Drawing, Request, Walk
from stepfold.web.runs import Run, compared, curves_of, preview_at, report_of, scores_of

SCORES = {
    "accuracy": "accuracy {:.1%}",
    "clip_score": "CLIP score {:.1f}",
    "fd": "FD {:.4f}",
    "diversity": "diversity {:.3f}",
}
SIDES = ("a", "b")
LOGGED = {
    "kept": "share of the walks that the filter kept",
    "loss": "what is minimised",
    "squared_error": "the loss without its weights",
    "tangent_norm": "how far the student is from consistent",
    "tangent_norm_0": "tangent norm, first quarter of t: near the picture",
    "tangent_norm_1": "tangent norm, second quarter of t",
    "tangent_norm_2": "tangent norm, third quarter of t",
    "tangent_norm_3": "tangent norm, last quarter of t: near noise",
    "w_phi": "learned log-weight of the adaptive weighting",
    "grad_norm": "size of the gradient, before clipping",
    "lr": "learning rate",
    "generator_loss": "adversarial loss of the student",
    "discriminator_loss": "loss of the heads; 2 is knowing nothing",
    "skipped": "1 where the step was left out",
}
"""What the logged numbers are; docs/reading.md says more."""


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


def panel(who: str, request: Request, drawing: Drawing) -> Markup:
    """Pictures with what they cost."""
    pictures = join(
        Markup('<img src="{}" alt="{}">').format(address_of(picture), f"{who}, seed {seed}: {request.prompt}")
        for seed, picture in zip(request.seeds, drawing.pictures, strict=True)
    )
    return Markup(
        '<section class="panel" aria-label="{who}" data-steps="{steps}">'
        '<div class="head"><h2>{who}</h2><span>{taken}</span></div>'
        '<div class="pictures n{count}">{pictures}</div>'
        '<p class="cost"><b>{ms}</b> ms<span>{calls}</span></p></section>'
    ).format(
        who=who,
        steps=drawing.steps,
        taken=counted(drawing.of, "step") if drawing.whole else f"step {drawing.steps} of {drawing.of}",
        count=len(drawing.pictures),
        pictures=pictures,
        ms=f"{1000 * drawing.sec:,.0f}",
        calls=calls_in_words(drawing),
    )


def calls_in_words(drawing: Drawing) -> str:
    """How often the network was called, per picture; both branches of guidance go through it as one batch."""
    said = counted(drawing.calls, "network call")
    if drawing.branches > 1:
        said += ", two at a time"
    return said + (f", {len(drawing.pictures)} pictures at once" if len(drawing.pictures) > 1 else "")


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
    if "n" in scores:
        said.append(f"n = {scores['n']:,.0f}")
    return Markup(
        '<section class="run {side}" aria-label="{name}"><h3>{name}</h3><p>{progress}</p>'
        '<div class="bar" aria-hidden="true"><div style="width: {share}%"></div></div>{scores}{problem}</section>'
    ).format(
        side=side,
        name=run.name,
        progress=run.progress,
        share=f"{share:.0f}",
        scores=Markup("<p>{}: {}</p>").format(counted(steps, "step"), ", ".join(said)) if said else "",
        problem=note(run.problem) if run.problem else "",
    )


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
    """What the runs logged, a panel each, with what it is."""
    names = " and ".join(run.name for run in runs)
    figures = join(
        Markup("<figure><figcaption><b>{}</b><span>{}</span></figcaption>{}</figure>").format(
            breakable(name), LOGGED.get(name, ""), _labelled(svg, f"{name} over the steps of {names}")
        )
        for name, svg in curves_of(runs).items()
    )
    return Markup('<div class="curves">{}</div>').format(figures) if figures else note("Nothing logged yet.")


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
