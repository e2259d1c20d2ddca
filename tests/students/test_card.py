"""A student's card: read as it was written, by this version or an earlier one, or refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from stepfold import assets
from stepfold.config import load_config
from stepfold.errors import UserError
from stepfold.sampling.recipe import Recipe
from stepfold.students.card import CARD, Card, read_card, student_folder

RECIPE: dict[str, Any] = {
    "sampler": "flow", "times": {"1": [1.57]}, "taught": [2.0, 3.0], "guidance": 3.0, "sigma_data": 0.5,
}  # fmt: skip
FIELDS: dict[str, Any] = {
    "stepfold": "0.2.0", "teacher": "you/teacher", "height": 32, "width": 64, "max_tokens": 16, "recipe": RECIPE,
    "calls": {"1": {"height": 32}}, "example": ["a cat"], "config": {"student": {"lora": 4}}, "colour": "red",
}  # fmt: skip
FIRST: dict[str, Any] = {
    "teacher": "emoji", "height": 32, "width": 32, "max_tokens": 16, "guidance": 4.5, "sigma_data": 0.5,
    "times": {"1": [1.5]}, "config": {"space": {"guidance": None}, "training": {"rollout_precision": "bf16"}},
}  # fmt: skip
"""The first version's fields, before a card had a recipe."""


def written(folder: Path, values: Any) -> Path:
    (folder / CARD).write_text(json.dumps(values))
    return folder


def test_a_card_is_read_as_it_was_written(tmp_path: Path):
    card = read_card(written(tmp_path, FIELDS))
    assert card.recipe == Recipe.model_validate(RECIPE) and card.calls == {1: {"height": 32}} and card.lora_rank == 4
    again = read_card(written(tmp_path, card.model_dump(mode="json")))
    assert again == card and again.model_dump()["colour"] == "red"  # a later version's field stays
    assert card.model_copy(update={"merged": True}).lora_rank == 0


@pytest.mark.parametrize(
    ("changes", "taught"),
    [
        ({"taught": [2, 3]}, (2, 3)),
        ({"config": {"space": {"guidance": [6.0]}}}, (6,)),
        ({"config": {"space": {"guidance": None}}}, (4.5,)),
        ({"config": {}}, (4.5,)),
    ],
)
def test_the_first_cards_are_of_consistency_students(tmp_path: Path, changes: dict[str, Any], taught: tuple[float]):
    """Their times are the teacher's class's, which is loaded later; the scales are where that version noted them."""
    card = read_card(written(tmp_path, FIRST | changes))
    expected = Recipe(sampler="consistency", times={}, taught=taught, guidance=4.5, sigma_data=0.5)
    assert card.recipe == expected and (card.calls, card.output) == ({}, "images")


def test_settings_have_todays_names(tmp_path: Path):
    assert read_card(written(tmp_path, FIRST)).config["training"] == {"walk_precision": "bf16"}


@pytest.mark.parametrize(
    "changes",
    [
        {"height": "32"}, {"width": 0}, {"max_tokens": None}, {"teacher": 3}, {"config": []}, {"output": "sound"},
        {"config": {"student": []}}, {"config": {"student": {"lora": "4"}}}, {"calls": {"one": {}}},
        {"calls": {"1": []}}, {"recipe": []}, {"recipe": RECIPE | {"sampler": "euler"}},
        {"recipe": RECIPE | {"times": {}}}, {"recipe": RECIPE | {"times": {"2": [1.0, 1.5]}}},
    ],
)  # fmt: skip
def test_a_damaged_card_is_one_line(tmp_path: Path, changes: dict[str, Any]):
    read_card(written(tmp_path, FIELDS))
    with pytest.raises(UserError, match=r"stepfold\.json is damaged \(.*; copy the student folder again") as error:
        read_card(written(tmp_path, FIELDS | changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "{}", "[]", "null", "[" * 100_000, '{"config": {"a": NaN}}'])
def test_what_is_no_card_is_one_line(tmp_path: Path, text: str):
    (tmp_path / CARD).write_text(text)
    with pytest.raises(UserError, match=r"stepfold\.json is damaged"):
        read_card(tmp_path)
    with pytest.raises(UserError, match=r"no student folder \(stepfold\.json is missing\)"):
        read_card(tmp_path / "none")


def test_the_settings_of_the_teacher(tmp_path: Path):
    card = read_card(written(tmp_path, FIELDS | {"config": {"teacher": {"source": "you/teacher"}}}))
    assert card.teacher_settings().source == "you/teacher"
    for config in ({}, {"teacher": {"source": 3}}, {"teacher": []}):
        with pytest.raises(UserError, match=r"stepfold\.json is damaged"):
            read_card(written(tmp_path, FIELDS | {"config": config})).teacher_settings()


def test_the_bundled_students_card_says_all_of_it():
    assert student_folder(Path("emoji-student")) == assets.STUDENT
    card = read_card(Path("emoji-student"))
    assert isinstance(card, Card) and card.network_only
    assert card.recipe.taught == (3.0,) and card.recipe.guidance == 3
    assert "recipe" in json.loads((assets.STUDENT / CARD).read_text())


@pytest.mark.parametrize(
    ("preset", "changes", "steps"),
    [
        ("decoupled", [], 4),
        ("dmd", ["rollout.steps=2"], 2),
        ("dmd", ["rollout.lengths=cycled"], 1),
        ("dmd", ["evaluation.steps=[8, 4]"], 8),
        ("vsd", [], 1),
        ("rcm", [], 1),
        ("demo", [], 1),
    ],
)
def test_a_student_of_four_own_steps_is_sampled_in_four(preset: str, changes: list[str], steps: int, tmp_path: Path):
    """A student of `decoupled` was sampled in one step, at 78% for 95%."""
    recipe = RECIPE | {"sampler": "consistency", "times": {"1": [1.57], "2": [1.57, 1.1], "4": [1.57, 1.3, 1.1, 0.6]}}
    settings = load_config(preset, changes).model_dump(mode="json")
    assert read_card(written(tmp_path, FIELDS | {"recipe": recipe, "config": settings})).usual_steps == steps
