"""The student's and the teacher's pictures, and what is said of their cost."""

import dataclasses
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forms import cases
from PIL import Image

from stepfold import assets
from stepfold.config import load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.jobs.distilling import run_distill
from stepfold.jobs.sampling import run_sample
from stepfold.web import markup
from stepfold.web.drawing import (
    MAX_PROMPT,
    Models,
    Paces,
    Request,
    checked,
    draw_strip,
    draw_student,
    draw_teacher,
    load_models,
    warm_up,
)


@pytest.fixture(scope="module")
def emoji() -> Models:
    return load_models(Path("emoji-student"), None, "cpu")


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def count_calls(network: torch.nn.Module) -> list[int]:
    """A list that gets the batch of each call of the network."""
    sizes: list[int] = []
    network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


@pytest.mark.parametrize("steps", cases([1, 2, 3], short=[2]))
def test_the_students_pictures_are_those_of_stepfold_sample(emoji: Models, steps: int) -> None:
    drawing = draw_student(emoji, Request("a pizza", steps, guidance=3.0, seed=5, count=3))
    for seed, picture in zip((5, 6, 7), drawing.pictures, strict=True):
        alone = run_sample(Path("emoji-student"), ["a pizza"], steps=steps, seed=seed, guidance=3.0, device="cpu")
        assert difference(picture, alone[0]) <= 1
    assert difference(drawing.pictures[0], drawing.pictures[1]) > 50
    assert drawing.whole and drawing.sec > 0


def test_calls_are_counted_as_they_are_made(emoji: Models) -> None:
    student: Any = emoji.student
    ours, theirs = count_calls(student.transformer), count_calls(emoji.teacher.transformer)
    request = Request("a pizza", 4, guidance=3.0, seed=0, count=3)
    drawing = draw_student(emoji, request)
    assert ours == [3] * 4 and drawing.calls == 4 == sum(ours) / 3
    *previews, whole = draw_teacher(emoji, request)
    assert theirs == [6] * 20  # both branches of three pictures at once
    assert whole.calls == 40 == sum(theirs) / 3
    assert (markup.calls_in_words(drawing), markup.calls_in_words(whole)) == (
        "4 network calls an image",
        "40 network calls an image",
    )
    assert [drawing.calls for drawing in previews] == [2 * drawing.steps for drawing in previews]


def test_the_teacher_forms_from_the_students_noise(emoji: Models) -> None:
    """Previews come on the way, and approach the end; the student's one step is near that end, another seed is not."""
    request = Request("red heart on blue background", 1, guidance=3.0, seed=2)
    *previews, whole = draw_teacher(emoji, request)
    assert previews and [d.steps for d in previews] == sorted(d.steps for d in previews)
    assert previews[0].walk is None and not previews[0].whole and whole.whole
    assert whole.sec > previews[0].sec > 0
    ours, other = (draw_student(emoji, Request(request.prompt, 1, 3.0, seed)).pictures[0] for seed in (request.seed, 3))

    def error(a: Image.Image) -> float:
        return float(np.square(np.asarray(a, float) - np.asarray(whole.pictures[0], float)).mean())

    assert error(ours) < 0.5 * error(other)
    assert error(previews[-1].pictures[0]) < error(previews[0].pictures[0])


def test_the_walk_begins_with_its_own_noise_and_ends_at_the_picture(emoji: Models) -> None:
    *_, whole = draw_teacher(emoji, Request("a pizza", guidance=3.0, seed=1, count=2))
    walk = whole.walk
    assert walk is not None
    assert walk.t[0] == pytest.approx(math.pi / 2) and walk.t == sorted(walk.t, reverse=True) and walk.t[-1] > 0
    assert len(walk.t) == len(walk.pictures) == len(walk.noises) == len(walk.similarity) == 7
    assert walk.similarity[0] == pytest.approx(1, abs=1e-4) and 0 < walk.similarity[-1] < 0.99
    assert difference(walk.pictures[-1], whole.pictures[0]) <= 1  # the last step goes to its own x_0
    assert walk.noises[0].size == (8, 8)
    noise = 0.5 * np.asarray(emoji_noise(emoji, 1))
    shown = (np.asarray(walk.noises[0].getchannel(0), float) / 255 - 0.5) * 2 * 1.5
    assert np.abs(shown - noise.clip(-1.5, 1.5)).max() < 0.01


