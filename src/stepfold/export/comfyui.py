"""A student as a workflow of ComfyUI: loaders, the student's own noise levels and sampler, guidance off.

The workflow is in ComfyUI's API format: its page opens it by drag and drop, and its server runs it as it is. Nodes,
inputs and types of text encoders are those of comfyui-workflow-templates-json 0.1.123 and comfyui-embedded-docs 0.5.15.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from stepfold.maths.formulations import flow_time
from stepfold.sampling.samplers import in_diffusers
from stepfold.students.card import Card
from stepfold.teachers.contract import SamplerName
from stepfold.teachers.conventions import OUTPUT, PREDICTIONS

Keys = Literal["diffusers", "comfy", "kohya", "peft"]
"""Whose names a LoRA has: diffusers', ComfyUI's for any model, those of kohya's scripts, which web UIs read too, or, in
a folder, PEFT's."""
Graph = dict[str, dict[str, Any]]
"""Number of a node -> its class, inputs and, where it is not the usual one, title.

An input from another node is [number, output].
"""

SAMPLERS: dict[SamplerName, str] = {"consistency": "lcm", "flow": "euler"}
"""Sampler in plain diffusers -> its name in ComfyUI and in stable-diffusion.cpp."""
USUAL_STEPS: dict[SamplerName, int] = {"consistency": 4, "flow": 8}
MOST_LEVEL = 5000.0
"""Above ComfyUI's highest noise level of Stable Diffusion, where a schedule that ends in pure noise has infinity."""
YOURS = "YOUR_"
"""How the names of files begin that the user puts in."""
IMAGE = f"{YOURS}IMAGE.png"


@dataclass(frozen=True)
class Loader:
    """How ComfyUI loads what a family's student needs beside its own file.

    Attributes:
        encoders: the text encoders' files, by their usual names; none where they are in the checkpoint.
        kind: of the text encoders, as the loader's `type` has it.
        latent: the node of empty latents.
        checkpoint: whether the model that was distilled is one file with its autoencoder.
        variance_preserving: whether noise levels are noise / signal; else they are shares of noise, in [0, 1].
        scale: whether the network embeds a guidance scale, which is told beside the prompt.
    """

    encoders: tuple[str, ...] = ()
    kind: str = ""
    latent: str = "EmptySD3LatentImage"
    checkpoint: bool = False
    variance_preserving: bool = False
    scale: bool = False


STABLE_DIFFUSION = Loader(latent="EmptyLatentImage", checkpoint=True, variance_preserving=True)
FLUX2 = "EmptyFlux2LatentImage"
LOADERS = {
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": STABLE_DIFFUSION,
    "StableDiffusion3Pipeline": Loader(("clip_l", "clip_g", "t5xxl"), "sd3", checkpoint=True),
    "FluxPipeline": Loader(("clip_l", "t5xxl"), "flux", scale=True),
    "Flux2Pipeline": Loader(("mistral_3_small",), "flux2", FLUX2, scale=True),
    "Flux2KleinPipeline": Loader(("qwen_3_4b_or_8b",), "flux2", FLUX2),  # of the 4B, and of the 9B
    "Lumina2Pipeline": Loader(("gemma_2_2b",), "lumina2"),
    "ZImagePipeline": Loader(("qwen_3_4b",), "lumina2"),
    "WanPipeline": Loader(("umt5_xxl",), "wan", "EmptyHunyuanLatentVideo"),
    "WanImageToVideoPipeline": Loader(("umt5_xxl",), "wan"),
}
"""Class of a pipeline -> its loaders."""
ENCODER_LOADERS = {1: "CLIPLoader", 2: "DualCLIPLoader", 3: "TripleCLIPLoader"}
READS_DIFFUSERS_NAMES = ("FluxPipeline", "StableDiffusion3Pipeline")
"""Pipelines whose LoRAs ComfyUI reads under diffusers' names."""


def loader_of(card: Card) -> Loader:
    """The loaders of a card's family; one without files where they are not known."""
    return LOADERS.get(card.pipeline, Loader())


def no_workflow(card: Card, keys: Keys | None = None, *, retimed: bool = False, of_text: bool = False) -> str:
    """Why there is no workflow of a file; empty where there is one.

    Args:
        card: the student's.
        keys: names in the file of a LoRA; None for a network.
        retimed: whether the network reads times of [0, 1].
        of_text: whether a LoRA changes text encoders too.
    """
    if retimed:
        return "the network was re-timed to read [0, 1], and ComfyUI tells it times up to 1000"
    if card.pipeline not in LOADERS:
        return f"no loader of {card.pipeline or 'this pipeline'} in ComfyUI is known here"
    if keys == "diffusers" and card.pipeline not in READS_DIFFUSERS_NAMES:
        names = "kohya" if LOADERS[card.pipeline] is STABLE_DIFFUSION else "comfy"
        return f"ComfyUI reads this family's LoRAs under other names; export with --keys {names}"
    if keys == "diffusers" and of_text:
        return "ComfyUI reads what it changes of the text encoders under other names; export with --keys kohya"
    return ""


