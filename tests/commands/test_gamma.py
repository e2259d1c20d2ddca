"""`stepfold sample --gamma`, and the cards of students that are told where to jump to, or know their segments alone."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

from stepfold.cli import app
from stepfold.commands.protocols import open_drawer
from stepfold.config import load_config, phases_of, validate
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.jobs.distilling import run_distill
from stepfold.jobs.exporting import run_export
from stepfold.jobs.sampling import run_sample
from stepfold.maths.routes import even_flow_times
from stepfold.sampling.recipe import Recipe, trained_steps
from stepfold.sampling.samplers import sampler_of
from stepfold.students.card import read_card

SETTINGS = (
    "teacher.height=32", "teacher.width=32", "teacher.max_tokens=24", "space.route_steps=4", "space.filter_rule=off",
    "training.steps=2", "training.prompts_per_step=2", "training.preview_every=2", "optimiser.name=adamw",
    "optimiser.lr=1e-3", "training.precision=no", "training.walk_precision=no", "space.guidance=[4.5]",
    "consistency.r_warmup=0",
)  # fmt: skip
TWO = ("student.times=two", "objective=continuous")
PAPERS = Path(__file__).parents[2] / "docs" / "papers.md"


def trained(teacher: Path, folder: Path, *changes: str) -> Path:
    """A finished run's student."""
    (folder / "prompts.txt").write_text("\n".join(tiny.PROMPTS))
    config = load_config(
        "default", [*SETTINGS, *changes], teacher__source=str(teacher), prompts=str(folder / "prompts.txt")
    )
    run_distill(config, folder / "run", resume=False, display=Display(quiet=True), command="test")
    return folder / "run" / "student"


