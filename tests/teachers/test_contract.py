"""What every teacher and the student made from it must do. A new family is one more row in TEACHERS.

Networks of one's own are in test_module.py.
"""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

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
from diffusers import DDIMScheduler, SanaSprintPipeline
from forms import cases
from passes import gradient_step
from torch import Tensor, nn

from stepfold.config import validate
from stepfold.errors import UserError
from stepfold.maths.formulations import guide
from stepfold.randomness import generator, normal
from stepfold.sampling.consistency import sample_consistency
from stepfold.sampling.flow import sample_flow
from stepfold.sampling.teacher import sample_teacher
from stepfold.spaces.generation import pairs_from, walk
from stepfold.students.saving import save_whole
from stepfold.students.whole import as_student, new_student
from stepfold.teachers.anima import AnimaTeacher
from stepfold.teachers.chroma import ChromaTeacher
from stepfold.teachers.contract import Condition, concatenate
from stepfold.teachers.dit import DiTTeacher
from stepfold.teachers.ernie_image import ErnieImageTeacher
from stepfold.teachers.family import Family
from stepfold.teachers.flux import FluxTeacher
from stepfold.teachers.flux2 import Flux2Teacher
from stepfold.teachers.flux2_klein import Flux2KleinTeacher
from stepfold.teachers.hunyuan_image import HunyuanImageTeacher
from stepfold.teachers.hunyuan_video15 import HunyuanVideo15Teacher
from stepfold.teachers.kandinsky5 import Kandinsky5Teacher
from stepfold.teachers.kandinsky5_image import Kandinsky5ImageTeacher
from stepfold.teachers.kandinsky5_video import Kandinsky5VideoTeacher
from stepfold.teachers.krea2 import Krea2Teacher
from stepfold.teachers.loading import family_of
from stepfold.teachers.longcat_image import LongCatImageTeacher
from stepfold.teachers.lumina2 import Lumina2Teacher
from stepfold.teachers.oracle import agreement
from stepfold.teachers.pixart import PixArtTeacher
from stepfold.teachers.prx import PRXTeacher
from stepfold.teachers.qwen_image import QwenImageTeacher
from stepfold.teachers.sana import GemmaTexts, SanaTeacher, SprintTeacher
from stepfold.teachers.sana_video import SanaVideoTeacher
from stepfold.teachers.schedules import FlowSchedule, VPSchedule
from stepfold.teachers.sd3 import SD3Teacher
from stepfold.teachers.stable_diffusion import StableDiffusionTeacher, StableDiffusionXLTeacher
from stepfold.teachers.wan import WanTeacher
from stepfold.teachers.z_image import ZImageTeacher

MAX_TOKENS = 48
PROMPTS = ["red heart", "dog on blue background", "pizza on a white plate"]
TIMES = (0.02, 0.9, 1.5707)
SMALL: dict[str, Any] = dict(height=16, width=32, max_tokens=MAX_TOKENS)


def sprint_folder(source: Path, folder: Path) -> Path:
    """A SanaSprintPipeline whose guidance embedding matters."""
    teacher = SanaTeacher(source, max_tokens=MAX_TOKENS)
    student = new_student(teacher)
    nn.init.normal_(student.transformer.time_embed.guidance_embedder.linear_2.weight, std=0.2)
    save_whole(teacher, student, folder, tiny.recipe(teacher))
    return folder


def to_thousand(source: Path, folder: Path) -> Path:
    """A teacher whose time counts to 1000."""
    shutil.copytree(source, folder)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"timestep_scale": 1.0}))
    return folder


def normalised(make: Callable[[], Any]) -> Any:
    """A pipeline whose latents have a mean and a deviation for each channel."""
    pipe = make()
    pipe.vae.register_to_config(latents_mean=[-0.6, 0.9, -0.4, 0.5], latents_std=[1.5, 0.9, 1.2, 2.0])
    return pipe


def clipping(make: Callable[[], Any]) -> Any:
    """A pipeline with a scheduler at DDIM's defaults, which clip, and with thresholding besides."""
    pipe = make()
    pipe.scheduler = DDIMScheduler(thresholding=True, num_train_timesteps=500)
    return pipe


class FromZero(SD3Teacher):
    """As the teacher of a pipeline whose scale s means c + s (c - u)."""

    no_guidance = 0.0

    def guidance_weight(self, scale: Any) -> Any:
        return scale + 1

    def own_guidance(self, guidance: float) -> dict[str, Any]:
        return {"guidance_scale": guidance + 1}

    def student_guidance(self, guidance: float) -> dict[str, Any]:
        return {"guidance_scale": super().student_guidance(guidance)["guidance_scale"] + 1}


