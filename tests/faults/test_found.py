"""What the fuzz suite found, each by its name, and what was found while looking for it."""

import gzip
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from torch import nn

from stepfold.commands import prompts as prompt_commands
from stepfold.config import TeacherSettings, from_yaml, load_config
from stepfold.errors import LONGEST, UserError
from stepfold.evaluation.mjhq import open_mjhq
from stepfold.prompts import formats, tables
from stepfold.prompts.cache import encode_prompts, open_conditions
from stepfold.prompts.reading import open_prompts
from stepfold.students.loading import load_student
from stepfold.teachers.contract import Condition
from stepfold.teachers.loading import load_any_pipeline, load_teacher
from stepfold.training.latents import cached_blacks
from stepfold.training.opening import Source, is_running, open_run, remember
from stepfold.training.runs import (
    CHECKSUMS,
    checkpoints,
    damage,
    load_checkpoint,
    read_metrics,
    rewind_metrics,
    save_checkpoint,
)
from stepfold.web.runs import preview_at, read_run, scores_of


def refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(tables.read_texts(path))


def test_a_gzip_file_with_broken_blocks(tmp_path: Path) -> None:
    """It was a zlib.error."""
    content = bytearray(gzip.compress(os.urandom(200), mtime=0))
    content[12] ^= 6
    refused(tmp_path / "p.txt.gz", bytes(content), "cannot be read")


def test_json_nested_without_end(tmp_path: Path) -> None:
    """It was a RecursionError."""
    refused(tmp_path / "p.jsonl", b'{"prompt": ' * 10**5, "line 1: not JSON")


