"""The command line: every mistake is one line that says what to do, and a run does what its log says."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from forms import cases
from PIL import Image
from safetensors.torch import save_file

import stepfold
from stepfold import cli
from stepfold.cli import main
from stepfold.config import TeacherSettings, from_yaml, load_config, preset_names, to_yaml
from stepfold.errors import Caution
from stepfold.training import doctor
from stepfold.training.doctor import Finding

COMMANDS = (
    "distill",
    "sample",
    "demo",
    "evaluate",
    "reproduce",
    "compare",
    "doctor",
    "plan",
    "runs",
    "presets",
    "prompts",
    "retime",
    "convert",
    "schedule",
    "bank",
    "combine",
    "export",
    "quantise",
    "push",
)
FAST = (
    "training.steps=1", "training.precision=no", "training.walk_precision=no", "space.route_steps=2",
    "teacher.max_tokens=32", "evaluation.n=0", "training.preview_every=1000",
)  # fmt: skip


class Result:
    """What a command printed and how it ended."""

    def __init__(self, *args: str | Path) -> None:
        out, err, old = StringIO(), StringIO(), sys.argv
        sys.argv = ["stepfold", *map(str, args)]
        try:
            with redirect_stdout(out), redirect_stderr(err):
                main()
            self.code: object = 0
        except SystemExit as exit_:
            self.code = exit_.code or 0
        finally:
            sys.argv = old
        self.out, self.err = out.getvalue(), err.getvalue()


def assert_one_line(result: Result, *wanted: str, code: int = 2) -> None:
    """Exit code, exactly one line on stderr, nothing on stdout, and what the line must say."""
    assert result.code == code, result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert result.out == ""
    for text in wanted:
        assert text in result.err, result.err


def distill(*args: str | Path, fast: bool = True) -> Result:
    given = {str(value).partition("=")[0] for option, value in pairwise(args) if option == "--set"}
    own = [change for change in FAST if fast and change.partition("=")[0] not in given]
    settings = [part for change in own for part in ("--set", change)]
    preset = () if "--preset" in args else ("--preset", "default")
    return Result("distill", *preset, "--quiet", *settings, *args)


MESSY = "\ufeffred heart\r\n\r\n  a cat  \r\nred heart\r\n   \r\nrocket\r\na cat\r\n"


@pytest.fixture(scope="module")
def run(tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """One finished run of one step, from prompts with a BOM, CRLF, blank lines and repeats."""
    folder = tmp_path_factory.mktemp("cli")
    prompts = folder / "messy.txt"
    prompts.write_bytes(MESSY.encode())
    settings = [part for change in FAST for part in ("--set", change)]
    out = folder / "run"
    given = ("--preset", "default", "--teacher", tiny_sana, "--prompts", prompts)
    return out, Result("distill", *given, "--out", out, *settings)


def test_messy_prompts_are_accepted_and_counted(run: tuple[Path, Result]) -> None:
    out, result = run
    assert result.code == 0, result.err
    assert "counts to 1000" not in result.err
    assert "3 prompts (2 blank and 2 repeated lines left out)" in result.err
    assert "step 1/1" in result.err
    assert result.out == f"student: {out / 'student'}\nreport:  {out / 'report.html'}\n"
    assert (out / "report.html").is_file()
    assert from_yaml(out / "config.yaml").training.steps == 1


def test_a_teacher_whose_time_is_too_fast_is_pointed_out(first_sana: Path, prompts_file: Path, tmp_path: Path) -> None:
    settings = [part for change in (*FAST, "objective=continuous") for part in ("--set", change)]
    given = ("--preset", "default", "--teacher", first_sana, "--prompts", prompts_file)
    result = Result("distill", *given, "--out", tmp_path / "run", *settings)
    assert result.code == 0
    said = re.search(r"counts to 1000, and its dF/dt is (\S+) .*; above 50 take .*stepfold retime first", result.err)
    assert said and float(said[1]) > 50


def test_sample_writes_pictures_side_by_side(run: tuple[Path, Result], tmp_path: Path) -> None:
    picture = tmp_path / "two.png"
    result = Result("sample", run[0] / "student", "red heart", "rocket", "--steps", "2", "--out", picture)
    assert (result.code, result.out) == (0, f"{picture}\n"), result.err
    with Image.open(picture) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 32))
        assert image.crop((0, 0, 32, 32)).tobytes() != image.crop((32, 0, 64, 32)).tobytes()


def test_a_run_is_sampled_or_says_what_finishes_it(run: tuple[Path, Result], tmp_path: Path) -> None:
    """The command that the error names does finish it."""
    folder, pictures = tmp_path / "my run", [tmp_path / f"{name}.png" for name in ("run", "student", "again")]
    for where, picture in ((run[0], pictures[0]), (run[0] / "student", pictures[1])):
        assert Result("sample", where, "red heart", "--out", picture).code == 0
    shutil.copytree(run[0], folder)
    shutil.rmtree(folder / "student")
    unfinished = [
        Result(*command)
        for command in (
            ("sample", folder, "red heart"), ("sample", folder / "student", "red heart"), ("evaluate", folder),
            ("export", folder, "--to", "pipeline"), ("push", folder, "you/mine", "--dry-run"),
        )
    ]  # fmt: skip
    for result in unfinished:
        assert_one_line(result, f"run {folder} has no student yet; finish it: stepfold distill --preset ")
    command = shlex.split(unfinished[0].err.split("finish it: stepfold ")[1])
    assert Result(*command, "--quiet").code == 0
    assert Result("sample", folder, "red heart", "--out", pictures[2]).code == 0
    assert len({picture.read_bytes() for picture in pictures}) == 1


def test_sample_depends_on_the_seed_alone(run: tuple[Path, Result], tmp_path: Path) -> None:
    def draw(name: str, *options: str) -> bytes:
        path = tmp_path / f"{name}.png"
        assert Result("sample", run[0] / "student", "red heart", *options, "--out", path).code == 0
        return path.read_bytes()

    assert draw("a") == draw("b", "--seed", "0") != draw("c", "--seed", "1")


def test_sample_mistakes(run: tuple[Path, Result], tmp_path: Path, tiny_sana: Path) -> None:
    student = run[0] / "student"
    assert_one_line(Result("sample", student, "x", "--out", tmp_path / "x.jpg"), "no PNG", "ends in .png")
    assert_one_line(Result("sample", tmp_path, "x", "--out", tmp_path / "x.png"), "no student folder", "OUT/student")
    assert_one_line(Result("sample", tiny_sana, "x", "--out", tmp_path / "x.png"), "no student folder", "stepfold.json")
    assert_one_line(Result("sample", tmp_path / "none", "x", "--out", tmp_path / "x.png"), "no student folder")
    assert_one_line(
        Result("sample", student, "x", "--out", tmp_path / "no" / "x.png"), "cannot write", "make the folder"
    )
    assert_one_line(
        Result("sample", student, "x", "--device", "abacus"),
        "--device abacus cannot be used here (torch knows no such device)",
        "cpu",
    )
    if not torch.cuda.is_available():
        assert_one_line(Result("sample", student, "x", "--device", "cuda"), "--device cuda cannot be used here", "cpu")
    assert list(tmp_path.iterdir()) == []


def test_export_and_push_from_the_command_line(run: tuple[Path, Result], tmp_path: Path) -> None:
    student, out = run[0] / "student", tmp_path / "whole"
    before = (student / "README.md").read_bytes()
    result = Result("export", student, "--to", "pipeline", "--out", out)
    assert (result.code, result.out) == (0, f"pipeline: {out}\n"), result.err
    assert_one_line(Result("export", student, "--to", "pipeline", "--out", out), "is there already", "--force")
    assert Result("export", student, "--to", "pipeline", "--out", out, "--force").code == 0
    assert_one_line(
        Result("export", student, "--to", "lora"), "no LoRA", "use --to pipeline, or train a LoRA (--lora 64)"
    )
    file = Result("export", student, "--to", "single-file", "--out", out.with_name("one.safetensors"))
    card = out.with_name("one.README.md")
    assert file.code == 0 and f"no scheduler and no times in it: {card} says how" in file.out
    assert f"ComfyUI: no workflow; {card} says why" in file.out
    shown = Result("push", student, "you/mine", "--dry-run")
    assert (
        shown.code == 0 and "MiB  model_index.json" in shown.out and 'from_pretrained("you/mine", dtype=' in shown.out
    )
    file = run[0].parent / "push.json"
    assert Result("push", student, "you/mine", "--dry-run", "--json", file).err == ""  # all weights are its own
    assert json.loads(file.read_text())["bytes"]["README.md"] == len(before)
    assert (student / "README.md").read_bytes() == before
    assert_one_line(Result("push", student, "mine", "--dry-run"), "names no owner", "you/mine")
    of_run = Result("push", run[0], "you/mine", "--dry-run")
    assert (of_run.code, of_run.out) == (0, shown.out)
    assert_one_line(Result("export", run[0], "--to", "lora"), f"{student} has all weights of its own and no LoRA")


def test_a_run_states_the_licences(run: tuple[Path, Result]) -> None:
    unknown = "unknown: see the teacher's page"
    assert f"Pipeline); licences: teacher {unknown}, text_encoder {unknown}\n" in run[1].err


def test_damaged_student_is_one_line(run: tuple[Path, Result], tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(run[0] / "student", student)
    (student / "stepfold.json").write_text("{}")
    assert_one_line(Result("sample", student, "x", "--out", tmp_path / "x.png"), "stepfold.json is damaged")
    shutil.rmtree(student / "vae")
    (student / "stepfold.json").write_bytes((run[0] / "student" / "stepfold.json").read_bytes())
    assert_one_line(Result("sample", student, "x", "--out", tmp_path / "x.png"), "lacks its part 'vae'")


def test_evaluate_mistakes(run: tuple[Path, Result]) -> None:
    student = run[0] / "student"
    assert_one_line(Result("evaluate", student, "--steps", "one"), "no list of numbers", "--steps 1,2,4")
    assert_one_line(
        Result("evaluate", student, "--protocol", "emoji"), "the evaluator knows the bundled teacher's images only"
    )
    no_such = Result("evaluate", student, "--protocol", "fid")
    assert_one_line(no_such, "no protocol 'fid'", "teacher, emoji, mjhq30k, geneval")
    assert_one_line(Result("evaluate", student, "--protocol", "mjhq30k"), "--images FOLDER")
    assert_one_line(Result("evaluate", student, "--protocol", "geneval"), "--prompts FILE")
    emoji = Result("evaluate", run[0], "--protocol", "emoji")
    assert_one_line(emoji, f"{run[0]} is a student of", "the evaluator knows the bundled teacher")
    assert_one_line(Result("evaluate", run[0].parent), "no model_index.json")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, ["no such file of prompts", "one prompt a line"]),
        (b"", ["no prompts in it (empty)", "write one prompt a line"]),
        (b"\n  \n\n", ["no prompts in it (3 blank lines)"]),
        (b"ok\n\x89PNG\0\0\n", ["line 2", "binary", "UTF-8"]),
        (b"ok\nfine\ncaf\xe9\n", ["line 3", "not UTF-8", "save the file as UTF-8"]),
        ("fox\n".encode("utf-16")[:-1], ["not the text that it says it is", "save the file as UTF-8"]),
        (b"ok\n" + b"x" * 2001 + b"\n", ["line 2", "longer than 2,000 characters", "shorten it"]),
        (b"x" * 100_000, ["line 1", "longer than 2,000 characters"]),
        ("folder", ["is a folder without files of prompts", "give one with"]),
    ],
    ids=["missing", "empty", "blank", "binary", "latin-1", "utf-16", "long", "endless", "folder"],
)
def test_bad_prompts_are_one_line(
    tiny_sana: Path, tmp_path: Path, content: bytes | str | None, wanted: list[str]
) -> None:
    path = tmp_path / "prompts.txt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    result = distill("--teacher", tiny_sana, "--prompts", path, "--out", tmp_path / "run")
    assert_one_line(result, str(path), *wanted)
    assert not (tmp_path / "run").exists()


def no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def bad_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def other_pipeline(folder: Path) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "AudioLDM2Pipeline"}))


def no_vae(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def no_weights(folder: Path) -> None:
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n")


def cut(part: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (file,) = (folder / part).glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:1000])

    return damage


def bad_config(folder: Path) -> None:
    (folder / "transformer" / "config.json").write_text("{")


def other_shape(folder: Path) -> None:
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"caption_channels": 48}))


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (no_index, ["no model_index.json", "save_pretrained"]),
        (bad_index, ["not valid JSON", "save_pretrained"]),
        (other_pipeline, ["is a AudioLDM2Pipeline", "SanaPipeline"]),
        (no_vae, ["lacks its part 'vae'", "copy the whole pipeline folder"]),
        (no_weights, ["does not load", "copy the whole folder again"]),
        (pickled, ["a pickle, transformer/diffusion_pytorch_model.bin", "safe_serialization=True"]),
        (cut("transformer"), ["does not load", "copy the whole folder again"]),
        (cut("text_encoder"), ["does not load", "copy the whole folder again"]),
        (cut("vae"), ["does not load", "copy the whole folder again"]),
        (bad_config, ["does not load", "not valid JSON"]),
        (other_shape, ["does not load", "copy the folder again"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_teacher_is_one_line_and_leaves_no_run(
    tiny_sana: Path, prompts_file: Path, tmp_path: Path, damage: Callable[[Path], None], wanted: list[str]
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_sana, folder)
    damage(folder)
    result = distill("--teacher", folder, "--prompts", prompts_file, "--out", tmp_path / "run")
    assert_one_line_at_the_end(result, *wanted)
    assert not (tmp_path / "run").exists()  # so that the corrected command can use the same --out


def assert_one_line_at_the_end(result: Result, *wanted: str) -> None:
    """As `assert_one_line`, for errors of the model libraries, which may warn before."""
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("error: "), result.err
    assert all(text in last for text in wanted), last


def test_teacher_that_is_nowhere_is_one_line(
    prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = distill("--teacher", tmp_path / "nowhere", "--prompts", prompts_file, "--out", tmp_path / "run")
    assert_one_line_at_the_end(result, "neither a pipeline folder nor a hub id that can be reached")


def test_a_teacher_in_one_file_gets_the_way_to_a_folder(prompts_file: Path, tmp_path: Path) -> None:
    """One that is not there was looked for on the hub."""
    file = tmp_path / "mine.safetensors"
    args = ("--teacher", file, "--prompts", prompts_file, "--out", tmp_path / "run")
    assert_one_line(distill(*args), f"there is no file '{file}'", "a pipeline folder or a hub id")
    file.write_bytes(b"")
    part = tmp_path / "pipe" / "unet"
    part.mkdir(parents=True)
    (part.parent / "model_index.json").write_text("{}")
    (part / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert_one_line(Result("doctor", part), f"is a part of the pipeline in '{part.parent}'; give that folder")
    made = f"stepfold convert {file} --base PIPELINE --out FOLDER"
    assert_one_line(distill(*args), "is one file, and a pipeline folder is needed", made)
    assert_one_line(Result("doctor", file), made)
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(1, 1)}, file)
    assert_one_line(Result("doctor", file), f"{file} is a LoRA", f"doctor TEACHER as --teacher-lora {file}")
    picture = tmp_path / "fox.png"
    picture.write_bytes(b"")
    assert_one_line(Result("doctor", picture), f"'{picture}' is no model; give a pipeline folder or a hub id")
    assert_one_line(Result("evaluate", tmp_path / "runs" / "none"), "there is no folder", "give one that is there")
    assert_one_line(Result("evaluate", "emoji"), "there is no folder 'emoji'", "the bundled student is emoji-student")


def test_odd_sizes_are_one_line(tiny_sana: Path, prompts_file: Path, tmp_path: Path) -> None:
    args = ("--teacher", tiny_sana, "--prompts", prompts_file, "--out", tmp_path / "run")
    assert_one_line(distill(*args, "--set", "teacher.height=33"), "height is 33", "multiple of ")
    assert_one_line(distill(*args, "--set", "teacher.guidance=embedded"), "leave it at 'auto'")


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--set", "training.stpes=5"], ["unknown setting 'training.stpes'", "did you mean 'training.steps'?"]),
        (["--set", "training.steps=0"], ["training.steps is 0", "greater than or equal to 1"]),
        (["--set", "training.steps"], ["is not key=value", "--set training.steps=100"]),
        (["--set", "training.steps", "5"], ["is not key=value; write --set training.steps=5"]),
        (["--set", "training.steps", "--quiet"], ["is not key=value", "--set training.steps=100"]),
        (["--preset", "papr"], ["unknown preset", "'paper'"]),
        ([], ["prompts is missing", "--prompts FILE"]),
    ],
)
def test_bad_settings_are_one_line(tmp_path: Path, args: list[str], wanted: list[str]) -> None:
    assert_one_line(distill("--teacher", "x/y", "--out", tmp_path / "run", *args), *wanted)
    assert not (tmp_path / "run").exists()


def test_output_folder_mistakes(run: tuple[Path, Result], tiny_sana: Path, tmp_path: Path, prompts_file: Path) -> None:
    out, prompts = run[0], run[0].parent / "messy.txt"
    args = ("--teacher", tiny_sana, "--prompts", prompts)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert_one_line(distill(*args, "--out", out), "already holds a run", "add --resume", "choose another --out")
    assert_one_line(
        distill(*args, "--out", out, "--resume", "--set", "training.ema=0.9"), "training.ema 0.999 there, 0.9 given"
    )
    file = tmp_path / "a file"
    file.write_text("mine")
    assert_one_line(distill(*args, "--out", file), "is a file", "choose another --out")
    assert_one_line(distill(*args, "--out", file / "run"), "cannot make", "choose another --out")
    assert_one_line(distill(*args, "--out", tmp_path), "not empty", "choose another --out")
    assert file.read_text() == "mine"
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    content = prompts.read_bytes()
    prompts.write_bytes(content + b"one more\n")
    try:
        assert_one_line(distill(*args, "--out", out, "--resume"), "has changed since this run began", "restore it")
    finally:
        prompts.write_bytes(content)


def test_dry_run_prints_settings_that_load(tmp_path: Path) -> None:
    args = ("--teacher", "x/y", "--prompts", "p.txt", "--set", "seed=5", "--out", tmp_path / "run", "--dry-run")
    result = distill(*args, fast=False)
    assert (result.code, result.err) == (0, "")
    expected = load_config("default", ["seed=5"], teacher__source="x/y", prompts="p.txt")
    assert result.out == to_yaml(expected)
    path = tmp_path / "settings.yaml"
    path.write_text(result.out)
    again = Result("distill", "--preset", path, "--dry-run")
    assert again.out == result.out
    assert not (tmp_path / "run").exists()


def test_the_bundled_teacher_has_a_preset_of_its_own() -> None:
    for teacher in ((), ("--teacher", "emoji")):
        result = Result("distill", *teacher, "--dry-run")
        assert result.err == "" and result.out == to_yaml(load_config("demo"))


def test_doctor_says_ok_and_writes_its_findings(tiny_sana: Path, tmp_path: Path) -> None:
    path = tmp_path / "findings.json"
    result = Result("doctor", tiny_sana, "--json", path)
    assert result.code == 0, result.out
    findings = json.loads(path.read_text())
    assert result.out.count(" ok") == len(findings) == 29
    assert all(f["ok"] is True and f["number"] for f in findings)


def test_doctor_says_what_to_do_at_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Finding("a", "1", "2", False, "turn it"), Finding("b", "1", "2", False), Finding("c", "1", "1", True)]
    monkeypatch.setattr(doctor, "examine", lambda *_: found)
    result = Result("doctor", "x")
    assert result.code == 1 and result.err.splitlines()[0] == "LOOK, a: turn it"
    assert "LOOK, b: docs/errors.md" in result.err and "LOOK, c" not in result.err


def test_doctor_refuses_what_is_no_teacher(tmp_path: Path) -> None:
    assert_one_line(Result("doctor", tmp_path), "no model_index.json")


def test_doctor_takes_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `distill` does: width, then height."""
    asked = []

    def examined(settings: TeacherSettings, *_: object) -> list[Finding]:
        asked.append((settings.height, settings.width))
        return []

    monkeypatch.setattr(doctor, "examine", examined)
    assert Result("doctor", "x", "--size", "96x64").code == Result("doctor", "x", "--height", 64).code == 0
    assert asked == [(64, 96), (64, None)]
    assert_one_line(Result("doctor", "x", "--size", "64", "--width", 64), "--size 64 is height and width")


