"""A network whose time counts to 1000 learns to read [0, 1]: the bundled teacher, put into thousands on purpose."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import tiny_ernie_image
import tiny_prx
import tiny_qwen
import tiny_z_image
import torch
import typer
from safetensors.torch import load_file

from stepfold import assets
from stepfold.commands.prompts import run_encode
from stepfold.commands.retime import retime, run_retime
from stepfold.config import TeacherSettings, load_config
from stepfold.display import Display
from stepfold.errors import NonFiniteError, UserError
from stepfold.export.single_file import export_single_file
from stepfold.jobs.distilling import run_distill
from stepfold.jobs.sampling import run_sample
from stepfold.randomness import generator
from stepfold.students.card import CARD
from stepfold.teachers.licences import in_words, licences_of
from stepfold.teachers.loading import load_teacher, retimable
from stepfold.teachers.sana import SanaTeacher
from stepfold.training import doctor
from stepfold.training.looks import Progress
from stepfold.training.retiming import fit_time_embedder
from stepfold.training.runs import checkpoints, read_metrics

TREMOR = 0.1  # of the weights that read the fast sinusoids: a third of F, and most of dF/dt
HARDLY_A_FIT = partial(fit_time_embedder, steps=5)
FEW = ["training.prompts_per_step=2", "space.route_steps=4", "training.checkpoint_every=3", "teacher.max_tokens=16"]


@pytest.fixture(scope="module")
def thousands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled teacher with a time embedder that was fitted to read 0 to 1000, and that trembles with it."""
    folder = tmp_path_factory.mktemp("thousands") / "teacher"
    teacher = SanaTeacher(assets.TEACHER, max_tokens=16)
    source = SanaTeacher(assets.TEACHER, max_tokens=16).transformer.time_embed.emb
    embedder = teacher.transformer.time_embed.emb
    teacher.transformer.requires_grad_(True)
    error = fit_time_embedder(source, embedder, 1.0, 1000.0, steps=800)
    assert error < 0.1
    with torch.no_grad():
        embedder.timestep_embedder.linear_1.weight.add_(
            TREMOR * torch.randn(embedder.timestep_embedder.linear_1.weight.shape)
        )
    teacher.transformer.register_to_config(timestep_scale=1.0)
    teacher.black_latent(teacher.latent_shape)
    teacher.pipe.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(autouse=True)