def emoji_noise(models: Models, seed: int) -> torch.Tensor:
    from stepfold.randomness import normal

    return normal(models.teacher.latent_shape, seed, "sample", 0)[0]


def test_bad_input_is_a_short_message(emoji: Models) -> None:
    def refused(*values: Any) -> str:
        with pytest.raises(UserError) as error:
            checked(emoji, *values)
        return str(error.value)

    good = ("a cat", 1, 3.0, 0, 1)
    assert checked(emoji, " a \n cat ", *good[1:]) == Request("a cat", 1, 3.0, 0, 1)
    for empty in ("", "  \n ", None, 3, ["a"]):
        assert refused(empty, *good[1:]) == "Type a prompt."
    assert "301 characters; 300 is the most" in refused("x" * (MAX_PROMPT + 1), *good[1:])
    for place, values in {
        1: (0, 9, None, "2", True, math.nan),
        2: (0, 9, math.inf),
        3: (-1, 2**31),
        4: (0, 10),
    }.items():
        for value in values:
            said = refused(*good[:place], value, *good[place + 1 :])
            assert re.match(
                r"(Student's steps|Teacher's guidance|Seed|Images) must be a number from \d to [\d,]+\.", said
            )


def test_a_scale_may_be_the_one_that_turns_guidance_off(emoji: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is 0 in pipelines that count their scale from there."""
    monkeypatch.setattr(emoji.teacher, "no_guidance", 0.0)
    assert checked(emoji, "a cat", 1, 0.0, 0, 1).guidance == 0


@pytest.mark.long
def test_a_student_with_a_pipeline_of_its_own(tiny_student: Path, tiny_sana: Path) -> None:
    models = load_models(tiny_student, None, "cpu")
    assert models.pipeline is not models.teacher and models.teacher.source == str(tiny_sana)
    request = Request("red heart", guidance=4.5)
    assert draw_student(models, request).pictures[0].size == (32, 32)
    assert models.examples == ("red heart",)
    assert "taught at guidance 4, 4.5, 5." in models.fine_print and models.guidance_label == "Guidance"
    with pytest.raises(UserError, match="give the teacher that the student was distilled from"):
        load_models(tiny_student, "emoji", "cpu")


@pytest.mark.long
def test_the_teacher_that_is_named_is_the_one_that_draws(tiny_student: Path, tiny_sana: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_sana, other)
    assert load_models(tiny_student, str(other), "cpu").teacher.source == str(other)
    emoji = load_models(Path("emoji-student"), "emoji", "cpu")
    assert Path(emoji.teacher.source).parts[-2:] == ("emoji", "pipeline")
    assert emoji.teacher is not emoji.pipeline
    request = Request("red heart", guidance=3.0)
    own = load_models(Path("emoji-student"), None, "cpu")
    *_, named = draw_teacher(emoji, request)
    *_, usual = draw_teacher(own, request)
    assert difference(named.pictures[0], usual.pictures[0]) == 0


@pytest.mark.long
def test_the_head_and_the_prompts_are_of_the_models_at_hand(emoji: Models, tiny_student: Path) -> None:
    assert emoji.about == ("Student of emoji after 6,000 training steps, taught at guidance 3; 64 × 64 pixels, on cpu.")
    assert "320 names on 12 background colours" in emoji.vocabulary and emoji.usual_count == 9
    known = set((assets.PROMPTS).read_text().splitlines())
    drawn = {emoji.random_prompt() for _ in range(5)}
    assert drawn <= known and len(drawn) > 1
    tiny = load_models(tiny_student, None, "cpu")
    assert tiny.vocabulary == "" and {tiny.random_prompt() for _ in range(20)} <= {"red heart", "a cat", "rocket"}
    gone = tiny.card.model_copy(update={"config": tiny.card.config | {"prompts": "nowhere.txt"}})
    assert Models(tiny.student, tiny.pipeline, tiny.teacher, gone).random_prompt() == "red heart"


def test_a_flow_map_draws_with_fresh_noise_where_it_may(tiny_sana: Path, tmp_path: Path) -> None:
    """As `stepfold sample --gamma` does; other students show no slider for it and refuse it."""
    (tmp_path / "prompts.txt").write_text("red heart\na cat\n")
    changes = [
        "student.times=two", "objective=continuous", "target.rule={gap: 0.7, zero: 0.3}", "training.steps=1",
        "training.precision=no", "training.walk_precision=no", "space.route_steps=3", "teacher.max_tokens=32",
        "evaluation.n=0", "training.preview_every=9",
    ]  # fmt: skip
    config = load_config("default", changes, teacher__source=str(tiny_sana), prompts=str(tmp_path / "prompts.txt"))
    run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
    student = tmp_path / "run" / "student"
    models, asked = load_models(student, None, "cpu"), ("a cat", 4, 4.5, 3, 2)
    assert models.takes_gamma
    half, none = (draw_student(models, checked(models, *asked, gamma)).pictures for gamma in (0.5, 0))
    alone = run_sample(student, ["a cat"], steps=4, seed=3, guidance=4.5, device="cpu", gamma=0.5)
    assert difference(half[0], alone[0]) <= 1 and difference(half[0], none[0]) > 1
    for gamma in (-0.1, 1.1, None, True):
        with pytest.raises(UserError, match=r"Fresh noise in the student's steps must be a number from 0 to 1\."):
            checked(models, *asked, gamma)
    plain = models.card.recipe.model_copy(update={"jumps_anywhere": False})
    other = dataclasses.replace(models, card=models.card.model_copy(update={"recipe": plain}))
    assert not other.takes_gamma and checked(other, *asked, 0).gamma == 0
    with pytest.raises(UserError, match="leave --gamma out"):
        checked(other, *asked, 0.5)


@pytest.mark.long
def test_a_student_of_one_number_of_steps_draws_in_that(tiny_student: Path) -> None:
    """The page began with one step, which such a student refuses."""
    tiny = load_models(tiny_student, None, "cpu")
    assert tiny.usual_steps == 1
    recipe = tiny.card.recipe.model_copy(update={"times": {3: tiny.card.recipe.times[3]}})
    config = tiny.card.config | {"evaluation": {"steps": [3]}}
    own = dataclasses.replace(tiny, card=tiny.card.model_copy(update={"recipe": recipe, "config": config}))
    assert own.usual_steps == 3
    warm_up(own)
    assert [steps for steps, _ in draw_strip(own, Request("red heart", 3))] == [3]
    many = tiny.card.model_copy(update={"config": tiny.card.config | {"evaluation": {"steps": [20]}}})
    assert dataclasses.replace(tiny, card=many).usual_steps == 8


def test_the_strip_is_the_first_picture_in_more_steps(emoji: Models) -> None:
    request = Request("a pizza", 3, guidance=3.0, seed=5, count=4)
    strip = draw_strip(emoji, request)
    assert [steps for steps, _ in strip] == [1, 2, 4, 8] and all(len(d.pictures) == 1 for _, d in strip)
    two = draw_student(emoji, Request("a pizza", 2, guidance=3.0, seed=5))
    assert difference(strip[1][1].pictures[0], two.pictures[0]) == 0


def test_a_ratio_is_one_of_medians_of_equal_drawings(emoji: Models) -> None:
    paces, one, nine = Paces(), Request("a cat"), Request("a cat", count=9)
    assert markup.headline(emoji, one, paces) == ""
    for sec in (9.0, 1.0, 2.0):
        paces.note("student", one, sec)
    assert markup.headline(emoji, one, paces) == ""
    for sec in (10.0, 30.0, 20.0, 1000.0, 5.0):
        paces.note("teacher", one, sec)
    html = markup.headline(emoji, one, paces)
    assert "<b>40 → 1</b> calls, <b>10×</b> as fast" in html
    assert "medians of the teacher&#39;s 5 and the student&#39;s 3 drawings of 1 image" in html
    assert markup.headline(emoji, nine, paces) == "" == markup.headline(emoji, Request("a cat", 2), paces)


def test_nothing_of_a_prompt_becomes_markup(emoji: Models) -> None:
    evil = "<script>alert(1)</script> \"' onerror=x ${7*7} {{7*7}}"
    html = markup.panel("Student", Request(evil), draw_student(emoji, Request(evil)))
    assert "<script" not in html and "&lt;script&gt;" in html and '" onerror' not in html
    assert markup.note("<b>") == '<p class="note" role="status">&lt;b&gt;</p>'