def test_json_goes_to_standard_output_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--json -`; the table is on standard error then, and no file is called -."""
    monkeypatch.chdir(tmp_path)
    result = Result("presets", "--json", "-")
    assert list(json.loads(result.out)) == preset_names() and result.err == Result("presets").out
    assert list(tmp_path.iterdir()) == []


def test_reproduce_lists_its_runs_and_names_mistakes(tmp_path: Path) -> None:
    runs = Result("reproduce", "--table", "T4", "--dry-run", "--out", tmp_path)
    assert (runs.code, runs.err) == (0, "")
    lines = runs.out.splitlines()
    assert len(lines) == 9 and lines[0] == "to do  T4 random: --preset reproduce space.route=random seed=0"
    file = tmp_path / "runs.json"
    Result("reproduce", "--table", "T4", "--dry-run", "--out", tmp_path, "--json", file)
    rows = json.loads(file.read_text())
    assert len(rows) == 9 and rows[0] == {
        "table": "T4", "row": "random", "preset": "reproduce", "changes": ["space.route=random", "seed=0"],
        "folder": rows[0]["folder"], "done": False,
    }  # fmt: skip
    assert len({row["folder"] for row in rows}) == 9 and Path(rows[0]["folder"]).parent == tmp_path
    assert_one_line(Result("reproduce", "--table", "T4", "--out", tmp_path, "--json", file), "goes with --dry-run")
    assert_one_line(Result("reproduce", "--table", "t9", "--out", tmp_path), "no table 'T9'")
    assert_one_line(Result("reproduce", "--set", "training.step=1", "--out", tmp_path), "did you mean 'training.steps'")


def test_the_version_is_shown() -> None:
    result = Result("--version")
    assert (result.code, result.out, result.err) == (0, f"stepfold {stepfold.__version__}\n", "")


def test_a_preset_shows_what_it_sets(tmp_path: Path) -> None:
    """Held to the settings themselves: `default` under what is printed is the preset."""
    shown = Result("presets", "sdxl-lora-4step", "--json", tmp_path / "one.json").out
    (tmp_path / "again.yaml").write_text("preset: default\n" + shown.partition("`default`:\n")[2])
    assert load_config(str(tmp_path / "again.yaml")) == load_config("sdxl-lora-4step")
    assert json.loads((tmp_path / "one.json").read_text())["student"] == {"lora": 64}
    (tmp_path / "mine.yaml").write_text("preset: default\n")
    assert "a file of yours" in Result("presets", str(tmp_path / "mine.yaml")).out
    assert_one_line(Result("presets", "sdlx-lora-4step"), "did you mean 'sdxl-lora-4step'")


def test_presets_are_listed(tmp_path: Path) -> None:
    """In groups, each under its heading."""
    listed = Result("presets").out
    groups = {part.splitlines()[0]: part.splitlines()[1:] for part in listed.split("\n\n")}
    lines = [line for rows in groups.values() for line in rows]
    assert sorted(line.split()[0] for line in lines) == preset_names()
    assert all(line.startswith("  ") and line.endswith(".") and len(line.split()) > 4 for line in lines)
    lora, whole, demos, methods = ([line.split()[0] for line in rows] for rows in groups.values())
    assert all(name.endswith("lora-4step") for name in lora) and len(lora) == 13
    assert whole == ["default", "paper", "released"] and demos == ["demo", "demo-4step", "emoji-long"]
    images = {"scm", "sana-sprint"}
    configs = [load_config(name, ["space.images=x"] if name in images else []) for name in methods]
    assert {config.teacher.source for config in configs} == {"emoji"}
    assert Result("presets", "--json", tmp_path / "presets.json").out == listed
    assert list(json.loads((tmp_path / "presets.json").read_text())) == preset_names()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    result = Result(command, "--help")
    assert result.code == 0
    assert re.search(rf"^\W*stepfold {command}\b", result.out, re.MULTILINE), result.out


def in_a_shell(*words: str, **environment: str) -> str:
    """What `stepfold` prints in a process of its own with these variables set."""
    command = [sys.executable, "-m", "stepfold", *words]
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_a_table_is_a_result(monkeypatch: pytest.MonkeyPatch, quiet: tuple[str, ...]) -> None:
    """On standard output, quiet or not, and not folded where it is no terminal."""
    row = {"accuracy": 0.5, "clip_score": 20.0, "fd": 0.1, "diversity": 0.2, "agreement": None, "calls": 1}
    name = "a/folder/with/a/long/name/" * 3
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(
        "stepfold.commands.evaluate.run_evaluate", lambda *args, **settings: {"pipelines": {name: {"1": row}}}
    )
    result = Result("evaluate", "x", *quiet)
    assert (result.code, result.err) == (0, "")
    assert re.search(rf"{name} 1 step +50\.0% ", result.out), result.out


def test_a_preset_for_ones_own_model_wants_one() -> None:
    """Without --teacher it trained the bundled one, at 1024 pixels."""
    for preset in ("sdxl-lora-4step", "lora-4step"):
        assert_one_line(Result("distill", "--preset", preset, "--dry-run"), preset, "no --teacher", "--teacher FOLDER")
    assert Result("distill", "--preset", "lora-4step", "--teacher", "emoji", "--dry-run").code == 0


@pytest.mark.parametrize(
    ("core", "without"),
    [
        ("from stepfold.config import load_config; load_config('demo')", "torch"),
        ("import stepfold.maths.tangent, stepfold.objectives.discrete, stepfold.spaces.generation", "diffusers"),
    ],
)
def test_the_core_loads_little(core: str, without: str) -> None:
    code = f"import sys; {core}; sys.exit({without!r} in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_the_command_line_does_not_know_is_one_line(tmp_path: Path) -> None:
    assert_one_line(Result("distill", "--stpes", 3), "No such option", "--stpes", "stepfold distill --help")
    assert_one_line(Result("sample"), "Missing argument", "stepfold sample --help")
    assert_one_line(Result("dstill"), "No such command 'dstill'. Did you mean 'distill'?", "stepfold --help")
    assert_one_line(Result("sample", "x", "y", "--steps", 0), "'--steps'", "1")
    helped = Result("prompts")
    assert (helped.code, "Usage: stepfold prompts" in helped.out + helped.err) == (2, True)
    away = tmp_path / "none" / "x.png"
    assert_one_line(Result("sample", "emoji-student", "x", "--out", away), f"make the folder {away.parent} first")


@pytest.mark.parametrize(
    "words",
    [
        ("distill", "--teacher", "a", "--prompts", "x", "--teacher", "b"),
        ("distill", "--dry-run", "--out=a", "--out", "b"),
        ("plan", "--preset", "nowhere", "--preset", "nowhere"),
        ("sample", "student", "a cat", "--steps", "1", "--steps", "1"),
        ("doctor", "nowhere", "--height", "32", "--height", "64"),
        ("prompts", "encode", "nowhere", "--batch", "1", "--batch", "2"),
    ],
)
def test_an_option_of_one_value_is_given_once(words: tuple[str, ...]) -> None:
    """The last one would win, and nothing would say so."""
    repeated = next(word for word in reversed(words) if word.startswith("--"))
    assert_one_line(Result(*words), f"{repeated} is given 2 times and has one value; give it once")


@pytest.mark.parametrize("command", ["distill", "plan", "retime"])
def test_steps_are_those_of_sampling(command: str) -> None:
    """One word, one meaning: of commands that train, the option says which steps it means."""
    for given in (("--steps", "500"), ("--steps=500",)):
        assert_one_line(Result(command, *given), "--steps", "sampling steps", "are --train-steps")
    shown = Result(command, "--help").out
    assert "--train-steps" in shown and "training.steps" in shown
    for other in ("sample", "evaluate"):
        assert "--train-steps" not in (shown := Result(other, "--help").out) and "--steps" in shown


SHORT_FORMS = (
    ("--train-steps", "300", "training.steps"),
    ("--lora", "64", "student.lora"),
    ("--dtype", "bfloat16", "teacher.dtype"),
    ("--lr", "3e-4", "optimiser.lr"),
    ("--seed", "3", "seed"),
    ("--size", "96", "teacher.height"),
    ("--teacher", "x/y", "teacher.source"),
)


@pytest.mark.parametrize(("option", "value", "name"), SHORT_FORMS)
def test_short_forms_are_settings(option: str, value: str, name: str) -> None:
    prompts = ("--prompts", "p.txt")
    short = Result("distill", "--preset", "demo", *prompts, option, value, "--dry-run")
    more = [f"{name}={value}", *(["teacher.width=96"] if option == "--size" else [])]
    assert short.out == to_yaml(load_config("demo", more, prompts="p.txt")), short.err
    for command in ("distill", "plan"):
        both = Result(command, option, value, "--set", f"{name}={value}", *prompts)
        assert_one_line(both, f"{option} and --set {name} are one setting; give one of them")
        shown = re.sub(r"[│`\s]+", " ", Result(command, "--help").out)
        assert option in shown and (name in shown or option == "--teacher")