def _a_shorter_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the time; what is left over is trained away, or well within what is asked for here."""
    monkeypatch.setattr("stepfold.training.retiming.fit_time_embedder", partial(fit_time_embedder, steps=600))


def wrong_of(settings: TeacherSettings) -> list[str]:
    """What the doctor flags."""
    return [finding.check for finding in doctor.examine(settings, "cpu") if not finding.ok]


def size_of(folder: Path) -> float:
    """The size of dF/dt, as the doctor says it."""
    findings = doctor.examine(TeacherSettings(source=str(folder), max_tokens=16), "cpu")
    return next(float(finding.number) for finding in findings if finding.check.startswith("size of dF/dt"))


@pytest.mark.long
def test_the_bundled_teacher_comes_back(thousands: Path, prompts_file: Path, tmp_path: Path) -> None:
    found = run_retime(
        str(thousands), prompts_file, tmp_path / "run", [*FEW, "training.steps=6"], resume=False,
        display=Display(quiet=True),
    )  # fmt: skip
    assert found["size of dF/dt before"] > 50 > 10 * found["size of dF/dt after"]
    assert found["error, network trained"] < 0.4  # the tremor
    new = tmp_path / "run" / "teacher"
    assert size_of(thousands) > 50 > 10 * size_of(new)
    assert wrong_of(TeacherSettings(source=str(new), max_tokens=16)) == []
    again = load_teacher(TeacherSettings(source=str(new), max_tokens=16), "cpu")
    assert isinstance(again, SanaTeacher) and again.student_is_sprint


FAMILIES: dict[str, Callable[[], Any]] = {
    "sd3": tiny.make_sd3,
    "flux dev": tiny.make_flux,
    "flux schnell": partial(tiny.make_flux, guidance_embeds=False),
    "flux2 klein": tiny.make_flux2_klein,
    "qwen image": tiny_qwen.make_qwen_image,
    "longcat": tiny_qwen.make_longcat,
    "ernie-image": tiny_ernie_image.make_ernie_image,
    "prx": tiny_prx.make_prx,
    "z-image": tiny_z_image.make_z_image,
}


def test_the_table_of_families_names_those_that_can_be_retimed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .*?re-timed.*$", page, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+Pipeline)`", row)} - {"SanaSprintPipeline"} == {
        *retimable()
    }


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_are_retimed_too(
    name: str, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their scheduler or network says it: teacher, student and plain diffusers give the network times of [0, 1]."""
    folder = tiny.save(FAMILIES[name], tmp_path / "pipeline")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: my-own\n---\n# Mine\n")
    small = ["teacher.height=32", "teacher.width=32", "teacher.max_tokens=24"]
    found = run_retime(
        str(folder), prompts_file, tmp_path / "run", [*FEW, *small, "training.steps=20"], resume=False,
        display=Display(quiet=True),
    )  # fmt: skip
    assert found["size of dF/dt before"] > 10 * found["size of dF/dt after"]
    assert found["error, network trained"] < found["error, time embedder fitted"] < 1
    new = tmp_path / "run" / "teacher"
    settings = TeacherSettings(source=str(new), height=32, width=32, max_tokens=24)
    assert wrong_of(settings) == [] and in_words(licences_of(str(new))["teacher"]) == "my-own"
    assert f"| size of dF/dt after | {found['size of dF/dt after']:.4g} |" in (new / "README.md").read_text()

    config = load_config(
        "default",
        [*small, "space.route_steps=4", "training.steps=2", "training.prompts_per_step=2", "training.precision=no",
         "training.walk_precision=no"],
        teacher__source=str(new), prompts=str(prompts_file),
    )  # fmt: skip
    run_distill(config, tmp_path / "student", resume=False, display=Display(), command="test")
    assert "tangent: " in capsys.readouterr().err and "tangent_norm" in read_metrics(tmp_path / "student")[0]
    student = tmp_path / "student" / "student"
    card = json.loads((student / CARD).read_text())
    (ours,) = run_sample(student, ["red heart"], steps=2, seed=0, guidance=None, device="cpu")
    pipe: Any = getattr(diffusers, card["pipeline"]).from_pretrained(student)
    pipe.set_progress_bar_config(disable=True)
    inputs = load_teacher(settings, "cpu").inputs(["red heart"], [generator(0, "sample", 0)])
    theirs = pipe(**inputs, **card["calls"]["1"]).images[0]
    (one,) = run_sample(student, ["red heart"], steps=1, seed=0, guidance=None, device="cpu")
    assert np.abs(np.asarray(one).astype(int) - np.asarray(theirs)).max() <= 1
    assert np.abs(np.asarray(one).astype(int) - np.asarray(ours)).max() > 1
    with pytest.raises(UserError, match=r"re-timed to read \[0, 1\].*use --to pipeline"):
        export_single_file(student, tmp_path / "one.safetensors")


def test_a_stopped_run_goes_on_to_the_bit(
    first_sana: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepfold.training.retiming.fit_time_embedder", HARDLY_A_FIT)
    settings, numbers = [*FEW, "training.steps=6"], tmp_path / "numbers.json"
    retime(str(first_sana), str(prompts_file), tmp_path / "a", 6, [*FEW], json_file=numbers, quiet=True)
    assert json.loads(numbers.read_text())["size of dF/dt after"] > 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "000006")
    run_retime(str(first_sana), prompts_file, tmp_path / "b", settings, resume=True, display=Display(quiet=True))
    a, b = (
        load_file(tmp_path / run / "teacher" / "transformer" / "diffusion_pytorch_model.safetensors") for run in "ab"
    )
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()
    assert (
        json.loads((tmp_path / "a" / "teacher" / "transformer" / "config.json").read_text())["timestep_scale"] == 0.001
    )


Straight = tuple[str, Path, Path]


