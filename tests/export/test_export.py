"""`stepfold export`: what a fresh process of plain diffusers makes of it, and the mistakes."""

import ast
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import FluxPipeline
from forms import cases
from safetensors.torch import load_file
from test_cli import Result

from stepfold.errors import UserError
from stepfold.export.casting import round_weights
from stepfold.export.pipeline import model_card, use_of
from stepfold.jobs.exporting import run_export
from stepfold.jobs.sampling import run_sample
from stepfold.sampling.consistency import sample_consistency
from stepfold.students.card import CARD, read_card
from stepfold.students.loading import load_merged, load_student

from .conftest import SMALLER, relative, start

StudentOf = Callable[..., Path]
Fresh = Callable[..., dict[str, torch.Tensor]]
KINDS = ("lora", "pipeline", "teacher")
RECENT = ("qwen", "chroma", "krea")
VIDEOS = ("wan 2.2 ti2v", "sana video")
WITH_LORA = ("sana", "sd3", "flux", "flux2", "flux2 dev", "sd1", "sdxl", "lumina", "wan", *RECENT, *VIDEOS)
FEWER = ", fewer blocks"
DRAWN = ("sana", "first sana", "sprint", "sd3", "flux", "flux2", "flux2 dev", "sd1", "sdxl", "pixart", "lumina", "wan")
DRAWN += (*RECENT, "longcat")
WITH_LORA += ("ernie-image", "z-image")
DRAWN += ("ernie-image", "prx", "z-image")
DRAWN += (*VIDEOS, "wan 2.2 a14b", "hunyuan video", "kandinsky video")
DRAWN += ("hunyuan image",)
DRAWN += tuple(f"{family}{FEWER}" for family in SMALLER)

PIPE = "pipe = diffusers.DiffusionPipeline.from_pretrained(folder)"
TEACHER = """
card = json.load(open(folder + "/stepfold.json"))
pipe = getattr(diffusers, card["pipeline"]).from_pretrained(card["teacher"])
pipe.scheduler = getattr(diffusers, card["scheduler"]).from_pretrained(folder, subfolder="scheduler")
"""
LORA = TEACHER + "pipe.load_lora_weights({weights!r})"


@pytest.mark.long
def test_a_lora_student_merged_and_as_a_file(student_of: StudentOf, fresh: Fresh, tmp_path: Path) -> None:
    """Both give the latents of the student's own folder, which are not the teacher's."""
    pipes, whole = {}, {}
    for family in WITH_LORA:
        student = student_of(family, 4)
        file = run_export(student, "lora", tmp_path / f"{family}.safetensors", force=False)
        whole[family] = run_export(student, "pipeline", tmp_path / family, force=False)
        pipes[f"{family} student"] = student, LORA.format(weights=str(student))
        pipes[f"{family} lora"] = student, LORA.format(weights=str(file))
        pipes[f"{family} pipeline"] = whole[family], PIPE
        pipes[f"{family} teacher"] = student, TEACHER
    drawn = fresh(pipes)
    for family in whole:
        away = {kind: relative(drawn[f"{family} {kind}"], drawn[f"{family} student"]) for kind in KINDS}
        assert max(away["lora"], away["pipeline"]) < 1e-4 < 1e-2 < away["teacher"], (family, away)
        pictures = [
            run_sample(folder, ["a cat"], steps=1, seed=0, guidance=None, device="cpu")[0]
            for folder in (student_of(family, 4), whole[family])
        ]
        levels = [np.asarray(picture).astype(int) for picture in pictures]
        assert np.abs(levels[0] - levels[1]).max() <= 1
        what = "video" if family.startswith("wan") or "video" in family else "image"
        assert f'.from_pretrained("FOLDER", dtype=torch.float32)\n{what}' in (whole[family] / "README.md").read_text()


