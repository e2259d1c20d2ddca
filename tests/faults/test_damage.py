"""Checkpoints that a disk has changed: found, set aside, and the run goes on from the one before."""

import os
import random
import shutil
from pathlib import Path

import pytest

from stepfold.config import load_config
from stepfold.display import Display
from stepfold.jobs.distilling import run_distill
from stepfold.training.runs import checkpoints, damage, set_aside_damaged

FILES = ("student.safetensors", "average.safetensors", "optimiser.safetensors", "state.json", "checksums.json")


def run(teacher: Path, prompts: Path, folder: Path, resume: bool) -> None:
    config = load_config(
        "default",
        [
            f"teacher.source={teacher}", f"prompts={prompts}", "teacher.max_tokens=48", "space.route_steps=3",
            "space.filter_rule=off", "training.steps=6", "training.prompts_per_step=1", "training.checkpoint_every=2",
            "training.keep_checkpoints=3", "training.preview_every=100", "optimiser.name=adamw",
            "training.precision=no", "training.walk_precision=no", "evaluation.n=0", "objective=discrete",
        ],
    )  # fmt: skip
    run_distill(config, folder, resume=resume, display=Display(quiet=True), command="test")


@pytest.fixture(scope="module")
def finished(tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A prompts file and a run that has three checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "prompts.txt").write_text("red heart\na cat\nmoon\n")
    run(tiny_sana, folder / "prompts.txt", folder / "run", resume=False)
    return folder / "prompts.txt", folder / "run"


def spoil(path: Path, rng: random.Random) -> str:
    """Truncates a file or flips one of its bits; says which."""
    size = path.stat().st_size
    if rng.random() < 0.3:
        os.truncate(path, rng.randrange(size))
        return "truncated"
    with path.open("r+b") as file:
        offset = rng.randrange(size)
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << rng.randrange(8))]))
    return f"a bit flipped at {offset}"


@pytest.mark.parametrize("file", FILES)
def test_any_change_of_a_file_is_found(finished: tuple[Path, Path], tmp_path: Path, file: str) -> None:
    """A hundred random truncations and flipped bits of each file of a checkpoint; the untouched one is whole."""
    newest = checkpoints(finished[1])[-1]
    assert damage(newest) is None and {path.name for path in newest.iterdir()} == set(FILES)
    rng, missed = random.Random(0), []
    shutil.copytree(newest, tmp_path / "copy")
    for _ in range(100):
        shutil.copy(newest / file, tmp_path / "copy" / file)
        what = spoil(tmp_path / "copy" / file, rng)
        if damage(tmp_path / "copy") is None:
            missed.append(what)
    assert not missed
    (tmp_path / "copy" / file).unlink()
    assert (damage(tmp_path / "copy") is None) == (file == "checksums.json")  # older versions wrote none


def test_a_run_goes_on_from_the_last_whole_checkpoint(
    finished: tuple[Path, Path], tiny_sana: Path, tmp_path: Path
) -> None:
    """The two newest are damaged: both are set aside, and the run ends with the very same bytes."""
    prompts, straight = finished
    broken = tmp_path / "run"
    shutil.copytree(straight, broken)
    rng = random.Random(1)
    for step in ("000004", "000006"):
        spoil(broken / "checkpoints" / step / "average.safetensors", rng)
    copy = tmp_path / "copy"
    shutil.copytree(broken, copy)
    said = set_aside_damaged(copy)
    assert len(said) == 2 and all("average.safetensors is not as it was written" in line for line in said)
    assert [path.name for path in checkpoints(copy)] == ["000002"]

    run(tiny_sana, prompts, broken, resume=True)
    for name in ("student", "average"):
        file = Path("checkpoints") / "000006" / f"{name}.safetensors"
        assert (broken / file).read_bytes() == (straight / file).read_bytes()
    assert (broken / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    assert (broken / "checkpoints" / "damaged_000006").is_dir()
    spoil(broken / "checkpoints" / "000006" / "average.safetensors", rng)  # again, and the name is taken
    assert "damaged_000006_2" in set_aside_damaged(broken)[0]


def test_a_finished_run_lets_go_of_the_checkpoint_that_a_kill_kept(
    finished: tuple[Path, Path], tiny_sana: Path, tmp_path: Path
) -> None:
    """Killed between its last checkpoint and the end of the oldest; resumed, it writes none that would remove it."""
    prompts, straight = finished
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    shutil.copytree(folder / "checkpoints" / "000002", folder / "checkpoints" / "000001")
    run(tiny_sana, prompts, folder, resume=True)
    assert [path.name for path in checkpoints(folder)] == ["000002", "000004", "000006"]