def usual_steps(card: Card) -> int:
    """The number of steps of a workflow: the first that the run's settings name, or the usual one."""
    wished = (*card.asked_steps, USUAL_STEPS[in_diffusers(card.recipe.sampler)])
    known = steps_of(card)
    return next((steps for steps in wished if steps in known), max(known))


def steps_of(card: Card) -> list[int]:
    """The numbers of steps whose noise levels a card says; that of a flow map may list calls without levels."""
    return [steps for steps, call in card.calls.items() if call.get("sigmas") or steps in card.recipe.times]


def says_levels(card: Card) -> bool:
    """Whether a card tells noise levels that other programs take: of a family in `LOADERS`, or of flow matching."""
    return bool(card.calls) and (card.pipeline in LOADERS or card.scheduler.startswith("FlowMatch"))


def levels_of(card: Card, num_steps: int) -> list[float]:
    """Noise levels of a student's steps as ComfyUI counts them, the final 0 among them.

    Args:
        card: one that `says_levels`.
        num_steps: one of `steps_of`.
    """
    if listed := card.calls[num_steps].get("sigmas"):
        return [*listed, 0.0]
    times = torch.tensor(card.recipe.times_for(num_steps), dtype=torch.float64).clamp(max=math.pi / 2)
    levels = times.tan().clamp(max=MOST_LEVEL) if loader_of(card).variance_preserving else flow_time(times)
    return [*levels.tolist(), 0.0]


def in_text(levels: list[float]) -> str:
    """`1, 0.75, 0`: ManualSigmas reads decimals alone, no exponents. Networks that read 1000 t need more than six."""
    return ", ".join(f"{level:.9f}".rstrip("0").rstrip(".") for level in levels)


def predicts_v(card: Card) -> bool:
    """Whether the teacher predicts v, which a checkpoint need not say, and which ComfyUI is told for a LoRA of it."""
    return card.conventions.get(OUTPUT) == PREDICTIONS["v_prediction"]


def workflow(card: Card, file: str, *, lora: bool, of_text: bool = False, per_token: bool = False) -> Graph:
    """The workflow of a file of weights, of a family in `LOADERS`.

    Args:
        card: the student's, with `calls`.
        file: its name, in ComfyUI's folder of LoRAs or of diffusion models.
        lora: whether it is a LoRA; else the network.
        of_text: whether that changes text encoders too.
        per_token: whether the network is told a time for each token, as Wan 2.2's of text and images is.
    """
    loader, steps = LOADERS[card.pipeline], usual_steps(card)
    graph: Graph = {}
    model, clip, vae = load(graph, loader, card, file, lora=lora, of_text=of_text)
    if lora and predicts_v(card):
        noisy = max(levels_of(card, steps)) >= MOST_LEVEL
        how: dict[str, Any] = {"sampling": "v_prediction", "zsnr": noisy}
        model = add(graph, "ModelSamplingDiscrete", "The model predicts v", model=model, **how)
    if card.pipeline == "Lumina2Pipeline":
        texts = {"system_prompt": "superior", "user_prompt": card.example}
        positive = add(graph, "CLIPTextEncodeLumina2", "Prompt", clip=clip, **texts)
    else:
        positive = add(graph, "CLIPTextEncode", "Prompt", clip=clip, text=card.example)
    negative = add(graph, "ConditioningZeroOut", "No negative prompt: guidance is off", conditioning=positive)
    if loader.scale:
        scale = float(card.calls[steps]["guidance_scale"])
        positive = add(graph, "FluxGuidance", "The scale that it was trained at", conditioning=positive, guidance=scale)
    if card.with_images and not per_token:
        positive = beside_image(graph, card, positive, vae)
    guider = add(graph, "CFGGuider", "Guidance off: cfg 1", model=model, positive=positive, negative=negative, cfg=1.0)
    levels = f"Its noise levels for {steps} step{'s' * (steps != 1)}"
    sampled = add(
        graph,
        "SamplerCustomAdvanced",
        noise=add(graph, "RandomNoise", noise_seed=0),
        guider=guider,
        sampler=add(graph, "KSamplerSelect", sampler_name=SAMPLERS[in_diffusers(card.recipe.sampler)]),
        sigmas=add(graph, "ManualSigmas", levels, sigmas=in_text(levels_of(card, steps))),
        latent_image=empty_latents(graph, loader, card, vae, per_token=per_token),
    )
    images = add(graph, "VAEDecode", samples=sampled, vae=vae)
    if card.output == "frames":
        film = {"fps": 16.0, "lossless": False, "quality": 90, "method": "default"}
        add(graph, "SaveAnimatedWEBP", images=images, filename_prefix=Path(file).stem, **film)
    else:
        add(graph, "SaveImage", images=images, filename_prefix=Path(file).stem)
    return graph


