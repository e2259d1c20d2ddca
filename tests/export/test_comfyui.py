"""A workflow is one that ComfyUI takes, and its levels and sampler give our latents.

The tables here are our own statement of ComfyUI's: nodes, inputs and outputs after comfyui-workflow-templates-json
0.1.123 and comfyui-embedded-docs 0.5.15, the opening of files after comfyui-frontend-package 1.58.1.
"""

import json
import math
import re
import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from forms import cases
from torch import Tensor

from stepfold.export.beside import card_of, file_card, sd_cpp_command, workflow_of
from stepfold.export.comfyui import LOADERS, in_text, levels_of, no_workflow, says_levels, steps_of, workflow
from stepfold.jobs.exporting import run_export
from stepfold.maths.formulations import data_prediction, trigflow_time
from stepfold.sampling.consistency import sample_consistency
from stepfold.sampling.flow import sample_flow
from stepfold.students.card import Card, read_card
from stepfold.students.loading import load_student

from .conftest import relative

StudentOf = Callable[..., Path]
Graph = dict[str, dict[str, Any]]

OUTPUTS: dict[str, tuple[str, ...]] = {
    "CheckpointLoaderSimple": ("MODEL", "CLIP", "VAE"), "UNETLoader": ("MODEL",), "VAELoader": ("VAE",),
    "CLIPLoader": ("CLIP",), "DualCLIPLoader": ("CLIP",), "TripleCLIPLoader": ("CLIP",),
    "LoraLoader": ("MODEL", "CLIP"), "LoraLoaderModelOnly": ("MODEL",), "ModelSamplingDiscrete": ("MODEL",),
    "CLIPTextEncode": ("CONDITIONING",), "CLIPTextEncodeLumina2": ("CONDITIONING",),
    "ConditioningZeroOut": ("CONDITIONING",), "FluxGuidance": ("CONDITIONING",), "CFGGuider": ("GUIDER",),
    "LoadImage": ("IMAGE", "MASK"), "ImageScale": ("IMAGE",), "VAEEncode": ("LATENT",),
    "ReferenceLatent": ("CONDITIONING",),
    "RandomNoise": ("NOISE",), "KSamplerSelect": ("SAMPLER",), "ManualSigmas": ("SIGMAS",),
    "EmptyLatentImage": ("LATENT",), "EmptySD3LatentImage": ("LATENT",), "EmptyFlux2LatentImage": ("LATENT",),
    "EmptyHunyuanLatentVideo": ("LATENT",), "Wan22ImageToVideoLatent": ("LATENT",),
    "SamplerCustomAdvanced": ("LATENT", "LATENT"), "VAEDecode": ("IMAGE",), "SaveImage": ("IMAGE",),
    "SaveAnimatedWEBP": (),
}  # fmt: skip
SIZES: dict[str, Any] = {"width": int, "height": int, "batch_size": int}
TYPES = ("sd3", "lumina2", "wan", "flux2", "flux")
INPUTS: dict[str, dict[str, Any]] = {
    "CheckpointLoaderSimple": {"ckpt_name": str}, "VAELoader": {"vae_name": str},
    "UNETLoader": {"unet_name": str, "weight_dtype": ("default",)},
    "CLIPLoader": {"clip_name": str, "type": TYPES},
    "DualCLIPLoader": {"clip_name1": str, "clip_name2": str, "type": TYPES},
    "TripleCLIPLoader": {"clip_name1": str, "clip_name2": str, "clip_name3": str},
    "LoraLoader": {
        "model": "MODEL", "clip": "CLIP", "lora_name": str, "strength_model": float, "strength_clip": float
    },
    "LoraLoaderModelOnly": {"model": "MODEL", "lora_name": str, "strength_model": float},
    "ModelSamplingDiscrete": {"model": "MODEL", "sampling": ("v_prediction",), "zsnr": bool},
    "CLIPTextEncode": {"clip": "CLIP", "text": str},
    "CLIPTextEncodeLumina2": {"clip": "CLIP", "system_prompt": ("superior", "alignment"), "user_prompt": str},
    "ConditioningZeroOut": {"conditioning": "CONDITIONING"},
    "FluxGuidance": {"conditioning": "CONDITIONING", "guidance": float}, "LoadImage": {"image": str},
    "ImageScale": {
        "image": "IMAGE", "upscale_method": ("lanczos",), "width": int, "height": int, "crop": ("center",)
    },
    "VAEEncode": {"pixels": "IMAGE", "vae": "VAE"},
    "ReferenceLatent": {"conditioning": "CONDITIONING", "latent": "LATENT"},
    "CFGGuider": {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "cfg": float},
    "RandomNoise": {"noise_seed": int}, "KSamplerSelect": {"sampler_name": ("lcm", "euler")},
    "ManualSigmas": {"sigmas": str}, "EmptyLatentImage": SIZES, "EmptySD3LatentImage": SIZES,
    "EmptyFlux2LatentImage": SIZES, "EmptyHunyuanLatentVideo": SIZES | {"length": int},
    "Wan22ImageToVideoLatent": SIZES | {"length": int, "vae": "VAE", "start_image": "IMAGE"},
    "SamplerCustomAdvanced": {
        "noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"
    },
    "VAEDecode": {"samples": "LATENT", "vae": "VAE"}, "SaveImage": {"images": "IMAGE", "filename_prefix": str},
    "SaveAnimatedWEBP": {
        "images": "IMAGE", "filename_prefix": str, "fps": float, "lossless": bool, "quality": int,
        "method": ("default",),
    },
}  # fmt: skip
"""Node -> its inputs: the type of an output, the type of a value, or the values that there are."""