def test_a_size_is_width_by_height() -> None:
    result = Result("distill", "--size", "1216x832", "--dry-run")
    assert "  height: 832\n  width: 1216\n" in result.out
    assert_one_line(Result("distill", "--size", "big"), "--size big is no size", "1024", "1216x832")


def test_the_device_is_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from stepfold.jobs.devices import usable_device

    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert usable_device("auto") == device
    for command in ("distill", "plan", "retime", "sample", "demo", "evaluate", "doctor", "prompts encode"):
        shown = re.sub(r"[│\s]+", " ", Result(*command.split(), "--help").out)
        assert "auto: cuda if there is one, else cpu. [default: auto]" in shown, command


def test_a_device_that_is_not_here_is_one_line(prompts_file: Path, tmp_path: Path) -> None:
    train = ("--teacher", "x/y", "--prompts", prompts_file, "--device", "abacus")
    for command in (("distill", *train), ("plan", *train), ("retime", "x/y", *train[2:], "--out", tmp_path / "run")):
        assert_one_line(Result(*command), "--device abacus cannot be used here", "cpu always can")
    assert not (tmp_path / "run").exists()


def test_lists_and_switches_may_be_repeated() -> None:
    lists = ("--set", "training.steps=3", "--set", "seed=2", "--teacher-lora", "a:0.5", "--teacher-lora", "b")
    result = Result("distill", *lists, "--dry-run", "--dry-run")
    assert (result.code, result.err) == (0, "")
    assert "- source: a\n    scale: 0.5\n  - source: b\n    scale: 1.0\n" in result.out


