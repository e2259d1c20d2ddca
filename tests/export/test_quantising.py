"""A quantised student is sampled as it was measured, its card has the loss, and its graph is onnxruntime's int8."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import Result, assert_one_line

from stepfold.commands.quantise import run_quantise
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.evaluation.latents import LatentProtocol, measure_change
from stepfold.export import quantising
from stepfold.export.pipeline import export_pipeline
from stepfold.jobs.exporting import run_export
from stepfold.sampling.consistency import sample_consistency
from stepfold.students.card import read_card
from stepfold.students.loading import load_merged, load_student
from stepfold.students.starting import start_from
from stepfold.teachers.loading import load_teacher
from stepfold.teachers.quantised import QuantisedLinear

from .conftest import relative
from .test_files import listed, there
from .test_onnx import needs_newer_torch

StudentOf = Callable[..., Path]
TEXTS = ["red heart", "a cat", "rocket on a white plate"]


def quantised(student: Path, out: Path, kind: Any = "int8", **changes: Any) -> tuple[Path, dict[str, Any]]:
    options = dict(
        onnx=False, dtype=None, n=0, prompts=None, force=False, device="cpu", display=Display(quiet=True)
    )  # fmt: skip
    return run_quantise(student, kind, out, **(options | changes))


def drawn(loaded: tuple[Any, Any, Any]) -> torch.Tensor:
    """x_0 of two steps."""
    teacher, student, card = loaded
    draws = torch.Generator().manual_seed(2)
    noise, fresh = 0.5 * torch.randn(2, len(TEXTS), *teacher.latent_shape, generator=draws)
    scales = torch.full((len(TEXTS),), card.recipe.guidance)
    return sample_consistency(student, noise, teacher.encode(TEXTS), scales, card.recipe.times[2], lambda i: fresh, 0.5)


@pytest.fixture(scope="module")
def made(student_of: StudentOf, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A LoRA student, it in NF4, and the loss."""
    folder = tmp_path_factory.mktemp("quantised")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(TEXTS) + "\n")
    student = student_of("sana", 4)
    out, loss = quantised(student, folder / "nf4", "nf4", n=2, prompts=prompts, dtype="bfloat16")
    return student, out, loss


def test_the_folder_is_the_student_with_rounded_weights(made: tuple[Path, Path, dict[str, Any]]) -> None:
    student, out, _ = made
    teacher, network, card = load_student(out, "cpu")
    assert card.quantised and card.quantised.kind == "nf4" and card.merged
    assert any(isinstance(layer, QuantisedLinear) for layer in network.modules())
    plain = drawn(load_merged(student, "cpu"))
    assert 1e-3 < relative(drawn((teacher, network, card)), plain) < 0.3
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt")]
    assert sorted(listed(out / "README.md")) == there(out)


def test_the_loss_is_measured_beside_the_student_and_in_its_card(made: tuple[Path, Path, dict[str, Any]]) -> None:
    student, out, loss = made
    teacher, plain, card = load_merged(student, "cpu")
    again = load_student(out, "cpu")[1]
    protocol = LatentProtocol(2, (4, 2, 1), card.recipe.guidance, "", (0, 1))
    expected = measure_change(
        load_teacher(card.teacher_settings(), "cpu"), {"student": plain, "nf4": again}, card.recipe, protocol,
        teacher.encode(TEXTS[:2]),
    )  # fmt: skip
    for name, rows in expected.items():
        for steps, row in rows.items():
            assert loss["forms"][name][steps] == pytest.approx(row, rel=1e-3)
    assert loss["forms"]["nf4"]["2"]["change"] > 0 and "change" not in loss["forms"]["student"]["2"]
    before, after = loss["bytes"]
    assert after < before and after == sum(f.stat().st_size for f in (out / "transformer").glob("*.safetensors"))
    assert read_card(out).quantised.loss == json.loads(json.dumps(loss))  # type: ignore[union-attr]
    readme = (out / "README.md").read_text()
    row = re.search(r"^\| 2 \| nf4 \| (\S+) \| (\S+) \|$", readme, re.MULTILINE)
    assert row and float(row[1]) == pytest.approx(loss["forms"]["nf4"]["2"]["latent_error"], abs=6e-4)
    assert float(row[2]) == pytest.approx(loss["forms"]["nf4"]["2"]["change"], abs=6e-4)
    assert 'pip install "bitsandbytes' in readme and "dtype=torch.bfloat16" in readme


