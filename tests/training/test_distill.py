"""What must hold for the loop, on the tiny teacher."""

import copy
import errno
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from forms import cases
from passes import gradient_step
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from stepfold.config import Config, SpaceSettings
from stepfold.display import Display
from stepfold.errors import NonFiniteError, UserError
from stepfold.export.pipeline import save_student
from stepfold.jobs.distilling import run_distill
from stepfold.objectives.adversarial import NAME, Discriminator
from stepfold.objectives.contract import Networks
from stepfold.prompts.reading import PromptFile, open_prompts
from stepfold.randomness import Draws
from stepfold.spaces.generation import pairs_from, walk
from stepfold.spaces.records import Pairs
from stepfold.students.loading import load_student
from stepfold.students.sana import SanaStudent
from stepfold.students.whole import new_student
from stepfold.teachers.contract import Condition
from stepfold.teachers.sana import SanaTeacher
from stepfold.training import states as states_of_spaces
from stepfold.training.accelerators import make_accelerator
from stepfold.training.choices import choose_precision
from stepfold.training.critics import new_discriminator
from stepfold.training.distill import distill
from stepfold.training.draws import Batch, draw
from stepfold.training.looks import Progress
from stepfold.training.precision import walk_precision
from stepfold.training.runs import checkpoints, damage, read_metrics, saved_step
from stepfold.training.states import collect
from stepfold.training.step_log import StepRecord, metrics_of, row_of
from stepfold.training.terms import add_gradients, terms_of

CPU = torch.device("cpu")
FIXED_TANGENT = "training.tangent=two_pass"
SPRINT = ("space.kind=endpoints", "adversarial.weight=0.5")
Settings = Callable[..., Config]


@pytest.fixture
def prompts(prompts_file: Path) -> PromptFile:
    return open_prompts(prompts_file)


def train(
    config: Config,
    folder: Path,
    teacher: SanaTeacher,
    prompts: PromptFile,
    student: SanaStudent | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> tuple[SanaStudent, SanaStudent]:
    """A run in process: (student, average)."""
    folder.mkdir(exist_ok=True)
    if student is None:
        torch.manual_seed(config.seed)
        student = new_student(teacher)
    black = torch.zeros(teacher.latent_shape)
    accelerator = make_accelerator(config.training.precision)
    average = distill(config, folder, teacher, student, prompts, [black], accelerator, report=report)
    assert isinstance(average, SanaStudent)
    return student, average


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def pairs_of(teacher: SanaTeacher, config: Config, prompts: PromptFile, keep: list[bool] | None = None) -> Pairs:
    """The pairs of step 0, in float64."""
    batch = draw(0, prompts, teacher, config, CPU)
    condition = teacher.encode(batch.prompts)
    trajectory = walk(teacher.velocity, batch.noise(), batch.route(config.space), condition, batch.guidance)
    kept = torch.tensor(keep or [True] * len(batch.prompts))
    pairs = pairs_from(trajectory, condition, batch.guidance, keep_first=config.space.keep_first, keep=kept)
    wide = {name: getattr(pairs, name).double() for name in ("x", "t", "dxdt", "guidance")}
    return replace(pairs, **wide, condition=Condition(pairs.condition.embeds.double(), pairs.condition.mask))


def lively_student(teacher: SanaTeacher) -> SanaStudent:
    """Float64, with no zeroed layer, so that every parameter has a gradient."""
    student = new_student(teacher).double()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return student


def gradient(
    student: SanaStudent, pairs: Pairs, config: Config, backend: str = "two_pass"
) -> tuple[Tensor, dict[str, Tensor]]:
    student.zero_grad(set_to_none=True)
    figures = gradient_step(student, pairs, config, tangent=backend)
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]), figures


def drawn(space: SpaceSettings) -> dict[str, Callable[[Batch], Tensor]]:
    """Everything that a batch draws, by name."""
    return {
        "noise": lambda batch: batch.noise(),
        "route": lambda batch: batch.route(space),
        "guidance": lambda batch: batch.guidance,
        "filter": lambda batch: batch.draws.uniform("filter", (1,)),
    }


@pytest.mark.parametrize(
    ("objective", "denominator"),
    cases(
        itertools.product(("continuous", "discrete"), ("kept", "all")),
        short=[("continuous", "kept"), ("discrete", "all")],
    ),
)
def test_micro_batches_add_up(
    teacher: SanaTeacher, settings: Settings, prompts: PromptFile, denominator: str, objective: str
) -> None:
    """Discrete consistency takes its targets from its own pictures where a micro-batch holds whole walks only."""
    same = (f"space.filter_denominator={denominator}", f"objective={objective}")
    config = settings(*same)
    pairs, student = pairs_of(teacher, config, prompts), lively_student(teacher)
    assert len(pairs) == 6
    whole, figures = gradient(student, pairs, config)
    assert whole.norm() > 0.1
    for size in (1, 4, 6, 100):
        parts, figures_of_parts = gradient(student, pairs, settings(*same, f"training.micro_batch={size}"))
        assert (parts - whole).norm() <= 1e-6 * whole.norm(), size
        for name, values in figures.items():
            assert torch.allclose(values, figures_of_parts[name], rtol=1e-6, atol=1e-8), (size, name)


