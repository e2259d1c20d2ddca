"""What a batch draws, of a teacher that starts below pi/2."""

import math
from pathlib import Path

import pytest
import tiny
import torch

from stepfold.config import Config, TeacherSettings, load_config
from stepfold.errors import UserError
from stepfold.maths.formulations import flow_time
from stepfold.prompts.reading import open_prompts
from stepfold.sampling.recipe import trained_steps
from stepfold.spaces.records import pairs_per_prompt
from stepfold.teachers.loading import load_teacher
from stepfold.training.draws import draw
from stepfold.training.states import states_per_prompt

CPU = torch.device("cpu")


@pytest.mark.parametrize("route", ["reference", "logit_normal", "random"])
@pytest.mark.parametrize("keep_first", [True, False])
def test_no_state_of_a_walk_stands_where_another_does(tmp_path: Path, route: str, keep_first: bool) -> None:
    """Stable Diffusion starts at 1.5025: routes begin there and fall, and none of their steps is of length 0."""
    tiny.make_sd1().save_pretrained(tmp_path / "sd", safe_serialization=True)
    (tmp_path / "prompts.txt").write_text("a fox\na cat\n")
    teacher, prompts = (
        load_teacher(TeacherSettings(source=str(tmp_path / "sd")), "cpu"),
        open_prompts(tmp_path / "prompts.txt"),
    )
    assert teacher.start_time < math.pi / 2 - 0.05
    changes = [f"space.route={route}", f"space.keep_first={str(keep_first).lower()}", "space.route_steps=16"]
    config = load_config(
        "default", changes, teacher__source=str(tmp_path / "sd"), prompts=str(tmp_path / "prompts.txt")
    )
    for number in range(20):
        batch = draw(number, prompts, teacher, config, CPU)
        times = batch.route(config.space)
        assert (
            times[:, 0].tolist() == pytest.approx([teacher.start_time], abs=1e-7)
            and (times <= teacher.start_time).all()
        )
        assert (times.diff(dim=1) < 0).all()
        noised = batch.times(config.space)
        assert noised.shape == (1, pairs_per_prompt(16, keep_first)) and (noised <= teacher.start_time).all()
        assert (noised.diff(dim=1) < 0).all()


@pytest.mark.parametrize("route", ["reference", "logit_normal", "random"])
def test_times_of_noised_latents_are_shared_by_a_step_or_are_the_prompts_own(
    tiny_sana: Path, prompts_file: Path, route: str
) -> None:
    teacher, prompts = load_teacher(TeacherSettings(source=str(tiny_sana)), "cpu"), open_prompts(prompts_file)

    def times(per: str, number: int = 0) -> torch.Tensor:
        changes = ["space.kind=endpoints", f"space.route={route}", f"space.route_per={per}"]
        config = load_config(
            "default",
            [*changes, "training.prompts_per_step=2"],
            teacher__source=str(tiny_sana),
            prompts=str(prompts_file),
        )
        return draw(number, prompts, teacher, config, CPU).times(config.space)

    shared, own = times("step"), times("prompt")
    assert torch.equal(shared[0], shared[1]) and not torch.equal(own[0], own[1])
    assert not torch.equal(shared, times("step", 1))


def test_times_may_be_noise_alone_or_u_shaped(tiny_sana: Path, prompts_file: Path) -> None:
    """One state a prompt where all is noise, so that its student takes one step; else as many as the route has."""
    teacher, prompts = load_teacher(TeacherSettings(source=str(tiny_sana)), "cpu"), open_prompts(prompts_file)

    def config_of(*changes: str) -> Config:
        own = ["space.kind=coupling", "objective=velocity", "space.route_per=prompt", "training.prompts_per_step=64"]
        return load_config("default", [*own, *changes], teacher__source=str(tiny_sana), prompts=str(prompts_file))

    config = config_of("space.times=noise")
    times = draw(0, prompts, teacher, config, CPU).times(config.space)
    assert times.shape == (64, 1) and times.min().item() == pytest.approx(math.pi / 2, abs=1e-6)
    assert states_per_prompt("coupling", config) == 1 and trained_steps(config) == {1}
    config = config_of("space.times=u_shaped")
    times = draw(0, prompts, teacher, config, CPU).times(config.space)
    assert times.shape == (64, states_per_prompt("coupling", config)) and trained_steps(config) is None
    ends = ((flow_time(times) < 0.2) | (flow_time(times) > 0.8)).float().mean()
    assert ends.item() == pytest.approx((math.expm1(0.8) - math.exp(4) * math.expm1(-0.8)) / math.expm1(4), abs=0.05)
    for changes, said in (
        (["space.kind=endpoints"], "give kind coupling"), (["objective=discrete"], "give objective=velocity"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            config_of("space.times=noise", *changes)