def test_the_scores_of_the_plain_student_are_not_the_rounded_ones(
    made: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The card of an int8 student had the float32 one's table."""
    run = tmp_path / "run"
    shutil.copytree(made[0], run / "student")
    protocol = {"hash": "a" * 12, "n": 2, "prompts": "2 held-out prompts", "guidance": 4.5}
    report = {"student": {"1": {"latent_error": 0.5}}, "teacher": {}, "protocol": protocol}
    (run / "report.json").write_text(json.dumps(report))
    export_pipeline(run / "student", tmp_path / "plain")
    assert "## Measured" in (tmp_path / "plain" / "README.md").read_text()
    out, _ = quantised(run / "student", tmp_path / "int8")
    assert "## Measured" not in (out / "README.md").read_text()


def test_without_memory_to_measure_the_folder_stays(
    student_of: StudentOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes of merging and rounding were thrown away with it."""

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("stepfold.commands.quantise.losses", full)
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS) + "\n")
    with pytest.raises(UserError, match=r"while measuring .* is written, without its loss: --device cpu .* --n 0"):
        quantised(student_of("sana", 4), tmp_path / "nf4", "nf4", n=2, prompts=tmp_path / "prompts.txt")
    assert read_card(tmp_path / "nf4").quantised and load_student(tmp_path / "nf4", "cpu")


def test_the_change_is_from_the_same_noise(made: tuple[Path, Path, dict[str, Any]]) -> None:
    """A student does not differ from itself, and each row has its own steps."""
    teacher, plain, card = load_merged(made[0], "cpu")
    protocol = LatentProtocol(3, (2, 1), card.recipe.guidance, "", (0, 1, 2))
    ticks: list[str] = []
    found = measure_change(
        teacher, {"a": plain, "b": plain}, card.recipe, protocol, teacher.encode(TEXTS), lambda n, _: ticks.append(n)
    )
    assert found["b"]["2"] == found["a"]["2"] | {"change": 0} and found["a"]["1"] != found["a"]["2"]
    assert ticks == ["reference 20", "a 2", "b 2", "a 1", "b 1"]


def test_the_command_prints_it(made: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    student, _, _ = made
    out, file, prompts = tmp_path / "out", tmp_path / "loss.json", tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS) + "\n")
    options = ("--out", out, "--prompts", prompts, "--device", "cpu", "--quiet")
    result = Result("quantise", student, *options, "--n", "1", "--json", file)
    assert result.code == 0, result.err
    loss = json.loads(file.read_text())
    assert set(loss["forms"]) == {"student", "int8"} and loss["protocol"]["n"] == 1 and loss["images"] is None
    assert set(loss["forms"]["int8"]["1"]) == {"latent_error", "change"}
    assert "int8 1 step" in result.out and "change" in result.out and str(out) in result.out
    assert "dtype=torch.float32" in (out / "README.md").read_text()
    assert Result("sample", out, "red heart", "--out", tmp_path / "a.png").code == 0
    assert_one_line(Result("quantise", student, *options, "--n", "0"), "is there already")


@pytest.mark.long
def test_the_bundled_student_is_scored_by_its_evaluator(tmp_path: Path) -> None:
    out, loss = quantised(Path("emoji-student"), tmp_path / "out", n=2)
    assert loss["images"] == 2 and set(loss["forms"]["int8"]["1"]) == {"latent_error", "change", "accuracy", "fd"}
    assert "| FD (n = 2) |" in (out / "README.md").read_text()


def test_what_needs_plain_weights_says_so(made: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    student, out, _ = made
    wanted = "this student's weights are rounded to nf4, .*; give the student that it was made of"
    for to, options in (("single-file", {}), ("onnx", {}), ("pipeline", {"dtype": "bfloat16"})):
        with pytest.raises(UserError, match=wanted):
            run_export(out, to, tmp_path / "a.safetensors", force=False, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=wanted):
        quantised(out, tmp_path / "again")
    with pytest.raises(UserError, match=wanted):
        start_from(out, load_merged(student, "cpu")[1], None, None)  # type: ignore[arg-type]
    copied = run_export(out, "pipeline", tmp_path / "copy", force=False)
    assert torch.equal(drawn(load_student(copied, "cpu")), drawn(load_student(out, "cpu")))


def test_bad_options_are_one_line(student_of: StudentOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = student_of("sana", 4)
    for given in ({"kind": "nf4"}, {"dtype": "float16"}):
        with pytest.raises(UserError, match=r"--(kind nf4|dtype float16) is not for --onnx, .*; leave it out"):
            quantised(student, tmp_path / "a", **({"onnx": True} | given))
    with pytest.raises(UserError, match="is the student itself, or in it"):
        quantised(student, student)
    with pytest.raises(UserError, match=r"run's own prompts cannot be read .*--prompts FILE"):
        quantised(student, tmp_path / "a", n=2)
    monkeypatch.setattr(quantising, "find_spec", lambda name: None)
    monkeypatch.setattr(quantising, "check_libraries", lambda to: None)
    with pytest.raises(UserError, match="--onnx needs onnxruntime; pip install onnx onnxscript onnxruntime"):
        quantised(student, tmp_path / "a", onnx=True)
    assert not list(tmp_path.iterdir())


@needs_newer_torch
@pytest.mark.long
def test_a_graph_in_int8_is_sampled_by_onnxruntime(student_of: StudentOf, tmp_path: Path) -> None:
    import onnx

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS) + "\n")
    out, loss = quantised(student_of("sana"), tmp_path / "onnx", onnx=True, n=3, prompts=prompts)
    kinds = {node.op_type for node in onnx.load(out / "model.onnx").graph.node}
    assert "MatMulInteger" in kinds and loss["bytes"][1] < loss["bytes"][0]
    assert 1e-4 < loss["forms"]["onnx int8"]["1"]["change"] < 0.2
    assert sorted(listed(out / "README.md")) == there(out)
    assert "| 1 | onnx int8 |" in (out / "README.md").read_text()
