"""A run as the command makes it, from settings to files."""

from pathlib import Path
from typing import Any

import pytest

from stepfold.commands.distill import run_distill
from stepfold.config import Config, load_config
from stepfold.display import Display
from stepfold.teachers.pipeline import PipelineTeacher


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
