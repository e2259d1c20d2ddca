"""One run on several processes, with gloo: the same weights; with launchers too, and what happens when one is lost."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from forked import Forked
from safetensors.torch import load_file
from tiny import PROMPTS
from torch.torch_version import TorchVersion

from stepfold.config import last_of_each, load_config
from stepfold.errors import UserError
from stepfold.prompts.reading import open_prompts
from stepfold.teachers.loading import load_teacher
from stepfold.training.draws import draw
from stepfold.training.processes import SHARDS_SINCE, Processes, lost_process, shard
from stepfold.training.runs import read_metrics

CPU = torch.device("cpu")
LISTENING, LATE = (Path(__file__).with_name(name) for name in ("listening.py", "late.py"))
ALL, STUDENT = ("all", "student") if torch.__version__ >= SHARDS_SINCE else ("none", "none")  # older ones are refused
SETTINGS = (
    "training.steps=6", "training.checkpoint_every=3", "training.preview_every=1000", "training.precision=no",
    "training.walk_precision=no", "space.route_steps=4", "teacher.max_tokens=32", "evaluation.n=0",
    "optimiser.name=adamw", "optimiser.lr=1e-3", "consistency.r_warmup=3",
    "training.prompts_per_step=5",  # uneven shares
    "training.micro_batch=4",  # and then an uneven number of passes
    "space.filter_rule=hard", "space.filter_threshold=15.5",  # drops some: all of a process's, now and then
)  # fmt: skip


def command(teacher: Path, prompts: Path, out: Path, *changes: str, resume: bool = False) -> list[str]:
    """What `stepfold` is given for a run."""
    changes = tuple(part for setting in last_of_each((*SETTINGS, *changes)) for part in ("--set", setting))
    paths = ["--teacher", str(teacher), "--prompts", str(prompts), "--out", str(out)]
    return ["distill", "--preset", "default", *paths, *changes, *(["--resume"] if resume else [])]


class Launch:
    """A `stepfold distill` on some processes that a launcher starts."""

    def __init__(
        self,
        count: int,
        teacher: Path,
        prompts: Path,
        out: Path,
        *changes: str,
        accelerate: bool = False,
        node: tuple[int, int] | None = None,
    ) -> None:
        """`node`: the number of this one of two nodes, each with half of the processes, and the port of the first."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        if accelerate:
            launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)]
        if node:
            place = ["--node-rank", str(node[0]), "--master-addr", "127.0.0.1", "--master-port", str(node[1])]
            launcher = ["-m", "torch.distributed.run", "--nnodes", "2", *place, "--nproc-per-node", str(count // 2)]
        self.out, self.log = out, out.with_name(f"{out.name}_{count}{f'_node{node[0]}' if node else ''}.log")
        self.process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "stepfold", *command(teacher, prompts, out, *changes)],
            stdout=subprocess.DEVNULL,
            stderr=self.log.open("w"),
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def finish(self, seconds: float = 150) -> tuple[int, str]:
        """Exit code and what was written to stderr."""
        try:
            return self.process.wait(timeout=seconds), self.log.read_text()
        finally:
            for child in psutil.Process(self.process.pid).children() if self.process.poll() is None else []:
                child.kill()
            self.process.kill()

    def workers(self) -> dict[int, psutil.Process]:
        """The processes that train, by rank."""
        found = psutil.Process(self.process.pid).children()
        return {int(child.environ()["RANK"]): child for child in found}

    def wait_for_rows(self, count: int) -> None:
        until = time.monotonic() + 200
        while len(read_metrics(self.out)) < count:
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)


def forked(
    count: int,
    teacher: Path,
    prompts: Path,
    out: Path,
    *changes: str,
    resume: bool = False,
    program: Sequence[str] = (),
) -> Forked:
    """The same without a launcher."""
    arguments = command(teacher, prompts, out, *changes, resume=resume)
    return Forked(arguments, out.with_name(f"{out.name}_{count}.log"), count=count, program=program)


