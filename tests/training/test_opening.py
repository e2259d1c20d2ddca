"""A run folder is opened by its own run alone: the same settings, prompts, weights and pictures."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from forms import cases
from safetensors.torch import load_file, save_file

from stepfold.config import Config, from_yaml, load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.jobs.distilling import run_distill
from stepfold.training.opening import as_begun, check_run, is_running, open_run, prepare_run
from stepfold.training.runs import CHECKSUMS, append_metrics, checkpoints, read_metrics, writing

Settings = Callable[..., Config]


def config_of(*changes: str) -> Config:
    return load_config("demo", changes)


def distil(config: Config, folder: Path, resume: bool = False) -> None:
    run_distill(config, folder, resume=resume, display=Display(quiet=True), command="")


@pytest.mark.parametrize("what", ["link", "pipe", "part", "metrics"])
def test_a_run_folder_leads_nowhere_else(tmp_path: Path, what: str) -> None:
    """Somebody else's run folder must not make a resumed run write, or delete, outside it."""
    folder, other = tmp_path / "run", tmp_path / "other"
    config = load_config("demo")
    open_run(folder, config, resume=False).release()
    (other / "000001").mkdir(parents=True)
    if what == "link":
        (folder / "checkpoints").symlink_to(other)
    elif what == "pipe":
        os.mkfifo(folder / "prompts.json")
    elif what == "metrics":
        (folder / "metrics.jsonl").mkdir()
    else:
        (folder / ".note.part").symlink_to(other / "stolen")
        with writing(folder / "note") as part:
            part.write_text("ours")
        assert (folder / "note").read_text() == "ours" and not (other / "stolen").exists()
        return
    with pytest.raises(UserError, match=r"is a link, which|is neither a file nor a folder|is a folder and should be"):
        open_run(folder, config, resume=True)
    assert (other / "000001").is_dir()


def test_open_run_refuses_a_run_that_is_there(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    open_run(out, config_of(), resume=False)
    with pytest.raises(UserError, match=r"already holds a run; add --resume"):
        open_run(out, config_of(), resume=False)
    open_run(out, config_of(), resume=True)


@pytest.mark.long
def test_a_second_process_is_refused_until_the_first_one_ends(tmp_path: Path) -> None:
    """Another process cannot open the folder, not even to resume; this one can, and a killed one locks nothing."""
    out = tmp_path / "run"
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from stepfold.config import load_config\n"
        "from stepfold.training.opening import open_run\n"
        "lock = open_run(Path(sys.argv[1]), load_config('demo'), resume=True)\n"
        "print('open', flush=True)\n"
        "time.sleep(100)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "open\n"
    with pytest.raises(UserError, match=r"another process is running in .*run; wait for it or stop it"):
        open_run(out, load_config("demo"), resume=True)
    other.kill()
    other.wait()
    first, second = (open_run(out, load_config("demo"), resume=True) for _ in range(2))
    assert first.is_locked and second.is_locked
    first.release(force=True)


def test_who_looks_whether_a_run_is_on_does_not_keep_it_from_starting(tmp_path: Path) -> None:
    """`is_running` takes the lock for an instant; `stepfold runs` and the page call it again and again."""
    open_run(tmp_path, config_of(), resume=False).release()
    looking = FileLock(tmp_path / ".lock", thread_local=False)
    looking.acquire()
    threading.Timer(0.1, looking.release).start()
    open_run(tmp_path, config_of(), resume=True).release()
    assert not is_running(tmp_path)


def test_open_run_names_the_settings_that_differ(tmp_path: Path) -> None:
    open_run(tmp_path, config_of("training.steps=8", "seed=3"), resume=False)
    append_metrics(tmp_path, {"step": 0})
    with pytest.raises(UserError) as caught:
        open_run(tmp_path, config_of("training.steps=7", "seed=3"), resume=True)
    assert "training.steps 8 there, 7 given" in str(caught.value)
    assert "seed" not in str(caught.value)


@pytest.mark.parametrize("left", [None, "metrics", "checkpoint"])
def test_a_run_without_a_step_goes_on_with_other_settings(left: str | None, tmp_path: Path) -> None:
    """After "out of memory" at the first step the advice is one: training.micro_batch=1."""
    open_run(tmp_path, config_of(), resume=False).release()
    smaller = config_of("training.micro_batch=1")
    with pytest.raises(UserError, match=r"already holds a run; add --resume"):
        open_run(tmp_path, smaller, resume=False)
    if left:
        if left == "metrics":
            append_metrics(tmp_path, {"step": 0})
        else:
            (tmp_path / "checkpoints" / "000001").mkdir(parents=True)
        with pytest.raises(UserError, match=r"training\.micro_batch 0 there, 1 given"):
            open_run(tmp_path, smaller, resume=True)
        return
    (tmp_path / "blacks.safetensors").write_text("of another size or precision")
    open_run(tmp_path, smaller, resume=True).release()
    assert from_yaml(tmp_path / "config.yaml") == smaller and not (tmp_path / "blacks.safetensors").exists()
    (tmp_path / "blacks.safetensors").write_text("its own")
    open_run(tmp_path, smaller, resume=True).release()
    assert (tmp_path / "blacks.safetensors").exists()


@pytest.mark.parametrize("result", ["student/stepfold.json", "report.json", "teacher/model_index.json"])
def test_a_run_that_has_ended_does_not_begin_again_over_its_results(tmp_path: Path, result: str) -> None:
    """Its checkpoints were deleted to save room: a job that is started again by itself must not lose the student."""
    open_run(tmp_path, config_of(), resume=False).release()
    append_metrics(tmp_path, {"step": 0})
    open_run(tmp_path, config_of(), resume=True).release()  # stopped before its first checkpoint: it begins again
    (tmp_path / result).parent.mkdir(exist_ok=True)
    (tmp_path / result).write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        UserError, match=rf"has ended and no whole .* keep .*{result[:6]}.*another --out to train again"
    ):
        open_run(tmp_path, config_of(), resume=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "checkpoints" / "000001").mkdir(parents=True)
    check_run(tmp_path, config_of(), resume=True)