def add(graph: Graph, kind: str, title: str = "", **inputs: Any) -> list[Any]:
    """Adds a node; returns its first output."""
    number = str(len(graph) + 1)
    graph[number] = {"class_type": kind, "inputs": inputs} | ({"_meta": {"title": title}} if title else {})
    return [number, 0]


def load(
    graph: Graph, loader: Loader, card: Card, file: str, *, lora: bool, of_text: bool
) -> tuple[list[Any], list[Any], list[Any]]:
    """Adds the loaders; returns the outputs that have network, text encoders and autoencoder.

    The LoRAs of the teacher come before the student's own; a network has them already, and its text encoders do not.
    """
    model = clip = vae = None
    if loader.checkpoint and (lora or not loader.encoders):
        whole = add(graph, "CheckpointLoaderSimple", "YOURS: the model that you distilled", ckpt_name=yours("MODEL"))
        model, clip, vae = ([whole[0], output] for output in range(3))
    if loader.encoders:
        count = len(loader.encoders)
        numbers = [""] if count == 1 else range(1, count + 1)
        files = {f"clip_name{i}": yours(name) for i, name in zip(numbers, loader.encoders, strict=True)}
        kind = {"type": loader.kind} if count < 3 else {}
        title = f"YOURS: its text encoder{'s' * (count > 1)}"
        clip = add(graph, ENCODER_LOADERS[count], title, **files, **kind)
    if not lora:
        model = add(graph, "UNETLoader", "The student", unet_name=file, weight_dtype="default")
    model = model or add(
        graph, "UNETLoader", "YOURS: the model that you distilled", unet_name=yours("MODEL"), weight_dtype="default"
    )
    vae = vae or add(graph, "VAELoader", "YOURS: its autoencoder", vae_name=yours("VAE"))
    for each in card.teacher_settings().lora:
        name = Path(each.source).name if each.source.endswith(".safetensors") else yours("LORA")
        strengths = {"strength_model": each.scale if lora else 0.0, "strength_clip": each.scale}
        title = "YOURS: the LoRA that you distilled with"
        model = add(graph, "LoraLoader", title, model=model, clip=clip, lora_name=name, **strengths)
        clip = [model[0], 1]
    if lora and of_text:
        strengths = {"strength_model": 1.0, "strength_clip": 1.0}
        model = add(graph, "LoraLoader", "The student", model=model, clip=clip, lora_name=file, **strengths)
        clip = [model[0], 1]
    elif lora:
        model = add(graph, "LoraLoaderModelOnly", "The student", model=model, lora_name=file, strength_model=1.0)
    assert clip is not None
    return model, clip, vae


def image_of(graph: Graph, card: Card, title: str) -> list[Any]:
    """Adds the image of a prompt, scaled and cropped as in training."""
    image = add(graph, "LoadImage", f"YOURS: {title}", image=IMAGE)
    sizes: dict[str, Any] = {"width": card.width, "height": card.height}
    return add(graph, "ImageScale", image=image, upscale_method="lanczos", crop="center", **sizes)


def beside_image(graph: Graph, card: Card, text: list[Any], vae: list[Any]) -> list[Any]:
    """Adds the reference image of a prompt; returns the condition of both."""
    latent = add(graph, "VAEEncode", pixels=image_of(graph, card, "the reference image"), vae=vae)
    return add(graph, "ReferenceLatent", conditioning=text, latent=latent)


def yours(name: str) -> str:
    """The placeholder of a file of the user's."""
    return f"{YOURS}{name}.safetensors"


def empty_latents(graph: Graph, loader: Loader, card: Card, vae: list[Any], *, per_token: bool) -> list[Any]:
    """Adds the node that says how large the result is."""
    sizes: Mapping[str, Any] = {"width": card.width, "height": card.height, "batch_size": 1}
    if card.output == "frames":
        sizes = {**sizes, "length": card.frames}
    if per_token:
        first: dict[str, Any] = {"start_image": image_of(graph, card, "the first frame")} if card.with_images else {}
        return add(graph, "Wan22ImageToVideoLatent", vae=vae, **sizes, **first)
    return add(graph, loader.latent, **sizes)
