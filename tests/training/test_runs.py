"""The run folder: nothing half-written, nothing mixed up, everything back to the bit."""

import copy
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from stepfold.config import Config, load_config
from stepfold.errors import UserError
from stepfold.students.whole import new_student
from stepfold.teachers.sana import SanaTeacher
from stepfold.training.optimisers import make_optimiser
from stepfold.training.runs import (
    BackgroundWrites,
    append_metrics,
    checkpoints,
    load_checkpoint,
    read_metrics,
    rewind_metrics,
    save_checkpoint,
    writing,
)


def config_of(*changes: str) -> Config:
    return load_config("demo", changes)


def push(student: nn.Module, optimiser: torch.optim.Optimizer, seed: int) -> None:
    """One optimiser step along a gradient that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in student.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimiser.step()


def make(teacher: SanaTeacher, name: str) -> tuple[dict[str, nn.Module], torch.optim.Optimizer]:
    student = new_student(teacher)
    average = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.5)
    config = config_of(f"optimiser.name={name}", "optimiser.lr=1e-2")
    return {"student": student, "average": average}, make_optimiser(student.parameters(), config.optimiser)


@pytest.mark.parametrize("name", ["adamw", "came"])
def test_checkpoint_round_trip_is_exact(tmp_path: Path, teacher: SanaTeacher, name: str) -> None:
    modules, optimiser = make(teacher, name)
    for seed in range(3):
        push(modules["student"], optimiser, seed)
    save_checkpoint(tmp_path, 3, modules, optimiser, keep=2)

    torch.manual_seed(1)  # another initial guidance embedder: what comes back came from the file
    again, optimiser_again = make(teacher, name)
    assert load_checkpoint(tmp_path / "checkpoints" / "000003", again, optimiser_again) == 3
    for part in modules:
        for key, value in modules[part].state_dict().items():
            assert torch.equal(value, again[part].state_dict()[key]), key
    old, new = optimiser.state_dict()["state"], optimiser_again.state_dict()["state"]
    assert old.keys() == new.keys()
    assert len(old) == len(list(modules["student"].parameters()))
    for index in old:
        assert old[index].keys() == new[index].keys()
        for key, value in old[index].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(new[index][key])), (index, key)

    push(modules["student"], optimiser, 7)
    push(again["student"], optimiser_again, 7)
    for a, b in zip(modules["student"].parameters(), again["student"].parameters(), strict=True):
        assert torch.equal(a, b)


class Exploding(nn.Module):
    """Its state cannot be had."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def state_dict(self, *args: object, **kwargs: object) -> dict:  # type: ignore[override]
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken"), MemoryError()])
def test_interrupted_save_keeps_the_old_checkpoint(
    tmp_path: Path, teacher: SanaTeacher, leftovers: Callable, tensors: Callable, error: BaseException
) -> None:
    modules, optimiser = make(teacher, "adamw")
    save_checkpoint(tmp_path, 2, modules, optimiser, keep=1)
    before = tensors(tmp_path / "checkpoints" / "000002")
    push(modules["student"], optimiser, 0)
    with pytest.raises(type(error)):
        save_checkpoint(tmp_path, 4, modules | {"average": Exploding(error)}, optimiser, keep=1)
    assert [p.name for p in checkpoints(tmp_path)] == ["000002"]
    assert os.listdir(tmp_path / "checkpoints") == ["000002"]
    after = tensors(tmp_path / "checkpoints" / "000002")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert leftovers(tmp_path) == []