@pytest.mark.long
@pytest.mark.parametrize("names", [("sana",), DRAWN], ids=["one", "all"])
def test_a_student_of_every_family_draws_our_latents_in_plain_diffusers(
    student_of: StudentOf, fresh: Fresh, names: tuple[str, ...]
) -> None:
    """One step from the same noise. DiT's pipeline takes no noise; its sampler is compared in one process."""
    students = {name: student_of(name.removesuffix(FEWER), depth=0.5 if FEWER in name else 1.0) for name in names}
    drawn = fresh({name: (folder, PIPE) for name, folder in students.items()}, 1)
    for family, folder in students.items():
        teacher, student, card = load_student(folder, "cpu")
        sigma_data, guidance = teacher.sigma_data, torch.tensor([card.recipe.guidance])
        noise, condition = sigma_data * start((1, *teacher.latent_shape)), teacher.encode([card.example])
        rest = card.recipe.times[1], lambda step, noise=noise: noise, sigma_data
        with torch.no_grad():
            x0 = sample_consistency(student, noise, condition, guidance, *rest)
        assert relative(teacher.made(drawn[family]), x0 / sigma_data) < (1e-3 if teacher.rounds else 1e-4), family


def test_a_student_with_weights_of_its_own_is_a_pipeline(student_of: StudentOf, tmp_path: Path) -> None:
    student = student_of("sana")
    whole = run_export(student, "pipeline", tmp_path / "whole", force=False)
    files = {path.relative_to(student) for path in student.rglob("*") if path.is_file()}
    assert files == {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    assert all((student / file).read_bytes() == (whole / file).read_bytes() for file in files)
    with pytest.raises(UserError, match=r"all weights of its own and no LoRA; use --to pipeline, or train"):
        run_export(student, "lora", None, force=False)


def test_nothing_is_overwritten_unasked(student_of: StudentOf, tmp_path: Path) -> None:
    student = student_of("sana", 4)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letters.txt").write_text("dear")
    for force in (False, True):  # a folder that stepfold did not write stays, whatever is asked
        with pytest.raises(UserError, match="is there already"):
            run_export(student, "pipeline", mine, force=force)
    assert (mine / "letters.txt").read_text() == "dear"
    file = tmp_path / "some.safetensors"
    file.write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        run_export(student, "lora", file, force=False)
    assert file.read_text() == "mine"
    run_export(student, "lora", file, force=True)
    assert file.read_bytes() == (student / "pytorch_lora_weights.safetensors").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "some.README.md", "some.safetensors"}


def test_mistakes_say_what_to_do(student_of: StudentOf, tmp_path: Path) -> None:
    student = student_of("sana", 4)
    with pytest.raises(UserError, match=r"--to is 'gguf'; a student becomes pipeline, lora"):
        run_export(student, "gguf", None, force=False)
    with pytest.raises(UserError, match=r"is no .safetensors file"):
        run_export(student, "lora", tmp_path / "mine.pt", force=False)
    with pytest.raises(UserError, match=r"mine.safetensors is a file's name, and this writes a folder; give"):
        run_export(student, "lora", tmp_path / "mine.safetensors", force=False, keys="peft")
    for out in (student, student / "part"):
        with pytest.raises(UserError, match="is the student itself, or in it"):
            run_export(student, "pipeline", out, force=True)
    with pytest.raises(UserError, match="is no student folder"):
        run_export(tmp_path / "none", "pipeline", tmp_path / "whole", force=False)
    assert list(tmp_path.iterdir()) == []


def test_without_a_name_it_goes_beside_the_student(student_of: StudentOf) -> None:
    student = student_of("sana", 4)
    assert run_export(student, "lora", None, force=False) == student.parent / "student-lora.safetensors"


def test_a_teacher_in_bfloat16_is_merged_in_float32(student_of: StudentOf, tmp_path: Path) -> None:
    """Else the merged weights would be rounded, and the student with them."""
    student = student_of("sd1", 4)
    half = tmp_path / "half"
    half.mkdir()
    for file in student.glob("*"):
        if file.is_file():
            (half / file.name).write_bytes(file.read_bytes())
    card = json.loads((half / CARD).read_text())
    card["config"]["teacher"]["dtype"] = "bfloat16"
    (half / CARD).write_text(json.dumps(card))
    teacher, merged, _ = load_merged(half, "cpu")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    _, loaded, _ = load_student(student, "cpu")
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([0.5, 1.2])
    condition, scale = teacher.encode(["red heart", "a cat"]), torch.full((2,), 2.0)
    with torch.no_grad():
        assert relative(merged(x, t, condition, scale), loaded(x, t, condition, scale)) < 1e-5


