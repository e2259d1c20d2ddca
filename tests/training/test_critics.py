"""Critics: the fake score becomes the score of the student's pictures; the discriminator tells two laws apart."""

import itertools
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forms import cases
from gaussians import SIGMA_DATA, Guided, Law, Perfect, Score, TwoScores, batch_of, gaussian, nothing
from torch import Tensor

from stepfold.config import Config, load_config
from stepfold.errors import NonFiniteError, UserError
from stepfold.maths.routes import level_times
from stepfold.objectives import denoising
from stepfold.objectives.adversarial import NAME, Discriminator, adversarial_loss, judged_draws
from stepfold.objectives.contract import Networks
from stepfold.prompts.reading import PromptFile, open_prompts
from stepfold.spaces.records import Pairs
from stepfold.students.starting import make_fake
from stepfold.students.whole import new_student
from stepfold.teachers.sana import SanaTeacher
from stepfold.training.accelerators import make_accelerator
from stepfold.training.critics import FAKE, critics_of, fake_loss, fake_states
from stepfold.training.distill import distill
from stepfold.training.optimisers import STUDENT, add_group
from stepfold.training.processes import ALONE
from stepfold.training.runs import checkpoints, read_metrics
from stepfold.training.stages import Stages
from stepfold.training.states import collect
from stepfold.training.step import Phase, Run, update_critic
from stepfold.training.step_log import StepRecord
from stepfold.training.terms import terms_of

Settings = Callable[..., Config]
FAKE_ON = ("fake.updates=2", "fake.head_start=0", "fake.kind=whole", "rollout.steps=2")


def trained_fake(steps: int = 1, updates: int = 400) -> Score:
    """A fake score that starts as the teacher N(0, 0.5^2) and learns the law of a student N(0.7, 0.3^2)."""
    config = load_config("default", [f"rollout.steps={steps}", "training.precision=no"])
    fake, student = Score(0.0, 0.5), Perfect(0.7, 0.3)
    networks: Any = Networks(student, Law(), {FAKE: fake})  # type: ignore[arg-type]
    optimiser = torch.optim.Adam(fake.parameters(), lr=2e-2)
    for update in range(updates):
        for group in optimiser.param_groups:
            group["lr"] = 2e-2 * (1 - update / updates)
        batch = batch_of(256, update)
        states = fake_states(networks, batch, nothing(256), config, update, {})
        fake_loss(networks, batch, states, config).value.mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert student.mean.grad is None and student.log_std.grad is None
    return fake


@pytest.mark.parametrize("steps", cases([1, 4], short=[1]))
def test_the_fake_becomes_the_score_of_the_students_pictures(steps: int) -> None:
    fake = trained_fake(steps)
    assert abs(fake.mean - 0.7) < 0.01 and abs(fake.log_std.exp() - 0.3) < 0.01
    x, t = torch.randn(1000, 3).double(), torch.rand(1000).double() * 1.5
    exact = gaussian(0.7, 0.3).velocity(x, t) / SIGMA_DATA
    with torch.no_grad():
        error = (fake(x / SIGMA_DATA, t, nothing(1000), torch.ones(1000)) - exact).norm() / exact.norm()
    assert error < 0.02


