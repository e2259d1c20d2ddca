"""The protocol's prompts are frozen, and a stream of pictures gets the scores that its features give."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stepfold.commands.evaluate import check_unread
from stepfold.errors import UserError
from stepfold.evaluation.judge import Judge, image_features, text_features
from stepfold.evaluation.measure import protocol_samplers
from stepfold.evaluation.metrics import accuracy, clip_score, diversity, frechet_distance
from stepfold.evaluation.protocol import (
    EMOJI,
    Protocol,
    check_steps,
    emoji_protocol,
    protocol_prompts,
    score_images,
)
from stepfold.sampling.recipe import Recipe

SMALL = Protocol(name="small", version=1, n=20, seed=3, samples_per_prompt=2)


def test_hash_is_frozen_and_follows_every_field():
    """A published result names this hash: a change here needs a new version of the protocol."""
    assert EMOJI.hash() == "45f9a83ccf5152d84e076f5a15b990f8f440d3c108dccd573dfec31fe3ec5487"
    changes = [{"n": 2000}, {"seed": 1}, {"guidance": 5.0}, {"teacher_steps": (20,)}, {"version": 2}]
    assert len({replace(EMOJI, **change).hash() for change in [{}, *changes]}) == len(changes) + 1


def test_students_stand_beside_the_teacher_at_the_scale_they_were_taught():
    """The first of a group is what agreement is measured against."""
    teacher: Any = SimpleNamespace()
    student: Any = None
    times = {steps: (1.5,) * steps for steps in (1, 2, 4)}
    one, several = (
        Recipe(sampler="consistency", times=times, taught=taught, guidance=taught[0], sigma_data=1.0)
        for taught in ((3.0,), (4.5, 6.0))
    )
    groups = protocol_samplers(teacher, {"a": (student, several), "b": (student, one)}, EMOJI)
    usual = ["teacher 20", "teacher 4", "teacher 2", "teacher 1", "a 4", "a 2", "a 1"]
    assert {scale: list(group) for scale, group in groups.items()} == {
        4.5: usual,
        3.0: ["teacher at guidance 3 20", "b 4", "b 2", "b 1"],
    }
    told = protocol_samplers(teacher, {"a": (student, several)}, EMOJI, guidance=6.0)
    assert list(told[6.0]) == ["teacher at guidance 6 20", "a 4", "a 2", "a 1"]
    with pytest.raises(UserError, match="taught at 3 alone"):  # the same pictures under another label
        protocol_samplers(teacher, {"b": (student, one)}, EMOJI, guidance=6.0)


def test_flow_maps_are_measured_at_eight_steps_too_with_the_teacher_beside_them():
    """Other students keep the frozen protocol, and so do maps that are asked for other steps."""
    times = {steps: (1.5,) * steps for steps in (1, 2, 4, 8)}
    plain, flow_map = (
        Recipe(sampler=sampler, times=times, taught=(3.0,), guidance=3.0, sigma_data=1.0)
        for sampler in ("consistency", "flow_map")
    )
    assert emoji_protocol([plain], None, 500, 4.5) == EMOJI
    ours = emoji_protocol([plain, flow_map], None, 500, 4.5)
    assert ours == replace(EMOJI, teacher_steps=(20, 8, 4, 2, 1), student_steps=(8, 4, 2, 1))
    assert emoji_protocol([flow_map], [1, 4], 500, 4.5) == replace(EMOJI, student_steps=(4, 1))
    assert emoji_protocol([plain], [8], 500, 4.5) == replace(EMOJI, student_steps=(8,))


def test_a_number_of_steps_that_no_student_has_is_refused():
    """Four steps were measured where one was asked for."""
    one, four = (
        Recipe(sampler="consistency", times=times, taught=(3.0,), guidance=3.0, sigma_data=1.0)
        for times in ({1: (1.5,), 2: (1.5, 1.0)}, {4: (1.5, 1.2, 0.9, 0.5)})
    )
    check_steps([one, four], None)
    check_steps([one, four], [4, 1])
    check_steps([], [12])  # of pipelines alone
    for recipes, steps, said in (
        ([four], [1], "has times for 4 steps, not for 1"),
        ([one], [3, 1], "has times for 1, 2 steps, not for 3"),
        ([one, four], [2], "has times for 4 steps, not for 2"),
    ):
        with pytest.raises(UserError, match=said):
            check_steps(recipes, steps)


@pytest.mark.parametrize("name", ["prompts", "clip", "images", "out"])
def test_options_that_the_bundled_evaluator_does_not_read_are_refused(name: str):
    check_unread(**dict.fromkeys(["prompts", "clip", "images", "out"]))
    with pytest.raises(UserError, match=f"^--{name} is not for --protocol emoji.*give --protocol teacher$"):
        check_unread(**{name: "x"})


@pytest.mark.parametrize(
    ("change", "message"),
    [({"n": 1}, "n is 1"), ({"samples_per_prompt": 1}, "diversity needs 2"), ({"student_steps": (1, 0)}, "1 or more")],
)
def test_impossible_protocols(change: dict, message: str):
    with pytest.raises(UserError, match=message):
        replace(EMOJI, **change)


def test_prompts(judge: Judge):
    prompts, target, group = protocol_prompts(judge, SMALL)
    assert len(prompts) == len(target) == len(group) == 20
    assert group.tolist() == [i // 2 for i in range(20)]
    for prompt, index in zip(prompts, target.tolist(), strict=True):
        name, colour = prompt.removesuffix(" background").split(" on ")
        assert name == judge.names[index] and colour in judge.colours
    assert prompts[0::2] == prompts[1::2]
    assert sorted(target[0:14:2].tolist()) == list(range(7))  # every name before any comes again
    assert prompts[:6:2] == ["rocket on white background", "snowman on black background", "ghost on black background"]


def test_prompts_by_seed_and_n(judge: Judge):
    prompts, target, _ = protocol_prompts(judge, SMALL)
    assert protocol_prompts(judge, replace(SMALL, n=15))[0] == prompts[:15]
    assert protocol_prompts(judge, replace(SMALL, seed=4))[0] != prompts
    assert target[:14:2].tolist() != sorted(target[:14:2].tolist())
    many, _, _ = protocol_prompts(judge, replace(SMALL, n=6000))
    counts = Counter(prompt.split(" on ")[1] for prompt in many[::2])
    assert all(abs(count - 1000) < 4 * 26 for count in counts.values()) and len(counts) == 3  # 4 standard deviations


def test_scores_are_those_of_all_features_at_once(judge: Judge):
    prompts, target, group = protocol_prompts(judge, SMALL)
    images = torch.rand(20, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def slowly() -> Iterator[torch.Tensor]:
        for batch in images.split([7, 1, 12]):
            time.sleep(0.05)
            yield batch

    scores = score_images(judge, slowly(), prompts, target, group, agreement=0.25)
    features = image_features(judge, images)
    captions = text_features(judge, prompts)
    distance = frechet_distance(features.double().mean(0), features.double().T.cov(), judge.mean, judge.covariance)
    assert scores.accuracy == accuracy(features, text_features(judge, judge.names), target).item()
    assert scores.clip_score == pytest.approx(clip_score(features, captions).item(), abs=1e-4)
    assert scores.fd == pytest.approx(distance.item(), rel=1e-4)
    assert scores.diversity == pytest.approx(diversity(features, group).item(), rel=1e-5)
    assert 20 / 1.0 < scores.images_per_sec <= 20 / 0.15  # three pauses of 0.05 s; the judge's time is not in it
    assert json.loads(json.dumps(scores.to_json()))["agreement"] == 0.25


def test_scores_know_the_right_answer(judge: Judge):
    """Targets taken from the judge's own nearest names give accuracy 1, every other name 0."""
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    nearest = (image_features(judge, images) @ text_features(judge, judge.names).T).argmax(1)
    group = torch.arange(6) // 2
    for shift, expected in ((0, 1.0), (1, 0.0)):
        target = (nearest + shift) % len(judge.names)
        prompts = [judge.names[i] for i in target.tolist()]
        assert score_images(judge, [images], prompts, target, group).accuracy == expected


def test_wrong_number_of_images(judge: Judge):
    prompts, target, group = protocol_prompts(judge, SMALL)
    with pytest.raises(AssertionError, match="18 images, 20 prompts"):
        score_images(judge, [torch.zeros(18, 3, 32, 32)], prompts, target, group)
