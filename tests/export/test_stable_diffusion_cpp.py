"""stable-diffusion.cpp, with the command that a single file's card prints, generates what our own sampler does."""

import json
import os
import re
import shlex
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stepfold.config import load_config
from stepfold.export.beside import card_of
from stepfold.export.pipeline import save_student
from stepfold.jobs.exporting import run_export
from stepfold.sampling.samplers import SAMPLERS
from stepfold.students.card import read_card
from stepfold.students.loading import load_merged
from stepfold.students.lora import lora_student
from stepfold.teachers.contract import SamplerName
from stepfold.teachers.loading import load_teacher

BINARY = os.environ.get("STEPFOLD_SD_CLI", "")
PROMPT = "a b c"
SEED = 7
SIDE = 64
VOCABULARY = 49408
"""Of CLIP's tokeniser, which is built into stable-diffusion.cpp."""
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's without its merges: words of one letter have the numbers that they have there."""
    letters = [*map(chr, PRINTABLE), *(chr(256 + i) for i in range(256 - len(PRINTABLE)))]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += [f"<{i}>" for i in range(VOCABULARY - 2 - len(words))]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def clip_encoder(kind: type) -> Any:
    """Of the one size that stable-diffusion.cpp has for CLIP-L."""
    return kind(
        CLIPTextConfig(
            vocab_size=VOCABULARY, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, projection_dim=768, bos_token_id=VOCABULARY - 2, eos_token_id=VOCABULARY - 1,
            pad_token_id=VOCABULARY - 1,
        )
    )  # fmt: skip


def silent(encoder: nn.Module) -> nn.Module:
    """One that says zeros, as stable-diffusion.cpp does where T5's file is missing."""
    for parameter in encoder.parameters():
        nn.init.zeros_(parameter)
    return encoder


def autoencoder(channels: int, scale: float, shift: float | None, *, quant: bool) -> AutoencoderKL:
    """The smallest that stable-diffusion.cpp can decode with; its scale and shift are built in there."""
    kind: Any = AutoencoderKL
    vae = kind(
        block_out_channels=(32, 64, 128, 128), latent_channels=channels, norm_num_groups=32, layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=SIDE,
        scaling_factor=scale, shift_factor=shift, use_quant_conv=quant, use_post_quant_conv=quant,
    )  # fmt: skip
    tiny.enliven(vae)
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 0.5  # few pixels are black or white
    return vae