def test_the_tangent_beside_the_forward_gives_the_same_gradient(
    teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    config = settings()
    pairs, student = pairs_of(teacher, config, prompts), lively_student(teacher)
    wanted, figures = gradient(student, pairs, config)
    found, beside = gradient(student, pairs, config, "one_pass")
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()  # Sana's attention works in float32
    torch.testing.assert_close(beside["tangent_norm"], figures["tangent_norm"], rtol=1e-5, atol=0)


def test_filtered_prompts_cost_nothing(teacher: SanaTeacher, settings: Settings, prompts: PromptFile) -> None:
    student, config = lively_student(teacher), settings()
    rows: list[int] = []
    student.transformer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    _, figures = gradient(student, pairs_of(teacher, config, prompts, [False, True]), config)
    assert rows
    assert max(rows) == 3  # one prompt's
    assert len(figures["loss"]) == 3


def test_filter_does_not_dilute_unless_asked_to(teacher: SanaTeacher, settings: Settings, prompts: PromptFile) -> None:
    student, kept, every = lively_student(teacher), settings(), settings("space.filter_denominator=all")
    half = pairs_of(teacher, kept, prompts, [False, True])
    alone = replace(half, num_drawn=len(half))  # as if the other prompt had never been there
    of_kept, of_all = gradient(student, half, kept)[0], gradient(student, half, every)[0]
    assert torch.equal(of_kept, gradient(student, alone, kept)[0])
    assert torch.equal(of_kept, gradient(student, alone, every)[0])
    assert torch.allclose(of_all, of_kept / 2, rtol=1e-9, atol=1e-12)


def test_a_step_without_kept_prompts_changes_nothing(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    config = settings("space.filter_rule=hard", "space.filter_threshold=1e9")
    student = new_student(teacher)
    before = state(student)
    train(config, tmp_path / "run", teacher, prompts, student)
    assert all(torch.equal(value, before[name]) for name, value in state(student).items())
    assert read_metrics(tmp_path / "run") == [{"step": step, "kept": 0.0} for step in range(4)]


@pytest.mark.parametrize("keep_first", ["true", "false"])
def test_endpoints_are_noised_to_the_times_that_a_walk_would_keep(
    teacher: SanaTeacher, settings: Settings, prompts: PromptFile, keep_first: str
) -> None:
    """Both spaces from the same prompts, noise, routes: equal times, and at the top of the route different states."""
    common = ("space.route_per=prompt", f"space.keep_first={keep_first}")
    walked = pairs_in(settings(*common), teacher, prompts)
    noised = pairs_in(settings(*common, "space.kind=endpoints"), teacher, prompts)
    assert torch.equal(walked.t, noised.t) and torch.equal(walked.prompt, noised.prompt)
    assert walked.num_drawn == noised.num_drawn and torch.equal(walked.t_next, noised.t_next)
    count = len(walked) // len(walked.prompt.unique())
    for first in range(0, len(walked), count):
        t, t_next = (values[first : first + count] for values in (walked.t, walked.t_next))
        assert torch.equal(t_next[:-1], t[1:]) and t_next[-1] == 0
    assert (walked.x - noised.x).flatten(1).norm(dim=1).min() > 0.1
    with torch.no_grad():
        again = teacher.velocity(noised.x, noised.t, noised.condition, noised.guidance)
    torch.testing.assert_close(noised.dxdt, again)


def pairs_in(config: Config, teacher: SanaTeacher, prompts: PromptFile) -> Pairs:
    """The pairs of step 0 of a run."""
    batch = draw(0, prompts, teacher, config, CPU)
    networks = Networks(new_student(teacher), teacher)
    pairs = collect([config.space.first], batch, teacher.encode(batch.prompts), networks, config)[config.space.first]
    assert isinstance(pairs, Pairs)
    return pairs


def test_diffusion_space_draws_independent_times(teacher: SanaTeacher, settings: Settings, prompts: PromptFile) -> None:
    """Logit-normal times of the given mean and spread, none replaced by pi/2, as a walk's first is."""
    changes = ("space.kind=endpoints", "space.route=logit_normal", "training.prompts_per_step=64")
    changes += ("space.route_per=prompt",)
    nine, one = (settings(*changes, f"space.route_steps={count}") for count in (9, 2))
    times = torch.cat([draw(step, prompts, teacher, nine, CPU).times(nine.space) for step in range(8)])
    assert times.shape == (512, 8) and (times.diff(dim=1) <= 0).all()
    tau = torch.log(teacher.sigma_data * torch.tan(times))
    assert abs(tau.mean() - 0.2) < 0.1 and abs(tau.std() - 1.6) < 0.1
    single = torch.cat([draw(step, prompts, teacher, one, CPU).times(one.space) for step in range(8)])
    assert single.shape == (512, 1) and abs(torch.log(teacher.sigma_data * torch.tan(single)).mean() - 0.2) < 0.25


@pytest.mark.parametrize("change", ["space.kind=endpoints", "objective=discrete", "training.tangent=one_pass"])
def test_other_spaces_and_objectives_train(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, change: str
) -> None:
    student = new_student(teacher)
    before = state(student)
    train(settings(change), tmp_path / "run", teacher, prompts, student)
    assert any(not torch.equal(value, before[name]) for name, value in state(student).items())
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in read_metrics(tmp_path / "run"))


class Asked(TorchDispatchMode):
    """Notes operations whose result the host has to wait for, and float64 but for single numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.wide: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"):
            self.operations.append(name)
        out = func(*args, **(kwargs or {}))
        if any(v.dtype == torch.float64 and v.ndim > 0 for v in tree_leaves(out) if isinstance(v, Tensor)):
            self.wide.append(name)
        return out


def unwatched(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose operations no mode sees."""

    def call(*args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    return call


AIMED = ("student.times=two", "target.rule={uniform: 0.5, zero: 0.25, diagonal: 0.25}")
ASKING = {
    "discrete": ("objective=discrete",),
    "adversarial": SPRINT,
    "aimed": AIMED,
    "pair": ("student.times=two", "target.rule={later: 0.75, diagonal: 0.25}", "objective=pair"),
    "semigroup": (*AIMED, "objective=semigroup"),
    "segments": ("target.rule=edge", "objective=semigroup"),
    "edges": (
        "student.times=two",
        "objective=discrete",
        "target.rule=edge",
        "target.segments={1: 1, 2: 1}",
        "target.draws=2",
    ),
    "lagrange": (*AIMED, "objective=lagrange", "space.kind=prior"),
}


@pytest.mark.parametrize("backend", ["two_pass", "one_pass", *ASKING])
def test_a_step_asks_the_device_for_nothing(
    teacher: SanaTeacher, settings: Settings, prompts: PromptFile, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the drawn numbers to the gradient: no value is read, so a GPU is never waited for; nor is anything float64,
    which a GPU is slow at and some do not have. The numbers themselves are drawn on the CPU."""
    for kind, name in ((Batch, "route"), (Batch, "times"), (Draws, "_draw"), (states_of_spaces, "grids_of")):
        monkeypatch.setattr(kind, name, unwatched(getattr(kind, name)))
    config, accelerator = settings("space.filter_rule=off", *ASKING.get(backend, ())), make_accelerator("no")
    student = new_student(teacher, two_times=config.student.times == "two")
    batch, condition = draw(0, prompts, teacher, config, CPU), teacher.encode(["fox", "pizza"])
    critics = {NAME: new_discriminator(teacher, 0)} if config.adversarial.weight else {}
    space, tangent = config.space.first, backend if backend == "one_pass" else "two_pass"
    with Asked() as asked:
        networks = Networks(student, teacher, critics, tangent)
        states = collect([space], batch, condition, networks, config)
        figures = add_gradients(terms_of(config), networks, states, batch.draws, config, 10, accelerator)[space]
        norm = torch.as_tensor(accelerator.clip_grad_norm_(student.parameters(), 1.0))
        metrics = metrics_of(states[space], figures, len(states[space]), states[space].num_drawn)
        record = StepRecord(0, batch.prompts, {space: metrics}, norms={"student": norm}, rate=1e-3)
        assert asked.operations == [] and asked.wide == []
        row = row_of(record)
    assert asked.operations and row["loss"] == figures["loss"].mean().item()


@pytest.mark.parametrize("objective", ["continuous", "discrete", "velocity"])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("no", torch.float32)])
def test_the_student_computes_in_the_runs_precision(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, objective: str, precision: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """In every pass of the loop; the teacher's walk has a precision of its own."""
    student, seen = new_student(teacher), dict[str, set[torch.dtype]](student=set(), teacher=set())
    for name, network in (("student", student.transformer), ("teacher", teacher.transformer)):
        layer = network.transformer_blocks[0].attn1.to_q
        note = seen[name].add
        layer.register_forward_hook(lambda module, args, output, note=note: note(output.dtype))
    config = settings(f"training.precision={precision}", f"objective={objective}", "training.steps=1", FIXED_TANGENT)
    train(config, tmp_path / "run", teacher, prompts, student)
    teacher.transformer.transformer_blocks[0].attn1.to_q._forward_hooks.clear()
    assert seen == {"student": {dtype}, "teacher": {torch.float32}}


@pytest.mark.parametrize(
    "change",
    cases(
        ["training.tangent=block", "training.checkpointing=true", "objective=discrete"],
        short=["training.checkpointing=true"],
    ),
)
def test_blocks_are_recomputed_in_bfloat16_too(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, change: str
) -> None:
    same = ("training.precision=bf16", "training.steps=2", change)
    plain = [value for value in same if "block" not in value and "checkpointing" not in value]
    wanted = state(train(settings(*plain, "training.tangent=one_pass"), tmp_path / "plain", teacher, prompts)[0])
    checkpointing = () if "block" in change else ("training.checkpointing=true",)
    found = state(train(settings(*same, *checkpointing), tmp_path / "run", teacher, prompts)[0])
    torch.manual_seed(0)
    start = state(new_student(teacher))
    for name, value in found.items():  # AdamW turns a gradient's rounding around zero into a whole step
        assert (value - wanted[name]).norm() <= 0.15 * (wanted[name] - start[name]).norm() + 1e-4, name


def test_looks_are_rare_and_lose_nothing(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    """The same steps and the same rows, however many of them are looked at at once."""
    rows, seen = [], []
    for name, every in (("each", 1), ("some", 4)):
        config = settings("training.steps=10", "training.checkpoint_every=6", f"training.look_every={every}")
        steps: list[int] = []
        train(
            config, tmp_path / name, teacher, prompts, report=lambda progress, steps=steps: steps.append(progress.step)
        )
        rows.append(read_metrics(tmp_path / name))
        seen.append(steps)
    assert rows[0] == rows[1] and seen[0] == seen[1] == list(range(1, 11))


def test_checkpoints_written_beside_the_training_are_the_same(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, tensors: Callable
) -> None:
    for name in ("true", "false"):
        config = settings("training.steps=6", "training.keep_checkpoints=9", f"training.background_checkpoints={name}")
        train(config, tmp_path / name, teacher, prompts)
    ours, theirs = checkpoints(tmp_path / "true"), checkpoints(tmp_path / "false")
    assert [path.name for path in ours] == [path.name for path in theirs] == ["000002", "000004", "000006"]
    for a, b in zip(ours, theirs, strict=True):
        assert damage(a) is None and (a / "state.json").read_text() == (b / "state.json").read_text()
        beside, between = tensors(a), tensors(b)
        assert beside.keys() == between.keys()
        assert all(torch.equal(value, between[name]) for name, value in beside.items())
    assert read_metrics(tmp_path / "true") == read_metrics(tmp_path / "false")


def test_a_disk_that_is_full_beside_the_training_stops_it(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, full_disk: Callable
) -> None:
    """At the next look, not at the next checkpoint; the one before stays."""
    config = settings(
        "training.steps=1000", "training.background_checkpoints=true", "training.checkpoint_every=10",
        "training.preview_every=1000",
    )  # fmt: skip
    steps, disk = list[int](), ExitStack()

    def report(progress: Progress) -> None:
        steps.append(progress.step)
        if progress.step == 19:
            disk.enter_context(full_disk(20_000))

    with disk, pytest.raises(UserError, match=r"cannot write .*000020: .*free some space"):
        train(config, tmp_path / "run", teacher, prompts, report=report)
    assert steps[-1] < 30
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["000010"]


def test_pairs_can_be_used_again(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the teacher's walks for as many steps; and a run stopped between two uses goes on to the bit."""
    walks: list[int] = []
    monkeypatch.setattr(
        "stepfold.training.batches.draw", lambda number, *rest: walks.append(number) or draw(number, *rest)
    )
    config = settings("training.steps=6", "space.reuse=2", "training.checkpoint_every=3", "training.keep_checkpoints=9")
    whole = state(train(config, tmp_path / "run", teacher, prompts)[0])
    assert walks == [0, 1, 2]
    rows = read_metrics(tmp_path / "run")
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    resumed = state(train(config, tmp_path / "run", teacher, prompts)[0])
    assert walks == [0, 1, 2, 1, 2] and read_metrics(tmp_path / "run") == rows
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_prompts_encoded_ahead_are_the_same_prompts(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text encoder works every third step, and is off the device between; resumed inside a group to the bit."""
    events: list[Any] = []
    encode, park = teacher.encode, teacher.park_text_encoder
    monkeypatch.setattr(teacher, "encode", lambda texts: events.append(list(texts)) or encode(texts))
    monkeypatch.setattr(teacher, "park_text_encoder", lambda: events.append("parked") or park())
    config = settings("training.steps=5", "training.checkpoint_every=4", "training.encode_ahead=3")
    whole = state(train(config, tmp_path / "run", teacher, prompts)[0])
    drawn = [draw(step, prompts, teacher, config, CPU).prompts for step in range(6)]
    first, second = ([text for texts in group for text in texts] for group in (drawn[:3], drawn[3:]))
    assert events[1:] == [first, "parked", second, "parked"]  # before them, one prompt to choose the tangent with
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    resumed = state(train(config, tmp_path / "run", teacher, prompts)[0])
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
    plain = state(train(settings("training.steps=5"), tmp_path / "plain", teacher, prompts)[0])
    for name, value in plain.items():
        torch.testing.assert_close(whole[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("objective", ["continuous", "discrete"])
def test_compiled_steps_are_the_same_steps(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, objective: str
) -> None:
    """Compiling changes rounding only, and a compiled run resumes to the bit."""
    torch.compiler.reset()
    plain = state(train(settings(f"objective={objective}"), tmp_path / "plain", teacher, prompts)[0])
    config = settings("training.compile=true", "teacher.max_tokens=16", f"objective={objective}")
    whole = state(train(config, tmp_path / "run", teacher, prompts)[0])
    start = state(new_student(teacher))
    for name, value in whole.items():
        assert (value - plain[name]).norm() <= 1e-2 * (plain[name] - start[name]).norm() + 1e-6, name
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    resumed = state(train(config, tmp_path / "run", teacher, prompts)[0])
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


@pytest.mark.long
def test_a_missing_compiler_is_named(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config as inductor

    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(inductor.cpp, "cxx", (str(tmp_path / "no-compiler"),))
    with pytest.raises(UserError, match=r"compiling .* failed .*training.compile=false"):
        train(settings("training.compile=true", "teacher.max_tokens=16"), tmp_path / "run", teacher, prompts)
    assert not checkpoints(tmp_path / "run")


def test_a_sample_does_not_depend_on_the_batch_size(
    teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    def batches(size: int) -> list[Batch]:
        config = settings(f"training.prompts_per_step={size}", "space.route_per=prompt")
        return [draw(step, prompts, teacher, config, CPU) for step in range(12 // size)]

    one, four = batches(1), batches(4)
    assert [p for b in one for p in b.prompts] == [p for b in four for p in b.prompts]
    space = settings("space.route_per=prompt").space
    for name, of in drawn(space).items():
        a, b = (torch.cat([of(batch) for batch in batches]) for batches in (one, four))
        assert torch.equal(a, b), name
    assert {p for b in one for p in b.prompts} == {prompts.prompt(i) for i in range(12)}  # an epoch
    guidance = torch.cat([b.guidance for b in four])
    assert set(guidance.tolist()) == {4.0, 4.5, 5.0}
    noise = torch.cat([b.noise() for b in four])
    assert noise.flatten(1).unique(dim=0).shape[0] == 12
    assert noise.std() == pytest.approx(0.5, rel=0.05)


def test_a_route_is_shared_by_a_step_or_is_the_prompts_own(
    teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    for route in ("reference", "logit_normal", "random"):
        together = settings(f"space.route={route}")
        apart = settings(f"space.route={route}", "space.route_per=prompt")
        shared, later = (draw(step, prompts, teacher, together, CPU).route(together.space) for step in (0, 1))
        own = draw(0, prompts, teacher, apart, CPU).route(apart.space)
        assert torch.equal(shared[0], shared[1])
        assert not torch.equal(own[0], own[1])
        assert not torch.equal(shared, later)


def test_every_draw_depends_on_the_seed(teacher: SanaTeacher, settings: Settings, prompts: PromptFile) -> None:
    size = "training.prompts_per_step=12"
    a, b = (draw(0, prompts, teacher, settings(size, f"seed={seed}"), CPU) for seed in (0, 1))
    assert a.prompts != b.prompts
    for name, of in drawn(settings().space).items():
        assert not torch.equal(of(a), of(b)), name


def test_average_follows_its_formula(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    student = new_student(teacher)
    history = [state(student)]
    config = settings("training.ema=0.15")
    _, average = train(
        config, tmp_path / "run", teacher, prompts, student, lambda progress: history.append(state(student))
    )
    expected = {name: value.double() for name, value in history[0].items()}
    for step, weights in enumerate(history[1:]):
        decay = min(0.15, (1 + step) / (10 + step))
        expected = {name: decay * value + (1 - decay) * weights[name] for name, value in expected.items()}
    for name, value in average.state_dict().items():
        assert torch.allclose(value.double(), expected[name], rtol=1e-5, atol=1e-7), name
    moved = [
        not torch.equal(v, history[0][n]) and not torch.equal(v, history[-1][n]) for n, v in state(average).items()
    ]
    assert sum(moved) >= len(moved) - 2


def test_every_trainable_tensor_moves(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    for optimiser in ("adamw", "came"):
        student = new_student(teacher)
        before = state(student)
        train(
            settings(f"optimiser.name={optimiser}", "training.steps=3"), tmp_path / optimiser, teacher, prompts, student
        )
        still = [name for name, p in student.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
        assert still == [], optimiser
        assert all(p.requires_grad for p in student.parameters())


def test_the_teacher_stays_as_it_is(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    before = state(teacher.transformer) | state(teacher.pipe.text_encoder)
    train(settings(), tmp_path / "run", teacher, prompts)
    after = state(teacher.transformer) | state(teacher.pipe.text_encoder)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("at", ["last step", "last preview"])
def test_a_stop_request_at_the_very_end_is_heard(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, at: str
) -> None:
    """What comes after the training may take long; the run goes on to it when it is resumed."""
    config, folder = settings("training.steps=4"), tmp_path / "run"
    folder.mkdir()
    shown: list[int] = []

    def show(average: Any, step: int) -> None:
        shown.append(step)
        if at == "last preview" and step == 4 and shown.count(4) == 1:
            signal.raise_signal(signal.SIGTERM)

    def report(progress: Progress) -> None:
        if at == "last step" and progress.step == 3:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # a second one does not kill

    def go() -> Any:
        torch.manual_seed(0)
        student, black = new_student(teacher), torch.zeros(teacher.latent_shape)
        return distill(
            config, folder, teacher, student, prompts, [black], make_accelerator("no"), report=report, preview=show
        )

    with pytest.raises(KeyboardInterrupt):
        go()
    assert saved_step(folder) == 4 == len(read_metrics(folder)) and (4 in shown) == (at == "last preview")
    assert go() is not None and saved_step(folder) == 4 and shown[-1] == 4


def test_nan_stops_the_run_and_says_where(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile, leftovers: Callable
) -> None:
    folder, config = tmp_path / "run", settings("training.steps=6")
    torch.manual_seed(config.seed)
    student = new_student(teacher)

    def poison(progress: Progress) -> None:
        if progress.step == 3:
            with torch.no_grad():
                student.transformer.proj_out.bias[0] = float("nan")

    with pytest.raises(NonFiniteError) as caught:
        train(config, folder, teacher, prompts, student, poison)
    message = str(caught.value)
    assert message.startswith("step 3: student's output of 6 of 6 pairs is not finite")
    assert any(repr(p) in message for p in draw(3, prompts, teacher, config, CPU).prompts)
    assert " t=" in message and "|x|=" in message and "|dxdt|=" in message
    assert [p.name for p in checkpoints(folder)] == ["000002"]
    assert leftovers(folder) == []
    assert [row["step"] for row in read_metrics(folder)] == [0, 1, 2]

    recovered, _ = train(config, folder, teacher, prompts)  # the same command, without the poison
    straight, _ = train(config, tmp_path / "straight", teacher, prompts)
    assert all(torch.equal(value, state(straight)[name]) for name, value in state(recovered).items())
    assert [row["step"] for row in read_metrics(folder)] == list(range(6))


def test_a_gradient_that_is_not_finite_stops_the_run_and_nothing_of_it_is_kept(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    student = new_student(teacher)
    student.variance_head.bias.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteError, match=r"^step 0: gradient is not finite \(gradient norm (inf|nan)\)"):
        train(settings("training.checkpoint_every=1"), tmp_path / "run", teacher, prompts, student)
    assert not checkpoints(tmp_path / "run") and not read_metrics(tmp_path / "run")


def test_the_student_learns_to_read_its_guidance(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    def effect(student: SanaStudent) -> float:
        pairs = pairs_of(teacher, settings(), prompts)
        x, t, condition = pairs.x.float() / 0.5, pairs.t.float(), teacher.encode([prompts.prompt(0)] * len(pairs))
        with torch.no_grad():
            low, high = (student(x, t, condition, torch.full_like(t, w)) for w in (1.0, 9.0))
        return float((high - low).norm() / low.norm())

    student = new_student(teacher)
    assert effect(student) == 0
    train(settings("training.steps=20", "space.guidance=[1.0, 9.0]"), tmp_path / "run", teacher, prompts, student)
    assert effect(student) > 1e-3
    alone = new_student(teacher)
    train(settings("training.steps=5", "space.guidance=[3.0, 3.0]"), tmp_path / "one", teacher, prompts, alone)
    assert effect(alone) == 0  # one scale has nothing to teach: any that a sampler says is the right one
    assert not torch.equal(alone.transformer.proj_out.weight, new_student(teacher).transformer.proj_out.weight)


def test_runs_repeat_to_the_bit(tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile) -> None:
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = settings("training.steps=5", f"seed={seed}")
        student, average = train(config, tmp_path / name, teacher, prompts)
        results.append(((tmp_path / name / "metrics.jsonl").read_bytes(), state(student), state(average)))
    a, b, c = results
    assert a[0] == b[0]
    assert len(a[0].splitlines()) == 5
    assert all(torch.equal(a[i][name], b[i][name]) for i in (1, 2) for name in a[i])
    assert a[0] != c[0]


def test_full_disk_stops_the_run_and_it_resumes_to_the_bit(
    tmp_path: Path,
    teacher: SanaTeacher,
    settings: Settings,
    prompts: PromptFile,
    full_disk: Callable,
    leftovers: Callable,
) -> None:
    folder, config = tmp_path / "run", settings("training.steps=6")
    straight, _ = train(config, tmp_path / "straight", teacher, prompts)

    with full_disk(20_000), pytest.raises(UserError, match=r"cannot write .*000002: .*free some space"):
        train(config, folder, teacher, prompts)
    assert checkpoints(folder) == []
    with full_disk(200), pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: .*continue with --resume"):
        train(config, folder, teacher, prompts)
    assert leftovers(folder) == []

    resumed, _ = train(config, folder, teacher, prompts)
    assert all(torch.equal(value, state(straight)[name]) for name, value in state(resumed).items())
    assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "straight" / "metrics.jsonl").read_bytes()


def test_what_is_exported_is_the_average(tmp_path: Path, settings: Settings, tensors: Callable) -> None:
    folder, config = tmp_path / "run", settings("training.ema=0.5")
    run_distill(config, folder, resume=False, display=Display(quiet=True), command="test")
    final = tensors(folder / "checkpoints" / "000004")
    _, exported, card = load_student(folder / "student", "cpu")
    weights = exported.transformer.state_dict()
    assert {f"average.transformer.{name}" for name in weights} <= final.keys()
    differs = 0
    for name, value in weights.items():
        assert torch.equal(value, final[f"average.transformer.{name}"]), name
        differs += not torch.equal(value, final[f"student.transformer.{name}"])
    assert differs > len(weights) / 2
    assert card.config == config.model_dump(mode="json") | {"objective": "continuous"}  # what auto became
    assert json.loads((folder / "report.json").read_text())["config"] == card.config


@pytest.mark.long
@pytest.mark.parametrize("at", [("000001", "student"), ()], ids=["two", "any"])
def test_a_disk_that_is_full_at_any_file_of_a_run_is_one_error_and_the_run_goes_on(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, at: tuple[str, ...]
) -> None:
    """Each file and folder that takes its place, one after the other: settings, notes, black latent, checkpoints,
    previews, student, report."""
    config = settings("training.steps=2", "training.checkpoint_every=1", "training.preview_every=1")
    take_its_place, names = os.replace, []
    full_at: int | None = None  # the file with this number finds no space

    def replaced(source: Any, target: Any) -> None:
        names.append(Path(target).name)
        if len(names) - 1 == full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        take_its_place(source, target)

    def run(folder: Path, resume: bool = False) -> bytes:
        names.clear()
        run_distill(config, folder, resume=resume, display=Display(quiet=True), command="")
        return (folder / "student" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()

    monkeypatch.setattr("stepfold.training.runs.os.replace", replaced)
    whole = run(tmp_path / "whole")
    files = list(names)
    assert {"config.yaml", "000001", "000002", "step_000002.png", "student", "report.html"} <= set(files), files
    for number, name in enumerate(files):
        if at and name not in at:
            continue
        folder, full_at = tmp_path / str(number), number
        with pytest.raises(UserError, match="No space left on device"):
            run(folder)
        full_at = None
        assert run(folder, resume=(folder / "config.yaml").exists()) == whole, name


def test_a_disk_that_is_full_for_the_curves_is_one_error(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """tensorboard writes in a thread of its own, whose traceback nobody needs."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(self: Any, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(UserError, match=r"cannot write .*tensorboard: No space left on device; .* --resume"):
        run_distill(settings(), tmp_path / "run", resume=False, display=Display(quiet=True), command="")
    assert "Traceback" not in capfd.readouterr().err


def test_export_on_a_full_disk_keeps_the_old_student(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, full_disk: Callable, leftovers: Callable
) -> None:
    folder = tmp_path / "student"
    student = new_student(teacher)
    save_student(teacher, student, folder, settings(), tiny.recipe(teacher, "consistency", 4.5), "fox")
    before = student.transformer.proj_out.bias.detach().clone()
    with torch.no_grad():
        student.transformer.proj_out.bias.add_(1)
    with full_disk(20_000), pytest.raises(UserError, match=r"cannot write .*student: "):
        save_student(teacher, student, folder, settings(), tiny.recipe(teacher, "consistency", 4.5), "fox")
    assert leftovers(tmp_path) == []
    _, old, _ = load_student(folder, "cpu")
    assert torch.equal(old.transformer.proj_out.bias, before)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_folder_is_one_line(tmp_path: Path, settings: Settings) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match=r"cannot make .*choose another --out"):
            run_distill(settings(), tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(("fast", "chosen"), [(True, "bf16"), (False, "no")])
def test_automatic_precision_follows_the_machine(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, fast: bool, chosen: str
) -> None:
    monkeypatch.setattr("stepfold.training.choices.has_bf16", lambda device: fast)
    config = choose_precision(settings("training.precision=auto", "training.walk_precision=bf16"))
    assert (config.training.precision, config.training.walk_precision) == (chosen, "bf16")
    assert choose_precision(settings()) == settings()
    differenced = settings("training.precision=auto", "training.tangent=finite_difference")
    assert choose_precision(differenced).training.precision == "no"


@pytest.mark.parametrize("there", [True, False])
def test_an_accelerator_counts_only_if_it_is_there(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """A torch that was built for CUDA names it on a machine that has none, as well."""
    asked = []
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: there)
    monkeypatch.setattr("stepfold.training.choices.has_bf16", lambda device: asked.append(device.type))
    choose_precision(settings("training.precision=auto"))
    assert asked == ["cuda" if there else "cpu"]


def judged_gradients(
    teacher: SanaTeacher, config: Config, prompts: PromptFile, keep: list[bool] | None = None
) -> tuple[SanaStudent, Discriminator, dict[str, Tensor]]:
    """One update with the adversarial term, without the step."""
    torch.manual_seed(0)  # the same student every time
    student, batch = lively_student(teacher).float(), draw(0, prompts, teacher, config, CPU)
    discriminator = new_discriminator(teacher, 0)
    pairs = pairs_of(teacher, config, prompts, keep)
    narrow = {name: getattr(pairs, name).float() for name in ("x", "t", "dxdt", "guidance")}
    pairs = replace(pairs, **narrow, condition=Condition(pairs.condition.embeds.float(), pairs.condition.mask))
    critics = {NAME: discriminator}
    figures = gradient_step(student, pairs, config, teacher=teacher, critics=critics, draws=batch.draws)
    return student, discriminator, figures


def test_the_discriminators_gradient_is_that_of_its_own_loss_alone(
    teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    """However the student weighs the term; the student's gradient does depend on it."""
    found = [judged_gradients(teacher, settings(f"adversarial.weight={w}"), prompts) for w in (0.5, 50)]
    (student, heads, figures), (strong, same_heads, _) = found
    gradients = [
        torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        for module in (heads, same_heads)
    ]
    torch.testing.assert_close(*gradients)
    assert gradients[0].norm() > 1e-3
    weak = torch.cat([p.grad.flatten() for p in student.transformer.parameters() if p.grad is not None])
    more = torch.cat([p.grad.flatten() for p in strong.transformer.parameters() if p.grad is not None])
    assert (more - weak).norm() > 1e-3 * weak.norm()
    assert all(parameter.grad is None for parameter in teacher.transformer.parameters())
    assert set(figures) >= {"loss", "generator_loss", "discriminator_loss"}


def test_filtered_prompts_are_not_judged(teacher: SanaTeacher, settings: Settings, prompts: PromptFile) -> None:
    """The pair that is kept is judged with its own draw, whatever was dropped before it."""
    config = settings("adversarial.weight=0.5")
    both = judged_gradients(teacher, config, prompts)[2]["generator_loss"]
    second = judged_gradients(teacher, config, prompts, [False, True])[2]["generator_loss"]
    assert len(second) == len(both) / 2
    torch.testing.assert_close(second, both[len(second) :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_pictures_are_judged_from_noise_as_often_as_asked(
    teacher: SanaTeacher, settings: Settings, prompts: PromptFile, share: float
) -> None:
    config = settings("adversarial.weight=0.5", f"adversarial.max_time={share}")
    seen: list[Tensor] = []
    student, pairs = new_student(teacher), pairs_of(teacher, config, prompts)
    student.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    narrow = {name: getattr(pairs, name).float() for name in ("x", "t", "dxdt", "guidance")}
    pairs = replace(pairs, **narrow, condition=Condition(pairs.condition.embeds.float(), pairs.condition.mask))
    draws, critics = draw(0, prompts, teacher, config, CPU).draws, {NAME: new_discriminator(teacher, 0)}
    gradient_step(student, pairs, config, teacher=teacher, critics=critics, draws=draws)
    assert ((seen[-1] > 1.57).float().mean() == share).item()  # the last forward is the judged one


def test_sana_sprint_trains_both_and_resumes_to_the_bit(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    config = settings(*SPRINT)
    train(config, tmp_path / "run", teacher, prompts)
    whole, first = checkpoints(tmp_path / "run")[::-1]
    after = {file.name: load_file(file) for file in whole.glob("*.safetensors")}
    before = load_file(first / "discriminator.safetensors")
    assert any(not torch.equal(value, before[name]) for name, value in after["discriminator.safetensors"].items())
    shutil.rmtree(whole)
    train(config, tmp_path / "run", teacher, prompts)
    for name, values in after.items():
        again = load_file(whole / name)
        assert all(torch.equal(value, again[key]) for key, value in values.items()), name
    rows = read_metrics(tmp_path / "run")
    assert all(0 < row["discriminator_loss"] < 4 for row in rows)


def test_the_heads_have_a_learning_rate_of_their_own(
    tmp_path: Path, teacher: SanaTeacher, settings: Settings, prompts: PromptFile
) -> None:
    """AdamW's first step moves a weight by the learning rate, whatever the gradient."""
    moved = []
    for factor in (1, 20):
        folder = tmp_path / f"x{factor}"
        config = settings(*SPRINT, f"adversarial.lr_factor={factor}", "training.steps=1", "training.checkpoint_every=1")
        train(config, folder, teacher, prompts)
        after = load_file(checkpoints(folder)[-1] / "discriminator.safetensors")
        bias = after["heads.0.1.bias"] - new_discriminator(teacher, config.seed).state_dict()["heads.0.1.bias"]
        moved.append(bias.abs().median().item())
    assert moved[1] == pytest.approx(20 * moved[0], rel=1e-2)


def test_the_size_of_a_steps_latents_is_drawn(teacher: SanaTeacher, settings: Settings, prompts: PromptFile) -> None:
    """Each shape about as often, by the seed and the step alone; what else a step draws does not change."""
    config = settings("training.prompts_per_step=2", *SPRINT)
    several = copy.copy(teacher)
    several.latent_shapes = ((4, 8, 8), (4, 4, 16))
    draws = [draw(step, prompts, several, config, CPU) for step in range(40)]
    sizes = [batch.shape_index for batch in draws]
    assert 10 < sum(sizes) < 30 and sizes == [
        draw(step, prompts, several, config, CPU).shape_index for step in range(40)
    ]
    for step, batch in enumerate(draws):
        assert batch.noise().shape[-3:] == batch.noise("fresh noise", 3).shape[-3:] == batch.shape
        assert batch.shape == several.latent_shapes[batch.shape_index]
        one = draw(step, prompts, teacher, config, CPU)
        assert torch.equal(one.route(config.space), batch.route(config.space)) and one.prompts == batch.prompts


def test_a_walk_casts_frozen_weights_once(teacher: SanaTeacher) -> None:
    """The numbers stay, to the bit, and so does what is frozen."""

    class Casts(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.sources: list[int] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in weights:
                self.sources.append(args[0].data_ptr())
            return func(*args, **(kwargs or {}))

    weights = {p.data_ptr() for p in teacher.network.parameters() if p.ndim > 1}
    noise, route = torch.randn(1, *teacher.latent_shape), torch.linspace(1.5, 0.3, 4)[None]
    condition, guidance = teacher.encode(["fox"]), torch.tensor([4.5])
    with torch.autocast("cpu", torch.bfloat16):
        plain = walk(teacher.velocity, noise, route, condition, guidance)
    teacher.clear_prompt_cache()
    with walk_precision("bf16", torch.device("cpu"), teacher.network), Casts() as casts:
        ours = walk(teacher.velocity, noise, route, condition, guidance)
    assert torch.equal(ours.x0, plain.x0) and torch.equal(ours.dxdt, plain.dxdt)
    assert casts.sources and len(casts.sources) == len(set(casts.sources))
    assert not any(p.requires_grad for p in teacher.network.parameters())