def test_a_readme_names_the_prompt_where_another_argument_comes_first(student_of: StudentOf) -> None:
    assert '    prompt="red heart",\n' in model_card(read_card(student_of("flux2")))
    assert '    "red heart",\n' in model_card(read_card(student_of("flux")))


def test_a_lora_students_readme_loads_the_very_teacher(student_of: StudentOf) -> None:
    card = read_card(student_of("sana", 4))
    theirs = card.config["teacher"] | {"revision": "v2", "variant": "fp16"}
    card = card.model_copy(update={"teacher": "you/teacher", "config": card.config | {"teacher": theirs}})
    assert 'from_pretrained("you/teacher", revision="v2", variant="fp16", dtype=torch.float32)' in model_card(card)


def test_a_lora_students_readme_merges_its_teachers_own_lora(student_of: StudentOf, tmp_path: Path) -> None:
    """FLUX's text encoder, which `fuse_lora` leaves out unless told."""
    student = student_of("flux", 4)
    card, names = read_card(student), {}
    pipe = FluxPipeline.from_pretrained(card.teacher)
    tiny.save_text_lora(pipe, ["text_encoder"], tmp_path / "lora")
    theirs = card.config["teacher"] | {"lora": str(tmp_path / "lora")}
    readme = model_card(card.model_copy(update={"config": card.config | {"teacher": theirs}}), name=str(student))
    loading = re.search(r"```python\n(.*?)^image = ", readme, re.DOTALL | re.MULTILINE)
    assert loading is not None
    exec(loading[1], names)
    tokens = torch.arange(4, 12)[None]
    torch.testing.assert_close(names["pipe"].text_encoder(tokens)[0], pipe.text_encoder(tokens)[0])
    assert any("lora_" in name for name in names["pipe"].transformer.state_dict())


def test_a_readme_says_when_plain_diffusers_merges_the_teachers_lora_otherwise(student_of: StudentOf) -> None:
    card = read_card(student_of("flux", 4))
    theirs = card.config["teacher"] | {"lora": ["a", {"source": "b", "scale": 0.8}]}
    card = card.model_copy(update={"config": card.config | {"teacher": theirs}})
    readme = model_card(card)
    assert 'load_lora_weights("a")' in readme and 'load_lora_weights("b")' in readme
    assert readme.count("lora_scale=0.8") == 1
    readme = model_card(card.model_copy(update={"loras_in_diffusers": False}))
    assert (
        "load_lora_weights" not in readme
        and "stepfold export" in readme
        and 'from_pretrained("WHOLE", dtype=torch.float32)' in readme
    )


@pytest.mark.parametrize(("lora", "dtype"), [(4, "float16"), (0, "bfloat16")])
def test_exports_in_half_precision_are_the_rounded_ones(
    lora: int, dtype: Any, student_of: StudentOf, tmp_path: Path
) -> None:
    """Of a LoRA and of a whole student; the autoencoder and what a folder says besides stay as they are."""
    student, half = student_of("sd1", lora), getattr(torch, dtype)
    files = [tmp_path / "whole.safetensors", tmp_path / "half.safetensors"]
    folders = [tmp_path / "whole", tmp_path / "half"]
    for given, file, folder in zip((None, dtype), files, folders, strict=True):
        run_export(student, "single-file", file, force=False, dtype=given)
        run_export(student, "pipeline", folder, force=False, dtype=given)
    whole, rounded = map(load_file, files)
    assert whole.keys() == rounded.keys()
    assert all(
        torch.equal(rounded[name], value.to(half)) and value.dtype == torch.float32 for name, value in whole.items()
    )
    for part in ("unet", "text_encoder", "vae"):
        (before,), (after,) = ([*(folder / part).glob("*.safetensors")] for folder in folders)
        wanted = {name: value.to(value.dtype if part == "vae" else half) for name, value in load_file(before).items()}
        found = load_file(after)
        assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    index, card = (
        [json.loads((folder / name).read_text()) for folder in folders] for name in ("model_index.json", CARD)
    )
    assert index[0] == index[1] and card[0] | {"dtype": dtype} == card[1]