def test_halves_of_characters(tmp_path: Path) -> None:
    """They were a UnicodeEncodeError where the clean prompts were written."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a \\ud800 cat"}\n{"prompt": "fine \\ud83d\\udc36"}\n')
    prompt_commands.clean(tmp_path / "p.jsonl", out=tmp_path / "clean.txt")
    opened = open_prompts(tmp_path / "clean.txt")
    assert [opened.prompt(i) for i in range(len(opened))] == ["a \ufffd cat", "fine \U0001f436"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """A few kilobytes of gzip became as much memory as they say."""
    monkeypatch.setattr(formats, "LONGEST_LINE", 10_000)
    refused(
        tmp_path / f"p{suffix}.gz",
        gzip.compress((b"prompt\n" if suffix != ".jsonl" else b"") + b"x" * 10_001),
        "a line of more than 10,000 char",
    )


@pytest.mark.parametrize(
    "text", ["seed: 2024-99-99", "seed: 0b_", "seed: !!int ''", "seed: !!timestamp x", "[" * 500, "seed: !!float ''"]
)
def test_yaml_that_its_own_constructors_break_on(tmp_path: Path, text: str) -> None:
    """They were a ValueError, an IndexError, an AttributeError and a RecursionError."""
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="is not valid yaml"):
        from_yaml(tmp_path / "config.yaml")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", ""])
def test_presets_that_no_file_can_be_called(name: str) -> None:
    """They were an OSError (file name too long) and a ValueError (null byte)."""
    with pytest.raises(UserError, match="unknown preset"):
        load_config(name)


def test_yaml_aliases_that_multiply(tmp_path: Path) -> None:
    """Ten lines became gigabytes in the error message."""
    rows = ["a: &b0 [x]", *(f"c{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]" for i in range(1, 10))]
    (tmp_path / "config.yaml").write_text("\n".join([*rows, "training: {steps: *b9}"]).replace("a: &b0", "seed: &b0"))
    with pytest.raises(UserError) as caught:
        from_yaml(tmp_path / "config.yaml")
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("value", ["*b9", "[demo]", "{a: 1}", "3", "null"])
def test_a_preset_that_is_no_name(tmp_path: Path, value: str) -> None:
    """Written out, the lists of a few lines of aliases took gigabytes, and the search for the nearest name for ever."""
    rows = ["a: &b0 [x]", *(f"c{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]" for i in range(1, 10))]
    (tmp_path / "mine.yaml").write_text("\n".join([*rows, f"preset: {value}"]))
    with pytest.raises(UserError, match=r"^setting preset is .*; it must be the name of one preset") as caught:
        load_config(str(tmp_path / "mine.yaml"))
    assert len(str(caught.value)) < 500


def test_settings_of_a_gigabyte(tmp_path: Path) -> None:
    with (tmp_path / "config.yaml").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(UserError, match=r"more than 1,048,576 bytes"):
        from_yaml(tmp_path / "config.yaml")


def test_an_error_is_never_longer_than_a_page(tmp_path: Path) -> None:
    """A csv file of one long line without a known column was quoted as a whole."""
    (tmp_path / "p.csv").write_text("[" * 100_000)
    with pytest.raises(UserError, match="which column holds the prompts") as caught:
        list(tables.read_texts(tmp_path / "p.csv"))
    assert len(str(caught.value)) < LONGEST + 10


def parquet_of(kind: str, word: str, rows: int, path: Path) -> None:
    """A column of one word again and again, by itself or inside of others."""
    one = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([word]))
    nested = {
        "words": lambda: one,
        "list": lambda: pa.ListArray.from_arrays(pa.array([0, rows], pa.int32()), one),
        "struct": lambda: pa.StructArray.from_arrays([one], ["text"]),
        "map": lambda: pa.MapArray.from_arrays(pa.array([0, rows], pa.int32()), pa.array(map(str, range(rows))), one),
    }
    table = pa.table({"id": pa.array([0] * len(nested[kind]())), "prompt": nested[kind]()})
    parquet.write_table(table, path, compression="zstd", store_schema=False)


@pytest.mark.parametrize("kind", ["list", "struct", "map"])
def test_parquet_of_nested_columns(tmp_path: Path, kind: str) -> None:
    """349 bytes, a list of a thousand times the same million characters, took 3.3 GiB, and became one prompt."""
    parquet_of(kind, "x" * 100, 10, tmp_path / "p.parquet")
    with pytest.raises(UserError, match=rf"the column 'prompt' holds {kind}.*, not texts; give one of texts"):
        list(tables.read_texts(tmp_path / "p.parquet"))


def test_parquet_that_says_how_far_it_blows_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single text of 400 million characters is 12 KB there."""
    parquet_of("words", "x" * 10**6, 1, tmp_path / "p.parquet")
    assert [len(text) for text in tables.read_texts(tmp_path / "p.parquet")] == [tables.LONGEST_TEXT]
    monkeypatch.setattr(tables, "LARGEST_BLOWN_UP", 10**5)
    with pytest.raises(UserError, match=r"bytes of the column 'prompt' become 1,0\d\d,\d\d\d; write it again"):
        list(tables.read_texts(tmp_path / "p.parquet"))
    parquet_of("words", "a cat", 10**5, tmp_path / "p.parquet")  # the same word is stored once
    assert sum(1 for _ in tables.read_texts(tmp_path / "p.parquet")) == 10**5


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_the_words_of_an_endless_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """Of 16 million characters, all were split into words before their number was looked at."""
    monkeypatch.setattr(tables, "LONGEST_TEXT", 3_000)
    texts, path = ["cat " * 10_000, "dog"], tmp_path / f"p{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pa.table({"prompt": texts}), path)
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    else:
        path.write_text("\n".join(["prompt", *texts]) if suffix == ".csv" else "\n".join(texts))
    assert [len(text) for text in tables.read_texts(path)] == [3_000, 3]
    prompt_commands.clean(path, out=tmp_path / "clean.txt")
    assert (tmp_path / "clean.txt").read_text() == "dog\n"


class Numbered:
    def __len__(self) -> int:
        return 3

    def prompt(self, index: int) -> str:
        return "x" * (index + 1)


def encode(index: Sequence[int]) -> Condition:
    texts = [Numbered().prompt(i) for i in index]
    mask = torch.tensor([[i < len(text) for i in range(4)] for text in texts]).long()
    return Condition(torch.randn(len(texts), 4, 4), mask)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    encode_prompts(tmp_path / "cache", {"k": 1}, Numbered(), encode, None, torch.randn(4, 2, 2), batch=3)
    assert len(open_conditions(tmp_path / "cache", {"k": 1}, 3).rows([0, 2])) == 2
    return tmp_path / "cache"