def test_what_is_written_later_is_what_was_there(tmp_path: Path, teacher: SanaTeacher, tensors: Callable) -> None:
    """The training goes on while a checkpoint waits to be written; a second one waits for the first."""
    modules, optimiser = make(teacher, "adamw")
    push(modules["student"], optimiser, 0)
    save_checkpoint(tmp_path / "at once", 1, modules, optimiser, keep=1)
    go, order = threading.Event(), list[str]()
    with BackgroundWrites() as background:
        background.start(lambda: order.append("first") if go.wait(30) else None)
        background.look()
        threading.Timer(0.2, go.set).start()
        save_checkpoint(tmp_path / "later", 1, modules, optimiser, keep=1, background=background)
        push(modules["student"], optimiser, 1)
        order.append("trained")
    assert order == ["first", "trained"]
    ours, theirs = (tensors(checkpoints(tmp_path / name)[0]) for name in ("later", "at once"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_error_beside_the_training_is_raised_once() -> None:
    def fail() -> None:
        raise UserError("no room")

    with BackgroundWrites() as background:
        background.start(fail)
        with pytest.raises(UserError, match="no room"):
            background.finish()
        background.start(lambda: None)
    with pytest.raises(UserError, match="no room"), BackgroundWrites() as background:
        background.start(fail)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    """Of a run of more than a million steps too; what has another name is none."""
    names = ["999800", "1000000", "1000200", "000003_backup", "1 copy", "damaged_999600", "12"]
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["999800", "1000000", "1000200"]


def test_full_disk_keeps_the_old_checkpoint(
    tmp_path: Path, teacher: SanaTeacher, leftovers: Callable, full_disk: Callable
) -> None:
    modules, optimiser = make(teacher, "adamw")
    save_checkpoint(tmp_path, 2, modules, optimiser, keep=1)
    with full_disk(20_000), pytest.raises(UserError, match=r"cannot write .*000004: .*free some space"):
        save_checkpoint(tmp_path, 4, modules, optimiser, keep=1)
    assert [p.name for p in checkpoints(tmp_path)] == ["000002"]
    assert leftovers(tmp_path) == []
    assert load_checkpoint(checkpoints(tmp_path)[-1], modules, optimiser) == 2


def test_rename_that_fails_keeps_the_old_file(
    tmp_path: Path, leftovers: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    file = tmp_path / "state.json"
    file.write_text("old")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="No space left on device"), writing(file) as part:
        part.write_text("new")
    assert file.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """`--json FOLDER` must not cost anyone the folder."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with (
        pytest.raises(UserError, match="mine is a folder; give the name of a file"),
        writing(tmp_path / "mine") as part,
    ):
        part.write_text("{}")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.tex"]


def test_what_a_kill_left_behind_does_not_get_into_the_next_write(tmp_path: Path) -> None:
    (tmp_path / ".student.part").mkdir()
    (tmp_path / ".student.part" / "stale").write_text("x")
    with writing(tmp_path / "student") as part:
        part.mkdir()
        (part / "fresh").write_text("y")
    assert os.listdir(tmp_path) == ["student"]
    assert os.listdir(tmp_path / "student") == ["fresh"]


def test_rotation_keeps_the_newest(tmp_path: Path, teacher: SanaTeacher) -> None:
    modules, optimiser = make(teacher, "adamw")
    for step in (99, 100, 1000, 99_999, 100_000):
        save_checkpoint(tmp_path, step, modules, optimiser, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["099999", "100000"]


@pytest.mark.parametrize("file", ["student.safetensors", "average.safetensors", "optimiser.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "empty"])
def test_damaged_checkpoint_names_its_folder(tmp_path: Path, teacher: SanaTeacher, file: str, damage: str) -> None:
    modules, optimiser = make(teacher, "adamw")
    push(modules["student"], optimiser, 0)
    save_checkpoint(tmp_path, 2, modules, optimiser, keep=1)
    path = tmp_path / "checkpoints" / "000002"
    if damage == "missing":
        (path / file).unlink()
    else:
        os.truncate(path / file, (path / file).stat().st_size // 2 if damage == "truncated" else 0)
    with pytest.raises(UserError, match=r"000002 is damaged .*delete that folder") as caught:
        load_checkpoint(path, modules, optimiser)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("other", [nn.Linear(2, 3), nn.Linear(2, 2, bias=False), nn.Sequential(nn.Linear(2, 2))])
def test_checkpoint_of_another_network_is_not_called_damaged(tmp_path: Path, other: nn.Module, checksums: bool) -> None:
    """Names or shapes differ: deleting checkpoints would help nobody."""
    network = nn.Linear(2, 2)
    save_checkpoint(tmp_path, 2, {"student": network}, torch.optim.SGD(network.parameters()), keep=1)
    path = tmp_path / "checkpoints" / "000002"
    if not checksums:  # as older versions left it
        (path / "checksums.json").unlink()
    with pytest.raises(UserError, match=r"000002 was made with another network \((size mismatch|.* key\(s\)).*resume"):
        load_checkpoint(path, {"student": other}, torch.optim.SGD(other.parameters()))


def test_checkpoint_of_another_optimiser_is_not_called_damaged(tmp_path: Path) -> None:
    network = nn.Linear(2, 2)
    save_checkpoint(tmp_path, 2, {"student": network}, torch.optim.SGD(network.parameters()), keep=1)
    groups = [{"params": [parameter]} for parameter in network.parameters()]
    with pytest.raises(UserError, match=r"made with another network \(.*different number of parameter groups"):
        load_checkpoint(tmp_path / "checkpoints" / "000002", {"student": network}, torch.optim.SGD(groups))


def test_a_flipped_bit_is_never_loaded(tmp_path: Path) -> None:
    """Not by whoever calls `load_checkpoint` either: the weights stay what they are."""
    network = nn.Linear(2, 2)
    optimiser = torch.optim.SGD(network.parameters())
    save_checkpoint(tmp_path, 2, {"student": network}, optimiser, keep=1)
    path = tmp_path / "checkpoints" / "000002"
    contents = bytearray((path / "student.safetensors").read_bytes())
    contents[-1] ^= 1  # in a weight: every reader takes the file
    (path / "student.safetensors").write_bytes(contents)
    before = network.weight.clone()
    with pytest.raises(UserError, match=r"000002 is damaged \(student\.safetensors is not as it was written\); delete"):
        load_checkpoint(path, {"student": network}, optimiser)
    assert torch.equal(network.weight, before)


def test_rewind_drops_later_rows_and_a_cut_last_line(tmp_path: Path) -> None:
    for step in range(6):
        append_metrics(tmp_path, {"step": step, "loss": step / 3})
    metrics = tmp_path / "metrics.jsonl"
    with open(metrics, "a") as file:
        file.write('{"step": 6, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3, 4, 5]
    rewind_metrics(tmp_path, 4)
    assert metrics.read_text() == "".join(json.dumps({"step": s, "loss": s / 3}) + "\n" for s in range(4))
    rewind_metrics(tmp_path, 9)
    assert len(read_metrics(tmp_path)) == 4
    append_metrics(tmp_path, {"step": 4})
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]


def test_rewind_without_metrics_starts_an_empty_file(tmp_path: Path) -> None:
    rewind_metrics(tmp_path, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
