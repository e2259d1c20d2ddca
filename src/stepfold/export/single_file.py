"""A student's network as one safetensors file, under the names that its family's original checkpoints use."""

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stepfold.errors import UserError
from stepfold.export.beside import is_retimed, write_file
from stepfold.export.casting import Half, round_weights
from stepfold.students.loading import load_merged
from stepfold.teachers.layouts import layout, pieces_of

PREFIXES = {"UNet2DConditionModel": "model.diffusion_model.", "SD3Transformer2DModel": "model.diffusion_model."}
"""What precedes the names in the original checkpoints of a class of networks."""


def original_state(network: Any) -> dict[str, Tensor]:
    """A network's tensors under their original names, as `from_single_file` of its class, where it has one, reads them.

    Raises:
        UserError: the original layout has no place for one of them.
    """
    kind, name_of = type(network).__name__, layout(network)
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in network.state_dict().items():
        original = name_of(name)
        if original is None:
            raise UserError(f"the single-file layout of a {kind} has no place for {name}; use --to pipeline")
        whole, places = pieces_of(original)
        parts[PREFIXES.get(kind, "") + whole].update(zip(places, tensor.chunk(len(places)), strict=True))
    state = {name: joined([pieces[i] for i in sorted(pieces)]) for name, pieces in parts.items()}
    if kind == "SanaTransformer2DModel":  # its loader insists on them; the second one is read for guidance only
        places, config = network.patch_embed.pos_embed, network.config
        width = config.num_attention_heads * config.attention_head_dim
        state["pos_embed"] = torch.zeros(1, 1, width) if places is None else places
        state["y_embedder.y_embedding"] = torch.zeros(1, config.caption_channels)
    return state


def joined(pieces: list[Tensor]) -> Tensor:
    """Row after row; one piece stays where it is, so that a UNet is not held twice."""
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def marks_of(network: Any, schedule: Mapping[str, Any]) -> dict[str, Tensor]:
    """Empty tensors by whose names ComfyUI and the web UIs know a UNet that predicts v, and one that starts in noise.

    Args:
        network: the student's.
        schedule: config of the teacher's scheduler.
    """
    if type(network).__name__ != "UNet2DConditionModel" or schedule.get("prediction_type") != "v_prediction":
        return {}
    names = ["v_pred", *(["ztsnr"] if schedule.get("rescale_betas_zero_snr") else [])]
    return {name: torch.empty(0) for name in names}


def export_single_file(folder: Path, out: Path, dtype: Half | None = None) -> None:
    """A student's network in one file, rounded to `dtype`; text encoders and autoencoder are the teacher's, not in it.

    Raises:
        UserError: no layout is known for it, or a weight is too large for float16.
    """
    teacher, _, card = load_merged(folder, "cpu")
    if is_retimed(teacher):
        raise UserError(
            "this network was re-timed to read [0, 1], and nothing in a single file says so, so that others would give "
            "it times up to 1000; use --to pipeline"
        )
    if dtype:
        round_weights(teacher.transformer, dtype)
    marks = marks_of(teacher.transformer, teacher.pipe.scheduler.config)
    state = original_state(teacher.transformer) | marks
    save = partial(save_file, state, metadata={"format": "pt"})
    write_file(out, save, card, per_token=bool(teacher.index.get("expand_timesteps")), marked_v=bool(marks))