def test_a_folder_of_encoded_prompts_is_of_one_precision(tmp_path: Path) -> None:
    """Begun in float32 and gone on with in bfloat16, it mixed both without a word."""

    def again(precision: str) -> None:
        black = torch.zeros(4, 2, 2)
        encode_prompts(tmp_path / "cache", {"k": 1}, Numbered(), encode, None, black, batch=3, precision=precision)

    again("float32")
    again("float32")
    with pytest.raises(UserError, match="was begun with --dtype float32, and this is bfloat16; give --dtype float32"):
        again("bfloat16")
    assert len(open_conditions(tmp_path / "cache", {"k": 1}, 3).rows([0])) == 1


def test_a_kill_in_the_first_write_of_all(tmp_path: Path) -> None:
    """Found by `benchmarks/kills.py`: the folder was "not empty" ever after. Other files still stay untouched."""
    for folder in (tmp_path / "cache", tmp_path / "run"):
        folder.mkdir()
        (folder / ".index.json.part").write_text("{")
        (folder / ".config.yaml.part").write_text("se")
    encode_prompts(tmp_path / "cache", {"k": 1}, Numbered(), encode, None, torch.randn(4, 2, 2), batch=3)
    open_conditions(tmp_path / "cache", {"k": 1}, 3)
    open_run(tmp_path / "run", load_config("demo"), resume=False).release(force=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.part").write_text("years")
    with pytest.raises(UserError, match="not empty"):
        encode_prompts(tmp_path / "other", {"k": 1}, Numbered(), encode, None, torch.randn(4, 2, 2), batch=3)
    with pytest.raises(UserError, match="not empty"):
        open_run(tmp_path / "other", load_config("demo"), resume=False)


@pytest.mark.parametrize("count", [10**18, -1, 0, None, "3", 3.0, True])
def test_encoded_prompts_that_claim_another_number(cache: Path, count: Any) -> None:
    """1e18 prompts were looked for one shard after the other."""
    index = json.loads((cache / "index.json").read_text())
    (cache / "index.json").write_text(json.dumps(index | {"count": count}))
    with pytest.raises(UserError, match=r"lacks \d+ of|is damaged|another count"):
        open_conditions(cache, {"k": 1})
    with pytest.raises(UserError, match=r"another count|is damaged"):
        open_conditions(cache, {"k": 1}, 3)


@pytest.mark.parametrize("name", ["index.json", "extras.safetensors", "conditions_00000.safetensors"])
def test_a_pipe_among_encoded_prompts(cache: Path, name: str) -> None:
    """Reading and going on waited for ever."""
    (cache / name).unlink()
    os.mkfifo(cache / name)
    for use in (
        lambda: open_conditions(cache, {"k": 1}, 3),
        lambda: encode_prompts(cache, {"k": 1}, Numbered(), encode, None, torch.randn(4, 2, 2), batch=3),
    ):
        with pytest.raises(UserError, match=f"{name} is no regular file; delete it"):
            use()


@pytest.mark.parametrize("name", ["metrics.jsonl", "report.json", "report.html", "previews/step_000001.png"])
def test_a_link_to_itself_in_a_run_that_is_listed(tmp_path: Path, name: str) -> None:
    """Where it leads was a RuntimeError, to `stepfold runs` and to the page."""
    open_run(tmp_path / "run", load_config("demo"), resume=False).release(force=True)
    (tmp_path / "run" / "previews").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "run" / name)
    run = read_run(tmp_path, "run")
    assert (run.state, run.step, run.has_report, scores_of(run)) == ("stopped", 0, False, (1, {}))
    if run.previews:
        with pytest.raises(UserError, match="is not there"):
            preview_at(run, 1)


def test_a_lock_that_leads_elsewhere(tmp_path: Path) -> None:
    """To list runs emptied the file that a run's lock was a link to, with filelock 3.16."""
    (tmp_path / "thesis.tex").write_text("years")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "thesis.tex")
    assert not is_running(tmp_path / "run")
    assert (tmp_path / "thesis.tex").read_text() == "years"