FAMILIES = {
    "sd1": "kohya", "sdxl": "kohya", "sd3": None, "flux": None, "flux2": "comfy", "flux2 dev": "comfy",
    "lumina": "comfy", "z-image": "comfy", "wan": "comfy", "wan 2.2 ti2v": "comfy", "v sdxl from noise": "comfy",
}  # fmt: skip
"""Family -> names under which ComfyUI reads its LoRAs."""
SHORT = ["sdxl", "flux"]


def check_nodes(graph: Graph) -> None:
    """Raises unless ComfyUI opens the file, knows the nodes, and every input has what it takes."""
    assert all(isinstance(node["class_type"], str) and isinstance(node["inputs"], dict) for node in graph.values())
    for number, node in graph.items():
        wanted = INPUTS[node["class_type"]]
        assert {"start_image"} >= wanted.keys() - node["inputs"].keys() and node["inputs"].keys() <= wanted.keys(), node
        for name, value in node["inputs"].items():
            kind = wanted[name]
            if isinstance(kind, str):
                source, output = value
                assert OUTPUTS[graph[source]["class_type"]][output] == kind and int(source) < int(number), (node, name)
            elif isinstance(kind, tuple):
                assert value in kind, (node, name)
            else:
                assert type(value) is kind, (node, name)
    used = {value[0] for node in graph.values() for value in node["inputs"].values() if isinstance(value, list)}
    assert [node["class_type"] for number, node in graph.items() if number not in used][-1].startswith("Save")


def only(graph: Graph, kind: str) -> dict[str, Any]:
    """The inputs of the one node of a kind."""
    (inputs,) = [node["inputs"] for node in graph.values() if node["class_type"] == kind]
    return inputs


def drawn(
    graph: Graph, denoised: Callable[[Tensor, float], Tensor], noise: list[Tensor], highest: float | None
) -> Tensor:
    """ComfyUI's loop: reading ManualSigmas, noise at the first level, `euler` or `lcm`.

    Args:
        graph: the workflow.
        denoised: (state, level) -> x_0, both as ComfyUI has them.
        noise: of each step, of variance 1.
        highest: noise level of the model, where levels are noise / signal; None of a flow model.
    """
    levels = [float(found) for found in re.findall(r"[-+]?(?:\d*\.*\d+)", only(graph, "ManualSigmas")["sigmas"])]
    sampler, first = only(graph, "KSamplerSelect")["sampler_name"], levels[0]
    whole = highest is not None and (math.isclose(highest, first, rel_tol=1e-5) or first > highest)
    x = noise[0] * (math.sqrt(1 + first**2) if whole else first)
    for i, (level, after) in enumerate(pairwise(levels)):
        x_0 = denoised(x, level)
        if sampler == "euler":
            x = x + (x - x_0) / level * (after - level)
        elif highest is None:
            x = after * noise[i + 1] + (1 - after) * x_0 if after else x_0
        else:
            x = x_0 + after * noise[i + 1] if after else x_0
    return x


