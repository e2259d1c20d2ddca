"""Folders that want something run, read or built that they have no right to: each is refused before it is loaded."""

import ast
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from offline import cached, offline_hub
from safetensors.torch import load_file, save_file
from tiny import make_sd1

from stepfold.config import TeacherSettings
from stepfold.errors import UserError
from stepfold.students.loading import load_student
from stepfold.teachers.folders import check_folder
from stepfold.teachers.loading import load_any_pipeline, load_teacher
from stepfold.teachers.safety import check_files, is_class_of

ROOT = Path(__file__).parents[2]
MARK = "print('code of the folder was run', flush=True); import pathlib; pathlib.Path('RAN').touch()\n"


@pytest.fixture
def folder(tiny_sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a whole pipeline; if code of it is run, there is a file RAN."""
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "teacher"
    shutil.copytree(tiny_sana, copy)
    return copy


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def index(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "model_index.json", **changes)


def config(part: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / part / "config.json", **changes)


def code_of_a_part(folder: Path) -> None:
    (folder / "transformer" / "evil.py").write_text(MARK + "class Model: pass\n")
    edit(folder / "model_index.json", transformer=["evil", "Model"])


def code_named_as_the_library(folder: Path) -> None:
    (folder / "transformer" / "diffusers.py").write_text(MARK + "class SanaTransformer2DModel: pass\n")


def code_of_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer" / "mine.py").write_text(MARK + "class Tokens: pass\n")
    edit(folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Tokens", None]})


def custom_pipeline(folder: Path) -> None:
    (folder / "pipeline.py").write_text(MARK + "class Mine: pass\n")
    edit(folder / "model_index.json", _class_name=["pipeline", "Mine"])


def sharded(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        (folder / "elsewhere.safetensors").write_bytes(weights.read_bytes())
        shutil.copy(weights, folder.parent / "elsewhere.safetensors")
        weights.unlink()
        text = json.dumps({"metadata": {}, "weight_map": {"x": name.replace("ABS", str(folder.parent))}})
        (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)

    return damage


def linked_file(folder: Path) -> None:
    file = folder / "vae" / "config.json"
    shutil.move(file, folder.parent / "config.json")
    file.symlink_to(folder.parent / "config.json")


def linked_folder(folder: Path) -> None:
    shutil.move(folder / "vae", folder.parent / "vae")
    (folder / "vae").symlink_to(Path("..") / "vae")


def linked_to_nothing(folder: Path) -> None:
    (folder / "vae" / "more.json").symlink_to("/nowhere/at/all")


def outside_vocabulary(folder: Path) -> None:
    (folder.parent / "secret.json").write_text("{}")
    edit(folder / "tokenizer" / "tokenizer_config.json", vocab_file=str(folder.parent / "secret.json"))


def pickle(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "transformer" / name).write_bytes(b"cos\nsystem\n.") and None


def deep(folder: Path) -> None:
    (folder / "transformer" / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def long_index(folder: Path) -> None:
    (folder / "model_index.json").write_text(" " * 2**24 + "{}")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a part from elsewhere": (code_of_a_part, "holds code, transformer/evil.py"),
    "a module of Python": (index(vae=["os", "path"]), "part 'vae' comes from 'os', whose code would be run"),
    "a library below": (index(vae=["diffusers.models", "AutoencoderDC"]), "part 'vae' comes from 'diffusers.models'"),
    "our own library": (index(vae=["stepfold", "__version__"]), "part 'vae' comes from 'stepfold'"),
    "a part of no library": (index(vae=[None, "AutoencoderDC"]), "part 'vae' comes from None"),
    "a class that is none": (index(vae=["diffusers", "utils"]), "is a 'utils', which is no class of diffusers"),
    "a dotted class": (index(vae=["diffusers", "utils.Any"]), "is a 'utils.Any', which is no class of diffusers"),
    "a module": (index(vae=["transformers", "utils"]), "is a 'utils', which is no class of transformers"),
    "a function": (index(vae=["transformers", "pipeline"]), "is a 'pipeline', which is no class of transformers"),
    "a part outside": (index(**{"../vae": ["diffusers", "AutoencoderDC"]}), "'../vae' is no name of a part"),
    "code named as the library": (code_named_as_the_library, "holds code, transformer/diffusers.py"),
    "a custom pipeline": (custom_pipeline, "a pipeline with code of its own"),
    "a pipeline from elsewhere": (index(_class_name="os"), "is a os"),
    "a pipeline of another library": (index(_class_name="transformers.AutoModel"), "is a transformers.AutoModel"),
    "auto_map of a text encoder": (
        config("text_encoder", auto_map={"AutoModel": "some/where--mine.Model"}),
        "text_encoder/config.json has an auto_map, which names code",
    ),
    "auto_map of a network": (
        config("transformer", auto_map={"AutoModel": "m.M"}),
        "transformer/config.json has an auto",
    ),
    "auto_map of a tokenizer": (code_of_a_tokenizer, "holds code, tokenizer/mine.py"),
    "auto_map of a tokenizer, without its code": (
        lambda f: edit(f / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["a/b--m.T", None]}),
        "tokenizer/tokenizer_config.json has an auto_map",
    ),
    "shards above": (sharded("../elsewhere.safetensors"), "names a file outside its folder, '../elsewhere"),
    "shards with an absolute name": (sharded("ABS/elsewhere.safetensors"), "names a file outside its folder, '/"),
    "shards that are a folder": (sharded(".."), "names a file outside its folder, '..'"),
    "shards that are pickles": (sharded("model-00001.bin"), "names 'model-00001.bin', which is no safetensors file"),
    "a link to a file": (linked_file, "a link that leaves it, vae/config.json; copy what it points to"),
    "a link to a folder": (linked_folder, "a link that leaves it, vae; copy"),
    "a link to nothing": (linked_to_nothing, "a link that leaves it, vae/more.json"),
    "a pipe": (lambda f: os.mkfifo(f / "vae" / "model.safetensors"), "vae/model.safetensors, which is no regular file"),
    "a vocabulary elsewhere": (outside_vocabulary, "names a file outside the folder, vocab_file"),
    "a pickle": (pickle("a.pt"), r"a pickle, transformer/a\.pt.*convert it once with save_pretrained"),
    "a pickle in capitals": (pickle("MODEL.BIN"), r"a pickle, transformer/MODEL\.BIN"),
    "layers without end": (config("transformer", num_layers=10**9), r"num_layers is 1e\+09, more than 1,024"),
    "a text encoder without end": (config("text_encoder", num_hidden_layers=10**6), "num_hidden_layers is 1e"),
    "a width without end": (config("transformer", sample_size=2**40), "sample_size is"),
    "nesting without end": (deep, "transformer/config.json does not load"),
    "an index without end": (long_index, "has more than 16,777,216 bytes"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_hostile_folder_is_refused_and_nothing_of_it_is_run(folder: Path, kind: str) -> None:
    damage, message = REFUSED[kind]
    damage(folder)
    before = set(sys.modules)
    for load in (
        lambda: load_teacher(TeacherSettings(source=str(folder)), "cpu"),
        lambda: load_any_pipeline(folder, "cpu"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert not (folder.parent / "RAN").exists()
    assert not {name for name in set(sys.modules) - before if "evil" in name or "mine" in name}


def test_a_student_folder_is_checked_too(folder: Path) -> None:
    card = {"teacher": "emoji", "height": 32, "width": 32, "max_tokens": 32, "guidance": 4.5, "config": {}}
    (folder / "stepfold.json").write_text(json.dumps(card))
    code_of_a_part(folder)
    with pytest.raises(UserError, match="holds code"):
        load_student(folder, "cpu")


@pytest.mark.parametrize(
    ("part", "name", "refused"),
    [
        ("transformer", "guidance_embedder.weight", True),
        ("vae", "quant_conv.weight", True),
        ("vae", "decoder.more.weight", True),
        ("text_encoder", "layers.9.mlp.up_proj.weight", True),
        ("text_encoder", "lm_head.weight", False),
        ("text_encoder", "embeddings.position_ids", False),
    ],
)
def test_weights_that_no_layer_takes_are_refused(part: str, name: str, refused: bool, folder: Path) -> None:
    """A config that is not that of the files leaves them out, and the libraries only warn; a few do not matter."""
    (file,) = (folder / part).glob("*.safetensors")
    save_file(load_file(file) | {name: torch.ones(2)}, file, {"format": "pt"})
    teacher = TeacherSettings(source=str(folder), max_tokens=8)
    if refused:
        with pytest.raises(UserError, match=rf"its part '{part}' hold 1 weights that no layer .*, such as {name}; is"):
            load_teacher(teacher, "cpu").decode(torch.zeros(1, 4, 8, 8))
    else:
        load_teacher(teacher, "cpu")


def test_a_lora_that_is_a_pickle_is_refused(folder: Path) -> None:
    file = folder.parent / "lora.bin"
    file.write_bytes(b"cos\nsystem\n.")
    for source in (file, folder.parent):
        with pytest.raises(UserError, match=r"a pickle, lora\.bin, which could run code; save it as safetensors"):
            load_teacher(TeacherSettings(source=str(folder), lora=str(source)), "cpu")


def test_what_is_usual_passes(folder: Path, tmp_path: Path) -> None:
    """Traces of the machine that saved it, settings that are no parts, and parts that are not there."""
    edit(folder / "text_encoder" / "config.json", _name_or_path="/home/somebody/models/gemma")
    edit(folder / "tokenizer" / "tokenizer_config.json", special_tokens_map_file="/root/.cache/map.json")
    edit(folder / "model_index.json", safety_checker=[None, None], id2label={"0": "cat"}, requires_safety_checker=True)
    (folder / "train.py").write_text(MARK)  # beside the parts nobody looks
    (folder / "vae" / "again.json").symlink_to("config.json")
    assert check_folder(folder)["_class_name"] == "SanaPipeline"
    load_teacher(TeacherSettings(source=str(folder)), "cpu")
    assert not (tmp_path / "RAN").exists()
    own = tmp_path / "sd1"
    pipe = make_sd1()
    assert isinstance(pipe, StableDiffusionPipeline)
    pipe.save_pretrained(own, safe_serialization=True)
    edit(own / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    (own / "safety_checker").mkdir()
    check_folder(own)
    assert is_class_of("transformers", "CLIPTextModel") and not is_class_of("transformers", "no such thing")
    assert is_class_of("transformers", "CLIPFeatureExtractor")  # of old folders: diffusers knows what it is called now


def test_a_snapshot_of_the_hub_passes_and_is_looked_at_before_it_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = offline_hub(tmp_path / "hub", monkeypatch)
    snapshot = cached(folder, hub)
    check_files(snapshot)
    for source in (str(snapshot), "some/where"):
        load_teacher(TeacherSettings(source=source), "cpu")
    config("text_encoder", auto_map={"AutoModel": "a/b--m.M"})(snapshot)
    for source in (str(snapshot), "some/where"):
        with pytest.raises(UserError, match=r"text_encoder/config\.json has an auto_map"):
            load_teacher(TeacherSettings(source=source), "cpu")
    index(vae=["os", "path"])(snapshot)
    for source in (str(snapshot), "some/where"):
        with pytest.raises(UserError, match=r"'vae' comes from 'os'|has an auto_map"):
            load_teacher(TeacherSettings(source=source), "cpu")


def test_nothing_here_asks_for_remote_code() -> None:
    """No keyword, string key or name of the whole tree: package, recipes, benchmarks and examples."""
    files = [file for part in ("src", "recipes", "benchmarks", "examples") for file in (ROOT / part).rglob("*.py")]
    assert len(files) > 90
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            said = [getattr(node, name, None) for name in ("arg", "id", "attr", "value", "custom_pipeline")]
            assert "trust_remote_code" not in said and "custom_pipeline" not in said, f"{file}:{node.lineno}"


def test_a_link_to_itself_is_no_regular_file(tiny_sana: Path, tmp_path: Path) -> None:
    """Before Python 3.13 `Path.resolve` raises RuntimeError for it."""
    folder = shutil.copytree(tiny_sana, tmp_path / "teacher")
    (folder / "vae" / "more.json").symlink_to("more.json")
    with pytest.raises(UserError, match=r"holds vae/more\.json, which is no regular file; delete it"):
        check_files(folder)