def difference(a: Path, b: Path, step: int = 6, names: Sequence[str] = ("student", "average", "optimiser")) -> float:
    """Largest relative difference between the tensors of two runs' checkpoints."""
    found = []
    for name in names:
        x, y = (load_file(folder / "checkpoints" / f"{step:06d}" / f"{name}.safetensors") for folder in (a, b))
        assert set(x) == set(y)
        found += [float((x[key] - y[key]).norm() / x[key].norm().clamp(min=1e-6)) for key in x]
    return max(found)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of prompts that all runs share."""
    path = tmp_path_factory.mktemp("texts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="module")
def alone(tiny_sana: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    code, words = forked(1, tiny_sana, texts, folder, f"training.shard={ALL}").finish()
    assert code == 0, words
    return folder


@pytest.fixture(scope="module")
def of_two(tiny_sana: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in two processes, its student sharded, with previews on the way; beside it what each one wrote."""
    folder = tmp_path_factory.mktemp("two") / "run"
    changes = (f"training.shard={STUDENT}", "training.preview_every=3")
    code, words = forked(2, tiny_sana, texts, folder, *changes, program=[str(LISTENING), str(folder.parent)]).finish()
    assert code == 0, words
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    ("does", "code", "said"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise ValueError('why')", 1, "ValueError: why"),
        ("os.kill(os.getpid(), 9)", -9, ""),
        ("time.sleep(100)", -9, "processes [0, 1] went on"),
    ],
)
def test_a_fork_that_fails_dies_or_hangs_is_told(
    does: str, code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what was written to stderr; process 1 does so, while 0 waits for it."""
    monkeypatch.setattr("forked.GRACE_SEC", 1.0)
    program = tmp_path / "program.py"
    waits = "if os.environ['RANK'] == '0':\n    time.sleep(100)"
    program.write_text(f"import os, sys, time\nos.write(2, b'hello\\n')\n{waits}\n{does}\n")
    run = Forked([], tmp_path / "log", count=2, program=[str(program)])
    until = time.monotonic() + 100
    while run.log.read_text().count("hello\n") < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    ended, words = run.finish(2)
    assert ended == code and words.count("hello\n") == 2 and said in words
    assert words.endswith("went on and were killed\n") and not run.running()


@pytest.mark.long
def test_eight_prompts_a_step_on_one_two_and_four_processes(tiny_sana: Path, texts: Path, tmp_path: Path) -> None:
    """One without a launcher, two and four by one launcher each."""
    changes = ("training.steps=10", "training.prompts_per_step=8", "training.checkpoint_every=10")
    runs = {count: tmp_path / f"of {count}" for count in (1, 2, 4)}
    for counts in ({1: forked, 2: partial(Launch, accelerate=True)}, {4: Launch}):  # two at a time
        started = [start(n, tiny_sana, texts, runs[n], *changes) for n, start in counts.items()]
        for launch in started:
            code, words = launch.finish(200)
            assert code == 0, words
    for count in (2, 4):
        assert json.loads((runs[count] / "report.json").read_text())["processes"] == count
        assert difference(runs[1], runs[count], 10) < 1e-3
        for row, wanted in zip(read_metrics(runs[count]), read_metrics(runs[1]), strict=True):
            assert row == {name: pytest.approx(value, rel=1e-4) for name, value in wanted.items()}


@pytest.mark.long
def test_a_process_that_comes_late_does_not_take_its_own_run_for_another_one(
    tiny_sana: Path, texts: Path, tmp_path: Path
) -> None:
    """It found the folder that the first process had just made: "already holds a run; add --resume"."""
    changes = ("training.steps=1", "training.prompts_per_step=2")
    code, words = forked(2, tiny_sana, texts, tmp_path / "run", *changes, program=[str(LATE)]).finish()
    assert code == 0, words
    code, words = forked(2, tiny_sana, texts, tmp_path / "run", *changes).finish()
    assert code != 0 and "already holds a run; add --resume" in words and "process 1: error: " in words


@pytest.mark.long
def test_two_processes_train_the_same_student(alone: Path, of_two: Path) -> None:
    check_same(alone, of_two, 2)


@pytest.fixture(scope="module")
def of_three(tiny_sana: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in three processes, teacher and student sharded."""
    folder = tmp_path_factory.mktemp("three") / "run"
    code, words = forked(3, tiny_sana, texts, folder, f"training.shard={ALL}").finish()
    assert code == 0, words
    return folder


@pytest.mark.long
def test_three_processes_train_the_same_student(alone: Path, of_three: Path) -> None:
    check_same(alone, of_three, 3)


def check_same(alone: Path, folder: Path, count: int) -> None:
    """Weights, metrics and the student of a run of `count` processes are those of the run in one."""
    assert difference(alone, folder) < 1e-3
    ours, theirs = read_metrics(folder), read_metrics(alone)
    for row, wanted in zip(ours, theirs, strict=True):
        assert row == {name: pytest.approx(value, rel=1e-4) for name, value in wanted.items()}
    assert {row["kept"] for row in theirs} == {0.4, 0.6}  # of five prompts: some processes are left with none
    report = json.loads((folder / "report.json").read_text())
    assert report["processes"] == count
    one, other = (load_file(next((run / "student" / "transformer").glob("*.safetensors"))) for run in (alone, folder))
    assert all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-5) for name in one)


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        ("objective=continuous", "student.times=two", "target.rule={gap: 0.5, zero: 0.25, diagonal: 0.25}"),
        ("objective=semigroup", "student.times=two", "target.rule={uniform: 0.75, diagonal: 0.25}"),
    ],
    ids=["continuous", "semigroup"],
)
@pytest.mark.parametrize("shard", ["none", STUDENT])
def test_two_processes_train_the_same_flow_map(
    tiny_sana: Path, texts: Path, tmp_path: Path, changes: tuple[str, ...], shard: str
) -> None:
    """Each state has its target whoever draws it; sharded, a process without a state that stays agrees too."""
    launches = [
        Launch(count, tiny_sana, texts, tmp_path / f"of {count}", *changes, f"training.shard={shard}")
        for count in (1, 2)
    ]
    for launch in launches:
        code, words = launch.finish(250)
        assert code == 0, words
    assert difference(tmp_path / "of 1", tmp_path / "of 2") < 1e-3