@pytest.fixture(scope="module")
def flow_map(tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(
        tiny_sana, tmp_path_factory.mktemp("map"), *TWO, "target.rule={gap: 0.5, zero: 0.25, diagonal: 0.25}"
    )


def picture(student: Path, steps: int, **options: Any) -> bytes:
    made = run_sample(student, ["red heart"], steps=steps, seed=0, guidance=None, device="cpu", **options)  # type: ignore[arg-type]
    return made[0].tobytes()


def test_a_flow_map_is_sampled_with_as_much_fresh_noise_as_is_asked_for(flow_map: Path) -> None:
    recipe = read_card(flow_map).recipe
    assert recipe.sampler == "flow_map" and recipe.jumps_anywhere and set(recipe.times) == set(range(1, 9))
    assert recipe.times[4] == pytest.approx(even_flow_times(4, 3.0)[:-1].tolist()) or len(recipe.times[4]) == 4
    plain, half, one = (picture(flow_map, 4, gamma=gamma) for gamma in (0.0, 0.5, 1.0))
    assert len({plain, half, one}) == 3 and plain == picture(flow_map, 4)
    assert picture(flow_map, 1, gamma=0.5) == picture(flow_map, 1)  # the last jump has no fresh noise


def test_another_students_fresh_noise_is_refused_in_one_line(flow_map: Path, tmp_path: Path) -> None:
    command = ["sample", str(flow_map), "red heart", "--out", str(tmp_path / "x.png"), "--steps", "2", "--gamma"]
    assert CliRunner().invoke(app, [*command, "0.3"]).exit_code == 0
    assert CliRunner().invoke(app, [*command, "1.5"]).exit_code == 2
    result = CliRunner().invoke(app, [*command, "0.3", "--sampler", "consistency"])
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == (
        "--gamma is 0.3, but consistency sampling has no such share of fresh noise; leave --gamma out"
    )
    edges = Recipe(
        sampler="flow_map", times={4: (1.5, 1.2, 0.9, 0.4)}, taught=(4.5,), guidance=4.5, sigma_data=0.5
    )  # fmt: skip
    with pytest.raises(UserError, match=r"was trained to jump between a few times alone.*; leave --gamma out"):
        edges.gamma_for(0.3)
    assert edges.gamma_for(0) == 0


def test_a_student_of_segments_is_sampled_from_edge_to_edge(tiny_sana: Path, tmp_path: Path) -> None:
    """Its card and its pipeline know as many steps as it has segments, and no other number."""
    student = trained(tiny_sana, tmp_path, "objective=semigroup", "target.rule=edge", "target.segments=3")
    card = read_card(student)
    assert card.recipe.sampler == "flow" and set(card.recipe.times) == {3} and set(card.calls) == {3}
    assert "3" in (student / "README.md").read_text() and "from edge to edge" in (student / "README.md").read_text()
    assert picture(student, 3)
    with pytest.raises(UserError, match="has times for 3 steps, not for 4"):
        picture(student, 4)
    assert (tmp_path / "run" / "previews" / "step_000002.png").is_file()


def test_a_map_of_segments_alone_is_not_called_a_consistency_model(
    tiny_sana: Path, tmp_path: Path, flow_map: Path
) -> None:
    """Told no target its network means 0, for which it was not trained: its card and all exports say what to do."""
    changes = ("student.times=two", "objective=semigroup", "target.rule=edge", "target.segments=3")
    student = trained(tiny_sana, tmp_path, *changes)
    card, text = read_card(student), (student / "README.md").read_text()
    assert card.recipe.sampler == "flow_map" and set(card.recipe.times) == {3} and not card.calls
    assert "stepfold export FOLDER --to pipeline --steps 3" in text and ".from_pretrained(" not in text
    assert "samples it as a consistency model" in (flow_map / "README.md").read_text()
    refused = r"from edge to edge of its 3 segments, and plain diffusers tells .*--to pipeline --steps 3, or use stepf"
    for to in ("pipeline", "lora", "single-file", "onnx"):
        with pytest.raises(UserError, match=refused):
            run_export(student, to, None, force=False)
    with pytest.raises(UserError, match=refused):
        open_drawer(student, "cpu")
    with pytest.raises(UserError, match=r"--sampler is consistency, but .* edge to edge .*; leave --sampler out"):
        picture(student, 3, sampler="consistency")
    folded = run_export(student, "pipeline", tmp_path / "folded", force=False, steps=3)
    assert set(read_card(folded).calls) == {3} and "from_pretrained" in (folded / "README.md").read_text()
    ours, theirs = (
        torch.frombuffer(bytearray(picture(each, 3)), dtype=torch.uint8).int() for each in (student, folded)
    )
    assert (ours - theirs).abs().max() <= 1


def test_plain_diffusers_takes_the_steps_that_a_map_was_trained_for_without_a_target() -> None:
    """A map of pure noise alone one; one of segments that learned 0 too any number, as one that jumps anywhere."""
    fields = dict(sampler="flow_map", taught=(4.5,), guidance=4.5, sigma_data=0.5)
    all_steps = {n: (1.5,) * n for n in (1, 2, 4)}
    found = {
        (steps, anywhere): set(
            Recipe(times={n: (1.5,) * n for n in steps}, jumps_anywhere=anywhere, **fields).without_target(all_steps)  # type: ignore[arg-type]
        )
        for steps, anywhere in (((1,), False), ((4,), False), ((1, 4), False), ((1, 2, 3), True))
    }
    assert list(found.values()) == [{1}, set(), {1, 2, 4}, {1, 2, 4}]


NAMED = {
    "ayf": ("continuous", "flow_map", None),
    "ctm": ("semigroup", "flow_map", None),
    "direct-cm": ("pair", "consistency", None),
    "flow-map": ("discrete", "flow_map", {1, 2, 4, 8}),
    "progressive": ("semigroup", "flow", {1}),
    "segments": ("semigroup", "flow", {4}),
    "tcd": ("semigroup", "flow_map", None),
    "tdd": ("semigroup", "flow_map", {4}),
    "walk-pairs": ("pair", "flow_map", None),
}
"""Preset -> its objective, its students' sampler, and their numbers of steps (None: all)."""


@pytest.mark.parametrize("name", NAMED)
def test_a_method_that_people_know_by_name_is_a_preset(name: str) -> None:
    config = load_config(name)
    assert (config.objective, sampler_of(config), trained_steps(config)) == NAMED[name]
    said = [row for row in PAPERS.read_text().splitlines() if f"`--preset {name}`" in row]
    assert len(said) == 1 and f"`objective={config.objective}`" in said[0]


def test_segments_merge_in_the_phases_of_progressive_distillation() -> None:
    parts = phases_of(load_config("progressive"))
    assert [(first, part.target.segments) for first, part in parts] == [(0, 8), (30, 4), (60, 2), (90, 1)]
    assert all(part.target.rules == {"edge"} and part.student.times == "one" for _, part in parts)


@pytest.mark.parametrize(
    ("changes", "sampler", "steps"),
    [
        ((*TWO, "target.rule=zero"), "consistency", None),
        ((*TWO, "target.rule={zero: 1, diagonal: 1}"), "consistency", None),
        ((*TWO, "target.rule={gap: 3, diagonal: 1}"), "flow_map", None),
        ((*TWO, "target.rule={edge: 1, zero: 1}"), "flow_map", {4, 1}),
        (("objective=semigroup", "target.rule=edge", "target.segments=2"), "flow", {2}),
        (("objective=pair",), "consistency", None),
        (("student.times=two", "objective=lagrange", "target.rule=uniform", "space.kind=prior"), "flow_map", {1}),
    ],
)
def test_a_runs_sampler_and_steps_follow_from_its_targets(
    changes: tuple[str, ...], sampler: str, steps: set[int] | None
) -> None:
    config = load_config("default", list(changes))
    assert sampler_of(config) == sampler and trained_steps(config) == steps
    phases = {
        "steps": 9,
        "phases": [{"steps": 2, "set": {"objective": "discrete", "target.rule": "zero", "space.kind": "generation"}}],
    }
    later = validate(config.model_dump() | {"training": config.training.model_dump() | phases})
    assert sampler_of(later) == sampler and trained_steps(later) == steps