def both(student: Path, graph: Graph) -> tuple[Tensor, Tensor, Card]:
    """Unit latents by ComfyUI's loop and by our sampler, from the same noise."""
    teacher, network, card = load_student(student, "cpu")
    guider = only(graph, "CFGGuider")
    assert guider["cfg"] == 1.0 and guider["positive"] != guider["negative"]
    scale = card.recipe.guidance
    if guided := [node for node in graph.values() if node["class_type"] == "FluxGuidance"]:
        assert guider["positive"] == [next(n for n, node in graph.items() if node is guided[0]), 0]
        scale = guided[0]["inputs"]["guidance"]
    text = next(node["inputs"] for node in graph.values() if node["class_type"].startswith("CLIPTextEncode"))
    condition, guidance = teacher.encode([text.get("text") or text["user_prompt"]]), torch.tensor([scale])
    draws = torch.Generator().manual_seed(5)
    noise = [torch.randn((1, *teacher.latent_shape), generator=draws) for _ in range(9)]
    preserving = LOADERS[card.pipeline].variance_preserving

    def denoised(x: Tensor, level: float) -> Tensor:
        t = torch.tensor([level]).atan() if preserving else trigflow_time(torch.tensor([level]))
        x = x * t.cos() if preserving else x * (t.sin() + t.cos())
        with torch.no_grad():
            return data_prediction(x, t, network(x, t, condition, guidance))

    highest = math.tan(min(teacher.start_time, 1.5706)) if preserving else None
    theirs = drawn(graph, denoised, noise, highest)
    first, *others = map(float, only(graph, "ManualSigmas")["sigmas"].split(","))
    times = card.recipe.times_for(len(others))
    if preserving and times[0] > 1.5706:  # pure noise, which has no finite level: both begin where the levels do
        assert first > 4500
        times = (math.atan(first), *times[1:])
    sample = sample_consistency if card.recipe.sampler == "consistency" else sample_flow
    half = [0.5 * each for each in noise]
    ours = sample(network, half[0], condition, guidance, times, lambda i: half[i], sigma_data=0.5)
    return theirs, ours / 0.5, card


@pytest.mark.parametrize("family", cases(FAMILIES, short=SHORT))
def test_a_loras_workflow_draws_our_latents(family: str, student_of: StudentOf, tmp_path: Path) -> None:
    student = student_of(family, lora=4)
    file = run_export(student, "lora", tmp_path / "fox.safetensors", force=False, keys=FAMILIES[family])  # type: ignore[arg-type]
    graph = json.loads(workflow_of(file).read_text())
    check_nodes(graph)
    assert only(graph, "LoraLoaderModelOnly")["lora_name"] == "fox.safetensors"
    theirs, ours, card = both(student, graph)
    assert relative(theirs, ours) < 1e-4
    sizes = next(node["inputs"] for node in graph.values() if "Latent" in node["class_type"])
    assert (sizes["width"], sizes["height"]) == (card.width, card.height)
    assert sizes.get("length") == (card.frames if card.output == "frames" else None)
    assert ("Wan22ImageToVideoLatent" in {node["class_type"] for node in graph.values()}) == ("ti2v" in family)


@pytest.mark.parametrize(
    ("family", "sampler"), cases([(f, s) for f in FAMILIES for s in ("consistency", "flow")], short=[("sd3", "flow")])
)
def test_a_networks_workflow_draws_our_latents(
    family: str, sampler: Any, student_of: StudentOf, tmp_path: Path
) -> None:
    student = student_of(family, sampler=sampler)
    file = run_export(student, "single-file", tmp_path / "fox.safetensors", force=False)
    graph = json.loads(workflow_of(file).read_text())
    check_nodes(graph)
    names = [node["inputs"]["unet_name"] for node in graph.values() if node["class_type"] == "UNETLoader"]
    assert names == ["fox.safetensors"]
    assert only(graph, "KSamplerSelect")["sampler_name"] == {"consistency": "lcm", "flow": "euler"}[sampler]
    theirs, ours, _ = both(student, graph)
    assert relative(theirs, ours) < 1e-4


@pytest.mark.parametrize(("family", "noisy"), [("sdxl", None), ("v sdxl", False), ("v sdxl from noise", True)])
def test_comfyui_is_told_of_a_model_that_predicts_v(
    family: str, noisy: bool | None, student_of: StudentOf, tmp_path: Path
) -> None:
    """A LoRA's checkpoint need not say it; a network's own file does."""
    card = read_card(student_of(family, lora=4))
    graph = workflow(card, "fox.safetensors", lora=True)
    check_nodes(graph)
    said = [node["inputs"] for node in graph.values() if node["class_type"] == "ModelSamplingDiscrete"]
    assert [node["zsnr"] for node in said] == ([] if noisy is None else [noisy])
    if said:
        told = next(number for number, node in graph.items() if node["inputs"] is said[0])
        assert only(graph, "CFGGuider")["model"] == [told, 0]
        assert graph[said[0]["model"][0]]["class_type"] == "LoraLoaderModelOnly"
    words = file_card(tmp_path / "fox.safetensors", card, "kohya", "", sd_cpp=False)
    assert ("in ComfyUI by ModelSamplingDiscrete" in words) == bool(said)
    whole = workflow(card, "fox.safetensors", lora=False)
    assert "ModelSamplingDiscrete" not in {node["class_type"] for node in whole.values()}