def test_damaged_checkpoints_alone_do_not_either(tmp_path: Path) -> None:
    """They are set aside, and what the run made stays."""
    open_run(tmp_path, config_of(), resume=False).release()
    checkpoint = tmp_path / "checkpoints" / "000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / CHECKSUMS).write_text('{"state.json": 1}')
    prepare_run(tmp_path, config_of(), True, [], lambda note: None).release()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["damaged_000001"]
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UserError, match="has ended and no whole checkpoint of it"):
        prepare_run(tmp_path, config_of(), True, [], lambda note: None)


def test_open_run_leaves_foreign_files_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UserError, match="not empty and holds no run"):
            open_run(tmp_path, config_of(), resume=resume)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_open_run_refuses_a_file_and_a_folder_below_a_file(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt is a file; choose another --out"):
        open_run(file, config_of(), resume=False)
    with pytest.raises(UserError, match=r"cannot make .*choose another --out"):
        open_run(file / "run", config_of(), resume=False)
    assert file.read_text() == "mine"


def test_check_run_writes_nothing(tmp_path: Path) -> None:
    check_run(tmp_path / "run", config_of(), resume=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("decay", cases([0.0, 0.9], short=[0.0]))
def test_a_run_can_be_made_longer_until_its_rate_falls(decay: float, settings: Settings, tmp_path: Path) -> None:
    """Two steps, then four: the same numbers and weights as four at once, to the bit."""
    rate = (f"optimiser.decay={decay}", "optimiser.warmup=1")
    short, long = (settings(*rate, f"training.steps={steps}") for steps in (2, 4))
    distil(short, tmp_path / "run")
    if decay:
        with pytest.raises(UserError, match=r"steps 2 there, 4 given\); a run can be made longer only until"):
            distil(long, tmp_path / "run", resume=True)
        assert from_yaml(tmp_path / "run" / "config.yaml") == short
        return
    distil(long, tmp_path / "run", resume=True)
    distil(long, tmp_path / "at once")
    assert from_yaml(tmp_path / "run" / "config.yaml") == long
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "at once")
    ours, theirs = (load_file(checkpoints(tmp_path / name)[-1] / "average.safetensors") for name in ("run", "at once"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(UserError, match=r"steps 4 there, 2 given\); resume with the same ones"):
        distil(short, tmp_path / "run", resume=True)


def test_what_a_phase_decides_stays_as_it_was(tmp_path: Path) -> None:
    """The rate of a phase falls with the whole run's steps; here all of it is warm-up, which does not know them."""
    phases = "training.phases=[{steps: 2, set: {objective: discrete}}]"
    open_run(tmp_path, config_of("training.steps=4", "optimiser.warmup=20", phases), resume=False).release()
    append_metrics(tmp_path, {"step": 0})
    check_run(tmp_path, config_of("training.steps=8", "optimiser.warmup=20", phases), resume=True)
    with pytest.raises(UserError, match=r"training\.phases"):
        check_run(tmp_path, config_of("training.steps=8", "optimiser.warmup=20"), resume=True)


def test_auto_is_what_it_was_when_the_run_began(tmp_path: Path) -> None:
    """On another machine it may be another one: nobody gave the value that was refused."""
    auto = ("training.precision=auto", "training.walk_precision=auto", "objective=auto")
    there = ("training.precision=bf16", "training.walk_precision=no", "objective=discrete")
    assert as_begun(tmp_path, config_of(*auto)) == config_of(*auto)
    open_run(tmp_path, config_of(*there), resume=False).release()
    append_metrics(tmp_path, {"step": 0})
    assert as_begun(tmp_path, config_of(*auto)) == config_of(*there)
    other = config_of("training.precision=no", *auto[1:])
    assert as_begun(tmp_path, other) == config_of("training.precision=no", *there[1:])
    with pytest.raises(UserError, match=r"training\.precision 'bf16' there, 'no' given"):
        check_run(tmp_path, as_begun(tmp_path, other), resume=True)


def test_a_run_knows_its_teacher(tiny_sana: Path, settings: Settings, tmp_path: Path) -> None:
    """Weights times 1.5 between start and --resume went on without a word; a copy of the same files is the same one."""
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_sana, folder)
    config = settings("training.steps=1").model_copy(
        update={"teacher": settings().teacher.model_copy(update={"source": str(folder)})}
    )
    distil(config, tmp_path / "run")
    shutil.rmtree(folder)
    shutil.copytree(tiny_sana, folder, copy_function=shutil.copy)  # other times
    distil(config, tmp_path / "run", resume=True)
    for part, name in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        weights = folder / part / f"{name}.safetensors"
        whole = weights.read_bytes()
        save_file({key: 1.5 * value for key, value in load_file(weights).items()}, weights, {"format": "pt"})
        with pytest.raises(UserError, match=r"the content of .* \(teacher\) has changed since this run began"):
            distil(config, tmp_path / "run", resume=True)
        weights.write_bytes(whole)
    distil(config, tmp_path / "run", resume=True)
