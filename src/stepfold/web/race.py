"""The race as a picture to share: both draw the same images, and each clock shows what was measured."""

import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from stepfold.errors import UserError
from stepfold.evaluation.preview import wrapped
from stepfold.training.runs import writing
from stepfold.web.drawing import Drawing, Models, Request, draw_student, draw_teacher

REPEATS, ENOUGH_SEC = 3, 20.0  # passes of each, unless so many seconds have gone by
FRAMES, SHORTEST_SEC, LONGEST_SEC, HOLD_SEC = 36, 3.0, 8.0, 3.0  # of the animation
PANEL, GAP, EDGE = 330, 4, 24  # pixels: of a panel, between its images, around it
INK, SOFT, LINE, ACCENT, OTHER, GROUND = "#22262a", "#62686e", "#dcdcd5", "#2a6f8e", "#b4632a", "#fcfcfa"
ENDINGS = (".gif", ".png")


@dataclass(frozen=True)
class Lane:
    """One of the two.

    Attributes:
        who: its name.
        drawings: what it has drawn, in order; the last one is whole.
        passes: how often it was measured; these are the drawings of the pass with the median time.
    """

    who: str
    drawings: Sequence[Drawing]
    passes: int

    @property
    def sec(self) -> float:
        """What it took, with the decoding of its pictures."""
        return self.drawings[-1].sec

    def at(self, sec: float) -> tuple[Drawing | None, int]:
        """What is seen of it after so many seconds, and how many steps it has taken."""
        whole = self.drawings[-1]
        if sec >= whole.sec:
            return whole, whole.of
        seen = [drawing for drawing in self.drawings[:-1] if drawing.sec <= sec]
        taken = bisect_right(whole.clock, sec) if len(whole.clock) == whole.of else 0
        return (seen[-1] if seen else None), taken


@dataclass(frozen=True)
class Race:
    """Both lanes, and what they drew."""

    prompt: str
    about: str
    student: Lane
    teacher: Lane

    @property
    def said(self) -> str:
        """The result in words, of the measured times."""
        ours, theirs = self.student, self.teacher
        calls = f"{ours.drawings[-1].calls} call{'s' * (ours.drawings[-1].calls > 1)} instead of "
        return f"{calls}{theirs.drawings[-1].calls}: {times(theirs.sec / ours.sec)} times as fast"


def run_race(models: Models, request: Request) -> Race:
    """Lets each draw alone, several times; the pass with the median time is the one that is shown."""
    student = [[draw_student(models, request)] for _ in range(REPEATS)]
    teacher = [list(draw_teacher(models, request))]
    while len(teacher) < REPEATS and sum(drawings[-1].sec for drawings in teacher) < ENOUGH_SEC:
        teacher.append(list(draw_teacher(models, request)))
    lanes = (_lane("Student", student), _lane("Teacher", teacher))
    return Race(request.prompt, models.about, *lanes)


def _lane(who: str, passes: list[list[Drawing]]) -> Lane:
    middle = statistics.median_low(drawings[-1].sec for drawings in passes)
    return Lane(who, next(drawings for drawings in passes if drawings[-1].sec == middle), len(passes))


def draw_frame(race: Race, sec: float, speed: float = 1.0) -> Image.Image:
    """The race after so many seconds.

    Args:
        race: measured.
        sec: by both clocks.
        speed: at which it is shown, which the picture says unless it is 1.
    """
    width = 2 * PANEL + 3 * EDGE
    heads = wrapped(f"“{race.prompt}”", width - 2 * EDGE, 19, 2)
    top = 20 + 26 * len(heads) + 14
    frame = Image.new("RGB", (width, top + 30 + PANEL + 62 + 50), GROUND)
    pen = ImageDraw.Draw(frame)
    for i, line in enumerate(heads):
        pen.text((EDGE, 18 + 26 * i), line, fill=INK, font_size=19)
    for i, (lane, colour) in enumerate(((race.student, ACCENT), (race.teacher, OTHER))):
        _draw_lane(frame, lane, sec, EDGE + i * (PANEL + EDGE), top, colour)
    foot = top + 30 + PANEL + 62
    done = sec >= race.teacher.sec
    pen.text((EDGE, foot), race.said if done else "Each clock was measured alone.", fill=INK, font_size=14)
    shown = "" if 0.95 < speed < 1.05 else f" Shown at {speed:.2g} times the speed."
    passes = f"Medians of {race.student.passes} and {race.teacher.passes} passes.{shown}"
    about = wrapped(race.about.replace("×", "x"), width - 2 * EDGE, 12, 1)
    pen.text((width - EDGE - _width(passes, 12), foot + 2), passes, fill=SOFT, font_size=12)
    pen.text((EDGE, foot + 24), "".join(about), fill=SOFT, font_size=12)
    return frame