@pytest.mark.parametrize("keys", ["diffusers", "kohya", "peft"])
def test_a_lora_in_half_precision_is_the_rounded_one(keys: Any, student_of: StudentOf, tmp_path: Path) -> None:
    """Its alphas, which count ranks, stay as they are."""
    student, ending = student_of("sd1", 4), "" if keys == "peft" else ".safetensors"
    places = [tmp_path / f"{name}{ending}" for name in ("whole", "half")]
    for given, place in zip((None, "float16"), places, strict=True):
        run_export(student, "lora", place, force=False, keys=keys, dtype=given)
    whole, half = (load_file(place if ending else place / "adapter_model.safetensors") for place in places)
    wanted = {name: value.half() if value.ndim else value for name, value in whole.items()}
    assert whole.keys() == half.keys() and all(torch.equal(half[name], value) for name, value in wanted.items())
    assert {value.dtype for value in half.values() if value.ndim} == {torch.float16}


def test_half_precision_is_for_files_whose_weights_fit_it(student_of: StudentOf, tmp_path: Path) -> None:
    student = student_of("sd1", 4)
    for to, steps in (("lora", 4), ("onnx", None), ("pipeline", 4)):
        with pytest.raises(UserError, match=r"--dtype float16 is for --to pipeline, lora or single-file without"):
            run_export(student, to, tmp_path / "out.safetensors", force=False, steps=steps, dtype="float16")
    layer = torch.nn.Linear(2, 2)
    layer.weight.data[0, 0] = 1e5
    with pytest.raises(UserError, match=r"weight has a weight that float16 cannot hold; give --dtype bfloat16"):
        round_weights(layer, "float16")
    round_weights(layer, "bfloat16")
    assert layer.weight.dtype == torch.bfloat16


FAMILIES_PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
QUICKSTARTS = dict(
    re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", FAMILIES_PAGE, re.DOTALL | re.MULTILINE)
)
TINY_FAMILIES = {
    "Sana": "first sana", "Sana-Sprint": "sprint", "Stable Diffusion 3 and 3.5": "sd3", "FLUX.1": "flux",
    "FLUX.2": "flux2", "PixArt-Sigma": "pixart", "Stable Diffusion 1 and 2": "sd1", "Stable Diffusion XL": "sdxl",
    "Lumina Image 2": "lumina", "Wan 2.1, text to video": "wan", "DiT": "dit",
    "Qwen-Image": "qwen", "Chroma": "chroma", "LongCat-Image": "longcat", "Krea 2": "krea",
    "ERNIE-Image": "ernie-image", "PRX": "prx", "Z-Image": "z-image",
    "Wan 2.2 TI2V-5B, text to video": "wan 2.2 ti2v", "Wan 2.2 A14B, text to video": "wan 2.2 a14b",
    "SANA-Video": "sana video", "HunyuanVideo 1.5": "hunyuan video",
    "Kandinsky 5, images": "kandinsky image", "Kandinsky 5, text to video": "kandinsky video",
    "HunyuanImage 2.1": "hunyuan image",
    "Anima": "anima",
}  # fmt: skip


@pytest.mark.parametrize("heading", cases(TINY_FAMILIES, short=["Sana", "Stable Diffusion 1 and 2", "FLUX.1", "DiT"]))
def test_a_student_of_each_family_samples_as_the_docs_say(heading: str, student_of: StudentOf) -> None:
    """The quickstart's last block, on a tiny student: its arguments are those of the card, and it makes an image."""
    code = QUICKSTARTS[heading]
    student = student_of(TINY_FAMILIES[heading], 4 if "load_lora_weights" in code else 0)
    card = read_card(student)
    call = next(
        node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and ast.unparse(node.func) == "pipe"
    )
    named = {str(keyword.arg): keyword.value for keyword in call.keywords}
    first = named.pop("prompt") if "prompt" in named else call.args[0]
    assert set(named) == set(card.calls[1])
    assert ast.unparse(first) == ("[207]" if heading == "DiT" else "'a red heart'")
    code = re.sub(r'"runs/\w+/student"', repr(str(student)), code)
    code = re.sub(r'(from_pretrained\(\s*)"[\w./-]+"', lambda found: found[1] + repr(card.teacher), code)
    code = re.sub(r"(height|width)=\d+", r"\1=32", code).replace("frames=33", "frames=5")
    code = re.sub(r"max_sequence_length=\d+", "max_sequence_length=24", code)
    code = code.replace("[207]", "[7]").replace("torch.bfloat16", "torch.float32")
    names: dict[str, Any] = {}
    exec(code, names)
    assert type(names["pipe"]).__name__ == card.pipeline
    assert type(names["pipe"].scheduler).__name__ == card.scheduler
    assert len(names["video"]) == 5 if card.output == "frames" else min(names["image"].size) >= 8