@pytest.mark.parametrize("mistake", ["sign", "teacher's law"])
def test_a_wrong_fake_is_seen(monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    if mistake == "sign":
        right = denoising.interpolate_velocity
        monkeypatch.setattr(denoising, "interpolate_velocity", lambda x0, z, t: -right(x0, z, t))
        fake = trained_fake(updates=200)
    else:
        fake = Score(0.0, 0.5)
    assert abs(fake.mean - 0.7) > 0.1 or abs(fake.log_std.exp() - 0.3) > 0.1


def test_the_updates_of_a_step_are_those_of_an_optimiser_of_its_own() -> None:
    """Each has draws and a gradient of its own, at the fake score's rate; nothing of them reaches the student."""
    changes = (
        "objective=matching", "space.kind=rollout", "rollout.steps=1", "fake.updates=2", "fake.lr_factor=3",
        "optimiser.lr=0.01", "optimiser.warmup=0", "optimiser.clip=1000", "training.precision=no",
        "training.prompts_per_step=8",
    )  # fmt: skip
    config, batch = load_config("default", changes), batch_of(8)
    student, fake, twin = Perfect(0.7, 0.3), Score(0.0, 0.5), Score(0.0, 0.5)
    networks: Any = Networks(student, Law(), {FAKE: fake})  # type: ignore[arg-type]
    optimiser = torch.optim.SGD([{"params": list(student.parameters()), "name": STUDENT}], lr=0.01)
    add_group(optimiser, FAKE, list(fake.parameters()), None)
    phase = Phase(0, config, terms_of(config), critics_of(config, {FAKE: fake}), networks)
    run = Run(config, student, student, optimiser, make_accelerator("no"), ALONE, [phase], Stages())
    update_critic(run, FAKE, phase.critics[FAKE], StepRecord(0, batch.prompts), batch, nothing(8), {})

    by_hand, alone = torch.optim.SGD(twin.parameters(), lr=0.03), replace(networks, critics={FAKE: twin})
    for j in range(2):
        own = replace(batch, draws=batch.draws.of_update(j))
        states = fake_states(alone, own, nothing(8), config, j, {})
        fake_loss(alone, own, states, config).value.mean().backward()
        by_hand.step()
        by_hand.zero_grad()
    assert abs(fake.mean) > 1e-3 and all(p.grad is None for p in (*student.parameters(), *fake.parameters()))
    torch.testing.assert_close([*fake.parameters()], [*twin.parameters()], rtol=1e-12, atol=0)


def losses_of(fake: Score, *changes: str) -> Tensor:
    """Of a fake score on the pictures of N(0.7, 0.3^2), under a teacher with classifier-free guidance."""
    config = load_config("default", ["rollout.steps=1", "training.precision=no", *changes])
    networks: Any = Networks(Perfect(0.7, 0.3), Guided(0.4, 0.2), {FAKE: fake})  # type: ignore[arg-type]
    batch = batch_of(32)
    states = fake_states(networks, batch, nothing(32), config, 0, {})
    return fake_loss(networks, batch, states, config).value.detach()


def test_a_fake_that_is_guided_while_it_learns_should_be_right_under_guidance() -> None:
    """With equal deviations the guided score is that of the guided mean. Unguided, it is another one."""
    fake, plain = TwoScores(0.5, 0.3, 0.2, 0.3), Score(0.2 + 3 * (0.5 - 0.2), 0.3)
    torch.testing.assert_close(losses_of(fake, "fake.guidance=3"), losses_of(plain))
    assert (losses_of(fake) - losses_of(plain)).abs().max() > 0.1


def test_a_share_of_the_pictures_comes_without_its_prompt() -> None:
    fake = TwoScores(0.5, 0.3, 0.2, 0.25)
    with_prompt, without = losses_of(Score(0.5, 0.3)), losses_of(Score(0.2, 0.25))
    torch.testing.assert_close(losses_of(fake), with_prompt)
    torch.testing.assert_close(losses_of(fake, "fake.unprompted=1"), without)
    some = losses_of(fake, "fake.unprompted=0.3")
    gone = (some - without).abs() < 1e-9
    assert 2 <= gone.sum() <= 18 and torch.allclose(some[~gone], with_prompt[~gone])


def test_the_times_of_the_fake_are_even_levels_shifted_and_clamped() -> None:
    uniform = (torch.arange(1000).double() + 0.5) / 1000
    level = torch.tan(level_times(uniform, 1.0, 0.02, 0.98)) / (1 + torch.tan(level_times(uniform, 1.0, 0.02, 0.98)))
    torch.testing.assert_close(level, uniform.clamp(0.02, 0.98))
    shifted = torch.tan(level_times(uniform, 3.0, 0.0, 1.0))
    torch.testing.assert_close(shifted, 3 * uniform / (1 - uniform))  # shift multiplies the odds


# The discriminator on two Gaussians: the student's pictures N(m, .) and the teacher's ends.


def judged(student: Score, discriminator: Discriminator, number: int, *changes: str) -> Any:
    more = ("space.filter_rule=off", "space.route_steps=12", "adversarial.weight=1")
    config = load_config("default", [*more, *changes])
    teacher: Any = Law(0.4, 0.1)
    networks = Networks(student, teacher, {NAME: discriminator})
    batch = batch_of(16, number)
    pairs = collect(["generation"], batch, nothing(16), networks, config)["generation"]
    assert isinstance(pairs, Pairs)
    return adversarial_loss(networks, pairs, batch.draws, config, 0)


class Mean(torch.nn.Module):
    """A head that reads the state's mean alone: LayerNorm would take it away."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(3, 8)
        self.out = torch.nn.Linear(8, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.out(torch.relu(self.line(maps[0].float()))).flatten(1)


def test_heads_learn_to_tell_the_students_pictures_from_the_teachers_ends() -> None:
    """With the student frozen the heads' loss falls; with the heads frozen then, the student's own falls."""
    torch.manual_seed(0)
    student, heads = Perfect(-0.4, 0.1), Mean()
    optimiser = torch.optim.Adam(heads.parameters(), lr=2e-2)
    losses = []
    for number in range(60):
        loss = judged(student, heads, number).of_critic.mean()  # type: ignore[arg-type]
        losses.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 1.2 < losses[0]
    student.zero_grad()
    before = student.mean.item()
    own = torch.optim.Adam([student.mean], lr=2e-2)
    fooled = []
    for number in range(60, 100):
        loss = judged(student, heads, number).value.mean()  # type: ignore[arg-type]
        fooled.append(loss.item())
        loss.backward()
        own.step()
        own.zero_grad()
    assert fooled[-1] < fooled[0] - 0.2 and student.mean.item() > before + 0.2  # towards the teacher's law


class Sum(torch.nn.Module):
    """A head that sums the state's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.scale * maps[0].flatten(1).sum(1, keepdim=True)


def test_heads_that_are_rough_pay_for_it_and_the_student_does_not() -> None:
    """A sum of 3 numbers moves by cos t times the sum of as many small noises, of deviation r1_noise sigma_data."""
    student, heads = Perfect(0.4, 0.1), Sum()
    plain = judged(student, heads, 0).of_critic  # type: ignore[arg-type]
    rough = judged(student, heads, 0, "adversarial.r1_weight=7", "adversarial.r1_noise=0.2")  # type: ignore[arg-type]
    torch.testing.assert_close(rough.of_critic - plain, 7 * rough.metrics["roughness"])
    level = torch.randn(20000, generator=torch.Generator().manual_seed(0)) - 0.6  # log(sigma_data tan t)
    share = 1 / (1 + (level.exp() / SIGMA_DATA).square())  # cos^2 t
    wanted = float(3 * (0.2 * SIGMA_DATA) ** 2 * share.mean())
    assert float(rough.metrics["roughness"].mean()) == pytest.approx(wanted, rel=0.3)
    rough.of_critic.sum().backward()
    assert heads.scale.grad is not None and student.mean.grad is None and student.log_std.grad is None


def test_pictures_are_judged_at_the_times_that_are_drawn_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's and the teacher's pictures at one time each, and those times are logit-normal, not the pairs'."""
    seen: list[Tensor] = []
    features = Law.features
    monkeypatch.setattr(Law, "features", lambda self, x, t, *rest: seen.append(t) or features(self, x, t, *rest))
    judged(Perfect(0.4, 0.1), Mean(), 0)  # type: ignore[arg-type]
    assert torch.equal(seen[0], seen[1])
    level = torch.log(SIGMA_DATA * torch.tan(seen[0]))
    assert abs(level.mean() + 0.6) < 0.25 and abs(level.std() - 1.0) < 0.25


# In the loop, on the tiny teacher.


@pytest.fixture
def prompts(prompts_file: Path) -> PromptFile:
    return open_prompts(prompts_file)


def run(config: Config, folder: Path, teacher: SanaTeacher, prompts: PromptFile, **options: Any) -> dict[str, Tensor]:
    """The student's weights at the end."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(config.seed)
    student, black = new_student(teacher), torch.zeros(teacher.latent_shape)
    options |= {"make_fake": lambda: make_fake(teacher, config.fake)}
    distill(config, folder, teacher, student, prompts, [black], make_accelerator("no"), **options)
    return {name: value.clone() for name, value in student.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("kind", cases(["whole", "lora"], short=["lora"]))
def test_a_fake_beside_the_student_changes_nothing_of_it_and_resumes_to_the_bit(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, tensors: Callable, kind: str
) -> None:
    plain = run(settings(), tmp_path / "plain", teacher, prompts)
    config = settings(*FAKE_ON, f"fake.kind={kind}", "fake.rank=4")
    ours = run(config, tmp_path / "run", teacher, prompts)
    assert equal(ours, plain)
    first, last = (tensors(path) for path in checkpoints(tmp_path / "run"))
    moved = [name for name in last if name.startswith("fake.") and not torch.equal(last[name], first[name])]
    assert moved and not any("variance_head" in name for name in moved)
    assert kind == "whole" or all("lora_" in name for name in moved)
    rows = read_metrics(tmp_path / "run")
    assert all(row["fake/loss"] > 0 and row["grad_norm/fake"] > 0 for row in rows)
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    assert equal(run(config, tmp_path / "run", teacher, prompts), ours)
    assert equal(tensors(checkpoints(tmp_path / "run")[-1]), last) and read_metrics(tmp_path / "run") == rows


def test_in_a_head_start_the_fake_learns_and_the_student_waits(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, tensors: Callable
) -> None:
    config = settings(*FAKE_ON, "fake.head_start=3", "training.checkpoint_every=1", "training.keep_checkpoints=9")
    run(config, tmp_path / "run", teacher, prompts)
    states = [tensors(path) for path in checkpoints(tmp_path / "run")]
    moves = {
        who: [
            any(not torch.equal(a[n], b[n]) for n in a if n.startswith(f"{who}."))
            for a, b in itertools.pairwise(states)
        ]
        for who in ("student", "fake")
    }
    assert moves == {"student": [False, False, True], "fake": [True, True, True]}
    rows = read_metrics(tmp_path / "run")
    assert [row.get("head_start") for row in rows] == [1, 1, 1, None] and ["lr" in row for row in rows] == [
        False
    ] * 3 + [True]


def test_a_fake_that_is_not_finite_stops_the_run(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stepfold.training import critics

    right, count = critics.denoising_error, itertools.count()
    monkeypatch.setattr(critics, "denoising_error", lambda *a: right(*a) * (float("nan") if next(count) == 5 else 1))
    with pytest.raises(NonFiniteError, match=r"step 2: loss of 2 of 4 pairs is not finite"):
        run(settings(*FAKE_ON, "training.checkpoint_every=1"), tmp_path / "run", teacher, prompts)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["000001", "000002"]


def test_micro_batches_of_a_critic_add_up(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, tensors: Callable
) -> None:
    found = []
    for size in (0, 1):
        config = settings(*FAKE_ON, "training.steps=1", "training.checkpoint_every=1", f"training.micro_batch={size}")
        run(config, tmp_path / str(size), teacher, prompts)
        found.append(read_metrics(tmp_path / str(size))[0])
    for name in ("fake/loss", "grad_norm/fake"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4)


@pytest.mark.parametrize("size", cases([1, 3], short=[3]))
def test_micro_batches_leave_the_discriminators_gradient(
    size: int, tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    """Its spectral norms are estimated anew at each call: the heads' gradient was 2% off."""
    found = []
    for parts in (0, size):
        config = settings(
            "adversarial.weight=0.5", "training.steps=3", "training.checkpoint_every=3", f"training.micro_batch={parts}"
        )
        run(config, tmp_path / str(parts), teacher, prompts)
        found.append(read_metrics(tmp_path / str(parts)))
    for whole, in_parts in zip(*found, strict=True):
        assert in_parts == pytest.approx(whole, rel=1e-4)


def test_the_fakes_blocks_are_compiled_with_the_others(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    from stepfold.training import set_up as loop

    given: list[torch.nn.Module] = []
    monkeypatch.setattr(loop, "compiled_blocks", lambda blocks, recompute: given.extend(blocks) or nullcontext())
    run(settings(*FAKE_ON, "training.compile=true", "training.steps=1"), tmp_path / "run", teacher, prompts)
    depth = len(teacher.transformer.transformer_blocks)
    assert len(given) == len({id(block) for block in given}) == 3 * depth  # teacher, student, fake


def test_the_memory_estimate_counts_a_critics_states(teacher: SanaTeacher, settings: Settings) -> None:
    from stepfold.training.choices import memory_estimate

    student, fake, condition = new_student(teacher), new_student(teacher), teacher.encode(["fox"])
    shape = teacher.latent_shape
    plain, _ = memory_estimate(settings(), student, condition, shape, 1)
    with_fake, _ = memory_estimate(settings(), student, condition, shape, 1, [fake])
    weights = sum(parameter.numel() * 4 for parameter in fake.parameters())
    assert (with_fake - plain) * 2**30 == pytest.approx(4 * weights)  # itself, its gradient, AdamW's two; no average


ALTERNATING = ("space.kind=endpoints", "adversarial.weight=0.5", "adversarial.updates=2")
BETTER = (*ALTERNATING, "adversarial.r1_weight=100", "adversarial.neighbours=true")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param((*BETTER, "training.micro_batch=1"), id="better, in parts"),
        pytest.param(BETTER, id="better", marks=pytest.mark.long),
        pytest.param(ALTERNATING, id="plain", marks=pytest.mark.long),
    ],
)
def test_alternating_heads_learn_in_updates_of_their_own_and_resume_to_the_bit(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, tensors: Callable,
    monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...],
) -> None:  # fmt: skip
    from stepfold.objectives import adversarial

    trained: list[bool] = []
    right = adversarial.heads_loss
    monkeypatch.setattr(adversarial, "heads_loss", lambda *a: trained.append(torch.is_grad_enabled()) or right(*a))
    config = settings(*changes)
    ours = run(config, tmp_path / "run", teacher, prompts)
    parts = 2 if "training.micro_batch=1" in changes else 1
    assert len(trained) == 2 * parts * config.training.steps  # none on the student's own passes
    first, last = (tensors(path) for path in checkpoints(tmp_path / "run"))
    for who in ("student", NAME):
        assert any(name.startswith(f"{who}.") and not torch.equal(last[name], first[name]) for name in last)
    assert any(".across." in name for name in last) == ("adversarial.neighbours=true" in changes)
    rows = read_metrics(tmp_path / "run")
    for row in rows:
        assert row["generator_loss"] and "discriminator_loss" not in row and row["grad_norm/discriminator"] > 0
        assert ("discriminator/roughness" in row) == (changes is not ALTERNATING) and row["discriminator/loss"] > 0
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    assert equal(run(config, tmp_path / "run", teacher, prompts), ours)
    assert equal(tensors(checkpoints(tmp_path / "run")[-1]), last) and read_metrics(tmp_path / "run") == rows


