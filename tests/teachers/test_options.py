"""docs/pipeline-options.md says of every argument of the supported pipelines what becomes of it."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny

from stepfold.config import TeacherSettings
from stepfold.errors import UserError
from stepfold.teachers.loading import FAMILIES, load_teacher

PAGE = Path(__file__).parents[2] / "docs" / "pipeline-options.md"


def test_the_page_has_every_argument_and_no_other() -> None:
    section = PAGE.read_text().split("## Arguments of a call", 1)[1].split("\n## ", 1)[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    said = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    there = {
        name
        for pipeline in FAMILIES
        for name in inspect.signature(getattr(diffusers, pipeline).__call__).parameters
        if name != "self"
    }
    assert len(said) == len(set(said)) and set(said) == there


UNETS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "time_cond_proj_dim": (tiny.make_sd1, {"time_cond_proj_dim": 16}),
    "class_embed_type": (tiny.make_sd1, {"class_embed_type": "timestep"}),
    "encoder_hid_dim_type": (tiny.make_sd1, {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 20}),
    "addition_embed_type": (tiny.make_sd1, {"addition_embed_type": "text", "addition_embed_type_num_heads": 4}),
}


@pytest.mark.parametrize("field", UNETS)
def test_a_unet_that_asks_for_more_than_a_text_is_refused(field: str, tmp_path: Path) -> None:
    """A latent consistency model was distilled as if it embedded nothing; others failed inside of a run."""
    make, changes = UNETS[field]

    def odd() -> Any:
        pipe = make()
        plain = {name: value for name, value in pipe.unet.config.items() if not name.startswith("_")}
        pipe.unet = type(pipe.unet)(**plain | changes)
        return pipe

    folder = tiny.save(partial(odd), tmp_path / "pipeline")
    with pytest.raises(UserError, match=rf"this UNet's config has {field}=.*; use "):
        load_teacher(TeacherSettings(source=str(folder), height=16, width=16), "cpu")