@pytest.mark.long
def test_two_nodes_train_what_one_does(tiny_sana: Path, texts: Path, tmp_path: Path) -> None:
    """Each with a launcher of its own, and one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one, two = tmp_path / "one", tmp_path / "two"
    started: list[Launch | Forked] = [Launch(2, tiny_sana, texts, two, node=(number, port)) for number in (0, 1)]
    started.append(forked(2, tiny_sana, texts, one))
    for launch in started:
        code, words = launch.finish()
        assert code == 0, words
    assert difference(one, two) == 0
    assert [json.loads((out / "report.json").read_text())["processes"] for out in (one, two)] == [2, 2]
    assert (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()


WRITTEN = {
    "open hello_0", "open run/metrics.jsonl", "open run/.report.json.part", "os.rename run/report.html",
    "save_file run/checkpoints/.000006.part/student.safetensors", "os.rename run/checkpoints/000006",
    "open run/previews/.step_000006.png.part", "os.mkdir run/.student.part",
}  # fmt: skip


def written(folder: Path) -> set[str]:
    """What the first process wrote; the other one wrote nothing."""
    first, other = (set((folder / f"heard_{rank}").read_text().splitlines()) for rank in (0, 1))
    assert other == {"open hello_1"}  # so it was heard
    assert any(line.startswith("open run/tensorboard/events") for line in first)
    return first


@pytest.mark.long
def test_only_the_first_process_writes(of_two: Path) -> None:
    """A new run with previews, checkpoints and a student, its weights sharded."""
    new = {"open run/.config.yaml.part", "open run/.lock", "save_file run/.blacks.safetensors.part"}
    assert WRITTEN | new <= written(of_two.parent)


@pytest.mark.long
def test_only_the_first_process_writes_in_a_run_that_goes_on(
    tiny_sana: Path, texts: Path, tmp_path: Path, of_two: Path
) -> None:
    folder = shutil.copytree(of_two, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "000006")
    (folder / "previews" / "step_000006.png").unlink()
    changes = (f"training.shard={STUDENT}", "training.preview_every=3")
    program = [str(LISTENING), str(tmp_path)]
    code, words = forked(2, tiny_sana, texts, folder, *changes, resume=True, program=program).finish()
    assert code == 0, words
    assert written(tmp_path) >= WRITTEN


@pytest.mark.long
def test_another_number_of_processes_goes_on(
    tiny_sana: Path, texts: Path, tmp_path: Path, alone: Path, of_three: Path
) -> None:
    """From what one process left to three; and from what three left to one."""
    started = {}
    for count, left in ((3, alone), (1, of_three)):
        folder = shutil.copytree(left, tmp_path / f"{count}" / "run")
        shutil.rmtree(folder / "checkpoints" / "000006")
        started[folder] = forked(count, tiny_sana, texts, folder, f"training.shard={ALL}", resume=True)
    for folder, launch in started.items():
        code, words = launch.finish()
        assert code == 0, words
        assert difference(alone, folder) < 1e-3


@pytest.mark.long
@pytest.mark.parametrize(("lost", "shard"), [(1, "none"), (0, STUDENT)])
def test_a_lost_process_ends_the_others_within_a_minute(
    lost: int, shard: str, tiny_sana: Path, texts: Path, tmp_path: Path
) -> None:
    run = Launch(2, tiny_sana, texts, tmp_path / "run", "training.steps=100000", f"training.shard={shard}")
    run.wait_for_rows(4)
    workers = run.workers()
    workers[lost].kill()
    killed = time.monotonic()
    code, words = run.finish(60)
    assert code != 0 and time.monotonic() - killed < 60
    told = re.findall(r"^(?:process \d: )?error: .*", words, re.MULTILINE)
    assert len(told) == 1, words
    assert "another process of this run is gone" in told[0] and "--resume" in told[0]
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers.values())
    assert (tmp_path / "run" / "checkpoints" / "000003").is_dir()


@pytest.mark.long
def test_a_terminated_run_saves_in_all_processes(tiny_sana: Path, texts: Path, tmp_path: Path) -> None:
    """As SLURM ends one: SIGTERM to the launcher, which hands it on."""
    run = Launch(2, tiny_sana, texts, tmp_path / "run", "training.steps=100000", "training.checkpoint_every=1000")
    run.wait_for_rows(4)
    run.process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    code, words = run.finish(60)
    assert code != 0 and time.monotonic() - asked < 30, "the launcher kills after 30 seconds"
    done = len(read_metrics(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"{done:06d}"]
    assert words.count("stopped; the state is saved") == 1


@pytest.mark.long
def test_a_signal_to_every_process_of_a_job_saves_too(tiny_sana: Path, texts: Path, tmp_path: Path) -> None:
    """As some SLURM set-ups and systemd end one; the launcher hands its own on, so that workers get two."""
    run = Launch(2, tiny_sana, texts, tmp_path / "run", "training.steps=100000", "training.checkpoint_every=1000")
    run.wait_for_rows(4)
    for process in (run.process, *run.workers().values()):
        process.send_signal(signal.SIGTERM)
    code, words = run.finish(60)
    assert code != 0
    done = len(read_metrics(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"{done:06d}"], words
    assert words.count("stopped; the state is saved") == 1


@pytest.mark.long
def test_fewer_prompts_than_processes_are_refused(tiny_sana: Path, texts: Path, tmp_path: Path) -> None:
    code, words = forked(2, tiny_sana, texts, tmp_path / "run", "training.prompts_per_step=1").finish()
    assert code != 0 and "training.prompts_per_step is 1, but there are 2 processes" in words
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_processes_draw_together_what_one_would(count: int, tiny_sana: Path, texts: Path) -> None:
    """Every sample has its own noise, and which process has it changes nothing."""
    config = load_config("default", [*SETTINGS], teacher__source=str(tiny_sana), prompts=str(texts))
    teacher, prompts = load_teacher(config.teacher, "cpu"), open_prompts(texts)
    whole = draw(3, prompts, teacher, config, CPU)
    parts = [draw(3, prompts, teacher, config, CPU, Processes(count, rank)) for rank in range(count)]
    of = {
        "noise": lambda batch: batch.noise(),
        "route": lambda batch: batch.route(config.space),
        "guidance": lambda batch: batch.guidance,
        "filter": lambda batch: batch.draws.uniform("filter", (1,)),
    }
    for values in of.values():
        assert torch.equal(torch.cat([values(part) for part in parts]), values(whole))
    assert [prompt for part in parts for prompt in part.prompts] == whole.prompts
    flat = whole.noise().flatten(1)
    assert (torch.cdist(flat, flat) + 100 * torch.eye(len(flat))).min() > 1


@pytest.mark.long
def test_a_fake_score_learns_on_two_processes_what_it_learns_on_one(
    tiny_sana: Path, texts: Path, tmp_path: Path
) -> None:
    """Uneven shares, prompts that the filter drops (not for the fake), a head start, several updates a step.

    Matching on rollouts, which no filter drops, stands beside an objective on walks.
    """
    fake = ("fake.updates=2", "fake.kind=whole", "fake.head_start=2", "rollout.steps=2", "fake.lr_factor=1")
    fake += ("matching.weight=0.5", "rollout.ladder=random")
    runs = {count: tmp_path / f"of {count}" for count in (1, 2)}
    for launch in [forked(count, tiny_sana, texts, out, *fake) for count, out in runs.items()]:
        code, words = launch.finish()
        assert code == 0, words
    assert difference(runs[1], runs[2], names=("student", "fake", "optimiser")) < 2e-3
    rows = [read_metrics(out) for out in runs.values()]
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys() and ("head_start" in one) == (one["step"] < 2)
        assert one["fake/loss"] == pytest.approx(two["fake/loss"], rel=1e-3)


def test_shares_differ_by_one_at_most() -> None:
    for count in range(1, 9):
        for total in range(count, 30):
            shares = [Processes(count, rank).share(range(100, 100 + total)) for rank in range(count)]
            assert [i for share in shares for i in share] == list(range(100, 100 + total))
            sizes = {len(share) for share in shares}
            assert max(sizes) - min(sizes) <= 1 and max(sizes) == Processes(count).largest_share(total)


def test_only_errors_of_the_network_are_told_as_such() -> None:
    """A prompt may well be about an igloo."""
    with pytest.raises(RuntimeError, match="igloo"), lost_process():
        raise RuntimeError("step 3: loss is not finite: prompt 'an igloo'")
    gloo = "[/build/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer [::1]:9. This is often"
    with pytest.raises(UserError, match=r"\(Connection closed by peer \[::1\]:9\); .*--resume"), lost_process():
        raise RuntimeError(gloo)


@pytest.mark.parametrize(
    ("change", "way_out"),
    [
        ("student.lora=4", "student.lora=0"),
        ("adversarial.weight=0.5", "adversarial.weight=0"),
        ("fake.updates=1", "fake.updates=0"),
        ("optimiser.name=came", "optimiser.name=adamw"),
        ("training.compile=true", "training.compile=false"),
    ],
)
def test_what_does_not_go_with_sharding(change: str, way_out: str) -> None:
    changes = ["optimiser.name=adamw", "training.shard=student", change]
    with pytest.raises(UserError, match=rf"does not go with training.shard=student; .*{way_out}"):
        load_config("default", changes, teacher__source="x", prompts="y")


def test_sharding_needs_a_torch_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1+cu130"))
    with pytest.raises(UserError, match=r"needs torch 2\.13 or newer, this is 2\.12\.1\+cu130; .*training\.shard=none"):
        shard(torch.nn.Linear(2, 2), Processes(count=2))
