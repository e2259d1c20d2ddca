"""What the rule for a run without a preset reads of a teacher and a machine."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepfold.sections import CARD

if TYPE_CHECKING:
    from stepfold.config import TeacherSettings
    from stepfold.teachers.contract import GuidanceKind

RANK = 64
BYTES = {"none": 2.0, "int8": 1.0, "nf4": 0.5625}
"""`teacher.quantise` -> bytes a weight of the blocks' linear layers, for a LoRA student."""
WHOLE_BYTES, LORA_BYTES, FAKE_BYTES = 18, 20, 16
"""A parameter that is trained, with its teacher's, gradient, average and moments: CAME's one, AdamW's two.

A fake score's LoRA has no average.
"""
PRESETS = {
    "StableDiffusionXLPipeline": "sdxl-lora-4step",
    "StableDiffusion3Pipeline": "sd3-lora-4step",
    "FluxPipeline": "flux-lora-4step",
    "SanaPipeline": "sana-lora-4step",
    "Lumina2Pipeline": "lumina2-lora-4step",
    "Flux2KleinPipeline": "flux2-klein-lora-4step",
    "ZImagePipeline": "z-image-lora-4step",
    "QwenImagePipeline": "qwen-image-lora-4step",
    "ChromaPipeline": "chroma-lora-4step",
}
"""Pipeline -> its family's four-step preset; see `family_preset` for those of which one class has several sizes."""
OTHER_PRESETS = {
    "sd1-lora-4step": "StableDiffusionPipeline",
    "wan-lora-4step": "WanPipeline",
    "wan22-ti2v-lora-4step": "WanPipeline",
}
"""Preset -> the class that has several."""


@dataclass(frozen=True)
class Facts:
    """What the rule reads.

    Attributes:
        preset: the four-step preset of the teacher's family.
        counts_to: the largest timestep of its network, 1 or 1000.
        guidance: its kind.
        gib: counted weights and states of a run: `whole`, where all weights are trained; and for a LoRA by the names of
            `BYTES`, which a pipeline without LoRAs lacks, as it lacks `fake`, what a fake score's LoRA adds.
        memory_gib: of the device.
        second_time: whether its network can be told a target time.
        widens: whether its network can give several velocities at a time, as pi-Flow's does.
        steps: sampling steps that the student is for.
        hours: that the run may take; None for any.
        full_hours: `whole` and `lora` -> hours of all their preset's steps, counted from measured ones; None before.
        fixed_hours: of a run's start and evaluation, which take as long however many steps there are.
        billions: of the network's parameters.
        video: whether it makes videos.
        no_lora: why no LoRA can be; empty where one can.
    """

    preset: str
    counts_to: float
    guidance: "GuidanceKind"
    gib: Mapping[str, float]
    memory_gib: float
    second_time: bool = True
    widens: bool = False
    steps: int = 4
    hours: float | None = None
    full_hours: Mapping[str, float] | None = None
    fixed_hours: float = 0.0
    billions: float = 0.0
    video: bool = False
    no_lora: str = ""


def family_preset(index: Mapping[str, Any], network: Mapping[str, Any]) -> str:
    """The four-step preset of a pipeline's family, `lora-4step` where it has none.

    Args:
        index: its model_index.json.
        network: its network's config.
    """
    name = str(index.get("_class_name"))
    if name == "StableDiffusionPipeline" and network.get("sample_size") == 64:
        return "sd1-lora-4step"
    if name == "WanPipeline":
        return "wan22-ti2v-lora-4step" if index.get("expand_timesteps") else "wan-lora-4step"
    return PRESETS.get(name, "lora-4step")


def foreign_preset(preset: str, source: str, tokens: int | None = None) -> str:
    """What to say of a preset that is for another teacher; empty where it is not.

    Args:
        preset: its name, or a yaml file that builds on it.
        source: the teacher's folder, or a hub id.
        tokens: of a prompt, as the run has them. Presets of the bundled model cut prompts, which a student of it as a
            teacher does not mind.
    """
    owners = {name: pipeline for pipeline, name in PRESETS.items()} | OTHER_PRESETS
    while preset not in owners and Path(preset).is_file():
        found = re.search(r"^preset: *[\"']?([^\s\"'#]+)", Path(preset).read_text(encoding="utf-8"), re.MULTILINE)
        preset = found[1] if found else ""
    if preset not in owners and (tokens is None or bundled_tokens(preset) != tokens):
        return ""
    try:
        index, network = configs_of(source)
        pipeline, own = index["_class_name"], family_preset(index, network)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ""  # which the run says
    if own != preset and "WanPipeline" == pipeline == owners.get(preset):
        return f"preset {preset} has size and frames of another {pipeline} than the teacher; its family has {own}"
    if preset in owners and pipeline != owners[preset]:
        return (
            f"preset {preset} has size, guidance scale and method for a {owners[preset]}, and the teacher is a "
            f"{pipeline}; its family has {own}"
        )
    if tokens is not None and tokens == bundled_tokens(preset) and not (Path(source) / CARD).is_file():
        return (
            f"preset {preset} is for the bundled model: it asks for {tokens} tokens a prompt, and its rate and length "
            f"were found there; the family of this teacher, a {pipeline}, has {own}"
        )
    return ""