WRONG: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "no embeds": lambda t: {"starts": t["starts"]},
    "starts of floats": lambda t: t | {"starts": t["starts"].float()},
    "starts beyond the end": lambda t: t | {"starts": t["starts"] * 2**40},
    "starts that fall": lambda t: t | {"starts": t["starts"].flip(0)},
    "too few starts": lambda t: t | {"starts": t["starts"][:-1].clone()},
    "embeds of whole numbers": lambda t: t | {"embeds": t["embeds"].long()},
    "embeds of one dimension": lambda t: t | {"embeds": t["embeds"].flatten()},
}


@pytest.mark.parametrize("kind", WRONG)
def test_encoded_prompts_of_other_shapes(cache: Path, kind: str) -> None:
    """They were a TypeError, a warning and a SafetensorError in the middle of the run."""
    shard = cache / "conditions_00000.safetensors"
    save_file(WRONG[kind](load_file(shard)), shard)
    with pytest.raises(UserError, match=r"is damaged .*delete it and encode again"):
        open_conditions(cache, {"k": 1}, 3)


@pytest.mark.parametrize("black", [torch.full((4, 2, 2), torch.nan), torch.zeros(4, 2, 2).long()])
def test_a_black_picture_that_is_none(cache: Path, black: torch.Tensor) -> None:
    save_file({"black": black}, cache / "extras.safetensors")
    with pytest.raises(UserError, match="no black picture"):
        open_conditions(cache, {"k": 1}, 3)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'"x"', b"\xff", b'{"sha256": "other"}'])
def test_a_note_of_prompts_that_is_damaged(tmp_path: Path, content: bytes) -> None:
    """It was a JSONDecodeError."""
    (tmp_path / "prompts.json").write_bytes(content)
    with pytest.raises(UserError, match=r"prompts\.json is damaged|has changed since this run began"):
        remember(tmp_path, Source("prompts", "p.txt", "abc", 3))


@pytest.mark.parametrize(
    "tensors", [None, {}, {"1": torch.zeros(4, 2, 2)}, {"0": torch.zeros(4)}, {"0": torch.full((4, 2, 2), torch.nan)}]
)
def test_kept_latents_that_are_damaged(tmp_path: Path, tensors: dict[str, torch.Tensor] | None) -> None:
    """They were a SafetensorError and a KeyError; not-a-number went unnoticed and let every picture pass the filter."""
    path = tmp_path / "blacks.safetensors"
    path.write_bytes(b"x") if tensors is None else save_file(tensors, path)
    teacher: Any = SimpleNamespace(device="cpu", latent_shapes=[(4, 2, 2)])
    with pytest.raises(UserError, match=r"is damaged .*delete it, it is made again"):
        cached_blacks(tmp_path, teacher)


def test_rows_of_metrics_that_are_none(tmp_path: Path) -> None:
    """A row without a step was a KeyError; one that is not whole took all rows after it along."""
    good = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5}]
    lines = [
        json.dumps(good[0]),
        "[]",
        "3",
        '{"loss": 1}',
        '{"step": "0"}',
        "{",
        "[" * 10**5,
        json.dumps(good[1]),
        '{"st',
    ]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff")
    assert read_metrics(tmp_path) == good
    rewind_metrics(tmp_path, 1)
    assert read_metrics(tmp_path) == good[:1]


