"""Conditions on disk: the same as the text encoder's, whole or refused, and enough to train from."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stepfold.commands.prompts import encode as encode_command
from stepfold.commands.prompts import run_encode
from stepfold.config import Config, TeacherSettings, load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.jobs.distilling import run_distill
from stepfold.prompts import cache as module
from stepfold.prompts.cache import encode_prompts, open_conditions
from stepfold.prompts.conditions import conditions_key
from stepfold.prompts.reading import open_prompts
from stepfold.teachers.contract import Condition
from stepfold.teachers.fingerprints import encoder_fingerprint
from stepfold.teachers.loading import load_teacher
from stepfold.teachers.sana import SanaTeacher
from stepfold.training.runs import read_metrics

Encode = Callable[[], None]


@pytest.fixture
def settings(tiny_sana: Path, monkeypatch: pytest.MonkeyPatch) -> TeacherSettings:
    monkeypatch.setattr(module, "SHARD", 5)
    return TeacherSettings(source=str(tiny_sana), max_tokens=32)


@pytest.fixture
def encode(settings: TeacherSettings, prompts_file: Path, tmp_path: Path) -> Encode:
    """Encodes the dozen prompts, three at a time, in shards of five."""
    return lambda: run_encode(
        settings, prompts_file, tmp_path / "cache", batch=3, display=Display(quiet=True), device="cpu"
    )


def key(settings: TeacherSettings, prompts_file: Path) -> dict[str, object]:
    return conditions_key(settings, open_prompts(prompts_file).sha256)


def test_encoding_leaves_the_network_in_the_hosts_memory(settings: TeacherSettings) -> None:
    """It is never called, and beside the text encoders it did not fit. No device here but `meta` is another one."""
    alone = settings.model_copy(update={"guidance": "none"})
    for encodes_only, place in ((True, "cpu"), (False, "meta")):
        teacher = load_teacher(alone, "meta", encodes_only=encodes_only)
        assert {p.device.type for p in teacher.transformer.parameters()} == {place}
        teacher._load_text_encoders()
        assert {p.device.type for p in teacher.pipe.text_encoder.parameters()} == {"meta"}


def test_encode_takes_settings_of_the_teacher_alone(monkeypatch: pytest.MonkeyPatch, prompts_file: Path) -> None:
    seen: list[TeacherSettings] = []
    monkeypatch.setattr("stepfold.commands.prompts.run_encode", lambda settings, *_, **__: seen.append(settings))
    teacher = {"teacher": "folder", "prompts": prompts_file, "device": "cpu"}
    encode_command(**teacher, preset="flux-lora-4step", changes=["teacher.guidance=classifier_free"])
    encode_command(**teacher, changes=["teacher.quantise=nf4"])
    assert [(each.guidance, each.quantise, each.dtype) for each in seen] == [
        ("classifier_free", "none", "bfloat16"), ("auto", "nf4", "float32"),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"--set space.kind=prior: only settings of the teacher matter here"):
        encode_command(**teacher, changes=["space.kind=prior"])


def test_rows_are_what_the_text_encoder_says(
    settings: TeacherSettings, encode: Encode, prompts_file: Path, tmp_path: Path
) -> None:
    encode()
    cache, teacher = open_conditions(tmp_path / "cache", key(settings, prompts_file)), load_teacher(settings, "cpu")
    prompts = open_prompts(prompts_file)
    for index in ([0], [4, 5], [11, 0, 7, 7], list(range(12))):  # across shards, out of order, twice
        found = cache.rows(index).to("cpu", torch.float32)
        wanted = teacher.encode([prompts.prompt(i) for i in index])
        assert torch.equal(found.mask, wanted.mask.long())
        real = found.mask.bool()
        torch.testing.assert_close(found.embeds[real], wanted.embeds[real], rtol=2**-8, atol=1e-6)
    assert cache.null is not None and teacher.null_condition is not None
    assert torch.equal(cache.null.embeds, teacher.null_condition.embeds)
    torch.testing.assert_close(cache.black, teacher.black_latent(teacher.latent_shape))
    stored = sum(load_file(path)["embeds"].numel() for path in (tmp_path / "cache").glob("conditions_*"))
    assert stored == sum(int(teacher.encode([prompts.prompt(i)]).mask.sum()) * 32 for i in range(12))  # no padding


def two_texts(prompts: list[str]) -> Condition:
    """A condition of the words, and a second one of the letters between quotes, which most prompts have none of."""

    def numbers(texts: list[str], width: int) -> Condition:
        length = max(1, *map(len, texts))
        codes = torch.tensor([[float(ord(letter)) for letter in text.ljust(length)] for text in texts])
        mask = torch.tensor([[int(i < len(text)) for i in range(length)] for text in texts])
        return Condition(codes[..., None].expand(-1, -1, width), mask, torch.tensor([[float(len(t))] for t in texts]))

    quoted = [prompt.split('"')[1] if '"' in prompt else "" for prompt in prompts]
    return replace(numbers(prompts, 4), second=numbers(quoted, 3))


def test_a_second_text_is_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD", 3)
    texts = ['a sign "stop"', "a cat", "a fish", "a dog", 'two words "go on" here']
    (tmp_path / "prompts.txt").write_text("\n".join(texts) + "\n")
    null, sizes = two_texts([""]), list[str]()
    encode_prompts(
        tmp_path / "cache", {}, open_prompts(tmp_path / "prompts.txt"),
        lambda index: two_texts([texts[i] for i in index]), null, torch.zeros(1), batch=2, note=sizes.append,
    )  # fmt: skip
    cache = open_conditions(tmp_path / "cache", {}, len(texts))
    for index in ([0], [1, 2], [4, 1, 0, 3]):
        found, wanted = cache.rows(index), two_texts([texts[i] for i in index])
        assert found.second is not None and wanted.second is not None
        for ours, theirs in ((found, wanted), (found.second, wanted.second)):
            assert torch.equal(ours.mask, theirs.mask) and torch.equal(ours.pooled.float(), theirs.pooled)
            assert torch.equal(ours.embeds[ours.mask.bool()].float(), theirs.embeds[ours.mask.bool()])
    assert cache.null is not None and cache.null.second is not None and null.second is not None
    assert torch.equal(cache.null.embeds, null.embeds) and torch.equal(cache.null.second.embeds, null.second.embeds)
    assert torch.equal(cache.null.second.mask, null.second.mask)


def test_a_run_that_was_stopped_goes_on(encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode()
    shards = sorted((tmp_path / "cache").glob("conditions_*"))
    assert len(shards) == 3
    before = [path.read_bytes() for path in shards]
    shards[1].unlink()
    seen: list[int] = []
    original = SanaTeacher.encode
    monkeypatch.setattr(
        SanaTeacher, "encode", lambda self, prompts: seen.append(len(prompts)) or original(self, prompts)
    )
    encode()
    assert seen == [3, 3, 2]  # to tell the size, then the five of the lost shard
    assert [path.read_bytes() for path in shards] == before


def test_training_needs_neither_text_encoder_nor_vae(
    settings: TeacherSettings, encode: Encode, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode()
    fast = (
        "training.steps=3", "training.prompts_per_step=2", "training.preview_every=3", "space.route_steps=4",
        "space.filter_rule=off", "teacher.max_tokens=32", "optimiser.name=adamw", "optimiser.lr=1e-3", "evaluation.n=0",
    )  # fmt: skip

    def config(*changes: str) -> Config:
        return load_config("default", [*fast, *changes], teacher__source=settings.source, prompts=str(prompts_file))

    run_distill(config(), tmp_path / "plain", resume=False, display=Display(quiet=True), command="")
    parts: list[tuple[bool, bool]] = []
    original = SanaTeacher.velocity

    def velocity(self: SanaTeacher, *args: torch.Tensor) -> torch.Tensor:
        parts.append((self.pipe.text_encoder is None, self.pipe.vae is None))
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(SanaTeacher, "velocity", velocity)
    monkeypatch.setattr(SanaTeacher, "encode", lambda self, prompts: pytest.fail("the text encoder was asked"))
    cached = config(f"conditions={tmp_path / 'cache'}")
    run_distill(cached, tmp_path / "run", resume=False, display=Display(quiet=True), command="")
    assert set(parts) == {(True, True)}
    for once, kept in zip(read_metrics(tmp_path / "plain"), read_metrics(tmp_path / "run"), strict=True):
        assert kept["loss"] == pytest.approx(once["loss"], rel=0.02)
    assert (tmp_path / "run" / "student" / "text_encoder" / "model.safetensors").exists()


def test_what_was_made_for_something_else_is_refused(
    settings: TeacherSettings, encode: Encode, prompts_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"holds no encoded prompts .*make it with stepfold prompts encode"):
        open_conditions(tmp_path / "none", key(settings, prompts_file))
    encode()
    folder, right = tmp_path / "cache", key(settings, prompts_file)
    for name, value, said in (
        ("prompts", "abc", "other prompts;"),
        ("encoder", "other", "another text encoder;"),
        ("max_tokens", 8, "another max_tokens "),
        ("teacher", "other", "another teacher "),
    ):
        with pytest.raises(UserError, match=f"encoded with {said}"):
            open_conditions(folder, right | {name: value})
    prompts_file.write_text("a cat\n")
    with pytest.raises(UserError, match="encoded with other prompts"):
        encode()
    (folder / "conditions_00001.safetensors").unlink()
    with pytest.raises(UserError, match="lacks 1 of 3 shards; finish it"):
        open_conditions(folder, right)
    (folder / "conditions_00001.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="is damaged"):
        open_conditions(folder, right)
    (folder / "index.json").write_text("[]")
    with pytest.raises(UserError, match="is damaged"):
        open_conditions(folder, right)
    (folder / "index.json").unlink()
    with pytest.raises(UserError, match="is not empty and holds no encoded prompts"):
        encode()


def test_a_full_disk_is_told_before_it_starts(encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        free = 10

    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Nothing)
    with pytest.raises(UserError, match=r"GiB left, about .* are needed"):
        encode()
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_index_says_what_it_was_made_of(encode: Encode, tmp_path: Path, settings: TeacherSettings) -> None:
    encode()
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    assert (index["count"], index["teacher"], index["max_tokens"]) == (12, settings.source, 32)


def test_another_text_encoder_of_equal_size_is_another(settings: TeacherSettings, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(settings.source, folder)
    assert encoder_fingerprint(str(folder)) == encoder_fingerprint(settings.source)
    weights = next((folder / "text_encoder").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert encoder_fingerprint(str(folder)) != encoder_fingerprint(settings.source)
    with pytest.raises(UserError, match="neither a folder nor a hub id that has been fetched"):
        encoder_fingerprint("nobody/nothing")


def test_images_have_captions_of_their_own() -> None:
    with pytest.raises(UserError, match="conditions are those of a prompts file"):
        load_config("scm", ["space.images=somewhere", "conditions=folder"])
