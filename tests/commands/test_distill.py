"""A run as the command makes it, from settings to files."""

from pathlib import Path
from typing import Any

import pytest

from stepfold.commands.prompts import run_encode
from stepfold.commands.retime import run_retime
from stepfold.config import Config, TeacherSettings, load_config
from stepfold.display import Display
from stepfold.jobs.distilling import load, run_distill
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.training import retiming
from stepfold.training.looks import Progress


def settings(teacher: Path, prompts: Path, *changes: str) -> Config:
    """Of a run of one short step."""
    short = (
        "training.steps=1", "training.prompts_per_step=1", "space.route_steps=2", "space.filter_rule=off",
        "training.precision=no", "training.walk_precision=no", "teacher.max_tokens=32", "evaluation.n=0",
    )  # fmt: skip
    return load_config("default", [*short, *changes], teacher__source=str(teacher), prompts=str(prompts))


@pytest.mark.parametrize("rule", ["off", "hard"])
def test_the_black_picture_is_encoded_for_a_filter_alone(
    rule: str, tiny_sana: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one it loaded the autoencoder for nothing; of a video it encoded all frames."""
    black_latent, encoded = PipelineTeacher.black_latent, []

    def noted(self: PipelineTeacher, shape: Any) -> Any:
        encoded.append(shape)
        return black_latent(self, shape)

    monkeypatch.setattr(PipelineTeacher, "black_latent", noted)
    config = settings(tiny_sana, prompts_file, f"space.filter_rule={rule}", "space.filter_threshold=1e-9")
    run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="")
    assert len(encoded) == (rule != "off") == (tmp_path / "run" / "blacks.safetensors").exists()


class Noted(Display):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_a_run_too_short_for_the_course_of_r_says_so(tiny_sana: Path, prompts_file: Path, tmp_path: Path) -> None:
    display = Noted()
    run_distill(
        settings(tiny_sana, prompts_file, "objective=continuous"),
        tmp_path / "run",
        resume=False,
        display=display,
        command="",
    )
    assert [line[:22] for line in display.lines if "r_warmup" in line] == ["r ends at 0 after 1 st"]


def test_a_run_says_what_few_users_mean(tiny_sana: Path, prompts_file: Path, tmp_path: Path) -> None:
    """Few prompts, a warm-up longer than the run, and guidance that is none."""
    display, prompts = Noted(), tmp_path / "many.txt"
    odd = settings(tiny_sana, prompts_file, "objective=discrete", "space.guidance=[1]", "optimiser.warmup=50")
    run_distill(odd, tmp_path / "odd", resume=False, display=display, command="")
    said = "\n".join(display.lines)
    assert "few prompts (" in said and "take --set optimiser.warmup=0" in said
    assert "space.guidance=[1.0] turns guidance off" in said and "usual scale is 4.5" in said
    display.lines.clear()
    prompts.write_text("".join(f"cat number {i}\n" for i in range(100)))
    usual = settings(tiny_sana, prompts, "objective=discrete", "optimiser.warmup=1")
    run_distill(usual, tmp_path / "usual", resume=False, display=display, command="")
    assert not [line for line in display.lines if "few prompts" in line or "warmup" in line or "guidance" in line]


def test_a_head_start_has_no_rate(capsys: pytest.CaptureFixture[str]) -> None:
    """It was "0 pairs/s  about 0.0 min left", and slowed the rate that came after it."""
    display = Display()
    with display.training(4):
        display.step(Progress(1, {"head_start": 1, "pairs": 0, "sec": 1.0}))
        display.step(Progress(4, {"pairs": 8, "sec": 2.0, "loss": 0.1, "grad_norm": 1.0}))
    first, last = "".join(capsys.readouterr()).splitlines()
    assert first.endswith("step 1/4  head start: the student waits")
    assert last.endswith("4 pairs/s  about 0.0 min left")


@pytest.mark.parametrize("command", ["distill", "encode", "retime"])
def test_what_is_wrong_with_the_prompts_is_said_before_it_begins(
    command: str, first_sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, display = tmp_path / "prompts.csv", Noted()
    prompts.write_text(f"prompt\na cat\na (red:1.3) door\n{'a cat, ' * 40}\n")
    if command == "distill":
        load(settings(first_sana, prompts, "objective=discrete"), tmp_path / "run", False, display)
    elif command == "encode":
        teacher = TeacherSettings(source=str(first_sana), max_tokens=32)
        run_encode(teacher, prompts, tmp_path / "cache", batch=4, display=display, device="cpu")
    else:
        monkeypatch.setattr(retiming, "retimed_network", lambda *_: pytest.exit("it began"))
        with pytest.raises(pytest.exit.Exception):
            run_retime(
                str(first_sana), prompts, tmp_path / "run", ["teacher.max_tokens=32"], resume=False, display=display
            )
    foreign, cut = (next(line for line in display.lines if word in line) for word in ("syntax of other", "tokens that"))
    assert foreign == (
        "1 prompt holds syntax of other programs, which is read as plain text: "
        "weights or brackets such as (a:1.3), [a], {a} 1"
    )
    assert cut.startswith(
        "1 prompt is longer than the 32 tokens that the text encoder reads, and the rest of each is cut"
    )
    assert "'a cat, a cat, a cat, " in cut and "stepfold prompts clean --longest" in cut