def make() -> tuple[dict[str, nn.Module], torch.optim.Optimizer]:
    student = nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(student.parameters())
    student(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    return {"student": student}, optimiser


@pytest.mark.parametrize(
    "state",
    [[], {}, {"step": 1}, {"step": 1, "optimiser": []}, {"step": "1"}, {"step": -1}, {"step": 1.5}, {"step": None}],
)
def test_states_of_checkpoints_that_are_none(tmp_path: Path, state: Any) -> None:
    """They were a TypeError and an AttributeError, or a run that went on from step "1"."""
    save_checkpoint(tmp_path, 1, *make(), keep=1)
    (path,) = checkpoints(tmp_path)
    whole = json.loads((path / "state.json").read_text())
    full = {"optimiser": whole["optimiser"]} | state if isinstance(state, dict) and state else state
    (path / "state.json").write_text(json.dumps(full))
    (path / "checksums.json").unlink()  # whose file it is, if it is not damage
    if full == whole:
        assert load_checkpoint(path, *make()) == 1
        return
    with pytest.raises(UserError, match="000001 is damaged"):
        load_checkpoint(path, *make())


def test_checksums_of_files_elsewhere(tmp_path: Path) -> None:
    """The checksum of /dev/zero takes for ever."""
    save_checkpoint(tmp_path, 1, *make(), keep=1)
    (path,) = checkpoints(tmp_path)
    (path / CHECKSUMS).write_text(json.dumps({"/dev/zero": 0}))
    assert damage(path) == "'/dev/zero' is no file of it"


@pytest.fixture
def folder(tiny_sana: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_sana, tmp_path / "teacher")
    return tmp_path / "teacher"


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "a part that is a number": ("model_index.json", {"vae": 0.5}),
    "a class that is a list of none": ("model_index.json", {"_class_name": []}),
    "a shift beyond all numbers": ("scheduler/scheduler_config.json", {"shift": 10**30}),
    "a dynamic shift of nothing": (
        "scheduler/scheduler_config.json",
        {"use_dynamic_shifting": True, "max_shift": None},
    ),
    "stages of other lengths": ("vae/config.json", {"encoder_qkv_multiscales": [[]]}),
    "a size of text": ("transformer/config.json", {"sample_size": "8"}),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_that_the_libraries_break_on(folder: Path, kind: str) -> None:
    """They were a TypeError, an OverflowError and an IndexError of diffusers, and a TypeError of ours."""
    name, changes = CONFIGS[kind]
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    with pytest.raises(UserError, match=r"does not load|code of its own"):
        load_teacher(TeacherSettings(source=str(folder)), "cpu")
    if name == "model_index.json":
        with pytest.raises(UserError):
            load_any_pipeline(folder, "cpu")


@pytest.mark.parametrize(
    "changes", [{"height": "32"}, {"config": []}, {"config": {"student": []}}, {"max_tokens": None}]
)
def test_cards_of_students_that_are_damaged(folder: Path, changes: dict[str, Any]) -> None:
    card = {"teacher": "emoji", "height": 32, "width": 32, "max_tokens": 16, "guidance": 4.5, "config": {}}
    (folder / "stepfold.json").write_text(json.dumps(card))
    load_student(folder, "cpu")
    (folder / "stepfold.json").write_text(json.dumps(card | changes))
    with pytest.raises(UserError, match=r"stepfold\.json is damaged"):
        load_student(folder, "cpu")


def test_a_tokenizer_that_breaks_on_every_prompt(folder: Path) -> None:
    """It was a TypeError of transformers, after the run folder had been made."""
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": [1]}))
    with pytest.raises(UserError, match=r"cannot encode a prompt|does not load"):
        load_teacher(TeacherSettings(source=str(folder), max_tokens=16), "cpu").encode(["a cat"])


def test_a_lora_students_card_without_a_teacher(folder: Path) -> None:
    """It was a KeyError or pydantic's ValidationError."""
    card = {"teacher": "emoji", "height": 32, "width": 32, "max_tokens": 16, "guidance": 4.5}
    for config in ({"student": {"lora": 4}}, {"student": {"lora": 4}, "teacher": {"source": 3}}):
        (folder / "stepfold.json").write_text(json.dumps(card | {"config": config}))
        with pytest.raises(UserError, match=r"stepfold\.json is damaged"):
            load_student(folder, "cpu")


@pytest.mark.parametrize("name", ["../../mine", "/tmp/mine", "..", "a/b", "a\0b"])
def test_ids_of_mjhq_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    """Pictures are named by them: they were written wherever the file said."""
    for row in ({name: {"category": "people", "prompt": "x"}}, {"1": {"category": name, "prompt": "x"}}):
        (tmp_path / "meta_data.json").write_text(json.dumps(row))
        with pytest.raises(UserError, match="which is no name of a file"):
            open_mjhq(tmp_path, 1)
