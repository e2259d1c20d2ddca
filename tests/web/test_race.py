"""The race: what it shows is what was measured."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from stepfold.cli import app
from stepfold.errors import UserError
from stepfold.web import race as module
from stepfold.web.drawing import Drawing, Models, Request, draw_both, draw_teacher, load_models
from stepfold.web.race import (
    ACCENT,
    FRAMES,
    OTHER,
    PANEL,
    Lane,
    Race,
    as_gif,
    as_png,
    draw_frame,
    in_time,
    moments_of,
    run_race,
    save_race,
)


def drawing(shade: int, steps: int, of: int, sec: float, clock: tuple[float, ...] = (), branches: int = 1) -> Drawing:
    pictures = [Image.new("RGB", (64, 64), (shade, 0, 0)) for _ in range(9)]
    return Drawing(pictures, steps, of, branches, sec, clock)


@pytest.fixture
def race() -> Race:
    """A student of half a second; a teacher of four steps, of which the first and the third were seen on the way."""
    clock = (1.0, 2.0, 3.0, 3.9)
    teacher = [
        drawing(90, 1, 4, 1.0, clock[:1], 2), drawing(150, 3, 4, 3.0, clock[:3], 2), drawing(250, 4, 4, 4.0, clock, 2),
    ]  # fmt: skip
    return Race(
        "a cat", "Student of x.", Lane("Student", [drawing(200, 1, 1, 0.5, (0.4,))], 3), Lane("Teacher", teacher, 2)
    )


def filled(frame: Image.Image, colour: str) -> int:
    """Pixels of a colour in the row of the frame that has most of them: the length of a progress bar."""
    wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return int((np.asarray(frame) == wanted).all(2).sum(1).max())


def test_a_lane_shows_what_it_had_drawn_by_then(race: Race) -> None:
    def at(sec: float) -> tuple[int | None, int]:
        seen, steps = race.teacher.at(sec)
        return (None if seen is None else seen.steps), steps

    assert [at(sec) for sec in (0, 0.99, 1.0, 2.5, 3.5, 3.95, 4.0, 99)] == [
        (None, 0), (None, 0), (1, 1), (1, 2), (3, 3), (3, 4), (4, 4), (4, 4),
    ]  # fmt: skip


def test_bars_and_pictures_follow_the_measured_times(race: Race) -> None:
    for sec in (0.0, 0.25, 0.5, 2.0, 4.0):
        frame = draw_frame(race, sec)
        assert filled(frame, ACCENT) == pytest.approx(PANEL * min(1, sec / 0.5), abs=1)
        assert filled(frame, OTHER) == pytest.approx(PANEL * sec / 4, abs=1)
    reds = [
        {colour for _, colour in draw_frame(race, sec).getcolors(1 << 20) if colour[1:] == (0, 0)}
        for sec in (0.4, 0.5, 4)
    ]
    assert reds == [set(), {(200, 0, 0)}, {(200, 0, 0), (250, 0, 0)}]
    assert race.said == "1 call instead of 8: 8.0 times as fast"


def test_the_gif_lasts_as_long_as_was_measured_and_the_png_is_the_finish(race: Race, tmp_path: Path) -> None:
    assert 0.5 in moments_of(race) and len(moments_of(race)) <= FRAMES + 3
    save_race(race, tmp_path / "race.gif")
    with Image.open(tmp_path / "race.gif") as gif:
        seconds = 0
        for i in range(gif.n_frames - 1):
            gif.seek(i)
            seconds += gif.info["duration"] / 1000
        assert gif.n_frames > 20 and seconds == pytest.approx(4, rel=0.1)  # real time: it is neither short nor long
        gif.seek(gif.n_frames - 1)
        assert gif.info["duration"] == 3000
    slow = Race(race.prompt, race.about, race.student, Lane("Teacher", [drawing(9, 4, 4, 80.0, (1, 2, 3, 4))], 1))
    with Image.open(io.BytesIO(as_gif(slow))) as gif:
        seconds = sum((gif.seek(i), gif.info["duration"])[1] for i in range(gif.n_frames - 1)) / 1000
    assert seconds == pytest.approx(8, rel=0.1)
    with Image.open(io.BytesIO(as_png(race))) as png:
        assert (np.asarray(png) == np.asarray(draw_frame(race, 0.5))).all()
    with pytest.raises(UserError, match=r"race.mp4 is neither .gif nor .png"):
        save_race(race, tmp_path / "race.mp4")


def test_the_pass_with_the_median_time_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three passes each; of a slow teacher one."""
    seconds = iter([0.3, 0.1, 0.2])

    def student(models: Any, request: Any) -> Drawing:
        return drawing(1, 1, 1, next(seconds))

    passes: list[float] = []

    def teacher(models: Any, request: Any) -> Any:
        passes.append(sec[len(passes)])
        yield drawing(2, 20, 20, passes[-1])

    class Named:
        about = "x"

    models: Any = Named()
    monkeypatch.setattr(module, "draw_student", student)
    monkeypatch.setattr(module, "draw_teacher", teacher)
    sec = [5.0, 3.0, 4.0]
    found = run_race(models, Request("a cat"))
    assert (found.student.sec, found.student.passes, found.teacher.sec, found.teacher.passes) == (0.2, 3, 4.0, 3)
    seconds, sec = iter([0.3, 0.1, 0.2]), [25.0]
    passes.clear()
    assert run_race(models, Request("a cat")).teacher.passes == 1