# name -> (folder of the tiny SanaPipeline, empty folder) -> teacher
TEACHERS: dict[str, Callable[[Path, Path], Any]] = {
    "sana": lambda sana, _: SanaTeacher(sana, max_tokens=MAX_TOKENS),
    "sana, the prompt's mask": lambda sana, _: SanaTeacher(sana, max_tokens=MAX_TOKENS, null_mask="prompt"),
    "sana, no guidance": lambda sana, _: SanaTeacher(sana, max_tokens=MAX_TOKENS, guidance_kind="none"),
    "sana, to 1000": lambda sana, empty: SanaTeacher(to_thousand(sana, empty / "sana"), max_tokens=MAX_TOKENS),
    "sana, float64": lambda sana, _: SanaTeacher(sana, max_tokens=MAX_TOKENS, dtype=torch.float64),
    "sprint": lambda sana, empty: SprintTeacher(sprint_folder(sana, empty / "sprint"), max_tokens=MAX_TOKENS),
    "sd3": lambda _, empty: SD3Teacher(tiny.save(tiny.make_sd3, empty / "sd3"), **SMALL),
    "sd3, a scale from 0": lambda _, empty: FromZero(tiny.save(tiny.make_sd3, empty / "sd3"), **SMALL),
    "sd3, no guidance": lambda _, empty: SD3Teacher(
        tiny.save(tiny.make_sd3, empty / "sd3"), **SMALL, guidance_kind="none"
    ),
    "pixart": lambda _, empty: PixArtTeacher(tiny.save(tiny.make_pixart, empty / "pixart"), **SMALL),
    "sd 1": lambda _, empty: StableDiffusionTeacher(tiny.save(tiny.make_sd1, empty / "sd"), **SMALL),
    "sd 2": lambda _, empty: StableDiffusionTeacher(tiny.save(tiny.make_sd2, empty / "sd"), **SMALL),
    "sd 2, zero terminal snr": lambda _, empty: StableDiffusionTeacher(
        tiny.save(tiny.make_sd2_zero, empty / "sd"), **SMALL
    ),
    "sdxl, v, normalised latents": lambda _, empty: StableDiffusionXLTeacher(
        tiny.save(partial(normalised, partial(tiny.make_sdxl, prediction_type="v_prediction")), empty / "sdxl"), **SMALL
    ),
    "pixart, clips": lambda _, empty: PixArtTeacher(
        tiny.save(partial(clipping, tiny.make_pixart), empty / "pixart"), **SMALL
    ),
    "sdxl": lambda _, empty: StableDiffusionXLTeacher(tiny.save(tiny.make_sdxl, empty / "sdxl"), **SMALL),
    "flux dev": lambda _, empty: FluxTeacher(tiny.save(tiny.make_flux, empty / "flux"), **SMALL),
    "flux schnell": lambda _, empty: FluxTeacher(
        tiny.save(partial(tiny.make_flux, guidance_embeds=False), empty / "flux"), **SMALL
    ),
    "flux 2 klein": lambda _, empty: Flux2KleinTeacher(tiny.save(tiny.make_flux2_klein, empty / "klein"), **SMALL),
    "flux 2 klein, distilled": lambda _, empty: Flux2KleinTeacher(
        tiny.save(partial(tiny.make_flux2_klein, is_distilled=True), empty / "klein"), **SMALL
    ),
    "flux 2 dev": lambda _, empty: Flux2Teacher(tiny.save(tiny.make_flux2, empty / "flux2"), **SMALL),
    "dit": lambda _, empty: DiTTeacher(tiny.save(tiny.make_dit, empty / "dit")),
    "lumina 2": lambda _, empty: Lumina2Teacher(tiny.save(tiny.make_lumina2, empty / "lumina2"), **SMALL),
    "wan": lambda _, empty: WanTeacher(tiny.save(tiny.make_wan, empty / "wan"), **SMALL, frames=5),
    "qwen image": lambda _, empty: QwenImageTeacher(tiny.save(tiny_qwen.make_qwen_image, empty / "qwen"), **SMALL),
    "chroma": lambda _, empty: ChromaTeacher(tiny.save(tiny_chroma.make_chroma, empty / "chroma"), **SMALL),
    "longcat": lambda _, empty: LongCatImageTeacher(tiny.save(tiny_qwen.make_longcat, empty / "longcat"), **SMALL),
    "krea 2": lambda _, empty: Krea2Teacher(tiny.save(tiny_qwen.make_krea2, empty / "krea"), **SMALL),
    "ernie-image": lambda _, empty: ErnieImageTeacher(
        tiny.save(tiny_ernie_image.make_ernie_image, empty / "ernie"), **SMALL
    ),
    "prx": lambda _, empty: PRXTeacher(tiny.save(tiny_prx.make_prx, empty / "prx"), **SMALL),
    "z-image": lambda _, empty: ZImageTeacher(
        tiny.save(tiny_z_image.make_z_image, empty / "z"), **SMALL | {"width": 24}
    ),
    "wan 2.2 ti2v": lambda _, empty: WanTeacher(
        tiny.save(tiny_wan22.make_ti2v, empty / "wan"), height=64, width=96, max_tokens=MAX_TOKENS, frames=5
    ),
    "hunyuan video": lambda _, empty: HunyuanVideo15Teacher(
        tiny.save(tiny_hunyuan.make_hunyuan_video, empty / "hunyuan"), **SMALL, frames=5
    ),
    "sana video": lambda _, empty: SanaVideoTeacher(
        tiny.save(tiny_sana_video.make_sana_video, empty / "sana"), height=32, width=64, max_tokens=MAX_TOKENS, frames=5
    ),
    "kandinsky image": lambda _, empty: Kandinsky5ImageTeacher(
        tiny.save(tiny_kandinsky.make_kandinsky_image, empty / "image"), **SMALL | {"height": 32, "width": 48}
    ),
    "kandinsky video": lambda _, empty: Kandinsky5VideoTeacher(
        tiny.save(tiny_kandinsky.make_kandinsky_video, empty / "video"), **SMALL, frames=5
    ),
    "wan 2.2 a14b": lambda _, empty: WanTeacher(tiny.save(tiny_wan22.make_a14b, empty / "wan"), **SMALL, frames=5),
    "anima": lambda _, empty: AnimaTeacher(tiny.save(tiny_anima.make_anima, empty / "anima"), **SMALL),
    "hunyuan image": lambda _, empty: HunyuanImageTeacher(
        tiny.save(tiny_hunyuan_image.make_hunyuan_image, empty / "hunyuan"), **SMALL
    ),
}