def test_a_setting_that_is_given_twice_is_refused() -> None:
    """The last one won, without a word."""
    for command in ("distill", "plan"):
        result = Result(command, "--set", "training.steps=3", "--set", "seed=2", "--set", "training.steps=4")
        assert_one_line(result, "--set training.steps is given 2 times and has one value; give it once")


def test_a_path_that_no_file_can_have_and_a_full_output_are_one_line(tmp_path: Path) -> None:
    for option in ("--out", "--prompts"):
        assert_one_line(Result("distill", option, "a" * 300), "File name too long")
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "stepfold", "presets"], stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert done.returncode != 0 and "Traceback" not in done.stderr


def test_no_color() -> None:
    coloured = re.compile(r"\x1b\[(?:\d+;)*(?:3|4)\d")
    assert coloured.search(in_a_shell("presets", "--help", FORCE_COLOR="1"))
    assert not coloured.search(in_a_shell("presets", "--help", FORCE_COLOR="1", NO_COLOR="1"))
    assert "\x1b" not in in_a_shell("presets", "--help")  # not a terminal


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("stepfold dis", "distill"), ("stepfold prompts cl", "clean"), ("stepfold plan --te", "--teacher")],
)
def test_the_shell_completes(typed: str, offered: str) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    found = subprocess.run(
        [sys.executable, "-c", "import sys; from stepfold.cli import main; sys.argv = ['stepfold']; main()"],
        env=os.environ | {"_STEPFOLD_COMPLETE": "complete_bash"} | words, capture_output=True, text=True,
    )  # fmt: skip
    assert offered in found.stdout.split(), found.stdout + found.stderr