@pytest.mark.long
def test_micro_batches_of_alternating_heads_add_up(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By plain descent: the hinge gives a head's last bias no gradient, and AdamW makes a step of its rounding."""
    from stepfold.training import set_up

    def plain(params: Iterable[Tensor], settings: object) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": list(params), "name": STUDENT}], lr=1e-3)

    monkeypatch.setattr(set_up, "make_optimiser", plain)
    found = []
    for parts in (0, 1):
        config = settings(*BETTER, f"training.micro_batch={parts}")
        run(config, tmp_path / str(parts), teacher, prompts)
        found.append(read_metrics(tmp_path / str(parts)))
    for whole, in_parts in zip(*found, strict=True):
        assert in_parts == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_in_a_fakes_head_start_alternating_heads_have_their_pairs(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    run(settings(*RCM_AND_HEADS, "training.steps=2"), tmp_path / "run", teacher, prompts)
    rows = read_metrics(tmp_path / "run")
    assert [("discriminator/loss" in row, "loss" in row) for row in rows] == [(True, False), (True, True)]


RCM_AND_HEADS = (*ALTERNATING, *FAKE_ON, "fake.head_start=1", "matching.weight=0.1")


def test_alternating_heads_take_no_filter() -> None:
    with pytest.raises(UserError, match=r"adversarial\.updates=1 .*give space\.filter_rule=off"):
        load_config("default", ["adversarial.weight=1", "adversarial.updates=1", "space.filter_rule=hard"])
    load_config("default", ["adversarial.updates=1", "space.filter_rule=hard"])
    with pytest.raises(UserError, match=r"adversarial\.neighbours stays the same in all phases"):
        load_config("default", ["training.phases=[{steps: 1, set: {adversarial.neighbours: true}}]"])


class Linear(torch.nn.Module):
    """A head whose gradient is known: w times the state."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.3, -1.0, 2.0]).double())

    def forward(self, maps: list[Tensor]) -> Tensor:
        return maps[0].double() @ self.w


def test_roughness_is_the_squared_gradient_times_the_noises_variance() -> None:
    """Of a linear head, in the mean over pictures, noised to times t: cos^2 t |w|^2 d^2."""
    changes = ["adversarial.weight=1", "adversarial.r1_weight=1", "adversarial.r1_noise=0.02", "space.filter_rule=off"]
    config = load_config("default", [*changes, "space.route_steps=12"])
    teacher: Any = Law(0.4, 0.1)
    networks = Networks(Perfect(0.4, 0.1), teacher, {NAME: Linear()})
    found, expected = [], []
    for number in range(8):
        batch = batch_of(64, number)
        pairs = collect(["generation"], batch, nothing(64), networks, config)["generation"]
        assert isinstance(pairs, Pairs)
        found.append(adversarial_loss(networks, pairs, batch.draws, config, 0).metrics["roughness"])
        t = judged_draws(pairs, batch.draws, config, SIGMA_DATA).t
        expected.append(t.cos().square() * (0.02 * SIGMA_DATA) ** 2 * (0.09 + 1 + 4))
    assert float(torch.cat(found).mean() / torch.cat(expected).mean()) == pytest.approx(1, rel=0.05)


def test_the_penalty_holds_the_heads_back() -> None:
    """Heads that are told two laws apart are flatter with it."""
    sizes = []
    for weight in (0, 300):
        torch.manual_seed(0)
        heads, student = Mean(), Perfect(-0.4, 0.1)
        optimiser = torch.optim.Adam(heads.parameters(), lr=2e-2)
        for number in range(40):
            judged(student, heads, number, f"adversarial.r1_weight={weight}").of_critic.mean().backward()  # type: ignore[arg-type]
            optimiser.step()
            optimiser.zero_grad()
        with torch.no_grad():
            sizes.append(float((heads.out.weight.abs() @ heads.line.weight.abs()).sum()))
    assert sizes[1] < 0.8 * sizes[0]
