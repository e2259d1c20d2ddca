"""Banks of couplings: whole or resumable at any kill, known by their teacher, and equal to trajectories."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from stepfold import bank as banks
from stepfold.bank import flaws_of, is_whole, make_bank, noise_of, open_bank, shard_path
from stepfold.cli import app
from stepfold.commands.bank import part_of, source
from stepfold.commands.own_teacher import choose
from stepfold.config import TeacherSettings, load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.jobs.distilling import run_distill
from stepfold.prompts.reading import shuffled_index
from stepfold.sampling.teacher import sample_teacher
from stepfold.students.card import read_card
from stepfold.teachers.loading import load_teacher
from stepfold.training.runs import read_metrics

INDEX: dict[str, Any] = {
    "teacher": "x", "count": 11, "prompts": 5, "seed": 3, "latent_shape": [2, 3], "sigma_data": 0.5, "guidance": 2.0,
}  # fmt: skip


def halved(samples: Sequence[int], noise: Tensor) -> Tensor:
    """An end that anyone can check."""
    return 0.5 * noise + torch.tensor(list(samples))[:, None, None] / 16


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banks, "SHARD", 4)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_are_ends_with_their_own_noise(tmp_path: Path) -> None:
    make_bank(tmp_path / "bank", INDEX, halved, batch=3)
    bank = open_bank(tmp_path / "bank", {"teacher": "x"})
    assert len(bank) == 11 and len(bank.shards) == 3 and flaws_of(tmp_path / "bank", halved) == []
    rows = bank.rows([10, 0, 4])
    torch.testing.assert_close(rows.x0, halved([10, 0, 4], rows.noise), rtol=1e-3, atol=1e-3)
    assert torch.equal(rows.noise, noise_of(INDEX, [10, 0, 4])) and rows.prompt == [0, 0, 4]
    assert torch.equal(rows.guidance, torch.full((3,), 2.0))
    assert abs(noise_of(INDEX | {"latent_shape": [64, 64]}, [0]).std().item() - 0.5) < 0.02


def test_a_kill_anywhere_is_made_good_and_parts_make_the_same_bank(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    make_bank(whole, INDEX, halved, batch=3)
    wanted = files(whole)
    asked: list[int] = []

    def noted(samples: Sequence[int], noise: Tensor) -> Tensor:
        asked.extend(samples)
        return halved(samples, noise)

    for lost in sorted(set(wanted) - {"index.json"}):  # which is written first
        stopped = tmp_path / f"without {lost}"
        shutil.copytree(whole, stopped)
        (stopped / lost).unlink()
        asked.clear()
        make_bank(stopped, INDEX, noted, batch=4)
        assert files(stopped) == wanted
        assert len(asked) == (3 if "00002" in lost else 4)
    parts = tmp_path / "parts"
    make_bank(parts, INDEX, halved, batch=2, part=(2, 2))
    assert [is_whole(parts, number) for number in range(3)] == [False, True, False]
    with pytest.raises(UserError, match="lacks 2 of 3 shards; finish it with stepfold bank make"):
        open_bank(parts, {})
    make_bank(parts, INDEX, halved, batch=4, part=(1, 2))
    assert files(parts) == wanted


def test_flipped_bytes_other_noise_and_other_teachers_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "bank"
    make_bank(folder, INDEX, halved, batch=4)
    path = shard_path(folder, 1)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    assert flaws_of(folder) == [f"{path.name} has other bytes than were written"]
    make_bank(folder, INDEX, halved, batch=4)  # a shard with its json counts, so what is damaged has to go first
    path.unlink()
    make_bank(folder, INDEX, halved, batch=4)
    assert flaws_of(folder) == []
    doubled = [line.split(": ", 1)[1] for line in flaws_of(folder, lambda at, noise: 2 * halved(at, noise))]
    assert len(doubled) == 3 and all(float(line.split("differ by ")[1][:-1]) > 99 for line in doubled)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"seed": 4}))
    assert {line.split(": ", 1)[1] for line in flaws_of(folder)} == {"its noise is another one on this machine"}


def test_what_is_no_bank_or_another_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bank"
    make_bank(folder, INDEX, halved, batch=4)
    with pytest.raises(UserError, match="is a bank with seed=3, not 4; choose another --out"):
        make_bank(folder, INDEX | {"seed": 4}, halved, batch=4)
    with pytest.raises(UserError, match=r"made with another teacher .'x' there, 'y' now.; make a bank of this run's"):
        open_bank(folder, {"teacher": "y"})
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no bank"):
        make_bank(other, INDEX, halved, batch=4)
    with pytest.raises(UserError, match=r"holds no bank; make one with stepfold bank make"):
        open_bank(other, {})
    for wrong in ("{", "[]", json.dumps(INDEX | {"count": 0}), json.dumps(INDEX | {"latent_shape": ["a"]})):
        (folder / "index.json").write_text(wrong)
        with pytest.raises(UserError, match="holds no bank"):
            open_bank(folder, {})
    (folder / "index.json").write_text(json.dumps(INDEX))
    shutil.copy(shard_path(folder, 2), shard_path(folder, 0))
    with pytest.raises(UserError, match="is damaged"):
        open_bank(folder, {})
    with pytest.raises(UserError, match="is not finite or beyond float16"):
        make_bank(tmp_path / "nan", INDEX, lambda samples, noise: noise / 0, batch=4)
    monkeypatch.setattr(banks.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 10))
    with pytest.raises(UserError, match=r"GiB left, about .* are needed"):
        make_bank(tmp_path / "full", INDEX, halved, batch=4)
    assert not (tmp_path / "full" / "index.json").exists()
    for wrong in ("0/2", "3/2", "x", "1/0"):
        with pytest.raises(UserError, match="is no K/W"):
            part_of(wrong)


def changes(teacher: Path, prompts: Path, *more: str) -> list[str]:
    return [
        f"teacher.source={teacher}", f"prompts={prompts}", "teacher.height=32", "teacher.width=32",
        "teacher.max_tokens=24", "space.route_steps=4", "space.filter_rule=off", "training.steps=3",
        "training.prompts_per_step=2", "training.preview_every=1000", "training.precision=no", "objective=velocity",
        "training.walk_precision=no", "space.kind=coupling", *more,
    ]  # fmt: skip


@pytest.fixture
def made(tiny_sana: Path, prompts_file: Path, tmp_path: Path) -> Path:
    """A bank of the tiny teacher, by the command; its settings are those of the runs."""
    settings = TeacherSettings(source=str(tiny_sana), height=32, width=32, max_tokens=24)
    index, end_of = source(settings, str(prompts_file), count=16, steps=4, guidance=2.0, seed=0, device="cpu")
    make_bank(tmp_path / "bank", index, end_of, batch=5)
    return tmp_path / "bank"


@pytest.mark.long
def test_a_run_on_a_bank_resumes_to_the_bit_and_samples_no_teacher(
    tiny_sana: Path, prompts_file: Path, tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_teacher(TeacherSettings(source=str(tiny_sana), height=32, width=32, max_tokens=24), "cpu")
    rows = open_bank(made, {}).rows([3])
    condition, scale = teacher.encode([prompts_file.read_text().splitlines()[3]]), torch.tensor([2.0])
    exact = sample_teacher(teacher, rows.noise, condition, scale, 4, even=True)
    torch.testing.assert_close(rows.x0, exact, rtol=2e-3, atol=2e-3)

    def run(name: str, *more: str, resume: bool = False) -> list[dict[str, Any]]:
        ours = ("seed=8", f"space.bank={made}", "space.guidance=[2.0]", *more)
        config = load_config("default", changes(tiny_sana, prompts_file, *ours))
        run_distill(config, tmp_path / name, resume=resume, display=Display(quiet=True), command="test")
        return [{name: value for name, value in row.items() if name != "sec"} for row in read_metrics(tmp_path / name)]

    monkeypatch.setattr("stepfold.training.states.walk", lambda *args: pytest.fail("the teacher was walked"))
    whole = run("whole")
    check_held_out(tmp_path / "whole", made)
    assert run("half", "training.steps=2") == whole[:2]
    assert run("half", resume=True) == whole and len(whole) == 3
    assert run("annealed", "space.anneal_steps=2")[2]["loss"] != whole[2]["loss"]  # the step before was another
    with pytest.raises(UserError, match=r"sampled at guidance scale 2; add --set 'space.guidance=\[2\]'"):
        run("other", "space.guidance=[3.0]")
    with pytest.raises(UserError, match=r"teacher.max_tokens=24, not 12; add --set 'teacher.max_tokens=24'"):
        run("longer", "teacher.max_tokens=12")
    with pytest.raises(UserError, match="bank holds ends of trajectories, and generation needs more"):
        run("walks", "space.kind=generation")


def check_held_out(run: Path, bank: Path) -> None:
    """Its prompts are those that no row of the bank brought to it, and nobody knows them without its note of the bank.

    The bank has more rows than the file has prompts. With this seed they reach the two that come last in the file's
    own order.
    """
    rows = [shuffled_index(i, 16, 8) for i in range(6)]
    reached = set(open_bank(bank, {}).rows(rows).prompt)
    protocol = json.loads((run / "report.json").read_text())["protocol"]
    assert protocol["unseen"] == protocol["n"] and not reached & set(protocol["index"])
    card = read_card(run)
    chosen = choose(run, card, None, 6)[1]
    assert chosen.unseen == 6 and not reached & set(chosen.index)
    (run / "bank.json").rename(run / "elsewhere.json")
    assert choose(run, card, None, 6)[1].unseen is None
    (run / "elsewhere.json").rename(run / "bank.json")


def test_the_command_makes_checks_and_shows(
    tiny_sana: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "bank")
    make = [
        "bank",
        "make",
        str(tiny_sana),
        "--prompts",
        str(prompts_file),
        "--out",
        out,
        "--count",
        "6",
        "--steps",
        "2",
    ]
    assert CliRunner().invoke(app, [*make, "--size", "32", "--quiet"]).exit_code == 0
    found = CliRunner().invoke(app, ["bank", "check", out, "--again", "--prompts", str(prompts_file), "--quiet"])
    assert found.exit_code == 0 and "6 couplings, no flaw" in found.output
    shown = CliRunner().invoke(app, ["bank", "show", out])
    assert shown.exit_code == 0 and (tmp_path / "bank" / "images.png").stat().st_size > 100
    shard_path(Path(out), 1).unlink()
    broken = CliRunner().invoke(app, ["bank", "check", out, "--quiet"])
    assert isinstance(broken.exception, UserError) and "couplings_00001.safetensors is missing" in broken.output


def test_a_bank_of_images_is_refused_before_it_is_sampled() -> None:
    """It was sampled from the texts alone, whole, and the run refused it then."""
    settings = TeacherSettings(source="x/y", image_column="image")
    with pytest.raises(UserError, match="sampled from texts alone; leave"):
        source(settings, "p.txt", count=None, steps=1, guidance=None, seed=0, device="cpu")