COMMANDS = {
    heading: re.findall(r"^stepfold distill .*$", text.replace("\\\n", " "), re.MULTILINE)
    for heading, text in re.findall(r"^## ([^\n]+)\n((?:(?!^## ).)*)", FAMILIES_PAGE, re.DOTALL | re.MULTILINE)
}
RETIMED = {"Sana": "sana", "Stable Diffusion 3 and 3.5": "retimed sd3"}


@pytest.mark.parametrize("heading", cases(TINY_FAMILIES, ("Sana", "Stable Diffusion 3 and 3.5", "Krea 2")))
def test_the_commands_of_each_family_begin_runs_of_students_that_the_docs_sample(
    heading: str, student_of: StudentOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All commands of a family one after the other, on tiny teachers and at a tiny size, each up to its first step."""
    begun: list[Any] = []

    def begin(run: Any, *_: Any) -> None:
        begun.append((run.folder, run.recipe, run.teacher))
        raise UserError("its first step")

    monkeypatch.setattr("stepfold.jobs.distilling.train", begin)
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.txt", "classes.txt"):
        Path(name).write_text("7\n" if heading == "DiT" else "a red heart\n")
    code, lines = QUICKSTARTS[heading], COMMANDS[heading]
    for line in lines:
        of = RETIMED[heading] if "runs/retimed/teacher" in line else TINY_FAMILIES[heading]
        student = student_of(of, 4 if "load_lora_weights" in code and of not in RETIMED.values() else 0)
        given = re.sub(r"--set conditions=\w+|--size \S+|--set teacher.(frames|height|width)=\d+", "", line)
        given = re.sub(r"--teacher \S+", f"--teacher {read_card(student).teacher} --set teacher.max_tokens=24", given)
        given += "" if heading == "DiT" else " --size 32"
        given += " --set teacher.frames=5" if "frames=" in code else ""
        assert Result(*shlex.split(given)[1:], "--quiet").err.endswith("error: its first step\n"), line
    assert [str(folder) for folder, _, _ in begun] == [re.findall(r"--out (\S+)", line)[0] for line in lines]
    _, recipe, teacher = begun[0]
    count = 4 if "lora-4step" in lines[0] else 1
    calls = use_of(teacher, recipe, lora="load_lora_weights" in code, asked=(count,))["calls"][count]
    call = next(
        node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and ast.unparse(node.func) == "pipe"
    )
    compared = (
        "sigmas",
        "timesteps",
        "num_inference_steps",
        "intermediate_timesteps",
        "guidance_scale",
        "true_cfg_scale",
    )
    for each in call.keywords:
        if each.arg in compared:
            wanted = calls[each.arg]
            assert ast.literal_eval(each.value) == (wanted if wanted is None else pytest.approx(wanted, rel=1e-5)), (
                heading
            )


def test_a_lora_student_is_loaded_as_the_docs_say(student_of: StudentOf) -> None:
    page = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "load_lora_weights" in block)
    student = student_of("sdxl", 4)
    teacher, names = read_card(student).teacher, {}
    code = code.replace("stabilityai/stable-diffusion-xl-base-1.0", teacher).replace("runs/mine/student", str(student))
    exec(code, names)
    assert any("lora_" in name for name in names["pipe"].unet.state_dict())
    assert type(names["pipe"].scheduler).__name__ == read_card(student).scheduler
