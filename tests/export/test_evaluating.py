"""`stepfold evaluate` calls a student the way its card says, whatever its family."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stepfold.commands.protocols import open_drawer, run_geneval
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.evaluation.pipelines import draw


def rows_seen(drawer: Any, steps: int, guidance: float | None = None) -> list[int]:
    """How many rows each call of the network has while one picture is drawn."""
    seen: list[int] = []
    network = drawer.pipe.unet if hasattr(drawer.pipe, "unet") else drawer.pipe.transformer
    handle = network.register_forward_pre_hook(
        lambda module, args, named: seen.append(len((*args, *named.values())[0])), with_kwargs=True
    )
    picture = draw(drawer, ["a red heart"], [3], steps, guidance, seed=0)
    handle.remove()
    assert picture.shape[:2] == (1, 3) and bool(torch.isfinite(picture).all())
    return seen


@pytest.mark.parametrize("family", ["sana", "first sana", "sd1", "sd3", "flux", "flux2", "lumina"])
def test_a_student_takes_its_own_steps_without_guidance(family: str, student_of: Callable[..., Path]) -> None:
    """One row a step: the branch of classifier-free guidance is not called."""
    drawer = open_drawer(student_of(family), "cpu")
    assert drawer.usual_steps == [4, 2, 1]
    for steps in drawer.usual_steps:
        assert rows_seen(drawer, steps) == [1] * steps
    with pytest.raises(UserError, match=r"says how to take 1, 2, 4 steps, not 3"):
        rows_seen(drawer, 3)


def test_a_scale_is_for_students_that_are_told_one(student_of: Callable[..., Path]) -> None:
    told, untold = (open_drawer(student_of(family), "cpu") for family in ("flux", "sd3"))
    assert told.options(1, 7.5)["guidance_scale"] == 7.5 and told.options(1, None)["guidance_scale"] == 2
    assert rows_seen(untold, 2, guidance=7.5) == [1, 1]


def test_geneval_takes_a_students_one_step(student_of: Callable[..., Path], tmp_path: Path) -> None:
    prompts, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "out"
    prompts.write_text(json.dumps({"prompt": "a cat"}) + "\n")
    run_geneval(student_of("sd3"), prompts, out, steps=None, guidance=None, display=Display(quiet=True), device="cpu")
    assert json.loads((out / "made_by.json").read_text())["steps"] == 1
    assert len(list((out / "00000" / "samples").iterdir())) == 4


def test_a_lora_alone_is_no_pipeline(student_of: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"without the rest of its pipeline.* stepfold export .* --to pipeline"):
        open_drawer(student_of("sd1", 4), "cpu")
    with pytest.raises(UserError, match="stepfold export emoji-student --to pipeline"):
        open_drawer(Path("emoji-student"), "cpu")
