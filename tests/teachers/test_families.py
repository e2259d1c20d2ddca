"""Every family through the commands: doctor, encode, distil, sample, and the student in plain diffusers."""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import tiny_anima
import tiny_chroma
import tiny_ernie_image
import tiny_hunyuan
import tiny_hunyuan_image
import tiny_kandinsky
import tiny_prx
import tiny_qwen
import tiny_sana_video
import tiny_wan22
import tiny_z_image
import torch
from forms import cases
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2

from stepfold.commands.prompts import run_encode
from stepfold.config import TeacherSettings, load_config
from stepfold.display import Display
from stepfold.errors import UserError
from stepfold.jobs.distilling import run_distill
from stepfold.jobs.sampling import run_sample
from stepfold.maths.formulations import flow_time
from stepfold.prompts.conditions import cache_of, conditions_from
from stepfold.prompts.reading import open_prompts
from stepfold.randomness import generator, normal
from stepfold.sampling.consistency import sample_consistency
from stepfold.sampling.teacher import sample_teacher
from stepfold.sections import LoraSettings
from stepfold.students.card import CARD
from stepfold.students.loading import load_student
from stepfold.students.lora import LORA_WEIGHTS, lora_student
from stepfold.students.saving import save_whole
from stepfold.students.whole import as_student, new_student
from stepfold.teachers import lora_files
from stepfold.teachers.contract import Condition
from stepfold.teachers.folders import load_index
from stepfold.teachers.loading import choose_objective, load_any_pipeline, load_teacher
from stepfold.teachers.oracle import agreement
from stepfold.training import doctor
from stepfold.training.draws import guidance_scales
from stepfold.training.runs import read_metrics

SMALL = TeacherSettings(height=16, width=32, max_tokens=24)

FAMILIES: dict[str, Callable[[], Any]] = {
    "sd3": tiny.make_sd3,
    "pixart": tiny.make_pixart,
    "dit": tiny.make_dit,
    "sd 1": tiny.make_sd1,
    "sd 2": tiny.make_sd2,
    "sdxl": tiny.make_sdxl,
    "flux dev": tiny.make_flux,
    "flux schnell": partial(tiny.make_flux, guidance_embeds=False),
    "flux 2 klein": tiny.make_flux2_klein,
    "flux 2 dev": tiny.make_flux2,
    "lumina 2": tiny.make_lumina2,
    "wan": tiny.make_wan,
    "wan 2.2 ti2v": tiny_wan22.make_ti2v,
    "wan 2.2 a14b": tiny_wan22.make_a14b,
    "sana video": tiny_sana_video.make_sana_video,
    "hunyuan video": tiny_hunyuan.make_hunyuan_video,
    "kandinsky image": tiny_kandinsky.make_kandinsky_image,
    "kandinsky video": tiny_kandinsky.make_kandinsky_video,
    "sprint": tiny.make_sprint,
    "qwen image": tiny_qwen.make_qwen_image,
    "chroma": tiny_chroma.make_chroma,
    "longcat": tiny_qwen.make_longcat,
    "krea 2": tiny_qwen.make_krea2,
    "ernie-image": tiny_ernie_image.make_ernie_image,
    "prx": tiny_prx.make_prx,
    "z-image": tiny_z_image.make_z_image,
    "hunyuan image": tiny_hunyuan_image.make_hunyuan_image,
    "anima": tiny_anima.make_anima,
}
FRAMES = {"WanPipeline": 5, "SanaVideoPipeline": 5, "HunyuanVideo15Pipeline": 5, "Kandinsky5T2VPipeline": 5}
WITHOUT_LORA = ("pixart", "dit", "longcat", "hunyuan video", "prx")
WITHOUT_LORA += ("hunyuan image",)
SANAS = ("SanaPipeline", "SanaSprintPipeline", "SanaVideoPipeline")
TIME_TO_ONE = ("Lumina2Pipeline", "SanaPipeline", "SanaSprintPipeline", "AnimaModularPipeline")


NAMES = ("sana", *FAMILIES)
WITH_LORA = tuple(name for name in NAMES if name not in (*WITHOUT_LORA, "wan 2.2 a14b", "anima"))
"""Those whose LoRA is one file; of two networks see tests/export/test_experts.py, of a modular one test_anima.py."""


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline of the family that the test is parametrised with. Shared: copy it before changing anything."""
    if request.param == "sana":
        return tiny_sana
    return tiny.save(FAMILIES[request.param], tmp_path_factory.mktemp("family") / "pipeline")


def families(*short: str, of: tuple[str, ...] = NAMES) -> pytest.MarkDecorator:
    """All these families; `make test` has the `short` ones."""
    return pytest.mark.parametrize("folder", cases(of, short), indirect=True)


each_kind = families("sana", "sd 1", "wan")


def network_of(folder: Path) -> str:
    """The name of a pipeline's network."""
    return "unet" if (folder / "unet").exists() else "transformer"


def pipeline_of(folder: Path) -> str:
    """The class of a saved pipeline."""
    return load_index(str(folder))["_class_name"]


def loaded(kind: str, folder: Path) -> Any:
    """A pipeline of plain diffusers, with its parts."""
    pipe: Any = getattr(diffusers, kind).from_pretrained(str(folder))
    if isinstance(pipe, diffusers.ModularPipeline):
        pipe.load_components()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frames_of(folder: Path) -> int | None:
    """How many frames a pipeline of videos makes here."""
    return FRAMES.get(pipeline_of(folder))


def low(folder: Path, width: int) -> tuple[int, int]:
    """Height and width of a low picture: 16 pixels high, and where 32 is the least all is twice as large."""
    coarse = json.loads((folder / "vae" / "config.json").read_text()).get("scale_factor_spatial") == 16
    return (32, 2 * width) if coarse or pipeline_of(folder) in SANAS else (16, width)


def settings(folder: Path, prompts: Path, *sets: str) -> Any:
    return load_config(
        "default",
        [
            f"teacher.source={folder}", f"prompts={prompts}", "teacher.height=32", "teacher.width=32",
            f"teacher.frames={frames_of(folder) or 'null'}", "teacher.max_tokens=24", "space.route_steps=4",
            "space.filter_rule=off", "training.steps=3", "training.prompts_per_step=2", "training.preview_every=1000",
            "optimiser.name=adamw", "optimiser.lr=1e-3", "optimiser.warmup=0", "training.precision=no",
            "training.walk_precision=no", "objective=discrete", *sets,
        ],
    )  # fmt: skip


def idle(teacher: Any) -> tuple[str, ...]:
    """Parts of the names of what does not move; where nothing is told of guidance, its embedding is one."""
    return (*teacher.idle_parameters(), "guidance_embedder")


