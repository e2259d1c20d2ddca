"""Runs that are interrupted, killed or have nowhere to write, through the command line."""

import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from forked import Forked
from safetensors.torch import load_file

STEPS = 20


class Command:
    """A `stepfold distill` in a process of its own."""

    def __init__(self, teacher: Path, prompts: Path, out: Path, *extra: str, program: Sequence[str] = ()) -> None:
        settings = (
            f"training.steps={STEPS}", "training.checkpoint_every=4", "training.preview_every=1000",
            "training.prompts_per_step=2", "training.precision=no", "training.walk_precision=no",
            "space.route_steps=4", "space.filter_rule=off", "teacher.max_tokens=32", "evaluation.n=0",
            "optimiser.lr=1e-3", "consistency.r_warmup=10",
        )  # fmt: skip
        changes = [part for setting in settings for part in ("--set", setting)]
        paths = ("--teacher", str(teacher), "--prompts", str(prompts), "--out", str(out))
        self.metrics = out / "metrics.jsonl"
        log = out.with_name(f"{out.name}{len(extra)}.log")
        self.run = Forked(["distill", "--preset", "default", *paths, *changes, *extra], log, program=program)

    def rows(self) -> list[str]:
        return self.metrics.read_text().splitlines() if self.metrics.exists() else []

    def send(self, number: signal.Signals, after: int) -> None:
        """Sends a signal once the metrics have more than `after` rows."""
        until = time.monotonic() + 120
        while len(self.rows()) <= after:
            assert self.run.running() and time.monotonic() < until, self.run.log.read_text()
            time.sleep(0.005)
        self.run.send_signal(number)


@pytest.fixture
def interrupted(tiny_sana: Path, prompts_file: Path, tmp_path: Path) -> tuple[Path, Path, list[tuple[int, str]]]:
    """A straight run, and one that is stopped with Ctrl-C, resumed, killed and resumed again."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    whole = Command(tiny_sana, prompts_file, straight)
    steps = []

    first = Command(tiny_sana, prompts_file, broken)
    first.send(signal.SIGINT, after=5)
    steps.append(first.run.finish())

    second = Command(tiny_sana, prompts_file, broken, "--resume")
    second.send(signal.SIGKILL, after=10)
    steps.append(second.run.finish())
    assert len(second.rows()) < STEPS, "it was too quick to be killed"

    third = Command(tiny_sana, prompts_file, broken, "--resume", "--quiet")
    steps += [third.run.finish(), whole.run.finish()]
    return straight, broken, steps


@pytest.mark.long
def test_interrupted_run_equals_the_straight_one(
    interrupted: tuple[Path, Path, list[tuple[int, str]]],
) -> None:
    straight, broken, ((stopped, said), (killed, _), (resumed, quiet), (whole, log)) = interrupted

    assert stopped == 130
    assert "the state is saved" in said
    assert f"--out {broken}" in said and said.strip().endswith("--resume")
    assert "Traceback" not in said
    assert killed == -signal.SIGKILL
    assert (resumed, quiet) == (0, "")
    assert whole == 0, log

    check_equal(straight, broken)


def check_equal(straight: Path, broken: Path) -> None:
    assert (broken / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    assert len((straight / "metrics.jsonl").read_text().splitlines()) == STEPS
    files = sorted((straight / "checkpoints" / f"{STEPS:06d}").iterdir()) + sorted((straight / "student").rglob("*"))
    assert len(files) > 10
    for file in files:
        other = broken / file.relative_to(straight)
        if file.suffix == ".safetensors":
            ours, theirs = load_file(file), load_file(other)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours), file
    assert [p.name for p in sorted((broken / "checkpoints").iterdir())] == ["000016", "000020"]
    assert not list(broken.rglob(".*.part"))


@pytest.mark.long
def test_a_kill_between_the_updates_of_a_fake_score_costs_no_bit(
    tiny_sana: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """In step 10, whose second update has its gradient and has not moved the fake score yet."""
    changes = (
        "objective=matching", "space.kind=rollout", "rollout.steps=2", "fake.updates=3", "fake.head_start=2",
        "fake.rank=4",
    )  # fmt: skip
    extra, straight, broken = [part for change in changes for part in ("--set", change)], tmp_path / "a", tmp_path / "b"
    between = (str(Path(__file__).with_name("between.py")), str(10 * 3 + 1))
    runs = [
        Command(tiny_sana, prompts_file, straight, *extra),
        Command(tiny_sana, prompts_file, broken, *extra, program=between),
    ]
    (whole, log), (killed, _) = (command.run.finish() for command in runs)
    assert whole == 0, log
    assert killed == -signal.SIGKILL and len(runs[1].rows()) == 10
    resumed, said = Command(tiny_sana, prompts_file, broken, *extra, "--resume").run.finish()
    assert resumed == 0, said
    check_equal(straight, broken)
    last = load_file(broken / "checkpoints" / f"{STEPS:06d}" / "fake.safetensors")
    first = load_file(broken / "checkpoints" / f"{STEPS - 4:06d}" / "fake.safetensors")
    assert any(not torch.equal(last[name], first[name]) for name in last)
