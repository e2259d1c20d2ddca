"""An image with each prompt, FLUX.2's reference and Wan's first frame: from a table to a student of plain diffusers."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import tiny_wan22
import torch
from forms import cases
from PIL import Image
from safetensors.torch import load_file
from test_cli import Result

from stepfold import api
from stepfold.commands.own_teacher import run_own
from stepfold.commands.prompts import run_encode
from stepfold.config import TeacherSettings, load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.export.pipeline import save_student
from stepfold.images.files import read_picture
from stepfold.jobs.distilling import run_distill
from stepfold.jobs.exporting import run_export
from stepfold.jobs.sampling import run_sample
from stepfold.maths.formulations import data_prediction
from stepfold.prompts.conditions import cache_of, conditions_from
from stepfold.prompts.reading import open_prompts
from stepfold.randomness import generator, normal
from stepfold.sampling.consistency import sample_consistency
from stepfold.sampling.teacher import sample_teacher
from stepfold.students.card import CARD, read_card
from stepfold.students.lora import LORA_WEIGHTS, lora_student
from stepfold.students.whole import new_student
from stepfold.teachers.loading import load_teacher
from stepfold.training.runs import read_metrics

PROMPTS = ["red heart", "a dog on blue background"]
MAKERS: dict[str, Callable[[], Any]] = {
    "klein": tiny.make_flux2_klein, "dev": tiny.make_flux2, "wan": tiny_wan22.make_ti2v
}  # fmt: skip
SHOWN: dict[str, Any] = {"height": 64, "width": 96, "max_tokens": 48, "image_column": "image"}
"""How a teacher is called here."""


def frames_of(teacher: Any) -> list[str]:
    """Settings for videos."""
    return [f"teacher.frames={teacher.frames}"] if teacher.frames > 1 else []


def picture(path: Path, seed: int, width: int = 96, height: int = 64) -> Path:
    """A smooth one of a file."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module", params=cases(MAKERS, short=["klein", "wan"]))
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny.save(MAKERS[request.param], tmp_path_factory.mktemp("teacher") / "pipeline")
    frames = 9 if request.param == "wan" else None
    return load_teacher(TeacherSettings(source=str(folder), frames=frames, **SHOWN), "cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    return [picture(folder / f"{i}.png", i) for i in range(2)]


def both(teacher: Any, files: list[Path]) -> Any:
    return teacher.encode(PROMPTS, [read_picture(path, teacher.height, teacher.width) for path in files])


@pytest.mark.parametrize("scale", ["usual", 1.0])
def test_the_wrapped_teacher_samples_what_its_pipeline_samples(teacher: Any, files: list[Path], scale: Any) -> None:
    """Two prompts with an image each, in one batch; the pipeline has one image a call."""
    scale, old = teacher.default_guidance if scale == "usual" else scale, teacher.pipe.scheduler
    teacher.pipe.scheduler = teacher.plain_scheduler(3)
    theirs = []
    for i, path in enumerate(files):
        call = teacher.usual_call() | teacher.own_steps(3) | teacher.own_guidance(scale)
        draws = [torch.Generator().manual_seed(i)]
        theirs.append(teacher.latents_of(teacher.pipe, [PROMPTS[i]], draws, image=Image.open(path), **call))
    teacher.pipe.scheduler = old
    noise = [torch.randn(teacher.latent_shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    condition = both(teacher, files)
    scales = torch.full((2,), scale)
    start = teacher.sigma_data * torch.stack(noise)
    ours, plain = (
        sample_teacher(teacher, start, each, scales, 3, even=teacher.even_ladder) / teacher.sigma_data
        for each in (condition, replace(condition, second=None))
    )
    wanted = torch.cat(theirs)
    assert (ours - wanted).norm() < 1e-4 * wanted.norm() < 1e-2 * (plain - wanted).norm()


def test_a_student_starts_as_its_teacher_and_learns(teacher: Any, files: list[Path]) -> None:
    condition = both(teacher, files)
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([0.5, 1.2])
    student: Any = new_student(teacher)
    F = student(x / teacher.sigma_data, t, condition, torch.ones(2))
    assert torch.equal(teacher.sigma_data * F, teacher.velocity(x, t, condition, None))
    F.square().sum().backward()
    idle = {name for name, p in student.transformer.named_parameters() if p.grad is None or not p.grad.any()}
    assert {name for name in idle if "guidance_embedder" not in name} == set()
    if teacher.guidance_kind == "classifier_free":
        assert torch.equal(teacher.null(condition).second.embeds, condition.second.embeds)
    if teacher.frames > 1:
        with pytest.raises(UserError, match="embeds its time in several of its parts"):
            new_student(teacher, two_times=True)
        # its step to clean latents ends at the first frame itself
        first = data_prediction(x / teacher.sigma_data, t, F)[:, :, 0]
        torch.testing.assert_close(first.flatten(2).mT, condition.second.embeds, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", cases([0, 4], short=[4]))
def test_a_students_folder_draws_our_latents_with_the_image(
    teacher: Any, files: list[Path], rank: int, tmp_path: Path
) -> None:
    """In plain diffusers; a picture in memory is as good as its file, and none is refused."""
    sizes = "teacher.width=96", "teacher.max_tokens=48", *frames_of(teacher)
    config = settings(Path(teacher.source), files[0], *sizes, f"student.lora={rank}")
    student = lora_student(teacher, rank) if rank else new_student(teacher)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in (p for p in student.parameters() if p.requires_grad):
            parameter += 0.05 * torch.randn_like(parameter)
    folder = tmp_path / "student"
    save_student(teacher, student, folder, config, tiny.recipe(teacher), PROMPTS[0])
    card, kind = read_card(folder), type(teacher.pipe)
    pipe: Any = kind.from_pretrained(teacher.source if rank else folder)
    if rank:
        pipe.scheduler = getattr(diffusers, card.scheduler).from_pretrained(folder / "scheduler")
        pipe.load_lora_weights(folder)
    pipe.set_progress_bar_config(disable=True)
    draws = [generator(0, "sample", 0)]
    theirs = teacher.latents_of(pipe, PROMPTS[:1], draws, image=Image.open(files[0]), **card.calls[1])
    noise = torch.stack([normal(teacher.latent_shape, 0, "sample", 0)])
    ours, plain = (
        sample_consistency(
            student, 0.5 * noise, condition, torch.full((1,), card.recipe.guidance),
            card.recipe.times_for(1), lambda i: noise, 0.5,
        ) / 0.5
        for whole in [both(teacher, files).rows(slice(0, 1))]
        for condition in (whole, replace(whole, second=None))
    )  # fmt: skip
    assert (ours - theirs).norm() < 1e-4 * theirs.norm() < 1e-2 * (plain - theirs).norm()

    (of_file,) = run_sample(folder, PROMPTS[:1], steps=1, seed=0, guidance=None, device="cpu", image=files[0])
    (in_memory,) = api.sample(folder, PROMPTS[:1], device="cpu", steps=1, image=Image.open(files[0]))
    assert of_file.tobytes() == in_memory.tobytes()
    with pytest.raises(UserError, match="trained with an image for each prompt; give one with --image FILE"):
        api.sample(folder, PROMPTS[:1], device="cpu")
    for command in ("demo", folder), ("sample", folder, "red heart", "--race", tmp_path / "a.png"):
        assert "this student needs an image; use stepfold sample --image" in Result(*command).err
    if not rank:
        with pytest.raises(UserError, match="reads an image too, and an onnx graph here takes a text"):
            run_export(folder, "onnx", tmp_path / "onnx", force=False)


def test_a_student_of_texts_alone_takes_no_image(files: list[Path]) -> None:
    with pytest.raises(UserError, match="--image is for a student that was trained with an image for each prompt"):
        api.sample("emoji-student", ["red heart"], device="cpu", image=str(files[0]))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight prompts, each with an image in a folder below it, of other sizes than the teacher's."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "below").mkdir()
    rows = []
    for i in range(8):
        picture(folder / "below" / f"{i}.png", i, width=100 + i)
        rows.append({"prompt": f"make it {['red', 'blue'][i % 2]}", "image": f"below/{i}.png"})
    path = folder / "edits.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_equal_prompts_of_other_images_are_other_prompts(table: Path, tmp_path: Path) -> None:
    prompts = open_prompts(table, "image")
    assert (
        len(prompts) == 8 and prompts.prompt(1) == "make it blue" and prompts.image(1) == table.parent / "below/1.png"
    )
    assert len(open_prompts(table)) == 2  # without the column it is a table of prompts
    moved = shutil.copytree(table.parent, tmp_path / "moved")
    assert open_prompts(moved / table.name, "image").sha256 == prompts.sha256
    picture(moved / "below" / "3.png", 30)
    assert open_prompts(moved / table.name, "image").sha256 != prompts.sha256


@pytest.mark.parametrize(
    ("text", "column", "said"),
    [
        ("a cat\na dog\n", "image", r"prompts.txt: teacher.image_column is 'image', and this is no table; write a"),
        ('{"prompt": "a", "image": "no.png"}\n', "image", r"prompt 1: image 'no.png' cannot be read \(.*; give a png"),
        ('{"prompt": "a", "image": "bad.png"}\n', "image", r"prompt 1: image 'bad.png' cannot be read \(.*; give a"),
        (
            '{"prompt": "a", "image": "large.png"}\n',
            "image",
            r"'large.png' has 70000 x 1000 pixels, more than ",
        ),
        ('{"prompt": "a", "image": null}\n', "image", r"prompt 1: 'image' is '', which is no path of an image; give"),
        ('{"prompt": ["a", "b"], "image": "0.png"}\n', "image", r"prompt 2: there is not one 'image' for each prompt"),
        ('{"prompt": "a", "image": "0.png"}\n', "picture", r"has no 'picture'; it has prompt, image"),
    ],
)
def test_a_bad_table_of_images_is_one_line(tmp_path: Path, text: str, column: str, said: str) -> None:
    picture(tmp_path / "0.png", 0)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n of which the rest is missing")
    Image.new("1", (70_000, 1000)).save(tmp_path / "large.png")
    (tmp_path / "prompts.txt").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        open_prompts(tmp_path / "prompts.txt", column)
    assert "\n" not in str(caught.value)


def test_an_image_whose_end_is_missing_is_one_line(tmp_path: Path) -> None:
    """Its head says nothing of it."""
    path = picture(tmp_path / "0.png", 0, width=200, height=200)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"image .*0.png cannot be read \(.*; give the whole file") as caught:
        read_picture(path, 64, 96)
    assert "\n" not in str(caught.value)


def settings(folder: Path, table: Path, *sets: str) -> Any:
    return load_config(
        "default",
        [
            f"teacher.source={folder}", f"prompts={table}", "teacher.image_column=image", "teacher.height=64",
            "teacher.width=64", "teacher.max_tokens=24", "space.route_steps=4", "space.filter_rule=off",
            "training.steps=1", "training.prompts_per_step=2", "training.preview_every=1000", "optimiser.name=adamw",
            "optimiser.lr=1e-3", "optimiser.warmup=0", "training.precision=no", "training.walk_precision=no",
            "objective=discrete", "evaluation.n=0", *sets,
        ],
    )  # fmt: skip


@pytest.mark.parametrize(("height", "width"), [(32, 64), (1024, 1040), (64, 576)])
def test_sizes_that_the_pipeline_refuses_are_one_line(teacher: Any, height: int, width: int) -> None:
    if teacher.frames > 1:
        pytest.skip("its own sizes count")
    tall = load_teacher(TeacherSettings(source=teacher.source, height=height, width=width, max_tokens=8), "cpu")
    with pytest.raises(UserError, match=rf"images are {height} x {width}, .* reads sides of at least 64") as caught:
        tall.encode_images(torch.zeros(1, 3, height, width))
    assert "\n" not in str(caught.value)


def test_first_frames_have_the_size_of_the_video(tmp_path: Path) -> None:
    folder = tiny.save(tiny_wan22.make_ti2v, tmp_path / "pipeline")
    with pytest.raises(UserError, match=r"first frames are 64 x 96, and teacher.sizes has 96 x 64; leave out"):
        load_teacher(TeacherSettings(source=str(folder), frames=5, sizes=((64, 96), (96, 64)), **SHOWN), "cpu")


def test_a_wan_that_is_not_shown_first_frames_reads_none(tmp_path: Path) -> None:
    folder = tiny.save(tiny.make_wan, tmp_path / "pipeline")
    with pytest.raises(UserError, match="image_column is 'image', but WanPipeline reads no images here; leave it"):
        load_teacher(TeacherSettings(source=str(folder), frames=5, **SHOWN), "cpu")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"WanPipeline"', '"WanImageToVideoPipeline"'))
    with pytest.raises(UserError, match="whose network reads images in channels of their own; give a WanPipeline, or"):
        load_teacher(TeacherSettings(source=str(folder), frames=5, **SHOWN), "cpu")


def test_others_read_no_images(tiny_sana: Path, table: Path, tmp_path: Path) -> None:
    config = settings(tiny_sana, table)
    with pytest.raises(UserError, match="image_column is 'image', but SanaPipeline reads no images here; leave it"):
        run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_lora_learns_from_conditions_on_disk_with_images_and_resumes_to_the_bit(
    teacher: Any, table: Path, tmp_path: Path
) -> None:
    folder, quiet = Path(teacher.source), Display(quiet=True)
    sets = (
        *frames_of(teacher),
        "student.lora=2",
        "training.steps=2",
        "training.checkpoint_every=1",
        f"conditions={tmp_path / 'cache'}",
    )
    config = settings(folder, table, *sets)
    run_encode(config.teacher, table, tmp_path / "cache", batch=3, display=quiet, device="cpu")
    prompts, own = open_prompts(table, "image"), load_teacher(config.teacher, "cpu")
    cached = conditions_from(cache_of(config, prompts), own, prompts)([2, 5])
    wanted = own.encode([prompts.prompt(i) for i in (2, 5)], [read_picture(prompts.image(i), 64, 64) for i in (2, 5)])
    assert cached.second is not None and wanted.second is not None
    torch.testing.assert_close(cached.second.embeds, wanted.second.embeds, rtol=0.01, atol=0.01)  # in bfloat16

    run, again = tmp_path / "run", tmp_path / "again"
    run_distill(config, run, resume=False, display=quiet, command="test")
    matrices = load_file(run / "checkpoints" / "000002" / "student.safetensors")
    assert {name for name, value in matrices.items() if "lora_B" in name and not value.any()} == set()
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "000002")
    run_distill(config, again, resume=True, display=quiet, command="test")
    before, after = (load_file(each / "student" / LORA_WEIGHTS) for each in (run, again))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.long
def test_a_run_with_images_and_its_student_in_diffusers(table: Path, tmp_path: Path) -> None:
    """From the table, and from conditions on disk; the image counts in samples as in plain diffusers."""
    folder = tiny.save(tiny.make_flux2_klein, tmp_path / "pipeline")
    config, quiet = settings(folder, table), Display(quiet=True)
    run_encode(config.teacher, table, tmp_path / "cache", batch=3, display=quiet, device="cpu")
    cached = settings(folder, table, f"conditions={tmp_path / 'cache'}")
    losses = {}
    for name, each in {"run": config, "cached": cached}.items():
        run_distill(each, tmp_path / name, resume=False, display=quiet, command="test")
        losses[name] = [row["loss"] for row in read_metrics(tmp_path / name)]
    np.testing.assert_allclose(losses["run"], losses["cached"], rtol=0.05)  # the cache is in bfloat16

    student = tmp_path / "run" / "student"
    other, image = (picture(tmp_path / f"image{i}.png", i, width=64) for i in (6, 5))
    others, ours = (
        np.asarray(run_sample(student, ["make it red"], steps=1, seed=0, guidance=None, device="cpu", image=each)[0])
        for each in (other, image)
    )
    card = json.loads((student / CARD).read_text())
    assert 'image=PIL.Image.open("image.png")' in (student / "README.md").read_text()
    pipe: Any = diffusers.Flux2KleinPipeline.from_pretrained(student)
    pipe.set_progress_bar_config(disable=True)
    teacher = load_teacher(config.teacher, "cpu")
    inputs = teacher.inputs(["make it red"], [generator(0, "sample", 0)])
    theirs = np.asarray(pipe(**inputs, image=Image.open(image), **card["calls"]["1"]).images[0])
    assert np.abs(ours.astype(int) - theirs).max() <= 1 < np.abs(ours.astype(int) - others).max()
    found = run_own([tmp_path / "run"], steps=[1], n=1, guidance=None, prompts=None, clip=None, out=None, device="cpu",
                    display=quiet)  # fmt: skip
    assert found
    before = load_file(next((folder / "transformer").glob("*.safetensors")))
    after = load_file(next((student / "transformer").glob("*.safetensors")))
    assert {name for name, value in before.items() if torch.equal(value, after[name])} == set()