def pixels(made: Any) -> np.ndarray:
    """A picture, or a video, of pictures or [F, H, W, 3] in [0, 1], as a filmstrip, in whole numbers to 255."""
    if isinstance(made, list):
        return np.hstack([np.asarray(frame).astype(int) for frame in made])
    return np.asarray(made).astype(int) if isinstance(made, Image.Image) else np.hstack(255 * made).round().astype(int)


@pytest.mark.parametrize(
    ("folder", "objective"),
    cases(
        product(NAMES, ("discrete", "continuous")),
        short=[("sana", "continuous"), ("dit", "discrete")],
    ),
    indirect=["folder"],
)
def test_a_teacher_is_distilled_and_its_student_drawn(
    folder: Path, prompts_file: Path, tmp_path: Path, objective: str
) -> None:
    """From folder and prompts to a student; plain diffusers draws the same picture, called as the card says."""
    config, run = settings(folder, prompts_file, f"objective={objective}"), tmp_path / "run"
    run_distill(config, run, resume=False, display=Display(quiet=True), command="test")
    assert all(math.isfinite(row["loss"]) for row in read_metrics(run)) and len(read_metrics(run)) == 3
    teacher = load_teacher(config.teacher, "cpu")
    before, after = (load_file(next((f / network_of(f)).glob("*.safetensors"))) for f in (folder, run / "student"))
    unmoved = {name for name, value in after.items() if name in before and torch.equal(value, before[name])}
    trained = {name for name, _ in teacher.transformer.named_parameters()}
    assert {n for n in unmoved & trained if not any(part in f".{n}" for part in idle(teacher))} == set()

    card = json.loads((run / "student" / CARD).read_text())
    (ours,) = run_sample(run / "student", ["red heart"], steps=1, seed=0, guidance=None, device="cpu")
    pipe = loaded(card["pipeline"], run / "student")
    inputs = teacher.inputs(["red heart"], [generator(0, "sample", 0)])
    theirs = pixels(getattr(pipe(**inputs, **card["calls"]["1"]), card["output"])[0])
    assert theirs.shape == (32, 32 * teacher.frames, 3)
    assert np.abs(pixels(ours) - theirs).max() <= 1


def contents(condition: Condition) -> torch.Tensor:
    """All that a network may read of one condition, in one vector."""
    pooled = () if condition.pooled is None else (condition.pooled.flatten(),)
    return torch.cat([condition.embeds[condition.mask.bool()].flatten(), *pooled])


