"""`stepfold sample --gamma`, and the cards of students that are told where to jump to, or know their segments alone."""

from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from stepfold.cli import app
from stepfold.commands.distill import run_distill
from stepfold.commands.sample import run_sample
from stepfold.config import load_config, validate
from stepfold.display import Display
from stepfold.errors import UserError
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


def picture(student: Path, steps: int, **options: float) -> bytes:
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