def _width(text: str, size: int) -> int:
    return int(ImageFont.load_default(size).getlength(text))


def _draw_lane(frame: Image.Image, lane: Lane, sec: float, left: int, top: int, colour: str) -> None:
    pen = ImageDraw.Draw(frame)
    whole = lane.drawings[-1]
    drawing, taken = lane.at(sec)
    pen.text((left, top), lane.who, fill=INK, font_size=17)
    calls = f"{whole.calls} network call{'s' * (whole.calls != 1)} an image"
    pen.text((left + PANEL - _width(calls, 14), top + 3), calls, fill=SOFT, font_size=14)
    top += 30
    columns = 1 if len(whole.pictures) == 1 else 2 if len(whole.pictures) <= 4 else 3
    cell = (PANEL - GAP * (columns - 1)) // columns
    for i in range(len(whole.pictures)):
        x, y = left + i % columns * (cell + GAP), top + i // columns * (cell + GAP)
        pen.rectangle((x, y, x + cell - 1, y + cell - 1), fill=LINE)
        if drawing:
            frame.paste(_fitted(drawing.pictures[i], cell), (x, y))
    top += PANEL + 10
    share = min(1.0, sec / lane.sec)
    pen.rectangle((left, top, left + PANEL - 1, top + 9), fill=LINE)
    if share > 0:
        pen.rectangle((left, top, left + max(1, round(PANEL * share)) - 1, top + 9), fill=colour)
    is_done = sec >= lane.sec
    steps = f"done: {counted(whole.of)}" if is_done else f"{taken} of {counted(whole.of)}"
    pen.text((left, top + 16), steps, fill=colour if is_done else SOFT, font_size=14)
    clock = in_time(min(sec, lane.sec))
    pen.text((left + PANEL - _width(clock, 17), top + 14), clock, fill=INK, font_size=17)


def _fitted(picture: Image.Image, cell: int) -> Image.Image:
    """A picture in a square cell, whole, on the page's ground; small ones are enlarged smoothly."""
    scale = cell / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    fitted = picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    if fitted.size == (cell, cell):
        return fitted
    ground = Image.new("RGB", (cell, cell), LINE)
    ground.paste(fitted, ((cell - size[0]) // 2, (cell - size[1]) // 2))
    return ground


def times(ratio: float) -> str:
    """`1.4`, `22`: two digits, or all before the point."""
    return f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:,.0f}"


def counted(steps: int) -> str:
    """`1 step`, `2 steps`."""
    return f"{steps} step{'s' * (steps != 1)}"


def in_time(sec: float) -> str:
    """`35 ms`, `1.24 s`."""
    return f"{1000 * sec:.0f} ms" if sec < 1 else f"{sec:.2f} s"


def moments_of(race: Race) -> list[float]:
    """The seconds that the animation shows, rising, with that in which the student is done."""
    end = race.teacher.sec if race.teacher.sec > race.student.sec else race.student.sec
    return sorted({end * i / FRAMES for i in range(FRAMES + 1)} | {race.student.sec, race.teacher.sec})


def as_gif(race: Race) -> bytes:
    """The race as an animation, in real time where that is neither too short nor too long to watch; else it says so."""
    moments = moments_of(race)
    shown_sec = min(LONGEST_SEC, max(SHORTEST_SEC, moments[-1]))
    speed = moments[-1] / shown_sec
    frames = [draw_frame(race, sec, speed) for sec in moments]
    palette = frames[-1].quantize(255, dither=Image.Dither.NONE)
    plain: list[Any] = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    waits = [round(1000 * (b - a) / speed) for a, b in pairwise(moments)]
    durations = [max(20, wait) for wait in waits] + [round(1000 * HOLD_SEC)]
    buffer = BytesIO()
    plain[0].save(
        buffer, format="GIF", save_all=True, append_images=plain[1:], duration=durations, loop=0, optimize=False
    )
    return buffer.getvalue()


def as_png(race: Race) -> bytes:
    """The moment in which the student is done."""
    buffer = BytesIO()
    draw_frame(race, min(race.student.sec, race.teacher.sec)).save(buffer, format="PNG")
    return buffer.getvalue()


def check_name(path: Path) -> None:
    """Refuses a name that says neither GIF nor PNG.

    Raises:
        UserError: naming both.
    """
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"--race {path} is neither .gif nor .png; give a name that ends in one of them")


def save_race(race: Race, path: Path) -> None:
    """The race as a GIF, or its photo finish as a PNG, as the name ends."""
    check_name(path)
    data = as_gif(race) if path.suffix.lower() == ".gif" else as_png(race)
    with writing(path) as part:
        part.write_bytes(data)