def configs_of(source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The index of a pipeline and the config of its network, from a folder or a hub id; of the bundled one nothing."""
    folder = Path(source)
    if source == "emoji":
        return {}, {}
    if not folder.exists():
        from stepfold.teachers.folders import load_index, part_config  # slow, and of no use for a folder

        index = load_index(source)
        return index, part_config(source, index, "unet" if "unet" in index else "transformer")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    file = folder / ("unet" if "unet" in index else "transformer") / "config.json"
    return index, json.loads(file.read_text("utf-8")) if file.is_file() else {}


def bundled_tokens(preset: str) -> int | None:
    """At how many tokens a preset of the bundled model cuts prompts; None for other presets, and for no preset."""
    from stepfold.config import load_config, preset_names

    return load_config(preset).teacher.max_tokens if preset in preset_names() else None


def read_facts(teacher: "TeacherSettings", lora: int | None, steps: int, hours: float | None, device: str) -> Facts:
    """What the rule reads of a teacher, from its configs alone, and of this machine.

    Args:
        teacher: its settings.
        lora: rank that the user asks for; 0 for all weights, None for no wish.
        steps, hours, device: of the run.

    Raises:
        UserError: there is no such teacher.
    """
    import torch

    from stepfold.jobs.devices import usable_device
    from stepfold.teachers.family import Family
    from stepfold.teachers.folders import load_index, part_config, unloadable, without_weights
    from stepfold.teachers.loading import family_of, place_of
    from stepfold.training.choices import device_memory

    source = place_of(teacher)
    family, index = family_of(source), load_index(source)
    try:
        parts = [part for part in (family.network_part, f"{family.network_part}_2") if (index.get(part) or [None])[0]]
        networks = [without_weights(source, part, index[part]) for part in parts]
        config = networks[0].config
        counts_to = family.time_scale_of(config, part_config(source, index, "scheduler"))
        kind = family.guidance_kinds(config, index)[0] if teacher.guidance == "auto" else teacher.guidance
    except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise unloadable(source, error) from None
    gib = weights_gib(networks, family.lora_blocks, lora or RANK)
    no_lora = no_lora_since(family.loads_lora, lora)
    if no_lora:
        gib = {"whole": gib["whole"]}
    elif lora:
        gib["whole"] = math.inf  # not wanted
    told = bool(family.time_module) or family.time_part is not Family.time_part
    return Facts(
        family_preset(index, config), counts_to, kind, gib, device_memory(torch.device(usable_device(device))) / 2**30,
        second_time=told and len(networks) == 1, widens=bool(family.head), steps=steps, hours=hours,
        billions=sum(weight.numel() for network in networks for weight in network.parameters()) / 1e9,
        video=family.output == "frames", no_lora=no_lora,
    )  # fmt: skip


def no_lora_since(loads: bool, wished: int | None) -> str:
    """Why no LoRA can be, or an empty text; `loads` is whether the pipeline loads LoRAs, `wished` the rank asked for.

    A LoRA that is asked for is left to the run, which refuses it where it cannot be.
    """
    if not loads:
        return "the pipeline loads no LoRA"
    if wished == 0:
        return "no LoRA is wanted"
    return "peft is missing (pip install peft)" if find_spec("peft") is None else ""


def weights_gib(networks: Sequence[Any], blocks: Sequence[str], rank: int) -> dict[str, float]:
    """Counted GiB of weights and states; see `Facts.gib`.

    Args:
        networks: on the meta device.
        blocks: parts of the names of the blocks that a LoRA is for.
        rank: of the LoRA.
    """
    from torch import nn

    total = sum(weight.numel() for network in networks for weight in network.parameters())
    layers = [
        layer
        for network in networks
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and any(part in name for part in blocks)
    ]
    inside = sum(layer.weight.numel() for layer in layers)
    width = sum(layer.in_features + layer.out_features for layer in layers)
    taken = {kind: 2 * (total - inside) + each * inside + LORA_BYTES * rank * width for kind, each in BYTES.items()}
    taken |= {"whole": WHOLE_BYTES * total, "fake": FAKE_BYTES * RANK * width}
    return {kind: count / 2**30 for kind, count in taken.items()}