def test_levels_are_decimals() -> None:
    """The node reads no exponents: 1e-05 is 1 and -5 to it."""
    assert in_text([1.0, 14.614647, 0.00001, 0.0]) == "1, 14.614647, 0.00001, 0"


def test_the_number_of_steps_is_that_of_the_run(student_of: StudentOf) -> None:
    card = read_card(student_of("sd3", sampler="flow"))
    assert only(workflow(card, "a", lora=False), "ManualSigmas")["sigmas"].count(",") == 8
    asked = card.config | {"evaluation": {"steps": [2, 4]}}
    graph = workflow(card.model_copy(update={"config": asked}), "a", lora=False)
    assert only(graph, "ManualSigmas")["sigmas"] == "1, 0.75, 0"


def test_a_flow_map_lists_the_steps_whose_levels_are_known(student_of: StudentOf) -> None:
    """One of segments that jumps to 0 too has calls for any number of steps, which the scheduler knows the times of."""
    card = read_card(student_of("sdxl", lora=4))
    recipe = card.recipe.model_copy(update={"sampler": "flow_map", "times": {1: (1.5,), 2: (1.5, 1.0)}})
    card = card.model_copy(update={"recipe": recipe})
    assert set(card.calls) > {1, 2} and steps_of(card) == [1, 2]
    assert only(workflow(card, "a", lora=True), "ManualSigmas")["sigmas"] == "14.101419947, 1.557407725, 0"


def test_the_teachers_loras_come_first(student_of: StudentOf) -> None:
    """Merged into the network, they are still to be loaded for the text encoders."""
    card = read_card(student_of("sdxl", lora=4))
    loras = [{"source": "a/style.safetensors", "scale": 0.5}, {"source": "some/repo", "scale": 1.0}]
    card = card.model_copy(update={"config": card.config | {"teacher": card.config["teacher"] | {"lora": loras}}})
    for lora, strengths in ((True, [0.5, 1.0]), (False, [0.0, 0.0])):
        graph = workflow(card, "fox.safetensors", lora=lora)
        check_nodes(graph)
        theirs = [node["inputs"] for node in graph.values() if node["class_type"] == "LoraLoader"]
        assert [each["lora_name"] for each in theirs] == ["style.safetensors", "YOUR_LORA.safetensors"]
        assert [each["strength_model"] for each in theirs] == strengths
        assert [each["strength_clip"] for each in theirs] == [0.5, 1.0]
        last = [number for number, node in graph.items() if node["class_type"] == "LoraLoader"][-1]
        assert only(graph, "CLIPTextEncode")["clip"] == [last, 1]
        loaded = only(graph, "LoraLoaderModelOnly") if lora else only(graph, "CFGGuider")
        assert loaded["model"] == [last, 0]


def test_a_student_of_images_is_shown_one(student_of: StudentOf) -> None:
    """Beside the text and its scale, in ComfyUI and in stable-diffusion.cpp."""
    card = read_card(student_of("flux2 dev", lora=4))
    assert "-r" not in sd_cpp_command("fox.safetensors", card).split()
    card = card.model_copy(update={"config": card.config | {"teacher": card.config["teacher"] | {"image_column": "p"}}})
    graph = workflow(card, "fox.safetensors", lora=True)
    check_nodes(graph)
    node = {kind: number for number, each in graph.items() for kind in [each["class_type"]]}
    assert only(graph, "CFGGuider")["positive"] == [node["ReferenceLatent"], 0]
    assert only(graph, "ReferenceLatent")["conditioning"] == [node["FluxGuidance"], 0]
    assert only(graph, "VAEEncode")["vae"] == only(graph, "VAEDecode")["vae"]
    assert only(graph, "LoadImage")["image"] == "YOUR_IMAGE.png"
    assert graph[node["LoadImage"]]["_meta"]["title"].startswith("YOURS")
    assert (only(graph, "ImageScale")["width"], only(graph, "ImageScale")["height"]) == (card.width, card.height)
    assert "-r YOUR_IMAGE.png" in sd_cpp_command("fox.safetensors", card)
    film = read_card(student_of("wan 2.2 ti2v", lora=4)).model_copy(
        update={"config": card.config, "pipeline": "WanImageToVideoPipeline"}
    )
    graph = workflow(film, "fox.safetensors", lora=True, per_token=True)
    check_nodes(graph)
    (scaled,) = [number for number, each in graph.items() if each["class_type"] == "ImageScale"]
    assert only(graph, "Wan22ImageToVideoLatent")["start_image"] == [scaled, 0] and len(only(graph, "LoadImage")) == 1