def make_flux(*, guidance: bool) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=128,
        num_attention_heads=2, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=guidance,
    )  # fmt: skip
    parts: Any = dict(
        transformer=enlivened(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(16, 0.3611, 0.1159, quant=False),
        text_encoder=clip_encoder(CLIPTextModel),
        tokenizer=clip_tokenizer(),
        text_encoder_2=silent(tiny.t5_encoder(4096)),
        tokenizer_2=tiny.t5_tokenizer(),
    )
    return FluxPipeline(**parts)


def make_sd3(**changes: Any) -> StableDiffusion3Pipeline:
    """Of the width that stable-diffusion.cpp takes for so few layers."""
    kind: Any = SD3Transformer2DModel
    transformer = kind(
        sample_size=SIDE // 8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=64,
        num_attention_heads=2, joint_attention_dim=4096, caption_projection_dim=128, pooled_projection_dim=2048,
        **{"pos_embed_max_size": 192} | changes,
    )  # fmt: skip
    clip = clip_encoder(CLIPTextModelWithProjection)
    nn.init.eye_(clip.text_projection.weight)  # stable-diffusion.cpp has none there
    clip_g = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=100, hidden_size=1280, intermediate_size=8, num_hidden_layers=1, num_attention_heads=20,
            projection_dim=1280,
        )
    )  # fmt: skip
    parts: Any = dict(
        transformer=enlivened(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(16, 1.5305, 0.0609, quant=False),
        text_encoder=clip,
        tokenizer=clip_tokenizer(),
        text_encoder_2=silent(clip_g),
        tokenizer_2=tiny.clip_tokenizer(),
        text_encoder_3=silent(tiny.t5_encoder(4096)),
        tokenizer_3=tiny.t5_tokenizer(),
    )
    return StableDiffusion3Pipeline(**parts)


def make_sd1() -> StableDiffusionPipeline:
    """Of the real size; stable-diffusion.cpp has no other."""
    parts: Any = dict(
        unet=denoising(enlivened(UNet2DConditionModel(sample_size=SIDE // 8, cross_attention_dim=768))),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        vae=autoencoder(4, 0.18215, None, quant=True),
        text_encoder=clip_encoder(CLIPTextModel),
        tokenizer=clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
    )
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


@torch.no_grad()
def denoising(unet: Any) -> UNet2DConditionModel:
    """A network that says its input and a little more, so that latents are of about unit size, as a trained one's are.

    The input takes the skip connection to the last block, in the first group of the last norm. It is there with both
    signs: silu(x) - silu(-x) = x.
    """
    last: Any = unet.up_blocks[-1]
    width = unet.conv_in.out_channels
    block, attention = last.resnets[-1], last.attentions[-1]
    group = width // unet.config.norm_num_groups
    for layer in (unet.conv_in, block.conv2, block.conv_shortcut, attention.proj_out):
        layer.weight[:group] = 0
        layer.bias[:group] = 0
    unet.conv_out.weight *= 0.05
    for channel in range(4):
        for place, sign in ((channel, 1), (channel + 4, -1)):
            unet.conv_in.weight[place, channel, 1, 1] = sign
            block.conv_shortcut.weight[place, width + place] = 1
            unet.conv_norm_out.weight[place] = (8 / group) ** 0.5
            unet.conv_out.weight[channel, place, 1, 1] = sign
    return unet


def enlivened(network: Any) -> Any:
    tiny.enliven(network)
    return network


FAMILIES: dict[str, Callable[[], Any]] = {
    "flux dev": partial(make_flux, guidance=True),
    "flux schnell": partial(make_flux, guidance=False),
    "sd3": make_sd3,
    "sd3.5": partial(make_sd3, qk_norm="rms_norm"),
    "sd3.5 medium": partial(make_sd3, qk_norm="rms_norm", dual_attention_layers=(0,), pos_embed_max_size=384),
    "sd1": make_sd1,
}
STEPS: dict[SamplerName, tuple[int, ...]] = {"consistency": (1, 2, 4), "flow": (1, 2, 8)}


@dataclass(frozen=True)
class Made:
    """A student's file, in the folder where its card's command finds the user's files.

    Attributes:
        folder: it has the files that the command names.
        words: the command.
        levels: number of steps -> noise levels, as the card lists them.
        starts: factors of the first noise; of Stable Diffusion 1 the last one is stable-diffusion.cpp's.
        ours: (number of steps, factor of the first noise) -> image [H, W, 3] of our own sampler, in grey levels.
    """

    folder: Path
    words: list[str]
    levels: dict[int, str]
    starts: list[float]
    ours: dict[tuple[int, float], Any]


def make(family: str, sampler: SamplerName, folder: Path) -> Made:
    """A student whose LoRA moved, exported; and what it generates here."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = FAMILIES[family]()
        tokens = 256 if family.startswith("flux") else 77  # T5's in stable-diffusion.cpp
        sizes = [f"teacher.height={SIDE}", f"teacher.width={SIDE}", f"teacher.max_tokens={tokens}"]
        changes = ["student.lora=4", "prompts=prompts.txt", "objective=discrete", *sizes]
        pipe.save_pretrained(folder / "teacher")
        del pipe
        config = load_config("default", [f"teacher.source={folder / 'teacher'}", *changes])
        teacher = load_teacher(config.teacher, "cpu")
        student = lora_student(teacher, 4)
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        save_student(teacher, student, folder / "student", config, tiny.recipe(teacher, sampler), PROMPT)
        del teacher, student
    run_export(folder / "student", "single-file", folder / "fox.safetensors", force=False)
    card = card_of(folder / "fox.safetensors").read_text()
    (line,) = re.findall(r"^sd-cli (.+)$", card, re.MULTILINE)
    levels = {int(steps): listed.replace(" ", "") for steps, listed in re.findall(r"^\| (\d+) \| (.+) \|$", card, re.M)}
    starts = [1.0, start_of(levels[1])] if family == "sd1" else [1.0]
    ours = our_images(folder / "student", STEPS[sampler], starts)
    put_users_files(folder)
    return Made(folder, shlex.split(line), levels, starts, ours)


def start_of(levels: str) -> float:
    """The share of noise in stable-diffusion.cpp's start from Stable Diffusion's highest level; ours is noise alone."""
    first = float(levels.split(",")[0])
    return first / (1 + first**2) ** 0.5


def our_images(student_folder: Path, steps: Iterable[int], starts: Iterable[float]) -> dict[tuple[int, float], Any]:
    """Images of our own sampler, from the noise of torch's generator: all of it from one, as `--rng cpu` has it."""
    teacher, student, card = load_merged(student_folder, "cpu")
    condition, scale = teacher.encode([PROMPT]), torch.full((1,), card.recipe.guidance)
    made = {}
    for num_steps, start in product(steps, starts):
        generator = torch.Generator().manual_seed(SEED)
        shape = (1, *teacher.latent_shape)
        noises = [teacher.sigma_data * torch.randn(shape, generator=generator) for _ in range(num_steps)]
        sample = SAMPLERS[card.recipe.sampler]
        times = card.recipe.times[num_steps]
        x0 = sample(student, start * noises[0], condition, scale, times, noises.__getitem__, teacher.sigma_data)
        made[num_steps, start] = 255 * teacher.decode(x0)[0].permute(1, 2, 0).numpy()
    return made


def put_users_files(folder: Path) -> None:
    """Under the names that the command has for them; not T5, which then says zeros."""
    teacher = folder / "teacher"
    vae, clip = teacher / "vae/diffusion_pytorch_model.safetensors", teacher / "text_encoder/model.safetensors"
    if not (teacher / "unet").is_dir():
        shutil.copy(vae, folder / "YOUR_VAE.safetensors")
        save_file(published_names(load_file(clip)), folder / "YOUR_clip_l.safetensors")
        if (teacher / "text_encoder_3").is_dir():
            put_silent_clip_g(folder / "YOUR_clip_g.safetensors")
        return
    state = {f"first_stage_model.{name}": tensor for name, tensor in load_file(vae).items()}
    state |= {f"cond_stage_model.transformer.{name}": each for name, each in published_names(load_file(clip)).items()}
    other = torch.randn(320, 4, 3, 3)  # the teacher's, which the student's replaces
    save_file(state | {"model.diffusion_model.input_blocks.0.0.weight": other}, folder / "YOUR_MODEL.safetensors")


def put_silent_clip_g(file: Path) -> None:
    """CLIP-G of its real size, all zeros, which take no place on the disk: stable-diffusion.cpp fails without one."""
    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
        projection_dim=1280,
    )  # fmt: skip
    with torch.device("meta"):
        state = published_names(CLIPTextModelWithProjection(config).state_dict())
    end, header = 0, {}
    for name, tensor in state.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(out.tell() + end)


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of CLIP's encoder: the newest transformers leave out what all of them begin with."""
    known = ("text_model.", "text_projection.")
    return {name if name.startswith(known) else f"text_model.{name}": tensor for name, tensor in state.items()}


def theirs(made: Made, steps: int, **changes: str) -> Any:
    """The image [H, W, 3] of stable-diffusion.cpp in grey levels, by the card's command.

    Args:
        made: the student.
        steps: their number; the card's noise levels of so many take the command's place.
        changes: option without its dashes -> another value.
    """
    words, values = list(made.words), {"steps": str(steps), "sigmas": made.levels[steps]} | changes
    for name, value in values.items():
        words[words.index("--" + name.replace("_", "-")) + 1] = value
    out = made.folder / "out.png"
    out.unlink(missing_ok=True)
    asked = [BINARY, *words, "--rng", "cpu", "-s", str(SEED), "--type", "f32", "-t", "1", "-o", str(out)]
    done = subprocess.run(asked, cwd=made.folder, capture_output=True, text=True)
    if "MMDiT layers: 24" in done.stdout:
        pytest.skip("takes every Stable Diffusion 3 for one of 24 layers, 8 GB; set `depth` to 0 in its mmdit.hpp")
    assert done.returncode == 0 and out.is_file(), done.stdout + done.stderr
    return np.asarray(Image.open(out).convert("RGB"), dtype=np.float32)


def theirs_in_diffusers(made: Made, steps: int) -> Any:
    """The image [H, W, 3] of plain diffusers in grey levels, with the call of the student's card."""
    folder = run_export(made.folder / "student", "pipeline", made.folder / "pipeline", force=True)
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)  # the scheduler asks no other generator for its fresh noise
        return 255 * pipe(PROMPT, output_type="np", **read_card(folder).calls[steps]).images[0]


def differences(image: Any, ours: Any) -> tuple[float, float]:
    """Mean and greatest one, in grey levels."""
    absolute = np.abs(image - ours)
    return float(absolute.mean()), float(absolute.max())


CASES: list[tuple[str, SamplerName]] = [
    ("flux dev", "consistency"),
    ("flux schnell", "flow"),
    ("sd3", "consistency"),
    ("sd3.5", "flow"),
    ("sd3.5 medium", "consistency"),
    ("sd1", "consistency"),
    ("sd1", "flow"),
]


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path(BINARY).is_file(), reason="no sd-cli; set STEPFOLD_SD_CLI to the binary's path")
@pytest.mark.parametrize(("family", "sampler"), CASES)
def test_the_cards_command_generates_our_images(family: str, sampler: SamplerName, tmp_path: Path) -> None:
    """The file has whole grey levels, so that a quarter is the mean difference of images that are equal."""
    made = make(family, sampler, tmp_path)
    limit = (1.5, 10) if family == "sd1" else (0.3, 2)  # its convolutions in float16 add up over the steps
    for (steps, start), ours in made.ours.items():
        assert ours.std() > 20 and ((ours > 1) & (ours < 254)).mean() > 0.9, "an image that anything may equal"
        mean, most = differences(theirs(made, steps), ours)
        print(family, sampler, steps, start, f"mean {mean:.3f}, most {most:.2f}; contrast {ours.std():.1f}")
        assert start != made.starts[-1] or (mean < limit[0] and most < limit[1]), (steps, mean, most)
    if family == "sd3":
        assert differences(theirs_in_diffusers(made, 2), made.ours[2, 1.0])[0] < 0.01
    steps = STEPS[sampler][1]
    ours = made.ours[steps, made.starts[-1]]
    first, *rest = made.levels[steps].split(",")
    other = {"lcm": "euler", "euler": "lcm"}[made.words[made.words.index("--sampling-method") + 1]]
    mistakes: dict[str, dict[str, str]] = {
        "levels": {"sigmas": ",".join([first, *(str(0.8 * float(level)) for level in rest)])},
        "guidance": {"cfg_scale": "2"},
        "sampler": {"sampling_method": other},
    } | ({"embedded guidance": {"guidance": "3.5"}} if family == "flux dev" else {})
    for mistake, changes in mistakes.items():
        mean, _ = differences(theirs(made, steps, **changes), ours)
        print(family, sampler, steps, f"other {mistake}: mean {mean:.3f}")
        assert mean > 1.5, mistake
