"""A student goes on from an earlier student of the same teacher, with another method."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stepfold.config import Config, load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.jobs.distilling import run_distill
from stepfold.sampling.recipe import policy_of
from stepfold.students.loading import load_student
from stepfold.students.starting import make_student
from stepfold.students.whole import new_student
from stepfold.teachers.contract import Student
from stepfold.teachers.loading import load_teacher

FAST = (
    "training.precision=no", "training.walk_precision=no", "training.steps=2", "training.prompts_per_step=1",
    "training.preview_every=1000", "space.route_steps=3", "space.filter_rule=off", "teacher.max_tokens=32",
    "optimiser.name=adamw", "optimiser.lr=1e-2", "evaluation.n=0", "training.ema=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def settings(tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a fox\na cat\n")
    return lambda *changes: load_config(
        "default", [*FAST, *changes], teacher__source=str(tiny_sana), prompts=str(prompts)
    )


def run(config: Config, folder: Path) -> Path:
    run_distill(config, folder, resume=False, display=Display(quiet=True), command="test")
    return folder / "student"


@pytest.fixture(scope="module")
def whole(settings: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(settings("objective=discrete"), tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def lora(settings: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(settings("student.lora=4"), tmp_path_factory.mktemp("lora") / "run")


def same_output(a: Student, b: Student, condition: object, tolerance: float = 0.0) -> bool:
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.4, 1.2])
    with torch.no_grad():
        ours, theirs = (student(x, t, condition, torch.full((2,), 4.5)) for student in (a, b))  # type: ignore[arg-type]
    return bool((ours - theirs).norm() <= tolerance * theirs.norm())


def started(folder: Path, config: Config) -> tuple[Student, object]:
    teacher = load_teacher(config.teacher, "cpu")
    settings = config.student.model_copy(update={"init": str(folder)})
    student = make_student(teacher, settings, config.teacher, policy_of(config, teacher))
    return student, teacher.encode(["a fox", "a cat"])


def test_a_whole_student_starts_where_the_earlier_one_ended(whole: Path, settings: Callable[..., Config]) -> None:
    student, condition = started(whole, settings())
    assert same_output(student, load_student(whole, "cpu")[1], condition)
    teacher = load_teacher(settings().teacher, "cpu")
    assert not same_output(student, new_student(teacher), condition, 1e-3)


def test_a_consistency_student_starts_where_a_flow_ended(settings: Callable[..., Config], tmp_path: Path) -> None:
    """That of a Sana is saved as a network of one guidance scale, and this one embeds scales."""
    flow = run(settings("objective=velocity", "space.kind=coupling"), tmp_path / "run")
    student, condition = started(flow, settings("objective=continuous"))
    earlier = load_student(flow, "cpu")[1]
    assert type(student) is not type(earlier) and same_output(student, earlier, condition, 1e-5)
    assert not same_output(student, new_student(load_teacher(settings().teacher, "cpu")), condition, 1e-3)


def test_a_lora_student_starts_where_the_earlier_one_ended(lora: Path, settings: Callable[..., Config]) -> None:
    student, condition = started(lora, settings("student.lora=4"))
    assert same_output(student, load_student(lora, "cpu")[1], condition)
    assert all("lora_" in name or "variance" in name for name, p in student.named_parameters() if p.requires_grad)


def test_a_whole_student_starts_from_a_lora(lora: Path, settings: Callable[..., Config]) -> None:
    student, condition = started(lora, settings())
    assert same_output(student, load_student(lora, "cpu")[1], condition, 1e-5)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_run_goes_on_with_another_method_and_its_card_says_from_where(
    whole: Path, settings: Callable[..., Config], tmp_path: Path
) -> None:
    """With a learning rate of next to nothing the second run's student is the first one's."""
    config = settings("objective=continuous", f"student.init={whole}", "optimiser.lr=1e-12")
    student = run(config, tmp_path / "run")
    condition = load_teacher(config.teacher, "cpu").encode(["a fox", "a cat"])
    (_, first, _), (_, second, card) = load_student(whole, "cpu"), load_student(student, "cpu")
    assert same_output(second, first, condition, 1e-5)
    assert card.config["student"]["init"] == str(whole)


@pytest.mark.long
def test_a_run_that_goes_on_needs_its_first_student_no_more(
    whole: Path, settings: Callable[..., Config], tmp_path: Path
) -> None:
    """Its checkpoints have the weights; without them it is needed again."""
    earlier, folder = tmp_path / "earlier", tmp_path / "run"
    shutil.copytree(whole, earlier)
    config = settings("objective=discrete", f"student.init={earlier}")
    before = load_file(run(config, folder) / "transformer" / "diffusion_pytorch_model.safetensors")
    shutil.rmtree(earlier)
    run_distill(config, folder, resume=True, display=Display(quiet=True), command="test")
    after = load_file(folder / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    shutil.rmtree(folder / "checkpoints")
    for said in ("has ended and no whole checkpoint", "earlier"):  # with what it made in its place, and without
        with pytest.raises(UserError, match=said):
            run_distill(config, folder, resume=True, display=Display(quiet=True), command="test")
        shutil.rmtree(folder / "student", ignore_errors=True)
        (folder / "report.json").unlink(missing_ok=True)


def test_what_cannot_go_on_is_one_line_and_leaves_no_run(
    whole: Path, lora: Path, settings: Callable[..., Config], tmp_path: Path
) -> None:
    wide = ("student.lora=4", "student.lora_convolutions=true")
    for folder, changes, message in (
        (whole, ("student.lora=8",), r"is a whole student, but student\.lora is 8; give --set student\.lora=0"),
        (lora, wide, r"has another network than this run's student; give the same student\.depth"),
    ):
        with pytest.raises(UserError, match=message):
            run(settings(f"student.init={folder}", *changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_ranks_and_teachers_must_be_the_same(
    lora: Path, settings: Callable[..., Config], first_sana: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"is a LoRA of rank 4, but student\.lora is 8; give --set student\.lora=4"):
        started(lora, settings("student.lora=8"))
    several = settings("student.lora=4", "objective=policy", "space.kind=policy", "policy.nodes=3")
    with pytest.raises(UserError, match=r"not give as many velocities at a time as this run's student \(1, 3\);"):
        started(lora, several)
    other = settings().model_copy(update={"teacher": settings().teacher.model_copy(update={"source": str(first_sana)})})
    with pytest.raises(UserError, match=r"is a student of another teacher \(teacher\.source is .* there and .* here\)"):
        started(lora, other)
    with pytest.raises(UserError, match=r"is no student folder"):
        started(tmp_path, settings())