SD_CPP = {
    "-m", "--diffusion-model", "--vae", "--clip_l", "--clip_g", "--t5xxl", "--llm", "-p", "-W", "-H", "--cfg-scale",
    "--guidance", "--sampling-method", "--steps", "--sigmas",
}  # fmt: skip
"""Options of sd-cli, after the README of stable-diffusion.cpp in stable-diffusion-cpp-python 0.4.7."""


@pytest.mark.parametrize(
    ("family", "sampler"),
    cases([("sd3", "flow"), ("flux", "consistency"), ("sdxl", "flow"), ("flux2", "flow")], short=[]),
)
def test_the_command_for_stable_diffusion_cpp(family: str, sampler: Any, student_of: StudentOf, tmp_path: Path) -> None:
    file = run_export(student_of(family, sampler=sampler), "single-file", tmp_path / "fox.safetensors", force=False)
    graph = json.loads(workflow_of(file).read_text())
    (line,) = re.findall(r"^sd-cli .+$", card_of(file).read_text(), re.MULTILINE)
    words = shlex.split(line)[1:]
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert given.keys() <= SD_CPP and given["--diffusion-model"] == "fox.safetensors" and given["--cfg-scale"] == "1"
    levels = only(graph, "ManualSigmas")["sigmas"].split(", ")
    assert given["--sigmas"].split(",") == levels and int(given["--steps"]) == len(levels) - 1
    assert given["--sampling-method"] == only(graph, "KSamplerSelect")["sampler_name"]
    assert ("--guidance" in given) == (family == "flux")
    said = re.findall(
        r"pads a prompt to (\d+) tokens of T5, and this student was trained at 24:", card_of(file).read_text()
    )
    assert said == {"sd3": ["77"], "flux": ["256"]}.get(family, [])


@pytest.mark.parametrize(
    ("family", "levels"),
    [("ernie-image", "1, 0.857142857, 0.666666667, 0.4, 0"), ("qwen", "1, 0.707106781, 0.5, 0.292893219, 0")],
)
def test_a_card_without_a_workflow_has_the_settings(
    family: str, levels: str, student_of: StudentOf, tmp_path: Path
) -> None:
    """Of families of flow matching; the levels of others are counted in another way by each program."""
    card = read_card(student_of(family, 4))
    found = [float(level) for level in levels.split(", ")]
    assert levels_of(card, 4) == pytest.approx(found, abs=1e-5)
    text = file_card(tmp_path / "fox.safetensors", card, "comfy", no_workflow(card, "comfy"), sd_cpp=False)
    assert "no workflow: no loader" in text and "The sampler is `lcm`, and CFG is 1" in text
    assert f"| 4 | {in_text(levels_of(card, 4))} |" in text and "guidance scale that the network embeds" not in text
    assert not says_levels(card.model_copy(update={"scheduler": "LCMScheduler"}))


def test_where_there_is_no_workflow_the_card_says_why(student_of: StudentOf, tmp_path: Path) -> None:
    file = tmp_path / "fox.safetensors"
    workflow_of(file).write_text("{}")  # of an earlier export
    run_export(student_of("sana"), "single-file", file, force=True)
    assert not workflow_of(file).exists()
    assert "no workflow: no loader of SanaSprintPipeline in ComfyUI is known here." in card_of(file).read_text()
    run_export(student_of("retimed sd3", lora=4), "lora", file, force=True)
    assert "no workflow: the network was re-timed to read [0, 1]" in card_of(file).read_text()
    card = read_card(student_of("sdxl", lora=4))
    assert no_workflow(card, "diffusers").endswith("under other names; export with --keys kohya")
    card = read_card(student_of("wan", lora=4))
    assert no_workflow(card, "diffusers").endswith("under other names; export with --keys comfy")
    assert not no_workflow(card, "comfy") and not no_workflow(card)