@pytest.mark.parametrize("command", cases(("", *COMMANDS), short=["", "distill"]))
def test_help_is_quick(command: str) -> None:
    """Its own process loads nothing that it does not show: 0.4 s of this processor at most, torch alone takes more."""
    code = (
        "import sys, time; from stepfold.cli import main; sys.argv = ['stepfold', *sys.argv[1:], '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('loaded', [n for n in ('torch', 'diffusers', 'transformers', 'numpy', 'gradio') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True)
    assert done.stdout.endswith("loaded []\n") and "Usage" in done.stdout, done.stdout[-300:] + done.stderr


def test_help_groups_the_commands_by_what_people_do() -> None:
    """Every command stands in one of four groups, in the order of a first visit."""
    shown = re.split(r"╭─ (\w+) ─+╮", Result("--help").out)
    groups = {
        name: re.findall(r"^│ (\w+) ", text, re.MULTILINE)
        for name, text in zip(shown[1::2], shown[2::2], strict=True)
        if name != "Options"
    }
    assert list(groups) == ["Distil", "Look", "Use", "Prepare"]
    assert sorted(name for names in groups.values() for name in names) == sorted(COMMANDS)
    assert groups["Distil"] == ["distill", "plan", "schedule", "combine"]
    assert groups["Use"] == ["export", "quantise", "push"]


def test_help_says_where_the_presets_are_listed() -> None:
    text = " ".join(Result("distill", "--help").out.replace("│", " ").split())
    assert "Settings to start from: a name that stepfold presets lists, or a yaml file" in text.replace("`", "")
    named = text.split("Settings to start from:")[1].split(".")[0]
    assert not set(re.findall(r"[\w-]+", named)) & set(preset_names())


@pytest.mark.long
def test_no_stack_trace_from_a_real_process(tmp_path: Path) -> None:
    options = ("--preset", "paper", "--prompts", "none.txt", "--out", "run")
    done = subprocess.run(
        [sys.executable, "-m", "stepfold", "distill", *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "no such file of prompts; give text, one prompt a line" in done.stderr
    assert done.stdout == ""


def test_conditions_are_encoded_for_the_size_of_the_run(tiny_sana: Path, prompts_file: Path, tmp_path: Path) -> None:
    """The cache holds the black picture of one size; a run of another size is refused, and says what differs."""
    cache = tmp_path / "cache"
    options = ("--teacher", tiny_sana, "--max-tokens", "32", "--height", "32", "--width", "64", "--quiet")
    result = Result("prompts", "encode", prompts_file, *options, "--out", cache)
    assert result.code == 0 and result.out == f"conditions: {cache}\n", result.err
    common = ("--teacher", tiny_sana, "--prompts", prompts_file, "--set", f"conditions={cache}", "--set")
    same = distill(*common, "teacher.height=32", "--set", "teacher.width=64", "--out", tmp_path / "run")
    assert same.code == 0, same.err
    other = distill(*common, "teacher.height=64", "--set", "teacher.width=64", "--out", tmp_path / "other")
    assert other.code == 2 and "height" in other.err, other.err


@pytest.mark.parametrize("command", ["distill", "plan"])
def test_a_variant_of_a_hub_id_is_asked_for_by_its_option(command: str, tiny_sana: Path, tmp_path: Path) -> None:
    given = ("--teacher", tiny_sana, "--prompts", "nowhere.txt", "--revision", "v1")
    result = Result(command, *given) if command == "plan" else Result(command, *given, "--out", tmp_path / "run")
    assert result.code == 2 and "teacher.revision is for hub ids" in result.err, result.err


def test_encoded_prompts_take_the_presets_size(tiny_sana: Path, prompts_file: Path, tmp_path: Path) -> None:
    preset, cache = tmp_path / "mine.yaml", tmp_path / "cache"
    preset.write_text("teacher: {height: 32, width: 64, max_tokens: 32}\n")
    common = ("--teacher", tiny_sana, "--preset", preset)
    assert Result("prompts", "encode", prompts_file, *common, "--out", cache, "--quiet").code == 0
    run = distill(*common, "--prompts", prompts_file, "--set", f"conditions={cache}", "--out", tmp_path / "run")
    assert run.code == 0, run.err
    both = Result("prompts", "encode", prompts_file, *common, "--size", "32", "--width", "32", "--out", cache)
    assert both.code == 2 and "--size gives height and width" in both.err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("x: can't allocate memory: y"),
    ],
)
def test_no_memory_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    raised = [error, error, RuntimeError("a fault of ours")]

    def fails(*args: object, **settings: object) -> None:
        raise raised.pop(0)

    monkeypatch.setattr("stepfold.cli.app", fails)
    done = Result("distill")
    assert done.code == 2 and done.err.startswith("error: out of memory ("), done.err
    assert "training.micro_batch=1" in done.err and done.err.count("\n") == 1
    other = Result("schedule").err  # which has no --set
    assert "a smaller --batch" in other and "--set" not in other
    raised = [error, error, RuntimeError("a fault of ours")]
    doctor = Result("doctor").err  # which has no --set
    assert "--quantise int8" in doctor and "--set" not in doctor
    retime = Result("retime").err  # which has no --lora, --dtype and --batch
    assert "--set training.micro_batch=1" in retime and not any(
        f"--{word}" in retime for word in ("lora", "batch", "n ")
    )
    with pytest.raises(RuntimeError, match="a fault of ours"):
        Result("distill")


def test_warnings_of_the_libraries_that_tell_nothing_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped hub id is one line; diffusers gives huggingface_hub an argument that this deprecates."""

    def app(**options: object) -> None:
        warnings.warn(
            "The `local_dir_use_symlinks` argument is deprecated and ignored in `hf_hub_download`.", stacklevel=2
        )
        warnings.warn("something else", stacklevel=2)

    monkeypatch.setattr(cli, "app", app)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(SystemExit):
            cli.main()
    assert [str(each.message) for each in said] == ["something else"]


def test_what_we_warn_of_is_one_line_and_what_libraries_do_is_as_python_shows_it() -> None:
    assert cli.format_warning(Caution("guidance 9 is far"), Caution, "here.py", 3) == "note: guidance 9 is far\n"
    theirs = cli.format_warning(FutureWarning("gone soon"), FutureWarning, "there.py", 4)
    assert "there.py:4: FutureWarning: gone soon" in theirs
