"""What people find on the hub: revisions, variants, weights in several files."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from offline import cached, offline_hub
from tiny import make_sana

from stepfold.commands.prompts import run_encode
from stepfold.config import TeacherSettings, load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.jobs.distilling import run_distill
from stepfold.students.loading import load_student
from stepfold.teachers.folders import hub_is_away
from stepfold.teachers.loading import load_teacher


def saved(folder: Path, scale: float, **options: Any) -> Path:
    """A tiny Sana whose first layer's bias is `scale` throughout."""
    pipe = make_sana()
    with torch.no_grad():
        pipe.transformer.patch_embed.proj.bias.fill_(scale)
    pipe.save_pretrained(folder, safe_serialization=True, **options)
    return folder


def scale_of(**settings: Any) -> float:
    return float(load_teacher(TeacherSettings(**settings), "cpu").transformer.patch_embed.proj.bias[0])


def test_a_revision_is_that_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = offline_hub(tmp_path / "hub", monkeypatch)
    cached(saved(tmp_path / "new", 2.0), hub)
    cached(saved(tmp_path / "old", 1.0), hub, "v1", "0")
    assert scale_of(source="some/where") == 2 and scale_of(source="some/where", revision="v1") == 1
    with pytest.raises(UserError, match="'some/where' cannot be fetched in revision v2"):
        scale_of(source="some/where", revision="v2")
    with pytest.raises(UserError, match=r"teacher\.revision is for hub ids"):
        scale_of(source=str(tmp_path / "new"), revision="v1")


def test_without_a_network_nothing_is_asked_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries tried each file six times, half a minute long."""
    asked = []

    def away(*args: Any, **options: Any) -> None:
        asked.append(args)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("stepfold.teachers.folders.get_session", lambda: SimpleNamespace(head=away))
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits to try again"))
    hub_is_away.cache_clear()
    for settings in ({"source": "some/where"}, {"source": "some/where", "revision": "v1"}):
        with pytest.raises(UserError, match="some/where"):
            load_teacher(TeacherSettings(**settings), "cpu")
    with pytest.raises(UserError, match="the hub does not answer, and its cache here has none"):
        load_teacher(TeacherSettings(source="some/where"), "cpu")
    assert len(asked) == 1
    hub_is_away.cache_clear()


@pytest.mark.parametrize("of_hub", [False, True])
def test_a_variant_is_read_where_there_is_one(of_hub: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files alone, as many repositories have them; text encoder and autoencoder too, now or later."""
    folder = saved(tmp_path / "half", 3.0, variant="fp16")
    source = str(folder)
    if of_hub:
        cached(folder, offline_hub(tmp_path / "hub", monkeypatch))
        source = "some/where"
    settings = TeacherSettings(source=source, variant="fp16", max_tokens=8)
    assert scale_of(source=source, variant="fp16") == 3
    whole = load_teacher(settings, "cpu")
    later = load_teacher(settings, "cpu", network_only=True, null=whole.null_condition)
    assert torch.equal(later.encode(["fox"]).embeds, whole.encode(["fox"]).embeds)
    assert later.decode(torch.zeros(1, *later.latent_shape)).isfinite().all()
    with pytest.raises(UserError, match="does not load" if of_hub else r"a variant; set teacher\.variant=fp16"):
        scale_of(source=source)


def test_a_part_without_the_variant_has_its_plain_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path / "mixed", 4.0, variant="fp16")
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").rename(
        folder / "vae" / "diffusion_pytorch_model.safetensors"
    )
    settings = TeacherSettings(source=str(folder), variant="fp16", max_tokens=8)
    null = load_teacher(settings, "cpu").null_condition
    teacher = load_teacher(settings, "cpu", network_only=True, null=null)
    assert teacher.decode(torch.zeros(1, *teacher.latent_shape)).isfinite().all()


def test_weights_in_several_files_are_distilled(tmp_path: Path, prompts_file: Path) -> None:
    """As transformers of billions of weights are saved; encoded apart, too."""
    folder = saved(tmp_path / "shards", 5.0, max_shard_size="40KB")
    parts = {part: len(list((folder / part).glob("*-of-*.safetensors"))) for part in ("transformer", "text_encoder")}
    assert min(parts.values()) > 1, parts
    index = json.loads((folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == parts["transformer"]
    display = Display(quiet=True)
    settings = TeacherSettings(source=str(folder), max_tokens=16)
    run_encode(settings, prompts_file, tmp_path / "conditions", batch=8, display=display, device="cpu")
    changes = ["training.steps=1", "training.prompts_per_step=2", "space.route_steps=3", "teacher.max_tokens=16"]
    config = load_config(
        "default", [*changes, f"conditions={tmp_path / 'conditions'}"], teacher__source=str(folder),
        prompts=str(prompts_file),
    )  # fmt: skip
    run_distill(config, tmp_path / "run", resume=False, display=display, command="")
    assert float(load_student(tmp_path / "run" / "student", "cpu")[0].shift) > 0