SHORT = ("sana", "sprint", "sd3", "sd 1", "sdxl", "flux dev", "dit", "wan", "qwen image")
"""One of each kind of network, text, time and guidance; all others are long forms."""
PADDED = (
    GemmaTexts | HunyuanVideo15Teacher | PixArtTeacher | Lumina2Teacher | WanTeacher | QwenImageTeacher | Krea2Teacher
)
PADDED |= ErnieImageTeacher | Kandinsky5Teacher | PRXTeacher | ZImageTeacher
PADDED |= HunyuanImageTeacher
PADDED |= AnimaTeacher
"""Whose prompts are as long as they are; other networks attend to their padding."""


@pytest.fixture(scope="module", params=cases(TEACHERS, SHORT))
def teacher(request: pytest.FixtureRequest, tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return TEACHERS[request.param](tiny_sana, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(params=TIMES)
def state(request: pytest.FixtureRequest, teacher: Any) -> tuple[Tensor, Tensor]:
    x = teacher.sigma_data * torch.randn(3, *teacher.latent_shape, dtype=teacher.dtype)
    return x, torch.full((3,), request.param, dtype=teacher.dtype)


def scales(teacher: Any, *values: float) -> Tensor:
    return torch.tensor(values, dtype=teacher.dtype)


def drawn(teacher: Any) -> tuple[Tensor, list[torch.Generator]]:
    """Unit noise for each prompt, and generators that will draw it."""
    noise = torch.stack([normal(teacher.latent_shape, 0, "test", i) for i in range(3)]).to(teacher.dtype)
    return noise, [generator(0, "test", i) for i in range(3)]


def fresh_noise(teacher: Any, steps: int) -> list[Tensor]:
    """What the pipelines' schedulers draw after each step [3, ...], in the order in which they do."""
    shape = teacher.pack(torch.zeros(3, *teacher.latent_shape)).shape
    if not teacher.one_by_one:
        return [teacher.sigma_data * teacher.unpack(torch.randn(shape)) for _ in range(steps)]
    each = [[torch.randn(1, *shape[1:]) for _ in range(steps)] for _ in range(shape[0])]
    return [teacher.sigma_data * teacher.unpack(torch.cat(rows)) for rows in zip(*each, strict=True)]


def count_rows(teacher: Any) -> tuple[list[int], Any]:
    """The batch size of every call of the network from now on, and the handle that ends the count."""
    rows: list[int] = []

    def count(module: nn.Module, args: Any, output: Any) -> None:
        rows.append(len(output[0] if isinstance(output, tuple) else output))

    hook = teacher.transformer.register_forward_hook(count)
    return rows, hook


def nearly(teacher: Any) -> float:
    """How far two ways to the same numbers may differ: a network that rounds within goes either way between two."""
    return 1e-3 if teacher.rounds else 1e-4


def same(teacher: Any, a: Tensor, b: Tensor) -> None:
    """Equal to 1e-5 of the largest: a noise prediction is divided by a small cos t where noise is nearly all."""
    most = nearly(teacher) if teacher.rounds else 1e-5
    torch.testing.assert_close(a, b, rtol=0, atol=most * max(1.0, b.abs().max().item()))


def spread(a: Tensor, b: Tensor) -> float:
    """Size of the difference, in sizes of a."""
    return ((a - b).norm() / a.norm()).item()


def test_velocity_is_finite_deterministic_and_has_no_graph(teacher: Any, state: tuple[Tensor, Tensor]):
    condition, guidance = teacher.encode(PROMPTS), scales(teacher, 4, 4.5, 5)
    x, t = state
    v = teacher.velocity(x.requires_grad_(), t, condition, guidance)
    assert v.shape == x.shape and v.dtype == x.dtype and not v.requires_grad and v.isfinite().all()
    assert torch.equal(v, teacher.velocity(x, t, condition, guidance))
    assert all(not p.requires_grad for p in teacher.transformer.parameters())


def test_everything_that_velocity_is_given_matters(teacher: Any, state: tuple[Tensor, Tensor]):
    condition, guidance = teacher.encode(PROMPTS), scales(teacher, 4, 4.5, 5)
    x, t = state
    v = teacher.velocity(x, t, condition, guidance)
    assert spread(v, teacher.velocity(-x, t, condition, guidance)) > 0.05
    assert spread(v, teacher.velocity(x, 0.8 * t + 0.05, condition, guidance)) > 1e-3
    assert spread(v, teacher.velocity(x, t, condition.rows(torch.tensor([1, 2, 0])), guidance)) > 0.05
    changed = spread(v, teacher.velocity(x, t, condition, guidance - 2))
    assert changed == 0 if teacher.guidance_kind == "none" else changed > 1e-3


def test_one_network_call_a_velocity(teacher: Any, state: tuple[Tensor, Tensor]):
    """Embedded guidance needs one row a sample; classifier-free guidance two, in one batch."""
    condition, guidance = teacher.encode(PROMPTS), scales(teacher, 4, 4.5, 5)
    rows, hook = count_rows(teacher)
    teacher.velocity(*state, condition, guidance)
    hook.remove()
    assert rows == ([6] if teacher.guidance_kind == "classifier_free" else [3])


def some_states(teacher: Any) -> tuple[Tensor, Tensor]:
    """Three states at different times."""
    x = teacher.sigma_data * torch.randn(3, *teacher.latent_shape, dtype=teacher.dtype)
    return x, torch.tensor([0.3, 0.8, 1.4], dtype=teacher.dtype)


@pytest.mark.parametrize("scale", [0.0, "off", "usual", 7.0])
def test_the_branches_make_the_velocity_at_every_scale(teacher: Any, scale: float | str):
    """One call of the network gives both. Where they are not exact, at the scales that are promised."""
    x, t = some_states(teacher)
    condition, other = teacher.encode(PROMPTS), teacher.encode([*PROMPTS[1:], PROMPTS[0]])
    rows, hook = count_rows(teacher)
    without, with_prompt = teacher.branches(x, t, condition)
    hook.remove()
    assert rows == ([3] if teacher.guidance_kind == "none" else [6])
    assert without.dtype == with_prompt.dtype == x.dtype and not without.requires_grad
    if teacher.exact_branches and teacher.guidance_kind == "classifier_free":
        assert spread(with_prompt, without) > 1e-3
        if getattr(teacher, "null_mask", "own") == "own":
            same(teacher, teacher.branches(x, t, other)[0], without)  # it knows no prompt
    assert spread(with_prompt, teacher.branches(x, t, other)[1]) > 1e-3
    value = {"usual": teacher.default_guidance, "off": teacher.no_guidance}.get(scale, scale)
    if teacher.exact_branches or scale in ("off", "usual"):
        weight = teacher.guidance_weight(value)
        if getattr(type(teacher), "guided", Family.guided) is Family.guided:
            guided = guide(without, with_prompt, weight)
        else:
            sigma, w = teacher.sigma_data, scales(teacher, *[weight] * 3)
            guided = sigma * teacher.guided(x / sigma, t, without / sigma, with_prompt / sigma, w)
        same(teacher, guided, teacher.velocity(x, t, condition, torch.full_like(t, value)))
    rows, hook = count_rows(teacher)
    same(teacher, teacher.velocity(x, t, condition, None), with_prompt)  # unguided, in half the rows
    hook.remove()
    assert rows == [3]


def test_a_scale_means_a_weight(teacher: Any):
    """Of the pipeline's scale: without guidance 1, and one more for each one more; one scale or a batch of them."""
    off = teacher.no_guidance
    assert teacher.guidance_weight(off) == 1 and teacher.guidance_weight(off + 2.5) == 3.5
    found = teacher.guidance_weight(scales(teacher, off, off + 1))
    assert found.dtype == teacher.dtype and found.tolist() == [1, 2]
    if teacher.guidance_kind == "classifier_free":
        x, t = some_states(teacher)
        condition = teacher.encode(PROMPTS)
        same(
            teacher,
            teacher.velocity(x, t, condition, scales(teacher, off, off, off)),
            teacher.branches(x, t, condition)[1],
        )


def test_a_velocity_lets_a_gradient_through(teacher: Any):
    """To x alone, against a difference in float64; what is kept of the prompt stays right, and nothing changes."""
    rounds = teacher.rounds
    exact = torch.float32 if rounds else torch.float64  # Kandinsky's class breaks in float64
    x, t = (values.to(exact) for values in some_states(teacher))
    network, was = teacher.transformer, next(teacher.transformer.parameters()).dtype
    guidance, condition = torch.tensor([3.0, 4.5, 6.0], dtype=exact), teacher.encode(PROMPTS)
    condition = condition.to("cpu", exact)
    network.to(exact)
    try:
        before = teacher.velocity(x, t, condition, guidance)
        weights = torch.randn_like(x)
        with torch.no_grad():  # whatever stands around it
            v = teacher.velocity(x.requires_grad_(), t, condition, guidance, with_gradient=True)
        (gradient,) = torch.autograd.grad((weights * v).sum(), x)
        assert (gradient.flatten(1).norm(dim=1) > 1e-3).all()
        x, steepest, h = x.detach(), gradient / gradient.norm(), 0.1 if rounds else 1e-3  # others round to float32
        ahead, behind = (teacher.velocity(x + step * steepest, t, condition, guidance) for step in (h, -h))
        found, most = (weights * (ahead - behind)).sum() / (2 * h), 3e-2 if rounds else 3e-3
        torch.testing.assert_close(found, gradient.norm(), rtol=most, atol=0)
        near = 1e-2 if rounds else 1e-6
        torch.testing.assert_close(v.detach(), before, rtol=near, atol=near)
        again = teacher.velocity(x, t, condition, guidance)
        assert torch.equal(again, before) and not again.requires_grad
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    finally:
        network.to(was)


def test_rows_do_not_know_of_each_other(teacher: Any, state: tuple[Tensor, Tensor]):
    """Nor of how far the batch's conditions are padded."""
    condition, guidance = teacher.encode(PROMPTS), scales(teacher, 3, 4.5, 6)
    x, t = state
    t = t * torch.tensor([1.0, 0.5, 0.25], dtype=t.dtype)
    together = teacher.velocity(x, t, condition, guidance)
    for i, prompt in enumerate(PROMPTS):
        row = slice(i, i + 1)
        alone = teacher.velocity(x[row], t[row], teacher.encode([prompt]), guidance[row])
        same(teacher, alone[0], together[i])


def test_trimmed_conditions_are_the_untrimmed_ones(teacher: Any, state: tuple[Tensor, Tensor]):
    condition, guidance = teacher.encode(PROMPTS), scales(teacher, 4, 4.5, 5)
    if not isinstance(teacher, PADDED):
        pytest.skip("attends to its padding, as its pipeline does")
    assert condition.mask.any(0).all() and condition.mask.shape[1] < MAX_TOKENS  # nothing left to trim
    v = teacher.velocity(*state, condition, guidance)
    if teacher.guidance_kind != "classifier_free" or teacher.null_mask == "own":
        whole = condition.padded(300)
        whole.embeds[whole.mask == 0] = 7.0  # what is masked must not matter
        same(teacher, teacher.velocity(*state, whole, guidance), v)


def test_guidance_in_float64_does_not_promote(teacher: Any, state: tuple[Tensor, Tensor]):
    condition, guidance = teacher.encode(PROMPTS), scales(teacher, 4, 4.5, 5)
    v = teacher.velocity(*state, condition, guidance.double())
    assert v.dtype == state[0].dtype
    torch.testing.assert_close(v, teacher.velocity(*state, condition, guidance), rtol=0, atol=1e-6)


def test_states_may_be_more_precise_than_the_network(teacher: Any, state: tuple[Tensor, Tensor]):
    """A teacher in bfloat16 under autocast still walks states in float32: velocity has the state's dtype."""
    if teacher.dtype != torch.float32:
        pytest.skip("autocast is for float32 networks")
    condition, guidance = teacher.encode(PROMPTS), scales(teacher, 4, 4.5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        v = teacher.velocity(*state, condition, guidance)
    assert v.dtype == torch.float32
    assert 0 < spread(teacher.velocity(*state, condition, guidance), v) < 0.1


def test_pictures_and_the_black_latent(teacher: Any):
    black = teacher.black_latent(teacher.latent_shape)
    assert black.shape == teacher.latent_shape and black.dtype == torch.float32
    x0 = teacher.sigma_data * torch.randn(3, *teacher.latent_shape, dtype=teacher.dtype)
    pictures = teacher.decode(x0)
    assert pictures.shape == (3, 3, teacher.height, teacher.frames * teacher.width)
    assert pictures.min() >= 0 and pictures.max() <= 1 and pictures.std() > 0.01
    torch.testing.assert_close(teacher.decode(x0, batch=2), pictures, rtol=0, atol=1e-5)
    teacher.release_decoder()
    torch.testing.assert_close(teacher.decode(x0), pictures, rtol=0, atol=1e-5)
    assert torch.equal(teacher.black_latent(teacher.latent_shape), black)


def student_velocity(teacher: Any, student: nn.Module, state: tuple[Tensor, Tensor], *rest: Any) -> Tensor:
    with torch.no_grad():
        return teacher.sigma_data * student(state[0] / teacher.sigma_data, state[1], *rest)


def test_a_new_student_is_its_teacher(teacher: Any, state: tuple[Tensor, Tensor]):
    """With guidance embedded at any scale; without, at the scale 1 that leaves classifier-free guidance out."""
    condition, student = teacher.encode(PROMPTS), new_student(teacher).to(teacher.dtype)
    guidance = scales(teacher, 3, 4.5, 6)
    equal = guidance if teacher.guidance_kind == "embedded" else torch.full_like(guidance, teacher.no_guidance)
    expected = teacher.velocity(*state, condition, equal)
    ours = student_velocity(teacher, student, state, condition, guidance)
    same(teacher, ours, expected)
    again = student_velocity(teacher, student, state, condition, guidance + 3)
    assert (spread(ours, again) > 1e-3) if teacher.guidance_kind == "embedded" else torch.equal(ours, again)
    settled = torch.full_like(guidance, -math.log(math.prod(teacher.latent_shape)))
    torch.testing.assert_close(student.log_variance(state[1], guidance), settled)  # the same at every time


def test_a_new_student_owns_its_weights_and_can_learn_all_of_them(teacher: Any):
    """Every parameter gets a gradient but those that the family names: the guidance embedder's last layer does."""
    state, condition, guidance = some_states(teacher), teacher.encode(PROMPTS), scales(teacher, 3, 4.5, 6)
    student = new_student(teacher).to(teacher.dtype)
    taken = {p.data_ptr() for p in teacher.transformer.parameters()}
    assert all(p.requires_grad and p.data_ptr() not in taken for p in student.parameters())
    F = student(state[0] / teacher.sigma_data, state[1], condition, guidance)
    (F.square().sum() + student.log_variance(state[1], guidance).sum()).backward()
    idle = {name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == {n for n, _ in student.named_parameters() if any(part in n for part in teacher.idle_parameters())}


@pytest.mark.long
def test_a_student_learns_guidance_in_twenty_steps(teacher: Any):
    """The real update: neutral at first, guidance changes the output after it."""
    if teacher.dtype != torch.float32 or not teacher.student_reads_guidance:
        pytest.skip("training is in float32, and its student reads guidance")
    student = new_student(teacher)
    config = validate(
        {
            "prompts": "prompts.txt",
            "objective": "continuous",
            "space": {"guidance": [1.0, 8.0]},
            "consistency": {"r_warmup": 0},
        }
    )
    condition, guidance = teacher.encode([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]), scales(teacher, 1, 8, 1, 8)
    noise = teacher.sigma_data * torch.randn(4, *teacher.latent_shape)
    route = torch.linspace(torch.pi / 2, 0, 5)[:-1].expand(4, -1)
    keep = torch.ones(4, dtype=torch.bool)
    pairs = pairs_from(
        walk(teacher.velocity, noise, route, condition, guidance), condition, guidance, keep_first=False, keep=keep
    )

    def sensitivity() -> float:
        rest = (pairs.x, pairs.t), pairs.condition
        low, high = (student_velocity(teacher, student, *rest, torch.full_like(pairs.t, w)) for w in (1.0, 8.0))
        return spread(low, high)

    before = sensitivity()
    assert (before == 0) == (teacher.guidance_kind != "embedded")
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for step in range(20):
        gradient_step(student, pairs, config, step, teacher=teacher)
        optimiser.step()
        optimiser.zero_grad()
    assert abs(sensitivity() - before) > 1e-3


@pytest.fixture(scope="module")
def saved(teacher: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A student that is not its teacher any more, and its folder."""
    student = new_student(teacher).to(teacher.dtype)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in student.transformer.parameters():
            parameter += 0.1 * parameter.std(correction=0) * torch.randn_like(parameter)
        if isinstance(teacher, SanaTeacher) and teacher.student_is_sprint:
            nn.init.normal_(student.transformer.time_embed.guidance_embedder.linear_2.weight, std=0.2)
    folder = tmp_path_factory.mktemp("saved") / "student"
    teacher.release_decoder()  # as during training; the folder must have the autoencoder all the same
    save_whole(teacher, student, folder, tiny.recipe(teacher))
    return student, folder


def test_a_saved_student_is_read_back(teacher: Any, state: tuple[Tensor, Tensor], saved: tuple[Any, Path]):
    student, folder = saved
    again = family_of(str(folder))(
        folder, dtype=teacher.dtype, height=teacher.height, width=teacher.width, frames=teacher.frames,
        max_tokens=MAX_TOKENS,
    )  # fmt: skip
    assert again.latent_shape == teacher.latent_shape
    guidance = scales(teacher, 3, 4.5, 6)
    expected = student_velocity(teacher, student, state, teacher.encode(PROMPTS), guidance)
    ours = student_velocity(teacher, as_student(again), state, again.encode(PROMPTS), guidance)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    untrained = new_student(teacher).to(teacher.dtype)
    assert spread(expected, student_velocity(teacher, untrained, state, teacher.encode(PROMPTS), guidance)) > 0.01
    torch.testing.assert_close(
        again.black_latent(again.latent_shape), teacher.black_latent(teacher.latent_shape), rtol=0, atol=1e-6
    )
    if isinstance(teacher, SanaTeacher) and teacher.student_is_sprint:
        assert again.guidance_kind == "embedded"
        assert torch.equal(again.velocity(*state, again.encode(PROMPTS), guidance), ours)


@pytest.mark.parametrize("steps", cases([1, 2, 4], short=[1, 4]))
def test_plain_diffusers_takes_the_students_steps(teacher: Any, saved: tuple[Any, Path], steps: int):
    """The saved folder, in its own pipeline class, with the arguments that the card names, and the same fresh noise."""
    if teacher.dtype != torch.float32:
        pytest.skip("pipelines are loaded in float32")
    student, folder = saved
    pipe: Any = teacher.student_class("consistency").from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    guidance, times = 4.0, teacher.student_times(steps, "consistency")
    noise, draws = drawn(teacher)
    torch.manual_seed(5)  # not all pipelines hand a generator to their scheduler
    theirs = teacher.latents_of(pipe, PROMPTS, draws, **teacher.student_call(times, guidance, "consistency"))

    torch.manual_seed(5)
    fresh, scale = iter(fresh_noise(teacher, steps)), torch.full((3,), guidance)
    x0 = sample_consistency(
        student, teacher.sigma_data * noise, teacher.encode(PROMPTS), scale, times, lambda i: next(fresh),
        teacher.sigma_data,
    )  # fmt: skip
    assert spread(theirs, x0 / teacher.sigma_data) < nearly(teacher)


@pytest.fixture(scope="module")
def saved_flow(teacher: Any, saved: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same student, saved as one that is a velocity."""
    folder = tmp_path_factory.mktemp("saved") / "flow"
    save_whole(teacher, saved[0], folder, tiny.recipe(teacher, "flow", 4.0))
    return folder


@pytest.mark.parametrize("steps", cases([1, 2, 4], short=[1, 4]))
def test_plain_diffusers_takes_a_flow_students_steps(
    teacher: Any, saved: tuple[Any, Path], saved_flow: Path, steps: int
):
    """No fresh noise, at the noise levels that the card lists or the scheduler has."""
    if teacher.dtype != torch.float32:
        pytest.skip("pipelines are loaded in float32")
    pipe: Any = teacher.student_class("flow").from_pretrained(saved_flow)
    pipe.set_progress_bar_config(disable=True)
    times = teacher.student_times(steps, "flow")
    noise, draws = drawn(teacher)
    torch.manual_seed(5)
    theirs = teacher.latents_of(pipe, PROMPTS, draws, **teacher.student_call(times, 4.0, "flow"))
    rest = teacher.sigma_data * noise, teacher.encode(PROMPTS), torch.full((3,), 4.0), times
    x0 = sample_flow(saved[0], *rest, no_fresh_noise, teacher.sigma_data)
    assert spread(theirs, x0 / teacher.sigma_data) < nearly(teacher)
    if steps == 4:  # a consistency sampler's pictures are others
        fresh = torch.randn_like(noise)
        other = sample_consistency(saved[0], *rest, lambda i: teacher.sigma_data * fresh, teacher.sigma_data)
        assert spread(theirs, other / teacher.sigma_data) > 0.01


def no_fresh_noise(i: int) -> Tensor:
    raise AssertionError("a flow sampler is deterministic")


def test_a_saved_flow_student_is_read_back(
    teacher: Any, state: tuple[Tensor, Tensor], saved: tuple[Any, Path], saved_flow: Path
):
    """Of Sana's it is the network at its one guidance scale, which SanaPipeline is not told."""
    again = family_of(str(saved_flow))(
        saved_flow, dtype=teacher.dtype, height=teacher.height, width=teacher.width, frames=teacher.frames,
        max_tokens=MAX_TOKENS,
    )  # fmt: skip
    guidance = scales(teacher, 4, 4, 4)
    expected = student_velocity(teacher, saved[0], state, teacher.encode(PROMPTS), guidance)
    ours = student_velocity(teacher, as_student(again), state, again.encode(PROMPTS), guidance)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", ["off", 6.0])
def test_the_wrapped_teacher_samples_what_its_pipeline_samples(teacher: Any, guidance: float | str):
    """The same ladder, noise and guidance; the pipeline's own loop calls the network as it always does."""
    guidance = teacher.no_guidance if guidance == "off" else guidance
    if isinstance(teacher.pipe, SanaSprintPipeline):
        pytest.skip("SanaSprintPipeline walks with SCMScheduler")
    if teacher.guidance_kind == "none" and not isinstance(teacher, FluxTeacher | Flux2KleinTeacher):
        guidance = teacher.no_guidance
    elif teacher.null_mask == "prompt":
        pytest.skip("the public training code's mask, not the pipeline's")
    noise, draws = drawn(teacher)
    theirs = teacher.pipeline_latents(PROMPTS, draws, guidance, 4)
    scale = torch.full((3,), guidance, dtype=teacher.dtype)
    ours = sample_teacher(
        teacher, teacher.sigma_data * noise, teacher.encode(PROMPTS), scale, 4, even=teacher.even_ladder
    )
    assert spread(theirs, ours / teacher.sigma_data) < nearly(teacher) < spread(theirs, noise)


def test_the_pipelines_own_loop_agrees(teacher: Any):
    """Its own scheduler calls the network as the teacher does, and has the schedule that was read."""
    if teacher.null_mask == "prompt":
        pytest.skip("the public training code's mask, not the pipeline's")
    guidance = (
        4.0
        if teacher.guidance_kind != "none" or isinstance(teacher, FluxTeacher | Flux2KleinTeacher)
        else teacher.no_guidance
    )
    found = agreement(teacher, PROMPTS, teacher.encode(PROMPTS), scales(teacher, *[guidance] * 3))
    assert found.network < nearly(teacher) and found.schedule < 0.05 and found.end < 0.05
    assert bool(found.left_out) == bool(teacher.pipe.scheduler.config.get("clip_sample"))


def test_pictures_are_the_pipelines(teacher: Any):
    """Decoded as the pipeline decodes its own latents."""
    call = teacher.usual_call() | teacher.own_steps(2) | teacher.own_guidance(teacher.no_guidance)
    torch.manual_seed(5)  # not all pipelines hand a generator to their scheduler
    latents = teacher.latents_of(teacher.pipe, PROMPTS, drawn(teacher)[1], **call)
    torch.manual_seed(5)
    inputs = teacher.inputs(PROMPTS, drawn(teacher)[1])
    if isinstance(teacher, HunyuanVideo15Teacher) or teacher.one_by_one:  # the former for its autoencoder
        inputs, latents = {name: values[:1] for name, values in inputs.items()}, latents[:1]
    made = teacher.pipe(**inputs, output_type="pt", **call)
    theirs = getattr(made, teacher.output)
    if teacher.output == "frames":  # side by side
        theirs = theirs.permute(0, 2, 3, 1, 4).flatten(3)
    torch.testing.assert_close(teacher.decode(teacher.sigma_data * latents), theirs.float(), rtol=0, atol=1e-5)


def test_impossible_guidance_is_refused(teacher: Any):
    wrong = "none" if teacher.guidance_kind == "embedded" else "embedded"
    with pytest.raises(UserError, match="auto") as caught:
        type(teacher)(teacher.source, max_tokens=MAX_TOKENS, guidance_kind=wrong)
    assert "\n" not in str(caught.value)


class ByVideo(SD3Teacher):
    """As the teacher of a pipeline of pictures whose autoencoder takes videos."""

    video_autoencoder = True

    def latent_scale(self, vae: Any) -> tuple[Any, Any]:
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        return 1 / std, mean

    def to_autoencoder(self, latents: Tensor) -> Tensor:
        return latents.flip(-1)

    def from_autoencoder(self, latents: Tensor) -> Tensor:
        return latents.flip(-1)


def test_a_picture_is_a_video_of_one_frame_to_an_autoencoder_of_videos(tmp_path: Path):
    """And has the layout and the scale that it wants."""
    teacher = ByVideo(tiny.save(tiny.make_sd3, tmp_path / "sd3"), **SMALL)
    vae: Any = tiny.make_wan().vae
    teacher.pipe.vae = vae
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    latents = torch.randn(2, 4, 2, 4)
    with torch.no_grad():
        video = vae.decode((latents * std + mean).flip(-1)[:, :, None], return_dict=False)[0]
        pictures = teacher.decode(0.5 * latents)
        encoded = vae.encode(2 * pictures[:, :, None] - 1, return_dict=False)[0].mode()[:, :, 0].flip(-1)
    torch.testing.assert_close(pictures, (video[:, :, 0] / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(teacher.encode_pictures(pictures), 0.5 * (encoded - mean) / std, rtol=0, atol=1e-5)


def test_conditions_pad_trim_and_join():
    a = Condition(torch.ones(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert a.trimmed().mask.tolist() == [[1, 1], [1, 0]] and a.trimmed().embeds.shape == (2, 2, 4)
    padded = a.padded(5)
    assert padded.mask.tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]] and padded.embeds[:, 3:].abs().max() == 0
    assert torch.equal(a.repeat_interleave(2).mask, a.mask[[0, 0, 1, 1]]) and len(a.rows(slice(1, 2))) == 1


def test_a_second_text_goes_where_the_first_goes():
    """With a length of its own, and with nothing to attend to in some rows or in all."""
    second = Condition(torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]), torch.randn(2, 5))
    whole = Condition(torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]]), None, second)

    def of(condition: Condition) -> Condition:
        assert condition.second is not None
        return condition.second

    assert of(whole.trimmed()).embeds.shape == (2, 2, 3) and whole.trimmed().embeds.shape == (2, 2, 4)
    assert of(whole.rows(slice(1, 2)).trimmed()).embeds.shape == (1, 1, 3)
    assert of(whole.padded(6)).embeds.shape == (2, 4, 3) and of(whole.first_tokens(1)).embeds.shape == (2, 4, 3)
    longer = of(whole.padded(6, 5))
    assert longer.embeds.shape == (2, 5, 3) and longer.mask[:, 4].tolist() == [0, 0]
    assert of(whole.padded(6, 3)).embeds.shape == (2, 4, 3)
    assert torch.equal(of(whole.rows(torch.tensor([1, 0]))).embeds, second.embeds[[1, 0]])
    assert torch.equal(of(whole.repeat_interleave(2)).mask, second.mask[[0, 0, 1, 1]])
    assert torch.equal(of(whole.rows(slice(0, 1)).expand(3)).embeds, second.embeds[[0, 0, 0]])
    assert of(whole.to("cpu", torch.float64)).embeds.dtype == torch.float64
    joined = concatenate([whole.rows(slice(0, 1)).trimmed(), whole.rows(slice(1, 2)).trimmed()])
    assert of(joined).mask.tolist() == [[1, 1], [0, 0]] and joined.mask.tolist() == [[1, 1], [1, 0]]
    assert torch.equal(of(joined).pooled, second.pooled)


def test_time_and_output_are_as_the_family_says(teacher: Any):
    """The largest timestep is that of noise, or of data; what the network gives is the flow velocity or its reverse."""
    x, t = some_states(teacher)
    condition, guidance = teacher.encode(PROMPTS).rows(slice(0, 1)), scales(teacher, teacher.no_guidance)
    told, given = [], []

    def watch(module: nn.Module, args: Any, named: dict[str, Any], output: Any) -> None:
        times = (
            [named["timestep"]] if "timestep" in named else [v for v in args if isinstance(v, Tensor) and v.ndim == 1]
        )
        told.append(float(times[0].flatten()[0]))
        out = output[0] if isinstance(output, tuple) else output
        given.append(float(sum(part.sum() for part in out)))

    hook = teacher.transformer.register_forward_hook(watch, with_kwargs=True)
    totals = []
    for i in range(3):
        v = teacher.velocity(
            x[i : i + 1], t[i : i + 1], condition, guidance if teacher.guidance_kind == "embedded" else None
        )
        x_unit = x[i : i + 1] / teacher.sigma_data
        totals.append(float(FlowSchedule(1000).output(x_unit, t[i : i + 1], v / teacher.sigma_data).sum()))
    hook.remove()
    assert sorted(told, reverse=teacher.rises_to == "data") == told and len(set(told)) == 3
    if not isinstance(teacher.schedule, VPSchedule):
        sign = -1 if teacher.rises_to == "data" else 1
        assert [sign * value for value in given] == pytest.approx(totals, rel=1e-3, abs=1e-2)
