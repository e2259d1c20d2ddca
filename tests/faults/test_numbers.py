"""Numbers that are not finite, wherever they come from; clocks that lie; folders and files that change under a run."""

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from forms import cases
from tiny import PROMPTS
from torch import Tensor, nn

from stepfold.config import Config, load_config
from stepfold.display import Display
from stepfold.errors import NonFiniteError, UserError
from stepfold.evaluation.report import write_report
from stepfold.jobs.distilling import run_distill
from stepfold.maths.tangent import Tangent
from stepfold.objectives import consistency
from stepfold.prompts.cache import encode_prompts
from stepfold.teachers.contract import Condition
from stepfold.training import looks as loop
from stepfold.training import states
from stepfold.training import step as steps
from stepfold.training.opening import open_run
from stepfold.training.runs import append_metrics, checkpoints, read_metrics, save_checkpoint, writing

NAN = float("nan")


FAST = (
    "training.steps=6", "training.checkpoint_every=2", "training.preview_every=100", "space.filter_rule=off",
    "training.prompts_per_step=2", "space.route_steps=3", "teacher.max_tokens=32", "optimiser.name=adamw",
    "training.precision=no", "training.walk_precision=no", "evaluation.n=0", "objective=continuous",
    "training.tangent=two_pass",
)  # fmt: skip


@pytest.fixture
def config(tiny_sana: Path, prompts_file: Path) -> Callable[..., Config]:
    def make(*changes: str) -> Config:
        return load_config("default", [*FAST, *changes], teacher__source=str(tiny_sana), prompts=str(prompts_file))

    return make


