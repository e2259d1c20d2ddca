"""Distribution matching and score identity in the loop, on the tiny teacher."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forms import cases
from scores import networks_of
from torch import Tensor

from stepfold.config import Config
from stepfold.errors import NonFiniteError, UserError
from stepfold.objectives import matching
from stepfold.objectives.matching import Noised, predictions
from stepfold.prompts.reading import PromptFile, open_prompts
from stepfold.students.lora import lora_student
from stepfold.students.starting import make_fake
from stepfold.students.whole import new_student
from stepfold.teachers.sana import SanaTeacher
from stepfold.training.accelerators import make_accelerator
from stepfold.training.distill import distill
from stepfold.training.runs import checkpoints, read_metrics

Settings = Callable[..., Config]
FAKE_ON = ("fake.updates=2", "fake.head_start=0", "fake.kind=whole", "fake.rank=4", "rollout.steps=2")
DMD = (*FAKE_ON, "objective=matching", "space.kind=rollout")
SID = (*FAKE_ON, "objective=identity", "space.kind=rollout", "rollout.lengths=cycled", "fake.guidance=3",
       "matching.fake_guidance=3", "matching.times=logit_normal", "fake.times=logit_normal")  # fmt: skip
VSD = (*DMD, "matching.fake_guidance=same", "fake.unprompted=0.5", "rollout.ladder=random")
RCM = (*FAKE_ON, "matching.weight=0.02")
DECOUPLED = (*FAKE_ON, "objective=decoupled", "space.kind=rollout")
ANCHORED = (*DMD, "rollout.first=2", "anchor.weight=0.05", "anchor.steps=2")
PHASED = (*DMD, "rollout.phased=true")
LATER = (*FAKE_ON, "objective=discrete", "matching.weight=0.3", "matching.form=decoupled", "rollout.first=2")
MIXED = (*FAKE_ON, "objective=matching", "space.kind={rollout: 1, endpoints: 0.5}")
METHODS = {
    "dmd": DMD, "sid": SID, "vsd": VSD, "rcm": RCM, "decoupled": DECOUPLED, "dp-dmd": ANCHORED, "mixed": MIXED,
    "phased": PHASED, "later": LATER,
}  # fmt: skip


@pytest.fixture
def prompts(prompts_file: Path) -> PromptFile:
    return open_prompts(prompts_file)


def run(config: Config, folder: Path, teacher: SanaTeacher, prompts: PromptFile, **options: Any) -> dict[str, Tensor]:
    """The student's weights at the end."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(config.seed)
    rank = config.student.lora
    student = lora_student(teacher, rank) if rank else new_student(teacher)
    black = torch.zeros(teacher.latent_shape)
    options |= {"make_fake": lambda: make_fake(teacher, config.fake)}
    distill(config, folder, teacher, student, prompts, [black], make_accelerator("no"), **options)
    return {name: value.clone() for name, value in student.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize(
    ("method", "kind", "rank"),
    cases(
        [(method, "whole", 0) for method in METHODS] + [("dmd", "lora", 0), ("dmd", "lora", 2), ("sid", "lora", 2)],
        [
            ("dmd", "lora", 2),
            ("sid", "whole", 0),
            ("mixed", "whole", 0),
        ],
    ),
)
def test_a_run_resumes_to_the_bit_and_moves_student_and_fake(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, tensors: Callable,
    method: str, kind: str, rank: int,
) -> None:  # fmt: skip
    config = settings(*METHODS[method], f"fake.kind={kind}", f"student.lora={rank}")
    ours = run(config, tmp_path / "run", teacher, prompts)
    first, last = (tensors(path) for path in checkpoints(tmp_path / "run"))
    for who in ("student", "fake"):
        moved = [name for name in last if name.startswith(f"{who}.") and not torch.equal(last[name], first[name])]
        assert moved and ((kind if who == "fake" else rank) in ("whole", 0) or all("lora_" in name for name in moved))
    rows = read_metrics(tmp_path / "run")
    before = "rollout/" if method in ("rcm", "dp-dmd", "mixed", "later") else ""
    for row in rows:
        assert row["fake/loss"] > 0 and row["grad_norm"] > 0 and row[f"{before}gap"] >= 0
        assert -1 <= row[f"{before}cosine"] <= 1.0001 and row[f"{before}std"] > 0 and row[f"{before}spread"] > 0
        assert not any("sketch" in name for name in row)
        assert (f"{before}fisher" in row) == (method == "sid") and not any("|" in name for name in row)
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    assert equal(run(config, tmp_path / "run", teacher, prompts), ours)
    assert equal(tensors(checkpoints(tmp_path / "run")[-1]), last) and read_metrics(tmp_path / "run") == rows


def at_random(teacher: SanaTeacher, w: float) -> Noised:
    generator = torch.Generator().manual_seed(0)
    x = teacher.sigma_data * torch.randn(3, *teacher.latent_shape, generator=generator)
    t = torch.tensor([0.2, 0.8, 1.4])
    condition = teacher.encode(["a fox", "a red circle", "an owl"])
    return Noised(x, t, condition, torch.full((3,), 4.5), torch.full((3,), w), None)


@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_at_the_start_the_fake_is_the_teacher_and_guidance_alone_pushes(
    teacher: SanaTeacher, settings: Settings, kind: str
) -> None:
    config = settings(*DMD, f"fake.kind={kind}")
    networks = networks_of(new_student(teacher), teacher, make_fake(teacher, config.fake))  # type: ignore[arg-type]
    at = at_random(teacher, 1.0)
    plain = predictions(networks, at)
    size = plain.real.norm()
    assert (plain.fake - plain.real).norm() < 1e-5 * size
    guided = predictions(networks, at_random(teacher, 3.0))
    without, with_prompt = teacher.branches(at.x, at.t, at.condition)
    alone = 2 * at.t.sin()[:, None, None, None] * (with_prompt - without)  # D = sin t (w - 1) (v_c - v_u)
    torch.testing.assert_close(guided.fake - guided.real, alone, rtol=0, atol=3e-6 * float(alone.abs().max()))


def test_a_fake_score_that_breaks_is_named(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, count = matching.fake_velocity, itertools.count()
    nan = float("nan")
    monkeypatch.setattr(matching, "fake_velocity", lambda *a: right(*a) * (nan if next(count) == 2 else 1))
    with pytest.raises(NonFiniteError, match=r"step 2: fake score's output of 2 of 2 pairs is not finite"):
        run(settings(*DMD, "training.checkpoint_every=1"), tmp_path / "run", teacher, prompts)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["000001", "000002"]


def test_the_fakes_own_loss_is_named_before_what_it_spoils(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stepfold.training import critics

    right = critics.denoising_error
    monkeypatch.setattr(critics, "denoising_error", lambda *a: right(*a) * float("nan"))
    with pytest.raises(NonFiniteError, match=r"step 0: loss of 4 of 4 pairs is not finite"):
        run(settings(*DMD), tmp_path / "run", teacher, prompts)


@pytest.mark.parametrize("head_start", [0, 2])
def test_a_fake_update_that_is_not_finite_is_left_out(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, monkeypatch: pytest.MonkeyPatch,
    tensors: Callable, head_start: int,
) -> None:  # fmt: skip
    """With the rest of its step, where steps may be skipped; the networks and the optimiser stay finite."""
    from stepfold.training import critics

    right, count = critics.denoising_error, itertools.count()
    nan = float("nan")
    monkeypatch.setattr(critics, "denoising_error", lambda *a: right(*a) * (nan if next(count) == 1 else 1))
    config = settings(*DMD, "training.skip_nonfinite=1", f"fake.head_start={head_start}")
    run(config, tmp_path / "run", teacher, prompts)
    rows = read_metrics(tmp_path / "run")
    skipped = [row for row in rows if "skipped" in row]
    assert len(skipped) == 1 and "loss" not in skipped[0] and "is not finite" in skipped[0]["nonfinite"]
    assert all(bool(values.isfinite().all()) for values in tensors(checkpoints(tmp_path / "run")[-1]).values())
    assert len(rows) == config.training.steps


def test_in_a_head_start_nobody_rolls_out_for_the_student(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stepfold.training import states

    right, made = states.from_rollout, []
    monkeypatch.setitem(states.SPACES, "rollout", lambda start: made.append(start.step) or right(start))
    config = settings(*DMD, "fake.head_start=3", "space.reuse=2")
    run(config, tmp_path / "run", teacher, prompts)
    assert made == [3]


@pytest.mark.parametrize("method", ["dmd", "rcm"])
def test_micro_batches_add_up(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, method: str
) -> None:
    found = []
    for size in (0, 1):
        config = settings(*METHODS[method], "training.steps=1", f"training.micro_batch={size}")
        run(config, tmp_path / str(size), teacher, prompts)
        found.append(read_metrics(tmp_path / str(size))[0])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_the_fake_learns_from_the_states_that_the_student_is_matched_on(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spaces in turn; in a head start too, in which only those are there that it needs."""
    from stepfold.training import critics, step

    seen: list[tuple[str, ...]] = []
    right = critics.fake_states
    monkeypatch.setattr(
        critics, "fake_states", lambda *a: seen.append((*a[-1], float(right(*a).t.max()))) or right(*a)
    )  # fmt: skip
    found: list[list[str]] = []
    train_step = step.train_step
    monkeypatch.setattr(
        "stepfold.training.distill.train_step", lambda *a: found.append(sorted(a[-1])) or train_step(*a)
    )  # fmt: skip
    changes = ("matching.weight=0.1", "matching.space=endpoints", "fake.head_start=2", "training.micro_batch=1")
    run(settings(*FAKE_ON, *changes), tmp_path / "run", teacher, prompts)
    assert found == [["endpoints"]] * 2 + [["endpoints", "generation"]] * 2
    assert len(seen) == 8 and all("endpoints" in names for names in seen)
    assert any(seen[i][-1] != seen[i + 1][-1] for i in (0, 2, 4, 6))  # each update of a step draws its states
    rows = read_metrics(tmp_path / "run")
    assert all(row["endpoints/gap"] >= 0 for row in rows[2:])


def test_a_phase_without_matching_is_a_run_without_it(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    config = settings(*RCM, "training.phases=[{steps: 2, set: {matching.weight: 0, fake.updates: 0}}]")
    run(config, tmp_path / "run", teacher, prompts)
    rows = read_metrics(tmp_path / "run")
    assert ["rollout/gap" in row for row in rows] == ["fake/loss" in row for row in rows] == [False, False, True, True]
    run(settings("training.steps=2"), tmp_path / "plain", teacher, prompts)
    assert [row["loss"] for row in rows[:2]] == [row["loss"] for row in read_metrics(tmp_path / "plain")]


def test_a_teacher_without_a_branch_without_prompt_is_told(
    teacher: SanaTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "_null", None)
    with pytest.raises(UserError, match=r"leave matching\.fake_guidance and fake\.guidance at 1"):
        teacher.null(teacher.encode(["a fox"]))


def test_rows_of_two_conditions_are_chosen(teacher: SanaTeacher) -> None:
    condition = teacher.encode(["a fox", "an owl on a red branch"])
    both = condition.where(torch.tensor([True, False]), teacher.null(condition))
    null, length = teacher.null(condition), condition.mask.shape[1]
    assert torch.equal(both.embeds[1, :length], condition.embeds[1]) and both.mask[0].sum() == null.mask[0].sum()
    kept = both.mask[0].bool()[: null.mask.shape[1]]
    assert torch.equal(both.embeds[0, : null.mask.shape[1]][kept], null.embeds[0][kept])
