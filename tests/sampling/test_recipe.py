"""Which sampler a student is for, and the part of its card that says how it is sampled."""

import json
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from stepfold.config import validate
from stepfold.errors import Caution, UserError
from stepfold.maths.routes import few_step_times
from stepfold.methods import METHODS
from stepfold.sampling.recipe import NUM_STEPS, Recipe, make_recipe
from stepfold.sampling.samplers import SAMPLERS, UNFIT, SamplerName, check_sampler, sampler_of
from stepfold.settings import ObjectiveName

FIELDS: dict[str, Any] = {
    "sampler": "consistency",
    "times": {"1": [1.5708], "2": [1.5708, 1.3]},
    "taught": [3.0, 4.0],
    "guidance": 4.0,
    "sigma_data": 0.5,
}


class Times:
    sigma_data = 0.5

    def student_times(self, num_steps: int, sampler: str) -> list[float]:
        return few_step_times(num_steps)


def test_every_pair_of_samplers_is_right_or_has_its_reason():
    names = get_args(SamplerName)
    assert tuple(SAMPLERS) == names
    for trained in names:
        assert check_sampler(trained, trained) == trained
        for asked in set(names) - {trained}:
            if (trained, asked) == ("flow_map", "consistency"):
                assert check_sampler(trained, asked) == asked
                continue
            with pytest.raises(UserError, match=rf"--sampler is {asked}, .* for {trained} sampling: .*leave") as error:
                check_sampler(trained, asked)
            assert UNFIT[trained, asked] in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="--sampler is 'euler'; choose consistency, flow, flow_map"):
        check_sampler("flow", "euler")


def test_a_recipe_is_read_back_as_it_was_written():
    recipe = Recipe.model_validate(FIELDS)
    assert recipe.times == {1: (1.5708,), 2: (1.5708, 1.3)} and recipe.taught == (3.0, 4.0)
    assert Recipe.model_validate(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe


@pytest.mark.parametrize(
    "change",
    [
        {"sampler": "euler"},
        {"times": {}, "sampler": "flow"},
        {"times": {"2": [1.5708]}},
        {"times": {"2": [1.3, 1.5]}},
        {"times": {"1": [0.0]}},
        {"times": {"1": [3.0]}},
        {"times": {"1": [float("nan")]}},
        {"times": {"0": []}},
        {"times": {"one": [1.5]}},
        {"taught": []},
        {"taught": ["much"]},
        {"guidance": None},
        {"sigma_data": 0},
        {"colour": "red"},
    ],
)
def test_a_recipe_that_makes_no_sense_is_none(change: dict[str, Any]):
    with pytest.raises(ValidationError):
        Recipe.model_validate(FIELDS | change)


def test_other_steps_than_the_card_lists_are_refused():
    recipe = Recipe.model_validate(FIELDS)
    assert recipe.times_for(2) == (1.5708, 1.3)
    with pytest.raises(UserError, match="has times for 1, 2 steps, not for 3"):
        recipe.times_for(3)


def test_a_student_of_one_scale_takes_no_other():
    several, one = Recipe.model_validate(FIELDS), Recipe.model_validate(FIELDS | {"taught": [3.0, 3.0], "guidance": 3})
    assert several.scale_for(None) == 4 and several.scale_for(3.5) == 3.5
    with pytest.warns(Caution, match="^guidance 7 is outside of 3 to 4, which the student was taught$"):
        assert several.scale_for(7.0) == 7
    assert one.scale_for(None) == one.scale_for(3.0) == 3
    with pytest.raises(UserError, match=r"--guidance is 7, but this student was taught at 3 alone.*leave --guidance"):
        one.scale_for(7.0)


def test_a_runs_sampler_is_that_of_what_it_is_trained_on_last():
    phases = [{"steps": 2, "set": {"objective": "velocity"}}]
    for objective, steps, changes, sampler in (
        ("continuous", 5, [], "consistency"),
        ("discrete", 5, [], "consistency"),
        ("velocity", 5, [], "flow"),
        ("discrete", 5, phases, "consistency"),
        ("discrete", 2, phases, "flow"),
    ):
        values = {"prompts": "x", "objective": objective, "training": {"steps": steps, "phases": changes}}
        assert sampler_of(validate(values)) == sampler
    assert set(METHODS) == {"auto", *get_args(ObjectiveName)}


def test_the_recipe_of_a_run():
    config, teacher = validate({"prompts": "prompts.txt"}), Times()
    several = make_recipe(config, teacher, (2.0, 3.0, 4.0), 3.5)  # type: ignore[arg-type]
    assert several.sampler == sampler_of(config) == "consistency" and several.sigma_data == 0.5
    assert several.times == {n: tuple(few_step_times(n)) for n in NUM_STEPS["consistency"]}
    assert several.taught == (2.0, 3.0, 4.0) and several.guidance == 3.5
    assert make_recipe(config, teacher, (2.0,), 3.5).guidance == 2  # type: ignore[arg-type]