@pytest.fixture(scope="module")
def straight(first_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """A tiny teacher, prompts, and the folder of a run of six steps that nothing stopped."""
    prompts = tmp_path_factory.mktemp("straight") / "prompts.txt"
    prompts.write_text("red heart\nrocket\na cat\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepfold.training.retiming.fit_time_embedder", HARDLY_A_FIT)
        retime(str(first_sana), str(prompts), prompts.parent / "run", 6, [*FEW], quiet=True)
    return str(first_sana), prompts, prompts.parent / "run"


def go_on(straight: Straight, folder: Path) -> None:
    """Resumes a run; it has to end as the one that nothing stopped."""
    source, prompts, wanted = straight
    run_retime(source, prompts, folder, [*FEW, "training.steps=6"], resume=True, display=Display())
    for file in ("metrics.jsonl", "teacher/transformer/diffusion_pytorch_model.safetensors"):
        assert (folder / file).read_bytes() == (wanted / file).read_bytes()


def test_what_saves_memory_changes_nothing(straight: Straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded prompts, parts of a batch, blocks computed again: the same teacher, whole."""
    source, prompts, wanted = straight
    settings = TeacherSettings(source=source, max_tokens=16)
    run_encode(settings, prompts, tmp_path / "cache", batch=2, display=Display(quiet=True), device="cpu")
    monkeypatch.setattr("stepfold.training.retiming.fit_time_embedder", HARDLY_A_FIT)
    lean = [f"conditions={tmp_path / 'cache'}", "training.micro_batch=3", "training.checkpointing=true"]
    with monkeypatch.context() as patch:
        patch.setattr(SanaTeacher, "encode_texts", lambda *_: 1 / 0)  # no text encoder is asked
        run_retime(
            source, prompts, tmp_path / "run", [*FEW, *lean, "training.steps=6"], resume=False,
            display=Display(quiet=True),
        )  # fmt: skip
    rows = zip(read_metrics(tmp_path / "run"), read_metrics(wanted), strict=True)
    for ours, theirs in rows:  # what is on disk is rounded to bfloat16
        assert (ours["loss"], ours["grad_norm"]) == pytest.approx((theirs["loss"], theirs["grad_norm"]), rel=2e-3)
    for part in ("text_encoder", "vae"):
        (file,) = (path.relative_to(wanted) for path in (wanted / "teacher" / part).glob("*.safetensors"))
        assert (tmp_path / "run" / file).read_bytes() == (wanted / file).read_bytes()


@pytest.mark.parametrize(("number", "at"), [(signal.SIGTERM, 4), (signal.SIGINT, 6)])
def test_a_stop_request_ends_with_a_checkpoint(
    straight: Straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    number: signal.Signals, at: int,
) -> None:  # fmt: skip
    def step(display: Display, progress: Progress) -> None:
        if progress.step == at:
            signal.raise_signal(number)

    source, prompts, _ = straight
    monkeypatch.setattr("stepfold.training.retiming.fit_time_embedder", HARDLY_A_FIT)
    with monkeypatch.context() as patch:
        patch.setattr(Display, "step", step)
        with pytest.raises(typer.Exit) as caught:
            retime(source, str(prompts), tmp_path / "run", 6, [*FEW])
    assert caught.value.exit_code == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("stopped; the state is saved. Continue with: stepfold ") and said.endswith(" --resume")
    assert checkpoints(tmp_path / "run")[-1].name == f"{at:06d}" and not (tmp_path / "run" / "teacher").exists()
    go_on(straight, tmp_path / "run")


def test_a_damaged_checkpoint_is_set_aside(
    straight: Straight, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(straight[2], tmp_path / "run")
    weights = folder / "checkpoints" / "000006" / "network.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    shutil.rmtree(folder / "teacher")
    go_on(straight, folder)
    assert "checkpoint 000006 is damaged (network.safetensors is not as it was written)" in capsys.readouterr().err
    assert [path.name for path in checkpoints(folder)] == ["000003", "000006"]
    assert (folder / "checkpoints" / "damaged_000006").is_dir()


def test_a_run_that_diverges_says_where(straight: Straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepfold.training.retiming.fit_time_embedder", HARDLY_A_FIT)
    settings = [*FEW, "training.steps=6", "optimiser.lr=1e9"]
    with pytest.raises(NonFiniteError, match=r"^step 1: loss of .* is not finite .*Earlier checkpoints are intact"):
        run_retime(*straight[:2], tmp_path / "run", settings, resume=False, display=Display(quiet=True))


def test_weights_in_half_precision_are_refused_at_once(tiny_sana: Path, prompts_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"in float32, not bfloat16; leave teacher\.dtype out"):
        run_retime(
            str(tiny_sana), prompts_file, tmp_path / "x", ["teacher.dtype=bfloat16"], resume=False,
            display=Display(quiet=True),
        )  # fmt: skip
    assert not (tmp_path / "x").exists()


def test_where_there_is_nothing_to_retime(prompts_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="counts to 1, not to 1000; distil it as it is"):
        run_retime("emoji", prompts_file, tmp_path / "run", FEW, resume=False, display=Display(quiet=True))
    pixart = str(tiny.save(tiny.make_pixart, tmp_path / "pipeline"))
    for source, more, said in (
        (
            pixart,
            ["teacher.height=32", "teacher.width=32"],
            r"a PixArtSigmaPipeline, but re-timing is for SanaPipeline, .*, Flux2Pipeline, .*; distil it",
        ),
        ("emoji", ["training.skip_nonfinite=3"], r"leave training\.skip_nonfinite out"),
    ):
        with pytest.raises(UserError, match=said):
            run_retime(source, prompts_file, tmp_path / "run", [*FEW, *more], resume=False, display=Display(quiet=True))
    assert not (tmp_path / "run").exists()