@pytest.fixture(scope="module")
def emoji() -> Models:
    return load_models(Path("emoji-student"), None, "cpu")


def test_the_clock_of_a_drawing_runs_with_its_steps(emoji: Models) -> None:
    *_, whole = draw_teacher(emoji, Request("a pizza", guidance=3.0))
    assert len(whole.clock) == 20 and list(whole.clock) == sorted(whole.clock)
    assert whole.clock[0] > 0 and whole.clock[-1] < whole.sec


@pytest.mark.parametrize("step_sec", [None, 1e9, 0.0])
def test_what_happens_first_by_its_clock_comes_first(emoji: Models, step_sec: float | None) -> None:
    """The student at once where the teacher would still be in its first step; else once the teacher's clock has come
    as far as the student's."""
    events = list(draw_both(emoji, Request("a pizza", guidance=3.0), step_sec))
    students = [(i, student) for i, (student, _) in enumerate(events) if student]
    assert len(students) == 1
    place, student = students[0]
    teachers = [teacher for _, teacher in events if teacher]
    assert teachers[-1].whole
    if step_sec == 0.0:
        assert all(teacher.sec < student.sec for _, teacher in events[:place] if teacher)
        assert events[place][1] is not None and (events[place][1].sec >= student.sec or events[place][1].whole)
    else:
        assert place == 0 and events[0][1] is None


def test_a_student_that_is_out_of_date_does_not_wait_for_its_clock(emoji: Models) -> None:
    first = next(draw_both(emoji, Request("a pizza", guidance=3.0), 0.0, lambda: True))
    assert first[0] is not None and first[1] is None
    old = iter([False, True])
    events = draw_both(emoji, Request("a pizza", 8, guidance=3.0), 0.0, lambda: next(old, True))
    student, teacher = next(events)
    assert student is not None and teacher is not None and teacher.steps == 1 and teacher.sec < student.sec


@pytest.mark.long
def test_the_command_writes_a_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nine small images, here of two, which take less time."""
    assert load_models(Path("emoji-student"), None, "cpu").usual_count == 9
    monkeypatch.setattr(Models, "usual_count", 2)
    out = tmp_path / "race.png"
    command = ["sample", "emoji-student", "a pizza", "--race"]
    result = CliRunner().invoke(app, [*command, str(out)])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n" and "racing: 2 images, 3 times 1 network calls" in result.stderr
    with Image.open(out) as png:
        assert filled(png.convert("RGB"), ACCENT) == PANEL and 0 < filled(png.convert("RGB"), OTHER) < PANEL
    for words, reason in (
        (["b", "--race", str(out)], "one prompt, and 2 are given"),
        (["--race", str(tmp_path / "x.mp4")], "neither .gif nor .png"),
        (["--race", str(out), "--steps", "9"], "not for 9"),
        (["--race", str(out), "--guidance", "7"], "taught at 3 alone"),
        (["--race", str(out), "--sampler", "consistency"], "leave out --sampler"),
    ):
        result = CliRunner().invoke(app, ["sample", "emoji-student", "a pizza", *words])
        assert isinstance(result.exception, UserError) and reason in str(result.exception), result.output


def test_times_are_short() -> None:
    assert [in_time(sec) for sec in (0.0354, 0.9994, 1.2345)] == ["35 ms", "999 ms", "1.23 s"]