@pytest.fixture(scope="module")
def straight(tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs, on the same prompts. Shared: copy it before changing anything."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    settings = load_config("default", FAST, teacher__source=str(tiny_sana), prompts=str(folder / "prompts.txt"))
    run(settings, folder / "run")
    return folder / "run"


def run(config: Config, folder: Path, resume: bool = False) -> dict[str, Any]:
    return run_distill(config, folder, resume=resume, display=Display(quiet=True), command="test")


class Poison:
    """Turns one call of a function (or all from it on) into not-a-number."""

    def __init__(
        self, function: Callable[..., Any], at: int, spoil: Callable[[Any], Any], always: bool = False
    ) -> None:
        self.function, self.at, self.spoil, self.always, self.count = function, at, spoil, always, 0

    def __call__(self, *args: Any, **named: Any) -> Any:
        self.count += 1
        out = self.function(*args, **named)
        return self.spoil(out) if self.count == self.at or (self.always and self.count > self.at) else out


def first_row(values: Tensor) -> Tensor:
    """Not-a-number in the first sample alone."""
    return torch.cat([values[:1] * NAN, values[1:]])


def spoil_teacher(monkeypatch: pytest.MonkeyPatch, at: int, always: bool = False) -> None:
    original = states.walk
    count = 0

    def walk(velocity: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        bad = count == at or (always and count > at)
        return original(Poison(velocity, 1, first_row) if bad else velocity, *args)

    monkeypatch.setattr(states, "walk", walk)


def spoil_tangent(monkeypatch: pytest.MonkeyPatch, at: int, always: bool = False) -> None:
    spoilt = Poison(consistency.total_derivative, at, lambda t: Tangent(t.F, first_row(t.dF)), always)
    monkeypatch.setattr(consistency, "total_derivative", spoilt)


def spoil_loss(monkeypatch: pytest.MonkeyPatch, at: int, always: bool = False) -> None:
    def spoil(terms: Any) -> Any:
        return type(terms)(first_row(terms.loss), terms.squared_error, terms.tangent_norm)

    monkeypatch.setattr(consistency, "consistency_terms", Poison(consistency.consistency_terms, at, spoil, always))


def spoil_gradient(monkeypatch: pytest.MonkeyPatch, at: int, always: bool = False) -> None:
    original = steps.add_gradients
    count = 0

    def add_gradients(terms: Any, networks: Any, *args: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        out = original(terms, networks, *args, **named)
        if count == at or (always and count > at):
            next(p for p in networks.student.parameters() if p.grad is not None).grad.fill_(NAN)
        return out

    monkeypatch.setattr(steps, "add_gradients", add_gradients)


PLACES: dict[str, tuple[Callable[..., None], str]] = {
    "teacher": (spoil_teacher, "teacher's output of [1-9]"),
    "tangent": (spoil_tangent, "tangent of 1 of 4 pairs"),
    "loss": (spoil_loss, "loss of 1 of 4 pairs"),
    "gradient": (spoil_gradient, "gradient"),
}


@pytest.mark.parametrize("place", cases(PLACES, short=["gradient"]))
def test_it_stops_names_the_place_and_keeps_the_last_checkpoint(
    tmp_path: Path, config: Callable[..., Config], straight: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    spoil, message = PLACES[place]
    with monkeypatch.context() as patch:
        spoil(patch, 4)
        fix = "look at the teacher" if place == "teacher" else "a lower optimiser.lr"
        wanted = rf"^step 3: {message} .*is not finite .*Earlier checkpoints are intact; {fix}"
        with pytest.raises(NonFiniteError, match=wanted):
            run(config(), tmp_path / "run")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["000002"]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2]
    run(config(), tmp_path / "run", resume=True)
    for name in ("student", "average"):
        file = Path("checkpoints") / "000006" / f"{name}.safetensors"
        assert (tmp_path / "run" / file).read_bytes() == (straight / file).read_bytes()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("place", cases(PLACES, short=["gradient"]))
def test_steps_are_skipped_where_that_is_asked_for(
    tmp_path: Path, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """One step is left out, noted and counted, the weights stay finite; and a run that resumes goes on counting."""
    spoil, message = PLACES[place]
    with monkeypatch.context() as patch:
        spoil(patch, 4)
        result = run(config("training.skip_nonfinite=1"), tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(6))
    assert [row["step"] for row in rows if "skipped" in row] == [3] and result["skipped_steps"] == 1
    assert re.match(message.split(" of ")[0], rows[3]["nonfinite"]) and "loss" not in rows[3]
    from safetensors.torch import load_file

    for file in (tmp_path / "run" / "checkpoints" / "000006").glob("*.safetensors"):
        assert all(bool(values.isfinite().all()) for values in load_file(file).values()), file

    with monkeypatch.context() as patch:
        spoil(patch, 2, always=True)
        with pytest.raises(
            NonFiniteError, match=r"^step 3: .*makes 3 such steps, and training.skip_nonfinite allows 2"
        ):
            run(config("training.skip_nonfinite=2"), tmp_path / "lost")
    assert [row["step"] for row in read_metrics(tmp_path / "lost")] == [0, 1, 2]
    with monkeypatch.context() as patch:
        spoil(patch, 1, always=True)
        with pytest.raises(
            NonFiniteError, match=r"^step 3: .*makes 3 such"
        ):  # one of the first two was skipped already
            run(config("training.skip_nonfinite=2"), tmp_path / "lost", resume=True)


def test_what_is_skipped_changes_nothing_else(tmp_path: Path, config: Callable[..., Config], straight: Path) -> None:
    run(config("training.skip_nonfinite=3"), tmp_path / "skips")
    assert (straight / "metrics.jsonl").read_bytes() == (tmp_path / "skips" / "metrics.jsonl").read_bytes()


@pytest.mark.long
def test_clocks_that_go_backwards(
    tmp_path: Path, config: Callable[..., Config], straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time is for people: no number of a run, and not which checkpoint is the newest, depends on it."""
    now = [4e9]

    def backwards() -> float:
        now[0] -= 1000.0
        return now[0]

    for name in ("time", "perf_counter", "monotonic"):
        monkeypatch.setattr(time, name, backwards)
    monkeypatch.setattr(time, "time_ns", lambda: int(backwards() * 1e9))
    run(config("training.steps=6"), tmp_path / "run")
    monkeypatch.undo()
    steps = checkpoints(tmp_path / "run")
    os.utime(steps[-1], (1, 1))  # the newest has the oldest date
    os.utime(steps[-1] / "state.json", (1, 1))
    result = run(config(), tmp_path / "run", resume=True)
    assert result["timed_steps"] == 0  # nothing was left to do
    for file in ("metrics.jsonl", "checkpoints/000006/student.safetensors", "checkpoints/000006/average.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (straight / file).read_bytes()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """For as long as the block runs, this process may not write there: it is nobody if it was root."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def one_module() -> tuple[dict[str, nn.Module], torch.optim.Optimizer]:
    student = nn.Linear(2, 2)
    return {"student": student}, torch.optim.AdamW(student.parameters())


class TwoPrompts:
    def __len__(self) -> int:
        return 2

    def prompt(self, index: int) -> str:
        return "x"


def encode(index: Sequence[int]) -> Condition:
    return Condition(torch.zeros(len(index), 2, 2), torch.ones(len(index), 2).long())


def text(folder: Path) -> None:
    with writing(folder / "card.json") as part:
        part.write_text("{}")


WRITES: dict[str, Callable[[Path], Any]] = {
    "a new run": lambda f: open_run(f / "run", load_config("demo"), resume=False),
    "a run resumed": lambda f: open_run(f, load_config("demo"), resume=True),
    "metrics": lambda f: append_metrics(f, {"step": 0}),
    "a first checkpoint": lambda f: save_checkpoint(f, 1, *one_module(), keep=2),
    "a next checkpoint": lambda f: save_checkpoint(f / "old", 1, *one_module(), keep=2),
    "a report": lambda f: write_report(f, {"title": "x"}),
    "encoded prompts": lambda f: encode_prompts(f / "c", {}, TwoPrompts(), encode, None, torch.zeros(1), batch=1),
    "a file": text,
}


@pytest.mark.parametrize("what", WRITES)
def test_a_folder_that_is_read_only(what: str) -> None:
    """One line, and what is there stays."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own folders are closed to nobody
        folder = Path(name)
        (folder / "config.yaml").write_text("seed: 0\n")
        (folder / "config.yaml").write_bytes(b"")
        open_run(folder / "made", load_config("demo"), resume=False).release(force=True)
        (folder / "config.yaml").write_bytes((folder / "made" / "config.yaml").read_bytes())
        (folder / ".card.json.part").write_text("left by a kill")
        (folder / "old" / "checkpoints").mkdir(parents=True)
        (folder / "old" / "checkpoints").chmod(0o555)
        before = sorted(path.name for path in folder.rglob("*"))
        with read_only(folder), pytest.raises(UserError, match=r"cannot|Permission denied") as caught:
            WRITES[what](folder)
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in folder.rglob("*")) == before


@pytest.mark.parametrize("change", cases(["shorter", "longer", "other words", "gone"], short=["other words"]))
def test_prompts_that_change_during_the_run(
    tmp_path: Path, config: Callable[..., Config], prompts_file: Path, straight: Path,
    monkeypatch: pytest.MonkeyPatch, change: str,
) -> None:  # fmt: skip
    """Noticed at the next step, whatever line that reads; put back, the run goes on as if nothing had been."""
    old = prompts_file.read_bytes()
    new = {"shorter": old[:20], "longer": old + b"one more\n", "other words": old.replace(b"red", b"tan")}
    original = loop.append_metrics

    def append(folder: Path, row: dict[str, Any]) -> None:
        original(folder, row)
        if row["step"] == 2:
            prompts_file.unlink()
            if change in new:
                prompts_file.write_bytes(new[change])

    with monkeypatch.context() as patch:
        patch.setattr(loop, "append_metrics", append)
        with pytest.raises(UserError, match=r"changed (or removed )?during the run; put the old file back"):
            run(config(), tmp_path / "run")
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2]
    with pytest.raises(UserError):
        run(config(), tmp_path / "run", resume=True)
    prompts_file.write_bytes(old)
    run(config(), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_a_kill_before_the_last_preview_does_not_cost_it(tmp_path: Path, config: Callable[..., Config]) -> None:
    """Found by `benchmarks/kills.py`: the checkpoint was there, the preview was not, and never came."""
    run(config(), tmp_path / "run")
    last = tmp_path / "run" / "previews" / "step_000006.png"
    drawn, first = last.read_bytes(), (tmp_path / "run" / "previews" / "step_000000.png").stat().st_mtime_ns
    last.rename(last.with_name(f".{last.name}.part"))
    run(config(), tmp_path / "run", resume=True)
    assert last.read_bytes() == drawn
    assert sorted(path.name for path in last.parent.iterdir()) == ["step_000000.png", last.name]
    assert (last.parent / "step_000000.png").stat().st_mtime_ns == first  # what is there is not drawn again