@families("sana")
def test_conditions_from_disk_are_those_of_the_encoders(folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    config = settings(folder, prompts_file)
    run_encode(config.teacher, prompts_file, tmp_path / "cache", batch=5, display=Display(quiet=True), device="cpu")
    cached = settings(folder, prompts_file, f"conditions={tmp_path / 'cache'}")
    losses = []
    for name, each in (("whole", config), ("cached", cached)):
        run_distill(each, tmp_path / name, resume=False, display=Display(quiet=True), command="test")
        losses.append([row["loss"] for row in read_metrics(tmp_path / name)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.05)  # the cache is in bfloat16

    teacher, prompts = load_teacher(config.teacher, "cpu"), open_prompts(prompts_file)
    numbers = list(range(len(prompts)))
    from_disk = conditions_from(cache_of(cached, prompts), teacher, prompts)(numbers)
    encoded = teacher.encode([prompts.prompt(i) for i in numbers])
    rows = [(contents(from_disk.rows(slice(i, i + 1))), contents(encoded.rows(slice(i, i + 1)))) for i in numbers]
    for i, (found, wanted) in enumerate(rows):
        of_the_next = rows[i - 1][1]
        assert found.shape == wanted.shape and (found - wanted).norm() < 0.01 * wanted.norm()
        assert found.shape != of_the_next.shape or (found - of_the_next).norm() > 0.03 * wanted.norm()


def still(teacher: Any, name: str) -> bool:
    """Whether a LoRA matrix belongs to a layer that does not move."""
    return any(part.rstrip(".") in f".{name}" for part in idle(teacher))


@families("sana", "sd 1", "flux dev", "dit")
def test_doctor_understands_it(folder: Path) -> None:
    height, width = (None, None) if pipeline_of(folder) == "DiTPipeline" else low(folder, 32)
    size = {"height": height, "width": width}
    teacher = SMALL.model_copy(update={"source": str(folder), "frames": frames_of(folder)} | size)
    findings = {finding.check: finding for finding in doctor.examine(teacher, "cpu")}
    assert {check for check, finding in findings.items() if not finding.ok} == set()
    assert any(check.startswith("schedule = that of ") for check in findings)
    beside = re.match(r"relative difference (\S+) \(one_pass\)", findings["tangent backends agree"].number)
    assert beside and float(beside[1]) <= 1e-4
    moved = re.fullmatch(r"(\d+) of (\d+) tensors", findings["one step changes the weights"].number)
    wanted = re.fullmatch(r">= (\d+)", findings["one step changes the weights"].want)
    assert moved and wanted and int(wanted[1]) <= int(moved[1]) <= int(moved[2])


@families("sana", of=WITH_LORA)
def test_a_lora_student_shares_its_teachers_weights(folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    config = settings(folder, prompts_file, "student.lora=4", "training.steps=4", "training.checkpoint_every=2")
    run = tmp_path / "run"
    run_distill(config, run, resume=False, display=Display(quiet=True), command="test")
    teacher = load_teacher(config.teacher, "cpu")
    student = lora_student(teacher, 4)
    trained = [p for p in student.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) < 0.5 * sum(p.numel() for p in teacher.transformer.parameters())
    theirs = {p.data_ptr() for p in teacher.transformer.parameters()}
    assert theirs <= {p.data_ptr() for p in student.parameters()}  # one copy of the backbone
    saved = load_file(run / "checkpoints" / "000004" / "student.safetensors")
    assert saved.keys() == student.state_dict().keys() - student.shared
    matrices = {name: value for name, value in saved.items() if "lora_" in name}
    assert {n for n, value in matrices.items() if "lora_B" in n and not value.any() and not still(teacher, n)} == set()

    # Plain diffusers: the teacher's own pipeline, the LoRA, the scheduler.
    card = json.loads((run / "student" / CARD).read_text())
    pipe: Any = getattr(diffusers, card["pipeline"]).from_pretrained(folder)
    pipe.scheduler = getattr(diffusers, card["scheduler"]).from_pretrained(run / "student" / "scheduler")
    pipe.set_progress_bar_config(disable=True)
    plain = teacher.latents_of(pipe, ["red heart"], [generator(0, "sample", 0)], **card["calls"]["1"])
    pipe.load_lora_weights(run / "student")
    drawn = teacher.latents_of(pipe, ["red heart"], [generator(0, "sample", 0)], **card["calls"]["1"])
    noise = torch.stack([normal(teacher.latent_shape, 0, "sample", 0)])
    assert (drawn - plain).abs().max() > 1e-4
    again, read, read_back = load_student(run / "student", "cpu")
    guidance = read_back.recipe.guidance
    x0 = sample_consistency(
        read, 0.5 * noise, again.encode(["red heart"]), torch.full((1,), guidance),
        again.student_times(1, "consistency"), torch.zeros_like, 0.5,
    )  # fmt: skip
    nearly = 1e-3 if teacher.rounds else 1e-4
    torch.testing.assert_close(drawn, x0 / 0.5, rtol=nearly, atol=nearly)

    # Adapter off: the teacher, as it was.
    state = noise, torch.ones(1), again.encode(["red heart"]), torch.full((1,), guidance)
    with torch.no_grad():
        own, taught = as_student(teacher)(*state), read(*state)
        read.transformer.disable_adapters()
        assert not torch.allclose(taught, own, atol=1e-4) and torch.equal(read(*state), own)

    # From the checkpoint before, to the bit.
    resumed = tmp_path / "resumed"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoints" / "000004")
    run_distill(config, resumed, resume=True, display=Display(quiet=True), command="test")
    before, after = (load_file(folder / "student" / LORA_WEIGHTS) for folder in (run, resumed))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("family", WITHOUT_LORA)
def test_a_pipeline_that_loads_no_lora_gets_none(family: str, prompts_file: Path, tmp_path: Path) -> None:
    folder = tiny.save(FAMILIES[family], tmp_path / "pipeline")
    for change in ("student.lora=4", f"teacher.lora={tmp_path / 'some.safetensors'}"):
        config = settings(folder, prompts_file, change)
        with pytest.raises(UserError, match=r"(PixArtSigma|DiT|LongCatImage|HunyuanVideo15|HunyuanImage|PRX)Pipeline"):
            run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scheduler", [diffusers.EDMEulerScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()])
def test_a_unet_on_another_schedule_is_refused(scheduler: Any, tmp_path: Path) -> None:
    """It was taken for noise prediction on DDPM's default betas."""
    folder = tiny.save(tiny.make_sdxl, tmp_path / "pipeline")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.scheduler = scheduler
    pipe.save_pretrained(folder)
    with pytest.raises(UserError, match=f"{type(scheduler).__name__}.* that predict noise or v are understood, with"):
        load_teacher(TeacherSettings(source=str(folder)), "cpu")


def test_a_schedule_that_ends_in_pure_noise_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tiny.make_pixart, tmp_path / "pipeline")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rescale_betas_zero_snr": True}))
    with pytest.raises(UserError, match="zero terminal signal-to-noise"):
        load_teacher(TeacherSettings(source=str(folder)), "cpu")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_train_timesteps": 990}))
    with pytest.raises(UserError, match=r"has 990 steps, .* LCMScheduler, needs a multiple of 50; give"):
        load_teacher(TeacherSettings(source=str(folder)), "cpu")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Writes a part's weights again."""
    (file,) = folder.glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pipeline_whose_files_lack_a_weight_is_refused(part: str, tmp_path: Path) -> None:
    """The libraries warn, and go on with a random one or with none."""
    folder = tiny.save(tiny.make_sd1, tmp_path / "pipeline")
    change_weights(folder / part, lambda state: dict(sorted(state.items())[:-1]))
    refused = pytest.raises(UserError, match=rf"its part '{part}' lack 1 of the weights of a \w+, such as .*; copy the")
    with refused:
        load_teacher(TeacherSettings(source=str(folder)), "cpu")
    with refused:
        load_any_pipeline(folder, "cpu")
    if part != "unet":  # read when they are needed
        null = load_teacher(
            TeacherSettings(source=str(tiny.save(tiny.make_sd1, tmp_path / "whole"))), "cpu"
        ).null_condition
        teacher = load_teacher(TeacherSettings(source=str(folder)), "cpu", network_only=True, null=null)
        with refused:
            teacher.decode(torch.zeros(1, *teacher.latent_shape)) if part == "vae" else teacher.encode(["red heart"])


def test_weights_under_older_names_are_all_there(tmp_path: Path) -> None:
    """As published for Stable Diffusion 1: the autoencoder's attention, and the text encoder with a buffer more."""
    folder = tiny.save(tiny.make_sd1, tmp_path / "pipeline")
    older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def of_then(name: str) -> str:
        return re.sub(r"\.to_(q|k|v|out\.0)\.", lambda found: older[found[0]], name)

    def pictures() -> torch.Tensor:
        teacher = load_teacher(TeacherSettings(source=str(folder)), "cpu")
        x = normal(teacher.latent_shape, 0, "test")[None]
        condition, t = teacher.encode(["red heart"]), torch.tensor([1.0])
        return teacher.decode(teacher.velocity(x, t, condition, torch.tensor([3.0])))

    before = pictures()
    change_weights(folder / "vae", lambda state: {of_then(name): value for name, value in state.items()})
    prefix, positions = "text_model.", {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    change_weights(
        folder / "text_encoder",
        lambda state: positions | {prefix + name.removeprefix(prefix): value for name, value in state.items()},
    )
    assert torch.equal(pictures(), before)


@families("sana", "sd 1", of=WITH_LORA)
def test_a_lora_on_the_teacher_is_merged_into_it(folder: Path, tmp_path: Path) -> None:
    """The merged teacher's samples are those of its pipeline with the LoRA loaded."""
    kind = getattr(diffusers, pipeline_of(folder))
    pipe: Any = kind.from_pretrained(folder)
    network = getattr(pipe, network_of(folder))
    layers = [
        n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and ("block" in n or "layers." in n)
    ]
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=layers, init_lora_weights=False))
    matrices = {f"{network_of(folder)}_lora_layers": get_peft_model_state_dict(network)}
    kind.save_lora_weights(tmp_path, **matrices)

    source = TeacherSettings(
        source=str(folder), height=32, width=32, frames=frames_of(folder), max_tokens=24
    )  # fmt: skip
    merging = source.model_copy(update={"lora": (LoraSettings(source=str(tmp_path)),)})
    plain, merged = load_teacher(source, "cpu"), load_teacher(merging, "cpu")
    noise, scale = torch.stack([normal(plain.latent_shape, 0, "test", 0)]), plain.default_guidance
    condition, scales = merged.encode(["red heart"]), torch.full((1,), scale)
    if pipeline_of(folder) == "SanaSprintPipeline":  # it walks with SCMScheduler alone: one step of its own
        times = merged.student_times(1, "consistency")
        without, theirs = (
            plain.latents_of(
                each, ["red heart"], [generator(0, "test", 0)], **plain.student_call(times, scale, "consistency")
            )
            for each in (plain.pipe, pipe)
        )
        ours = sample_consistency(as_student(merged), 0.5 * noise, condition, scales, times, torch.zeros_like, 0.5)
    else:
        without = plain.pipeline_latents(["red heart"], [generator(0, "test", 0)], scale, 2)
        merged_pipe, merged.pipe = merged.pipe, pipe  # the same loop, around the pipeline that only loaded the LoRA
        theirs = merged.pipeline_latents(["red heart"], [generator(0, "test", 0)], scale, 2)
        merged.pipe = merged_pipe
        ours = sample_teacher(merged, 0.5 * noise, condition, scales, 2, even=merged.even_ladder)
    nearly = 1e-3 if merged.rounds else 1e-4
    assert (ours / 0.5 - theirs).norm() / theirs.norm() < nearly < (without - theirs).norm() / theirs.norm()


@pytest.mark.parametrize(
    ("folder", "lora"), cases(product(WITH_LORA, (0, 4)), short=[("sana", 0)]), indirect=["folder"]
)
def test_a_teacher_in_bfloat16(folder: Path, prompts_file: Path, tmp_path: Path, lora: int) -> None:
    """Its weights take half the memory; it walks about as before, and its student learns in float32."""
    config = settings(folder, prompts_file, "teacher.dtype=bfloat16", f"student.lora={lora}", "training.steps=2")
    whole = load_teacher(config.teacher.model_copy(update={"dtype": "float32"}), "cpu")
    half = load_teacher(config.teacher, "cpu")
    kept = half.transformer._keep_in_fp32_modules or ()  # by diffusers, as the class says
    assert {p.dtype for n, p in half.transformer.named_parameters() if not any(part in n for part in kept)} == {
        torch.bfloat16
    }
    x, t = 0.5 * torch.randn(2, *whole.latent_shape), torch.tensor([0.5, 1.2])
    condition, guidance = whole.encode(["red heart", "a cat"]), torch.full((2,), 2.0)
    exact = whole.velocity(x, t, condition, guidance)
    rough = half.velocity(x, t, half.encode(["red heart", "a cat"]), guidance)
    assert rough.dtype == torch.float32 and 0 < (rough - exact).norm() / exact.norm() < 0.2
    student = lora_student(half, 4) if lora else new_student(half)
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
    run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
    assert all(math.isfinite(row["loss"]) for row in read_metrics(tmp_path / "run"))
    (picture,) = run_sample(tmp_path / "run" / "student", ["red heart"], steps=1, seed=0, guidance=None, device="cpu")
    assert np.asarray(picture).std() > 1


@pytest.mark.parametrize(
    ("family", "encoders"),
    cases(
        [
            ("sd 1", ["text_encoder"]),
            ("sdxl", ["text_encoder", "text_encoder_2"]),
            ("sd3", ["text_encoder", "text_encoder_2"]),
            ("flux dev", ["text_encoder"]),
        ],
        short=[("sdxl", ["text_encoder", "text_encoder_2"])],
    ),
)
def test_a_student_has_the_loras_of_all_text_encoders(family: str, encoders: list[str], tmp_path: Path) -> None:
    """Plain diffusers loads the student with text encoders that answer as the teacher's with its LoRA."""
    folder = tiny.save(FAMILIES[family], tmp_path / "pipeline")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    tokens = torch.arange(4, 12)[None]
    before = [getattr(pipe, name)(tokens)[0] for name in encoders]
    tiny.save_text_lora(pipe, encoders, tmp_path / "lora")
    wanted = [getattr(pipe, name)(tokens)[0] for name in encoders]
    teacher = load_teacher(TeacherSettings(source=str(folder), lora=str(tmp_path / "lora")), "cpu")
    save_whole(teacher, new_student(teacher), tmp_path / "student", tiny.recipe(teacher))
    student = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    for name, plain, expected in zip(encoders, before, wanted, strict=True):
        assert not torch.allclose(plain, expected, atol=1e-2)
        torch.testing.assert_close(getattr(student, name)(tokens)[0], expected)


def test_a_lora_of_which_nothing_is_taken_is_refused(tiny_sana: Path, tmp_path: Path) -> None:
    """diffusers warns and goes on without it."""
    folder = tiny.save(tiny.make_sd1, tmp_path / "pipeline")
    tiny.save_text_lora(diffusers.StableDiffusionPipeline.from_pretrained(folder), ["text_encoder"], tmp_path / "lora")
    with pytest.raises(
        UserError, match=r"SanaPipeline has no place for \d of its \d layers, such as text_encoder\S+; .*, or a copy"
    ):
        load_teacher(TeacherSettings(source=str(tiny_sana), lora=str(tmp_path / "lora")), "cpu")


@pytest.mark.parametrize(
    ("part", "dtype"),
    cases(
        product(("unet", "text_encoder"), ("float32", "bfloat16")),
        short=[("unet", "float32"), ("text_encoder", "bfloat16")],
    ),
)
def test_a_lora_of_which_some_is_not_taken_is_refused(part: str, dtype: Any, tmp_path: Path) -> None:
    """diffusers warns and goes on without those weights. The file is as kohya's scripts write it, in half precision."""
    folder = tiny.save(tiny.make_sd1, tmp_path / "pipeline")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    layers = ("to_q", "q_proj", "out_proj")
    state = {
        f"lora_{name}_{layer.replace('.', '_')}.{key}": value.half()
        for name, network in (("unet", pipe.unet), ("te", pipe.text_encoder))
        for layer, module in network.named_modules()
        if layer.endswith(layers)
        for key, value in {
            "lora_down.weight": torch.randn(2, module.in_features),
            "lora_up.weight": torch.randn(module.out_features, 2),
            "alpha": torch.tensor(1.0),
        }.items()
    }
    settings = TeacherSettings(source=str(folder), lora=str(tmp_path / "kohya.safetensors"), dtype=dtype)
    save_file(state, tmp_path / "kohya.safetensors")
    load_teacher(settings, "cpu")

    start = {"unet": "lora_unet_down", "text_encoder": "lora_te"}[part]
    layer = next(name for name in state if name.startswith(start)).split(".")[0]
    elsewhere = re.sub(r"_(blocks|layers)_0_", r"_\1_7_", layer, count=1)
    assert elsewhere != layer
    for key in ("lora_down.weight", "lora_up.weight", "alpha"):
        state[f"{elsewhere}.{key}"] = state[f"{layer}.{key}"] + 1
    save_file(state, tmp_path / "kohya.safetensors")
    with pytest.raises(
        UserError, match=rf"no place for 1 of its \d+ layers, such as {elsewhere}; .*, or a copy without"
    ):
        load_teacher(settings, "cpu")


@pytest.mark.long
def test_a_lora_on_the_text_encoder_counts_with_conditions_from_disk(prompts_file: Path, tmp_path: Path) -> None:
    """The pipeline has no text encoder then until the LoRA is merged."""
    folder = tiny.save(tiny.make_sd1, tmp_path / "pipeline")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    tiny.save_text_lora(pipe, ["text_encoder"], tmp_path / "lora")

    config = settings(folder, prompts_file, f"teacher.lora={tmp_path / 'lora'}", "training.steps=1")
    run_encode(config.teacher, prompts_file, tmp_path / "cache", batch=5, display=Display(quiet=True), device="cpu")
    cached = config.model_copy(update={"conditions": str(tmp_path / "cache")})
    run_distill(cached, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
    (plain,), (merged,) = (
        (folder_ / "text_encoder").glob("*.safetensors") for folder_ in (folder, tmp_path / "run" / "student")
    )
    a, b = load_file(plain), load_file(merged)
    changed = {name.split(".")[-2] for name in a if not torch.equal(a[name], b[name])}
    assert changed == {"q_proj", "v_proj"}


def test_a_lora_that_cannot_be_fetched_is_what_the_error_names(
    tiny_sana: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unreachable(Exception):
        """The hub's client has its own kinds."""

    def fails(*args: object, **settings: object) -> None:
        raise Unreachable("[Errno -2] Name or service not known")

    monkeypatch.setattr(lora_files.HfApi, "list_repo_files", fails)
    with pytest.raises(UserError, match=r"LoRA 'you/lora' does not load \(\[Errno -2\] Name or service not known\)"):
        load_teacher(TeacherSettings(source=str(tiny_sana), lora="you/lora"), "cpu")


@pytest.mark.parametrize("name", WITHOUT_LORA)
def test_a_pipeline_that_loads_no_lora_says_so(name: str, tmp_path: Path) -> None:
    folder = tiny.save(FAMILIES[name], tmp_path / "pipeline")
    with pytest.raises(UserError, match=rf"{pipeline_of(folder)} loads no LoRA; give a teacher with it merged"):
        load_teacher(TeacherSettings(source=str(folder), lora="x"), "cpu")


def test_sd3_draws_no_larger_than_its_table_of_positions(tmp_path: Path) -> None:
    folder = tiny.save(tiny.make_sd3, tmp_path / "pipeline")
    with pytest.raises(UserError, match=r"draws at most \d+ a side; give a smaller height and width"):
        load_teacher(TeacherSettings(source=str(folder), height=4096, width=32), "cpu")


def test_a_lora_that_does_not_fit_is_one_line(tiny_sana: Path, tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "nothing.safetensors"):
        with pytest.raises(UserError, match="does not load") as caught:
            load_teacher(TeacherSettings(source=str(tiny_sana), lora=str(source)), "cpu")
        assert "\n" not in str(caught.value)


@families("flux dev")
def test_several_scales_need_a_network_that_can_be_told(folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    config = settings(folder, prompts_file, "space.guidance=[3.0, 5.0]")
    teacher = load_teacher(config.teacher, "cpu")
    if teacher.guidance_kind == "none":
        with pytest.raises(UserError, match=r"space\.guidance is \[3\.0, 5\.0\], but this teacher has no guidance"):
            run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
        assert not (tmp_path / "run").exists()
    elif teacher.student_reads_guidance:
        run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
    else:
        with pytest.raises(UserError, match=r"has 2 scales, but this student's network takes none.*give one, for"):
            run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
        assert not (tmp_path / "run").exists()


@families("sd 1", "z-image")
def test_a_scale_that_leaves_the_prompt_out_is_refused(folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    """In diffusers 0 is guidance turned off; a student of it had never seen a prompt. Z-Image's own 0 is that."""
    teacher = load_teacher(settings(folder, prompts_file).teacher, "cpu")
    config = settings(folder, prompts_file, f"space.guidance=[{teacher.no_guidance - 1:g}]")
    if teacher.guidance_kind == "classifier_free":
        with pytest.raises(
            UserError, match=f"leaves the prompt out; give {teacher.no_guidance:g}, which turns guidance"
        ):
            run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
        assert not (tmp_path / "run").exists()
        assert guidance_scales(settings(folder, prompts_file, f"space.guidance=[{teacher.no_guidance:g}]"), teacher)


@pytest.mark.parametrize("family", cases(("flux schnell", "sd 1"), short=["flux schnell"]))
def test_a_student_of_a_teacher_without_guidance_says_no_scale(family: str, prompts_file: Path, tmp_path: Path) -> None:
    """FLUX schnell has none, others may be told to go without: no scale is taught, and none is on the card."""
    folder = tiny.save(FAMILIES[family], tmp_path / "pipeline")
    config = settings(folder, prompts_file, "teacher.guidance=none", "training.steps=1")
    scaled = config.model_copy(update={"space": config.space.model_copy(update={"guidance": (7.0,)})})
    with pytest.raises(UserError, match=r"space\.guidance is \[7\.0\], but this teacher has no guidance .*=null\)"):
        run_distill(scaled, tmp_path / "refused", resume=False, display=Display(quiet=True), command="test")
    run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
    recipe = json.loads((tmp_path / "run" / "student" / CARD).read_text())["recipe"]
    assert recipe["taught"] == [1.0] and recipe["guidance"] == 1.0


@pytest.mark.parametrize("family", cases(("flux dev", "flux schnell"), short=["flux schnell"]))
def test_a_flux_that_was_tuned_back_has_classifier_free_guidance(
    family: str, prompts_file: Path, tmp_path: Path
) -> None:
    """Beside the pipeline's own; a student of one scale, that plain diffusers calls with none."""
    folder = tiny.save(FAMILIES[family], tmp_path / "pipeline")
    config = settings(folder, prompts_file, "teacher.guidance=classifier_free", "space.guidance=[2.5]")
    teacher = load_teacher(config.teacher, "cpu")
    prompts = ["red heart", "a cat"]
    found = agreement(teacher, prompts, teacher.encode(prompts), torch.full((2,), 2.5), num_steps=4)
    assert found.network < 1e-4
    run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
    card = json.loads((tmp_path / "run" / "student" / CARD).read_text())
    assert card["recipe"]["taught"] == [2.5] and card["calls"]["1"]["guidance_scale"] == 1


@pytest.mark.parametrize(("family", "tokens"), [("flux dev", 512), ("flux schnell", 256)])
def test_flux_reads_as_many_tokens_as_its_authors_do(family: str, tokens: int, tmp_path: Path) -> None:
    folder = tiny.save(FAMILIES[family], tmp_path / "pipeline")
    assert load_teacher(TeacherSettings(source=str(folder)), "cpu").max_tokens == tokens


@pytest.mark.parametrize("family", ["sd 1", "sdxl"])
def test_a_prompt_is_no_longer_than_the_pipeline_reads(family: str, tmp_path: Path) -> None:
    """More was ignored, but for conditions that compiled runs pad to it, and the padding was attended to."""
    folder = tiny.save(FAMILIES[family], tmp_path / "pipeline")
    with pytest.raises(UserError, match=r"max_tokens is 100, but this pipeline reads 77 tokens of a prompt; leave it"):
        load_teacher(TeacherSettings(source=str(folder), max_tokens=100), "cpu")


def test_a_tokenizer_of_sentencepiece_alone_is_read(tmp_path: Path) -> None:
    """As PixArt's folders are published: spiece.model, and no tokenizer.json."""
    folder = tiny.save(tiny.make_pixart, tmp_path / "pipeline")
    wanted = load_teacher(SMALL.model_copy(update={"source": str(folder)}), "cpu").encode(["a red door, 3 cats"])
    model = sentencepiece_model_pb2.ModelProto()
    for i, (piece, score) in enumerate(tiny.T5_PIECES):
        model.pieces.add(piece=piece, score=score, type=(3, 3, 2)[i] if i < 3 else 1)  # two of control, unknown
    trainer = model.trainer_spec
    trainer.model_type, trainer.pad_id, trainer.eos_id, trainer.unk_id, trainer.bos_id = 1, 0, 1, 2, -1
    model.normalizer_spec.name = "identity"
    (folder / "tokenizer" / "spiece.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer" / "tokenizer.json").unlink()
    found = load_teacher(SMALL.model_copy(update={"source": str(folder)}), "cpu").encode(["a red door, 3 cats"])
    assert torch.equal(found.embeds, wanted.embeds) and torch.equal(found.mask, wanted.mask)


def test_captions_of_pixart_are_cleaned_wherever_it_runs(tmp_path: Path) -> None:
    """Its pipeline cleans them where two packages are there, and only warns where they are not."""
    folder = tiny.save(tiny.make_pixart, tmp_path / "pipeline")
    teacher = load_teacher(SMALL.model_copy(update={"source": str(folder)}), "cpu")
    plain, marked = (teacher.encode([text]) for text in ("a fox cat", "a <b>fox</b> &amp; cat"))
    assert torch.equal(plain.embeds, marked.embeds)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("no module named 'sentencepiece'"), "sentencepiece'; install what it names"),
        (OSError("no file named model.safetensors"), "copy the whole folder again"),
        (KeyError("in_channels"), "in_channels'; what its configs say does not fit"),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), None),
    ],
)
def test_advice_fits_what_went_wrong(
    error: Exception, said: str | None, tiny_sana: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving a folder again mends no missing package, no missing file and no GPU."""

    def fails(*args: object, **settings: object) -> None:
        raise error

    monkeypatch.setattr(diffusers.SanaPipeline, "from_pretrained", fails)
    expected = pytest.raises(UserError, match=said) if said else pytest.raises(torch.AcceleratorError)
    with expected:
        load_teacher(TeacherSettings(source=str(tiny_sana)), "cpu")


@each_kind
def test_a_walk_at_another_size_is_that_of_a_teacher_made_for_it(folder: Path, prompts_file: Path) -> None:
    """Nothing that the size decides is fixed when the teacher is made: positions, sizes that the network is told."""
    base = settings(folder, prompts_file).teacher
    if pipeline_of(folder) == "DiTPipeline":
        with pytest.raises(UserError, match="16 x 48 pixels, but this network draws at one size only"):
            load_teacher(base.model_copy(update={"sizes": ((32, 32), (16, 48))}), "cpu")
        return
    height, width = low(folder, 48)
    both = load_teacher(base.model_copy(update={"sizes": ((32, 32), (height, width))}), "cpu")
    wide = load_teacher(base.model_copy(update={"height": height, "width": width}), "cpu")
    assert both.latent_shapes == (both.latent_shape, wide.latent_shape) and both.latent_shape != wide.latent_shape
    x, t = 0.5 * torch.randn(2, *wide.latent_shape), torch.tensor([0.5, 1.2])
    condition, scale = both.encode(["red heart", "a cat"]), torch.full((2,), both.default_guidance)
    torch.testing.assert_close(both.velocity(x, t, condition, scale), wide.velocity(x, t, condition, scale))
    torch.testing.assert_close(both.black_latent(wide.latent_shape), wide.black_latent(wide.latent_shape))
    with pytest.raises(
        UserError, match=r"width is 17, but this pipeline needs a multiple of|32 x 17 pixels, but .* alone"
    ):
        load_teacher(base.model_copy(update={"sizes": ((32, 17),)}), "cpu")


@families("sana")
def test_a_run_at_several_sizes(folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    """One is drawn for every step, walks are filtered by the black picture of their size, and the student is saved."""
    if pipeline_of(folder) == "DiTPipeline":
        pytest.skip("it draws at one size")
    height, width = low(folder, 48)
    config = settings(
        folder, prompts_file, f"teacher.sizes=[[32,32],[{height},{width}]]", "training.steps=6",
        "space.filter_rule=random", "space.filter_threshold=0.01",
    )  # fmt: skip
    run = tmp_path / "run"
    run_distill(config, run, resume=False, display=Display(quiet=True), command="test")
    assert all(math.isfinite(row["loss"]) for row in read_metrics(run))
    (picture,) = run_sample(run / "student", ["red heart"], steps=1, seed=0, guidance=None, device="cpu")
    assert picture.size == (32 * (frames_of(folder) or 1), 32)


@each_kind
def test_the_objective_follows_the_networks_time(folder: Path, tiny_sana: Path, prompts_file: Path) -> None:
    """Left to itself a run has no tangent where dF/dt explodes; what is asked for is done."""
    fast = pipeline_of(folder) not in TIME_TO_ONE
    left = settings(folder, prompts_file, "objective=auto")
    assert choose_objective(left).objective == ("discrete" if fast else "continuous")
    assert choose_objective(settings(tiny_sana, prompts_file, "objective=auto")).objective == "continuous"
    asked = settings(folder, prompts_file, "objective=continuous")
    assert choose_objective(asked) is asked


def test_frames_are_for_videos(tiny_sana: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher\.frames is 5, but SanaPipeline makes pictures; leave it out"):
        load_teacher(TeacherSettings(source=str(tiny_sana), frames=5), "cpu")
    folder = tiny.save(tiny.make_wan, tmp_path / "pipeline")
    with pytest.raises(UserError, match=r"teacher\.frames is 6, but this pipeline needs a multiple of 4 and one more"):
        load_teacher(TeacherSettings(source=str(folder), frames=6), "cpu")
    usual = load_teacher(TeacherSettings(source=str(folder)), "cpu")
    assert (usual.frames, usual.height, usual.width) == (81, 480, 832) and usual.latent_shape == (4, 21, 60, 104)


@pytest.mark.parametrize("change", [{"boundary_ratio": 0.9}, {"transformer_2": ["diffusers", "X"]}])
def test_wan_of_another_kind_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = tiny.save(tiny.make_wan, tmp_path / "pipeline")
    (folder / "transformer_2").mkdir()
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(UserError, match=r"has one of transformer_2 and boundary_ratio .*; copy that file") as caught:
        load_teacher(TeacherSettings(source=str(folder)), "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("FluxInpaintPipeline", r" \(it fills a part of an image; give the .*\);"),
        ("LTX2Pipeline", r" \(each step moves video and sound together, .*; give a model of videos alone\);"),
        ("LTX2ImageToVideoPipeline", r" \(it starts from an image; .*\);"),
        ("Kandinsky5I2IPipeline", r" \(it edits an image; give the .*\);"),
        ("Flux2KleinKVPipeline", r" \(it caches the keys of images .* without KV and save it again\);"),
        ("AuraFlowPipeline", ";"),
        (None, ";"),
        (3, ";"),
    ],
)
def test_a_pipeline_that_is_no_teacher_is_told_why(kind: Any, reason: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(UserError, match=rf"is a {kind}{reason} this version distils SanaPipeline") as caught:
        load_teacher(TeacherSettings(source=str(tmp_path)), "cpu")
    assert "\n" not in str(caught.value)


def test_a_wan_that_tells_each_token_its_time_stays_one(tmp_path: Path) -> None:
    """The student's pipeline is called as the teacher's is; other patches than the pipeline counts are refused."""
    folder = tiny.save(tiny_wan22.make_ti2v, tmp_path / "pipeline")
    teacher = load_teacher(TeacherSettings(source=str(folder)), "cpu")
    assert (teacher.latent_shape, teacher.pipe.config.expand_timesteps) == ((6, 21, 30, 52), True)
    save_whole(teacher, new_student(teacher), tmp_path / "student", tiny.recipe(teacher))
    assert json.loads((tmp_path / "student" / "model_index.json").read_text())["expand_timesteps"] is True
    other = tiny.save(partial(tiny_wan22.make_ti2v, patch_size=(1, 1, 1)), tmp_path / "other")
    with pytest.raises(UserError, match=r"has patch_size=\(1, 1, 1\), but with expand_timesteps .*; set expand_times"):
        load_teacher(TeacherSettings(source=str(other)), "cpu")


def test_a_sana_video_of_another_autoencoder_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tiny_sana_video.make_sana_video, tmp_path / "pipeline")
    index = folder / "model_index.json"
    vae = {"vae": ["diffusers", "AutoencoderKLLTX2Video"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | vae))
    with pytest.raises(UserError, match=r"has an AutoencoderKLLTX2Video, and .*; give one of 480p") as caught:
        load_teacher(TeacherSettings(source=str(folder)), "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"start": 0.2}, {"use_original_formulation": True}, {"guidance_rescale": 0.7}, {"enabled": False}]
)
def test_a_guider_with_another_rule_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = tiny.save(tiny_hunyuan.make_hunyuan_video, tmp_path / "pipeline")
    config = folder / "guider" / "guider_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(
        UserError, match=rf"has a ClassifierFreeGuidance with {next(iter(change))}; give it a"
    ) as caught:
        load_teacher(TeacherSettings(source=str(folder)), "cpu")
    assert "\n" not in str(caught.value)


NO_PROJECTION = {"adaptive_projected_guidance_scale": 1.0}


def mix(**options: Any) -> diffusers.AdaptiveProjectedMixGuidance:
    """A guider as published, at its defaults but for `options`."""
    return diffusers.AdaptiveProjectedMixGuidance(guidance_scale=3.5, **options)


def hunyuan_image(**guiders: Any) -> Any:
    pipe = tiny_hunyuan_image.make_hunyuan_image()
    return type(pipe)(**pipe.components | guiders)


@pytest.mark.parametrize(
    ("guiders", "said"),
    [
        ({"guider": mix()}, r"late steps of its guider depend .*; write .*: 1 into guider/guider_config.json"),
        ({"ocr_guider": mix()}, r"late steps of its ocr_guider depend .*; write .*: 1 into ocr_guider/guider_con"),
        ({"guider": mix(**NO_PROJECTION, start=0.1)}, "has a AdaptiveProjectedMixGuidance with start; give it a Class"),
        ({"guider": None}, "has no guider, as pipelines of distilled networks; give the model"),
        (
            {"ocr_guider": mix(**NO_PROJECTION).new(guidance_scale=5.0)},
            r"has guiders of scales 3\.5 and 5\.0; write one guidan",
        ),
    ],
)
def test_guiders_that_are_no_velocity_are_refused(tmp_path: Path, guiders: dict[str, Any], said: str) -> None:
    """Guidance with a momentum depends on the steps before; two scales would need to know which prompt is asked for."""
    folder = tiny.save(partial(hunyuan_image, **guiders), tmp_path / "pipeline")
    with pytest.raises(UserError, match=said) as caught:
        load_teacher(SMALL.model_copy(update={"source": str(folder)}), "cpu")
    assert "\n" not in str(caught.value)


def test_a_mixed_guider_without_projection_is_plain_guidance(tmp_path: Path) -> None:
    """As a published folder is with that one option, by its own guiders, at more steps than they would begin after."""
    both = {name: mix(**NO_PROJECTION, adaptive_projected_guidance_start_step=1) for name in ("guider", "ocr_guider")}
    folder = tiny.save(partial(hunyuan_image, **both), tmp_path / "pipeline")
    teacher = load_teacher(SMALL.model_copy(update={"source": str(folder), "max_tokens": 64}), "cpu")
    assert teacher.default_guidance == 3.5
    prompts = ["a cat", "a sign that says \"a cat\" and 'no'"]
    draws = [torch.Generator().manual_seed(i) for i in range(2)]
    teacher.encode(prompts)
    theirs = teacher.latents_of(teacher.pipe, prompts, draws, **teacher.usual_call(), num_inference_steps=4)
    noise = torch.stack([torch.randn(teacher.latent_shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1)])
    ours = sample_teacher(teacher, 0.5 * noise, teacher.encode(prompts), torch.full((2,), 3.5), 4, even=True)
    assert (ours / 0.5 - theirs).norm() < 1e-4 * theirs.norm()
    save_whole(teacher, new_student(teacher), tmp_path / "student", tiny.recipe(teacher))
    saved = diffusers.HunyuanImagePipeline.from_pretrained(tmp_path / "student")
    assert saved.ocr_guider is None and saved.guider.config.guidance_scale == 1


def test_what_stands_in_quotes_is_a_second_text(tmp_path: Path) -> None:
    """It counts, and a prompt without has none; a teacher of the network alone needs no autoencoder to be made."""
    folder = tiny.save(tiny_hunyuan.make_hunyuan_video, tmp_path / "pipeline")
    settings = SMALL.model_copy(update={"source": str(folder), "frames": 5, "max_tokens": 48})
    teacher = load_teacher(settings, "cpu")
    assert (teacher.default_guidance, teacher.usual_tokens()) == (6.0, 1000)
    both = teacher.encode(["a cat", 'a sign "cat"'])
    assert both.second is not None and both.second.mask.sum(1).tolist() == [0, len('Text "cat". ') + 1]
    none = Condition(both.second.embeds, torch.zeros_like(both.second.mask))
    x, t, scale = torch.randn(2, *teacher.latent_shape), torch.tensor([0.5, 1.2]), torch.full((2,), 4.0)
    plain, told = (teacher.velocity(x, t, each, scale) for each in (replace(both, second=none), both))
    assert torch.equal(plain[0], told[0]) and (plain[1] - told[1]).norm() > 1e-3 * plain[1].norm()
    alone = load_teacher(settings, "cpu", network_only=True, null=teacher.null_condition)
    assert alone.pipe.vae is None and torch.equal(alone.velocity(x, t, both, scale), told)
    reader = teacher.text_reader()
    assert reader is not None and reader.count(["a cat"]) == [5] and reader.most == 47
    with pytest.raises(UserError, match="max_tokens is 1001, but this pipeline reads 1000 tokens of a prompt; leave"):
        load_teacher(settings.model_copy(update={"max_tokens": 1001}), "cpu")


def test_pictures_teach_no_videos(tmp_path: Path) -> None:
    folder = tiny.save(tiny.make_wan, tmp_path / "pipeline")
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (32, 32), "red").save(images / "red.png")
    (images / "metadata.jsonl").write_text('{"file_name": "red.png", "text": "red"}\n')
    sets = ["prompts=null", "space.kind=images", f"space.images={images}", "training.prompts_per_step=1"]
    video = settings(folder, images, *sets)
    with pytest.raises(UserError, match=r"this teacher makes 5 frames; set teacher\.frames=1"):
        run_distill(video, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
    assert not (tmp_path / "run").exists()
    picture = settings(folder, images, *sets, "teacher.frames=1")
    run_distill(picture, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
    assert all(math.isfinite(row["loss"]) for row in read_metrics(tmp_path / "run"))


def test_a_students_levels_are_those_that_its_pipeline_takes_unasked(tmp_path: Path) -> None:
    """WanPipeline takes no noise levels: they fall by equal factors from 1 to 2/3."""
    teacher = load_teacher(TeacherSettings(source=str(tiny.save(tiny.make_wan, tmp_path / "pipeline"))), "cpu")
    for steps in (2, 3, 4):
        levels = flow_time(torch.tensor(teacher.student_times(steps, "consistency"), dtype=torch.float64))
        torch.testing.assert_close(
            levels, (2 / 3) ** torch.linspace(0, 1, steps, dtype=torch.float64), rtol=0, atol=1e-5
        )


def test_a_prompt_of_dit_is_a_class(tmp_path: Path) -> None:
    teacher = load_teacher(TeacherSettings(source=str(tiny.save(tiny.make_dit, tmp_path / "pipeline"))), "cpu")
    prompts = ["207", " Love ", "red heart, love", "cat", "0"]
    assert teacher.encode(prompts).embeds.argmax(-1).flatten().tolist() == [207, 207, 207, 3, 0]
    assert teacher.encode(prompts).embeds.shape == (5, 1, 1001)
    for wrong in ("1000", "-1", "cats", ""):
        with pytest.raises(UserError, match=rf"prompt '{wrong}' is no class.*0 to 999, or a name.*'.+'") as caught:
            teacher.encode(["207", wrong])
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="64 x 32 pixels, but this network draws at one size"):
        load_teacher(TeacherSettings(source=teacher.source, height=64), "cpu")
    file = tmp_path / "prompts.txt"
    file.write_text("207\nlove\na unicorn\n")
    config = settings(Path(teacher.source), file)
    with pytest.raises(UserError, match="prompt 'a unicorn' is no class"):
        run_distill(config, tmp_path / "run", resume=False, display=Display(quiet=True), command="test")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dynamic", [False, True])
def test_lumina_with_its_own_scheduler_is_sampled_too(tmp_path: Path, dynamic: bool) -> None:
    """Its dynamic shift comes of the number of channels, in whose place other pipelines have that of tokens."""
    schedule = {"use_dynamic_shifting": dynamic, "base_image_seq_len": 2, "max_image_seq_len": 8}
    folder = tiny.save(partial(tiny.make_lumina2, **schedule), tmp_path / "pipeline")
    teacher = load_teacher(SMALL.model_copy(update={"source": str(folder)}), "cpu")
    call = teacher.usual_call() | {"num_inference_steps": 3, "guidance_scale": 4.0}
    with torch.no_grad():
        theirs = teacher.latents_of(teacher.pipe, ["red heart"], [generator(0, "test", 0)], **call)
    noise = 0.5 * normal(teacher.latent_shape, 0, "test", 0)[None]
    ours = sample_teacher(teacher, noise, teacher.encode(["red heart"]), torch.tensor([4.0]), 3, even=True)
    assert (ours / 0.5 - theirs).norm() < 1e-4 * theirs.norm()
    with pytest.raises(UserError, match=r"max_tokens is 4, but this pipeline puts \d+ tokens before each prompt"):
        load_teacher(SMALL.model_copy(update={"source": str(folder), "max_tokens": 4}), "cpu").encode(["red heart"])


@pytest.mark.parametrize(("height", "width"), [(16, 32), (64, 32)])
def test_flux_with_its_own_scheduler_is_sampled_too(tmp_path: Path, height: int, width: int) -> None:
    """Its shift depends on the number of tokens."""
    folder = tiny.save(tiny.make_flux, tmp_path / "pipeline")
    teacher = load_teacher(SMALL.model_copy(update={"source": str(folder), "height": height, "width": width}), "cpu")
    call = teacher.usual_call() | {"num_inference_steps": 3, "guidance_scale": 3.5}
    with torch.no_grad():
        theirs = teacher.latents_of(teacher.pipe, ["red heart"], [generator(0, "test", 0)], **call)
    noise = 0.5 * normal(teacher.latent_shape, 0, "test", 0)[None]
    condition, scale = teacher.encode(["red heart"]), torch.tensor([3.5])
    ours = sample_teacher(teacher, noise, condition, scale, 3, even=teacher.even_ladder)
    assert (ours / 0.5 - theirs).norm() < 1e-4 * theirs.norm()
