"""`stepfold convert`: a Sana or Sana-Sprint checkpoint under its original names becomes a pipeline folder."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from diffusers import SanaPipeline, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stepfold.errors import UserError, first_line
from stepfold.export.single_file import SANA, from_table, pieces_of
from stepfold.teachers.folders import load_index, load_pipeline
from stepfold.teachers.loading import folder_of
from stepfold.teachers.pipeline import SIGMA_DATA
from stepfold.training.runs import writing

UNUSED = ("pos_embed", "y_embedder.y_embedding", "logvar_linear.")
"""What a network in use has no need of: fixed positions, the empty prompt of training, the adaptive weight's head."""


def read_original(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint; of a pickle nothing but tensors is read, and nothing in it is run.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    try:
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{file} is no checkpoint that can be read safely ({first_line(error)}); give a .pth or .safetensors file "
            "of tensors"
        ) from None
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} holds something else than named tensors; give the checkpoint of a Sana network")
    return state


def network_of(state: Mapping[str, Tensor], config: Mapping[str, Any], time_scale: float) -> SanaTransformer2DModel:
    """A network with the tensors of an original checkpoint.

    Args:
        state: original name -> tensor.
        config: of a network of the same widths; what the names tell is taken from them.
        time_scale: what the network's own time counts to.

    Raises:
        UserError: the checkpoint lacks a tensor, has one too many, or one of another shape.
    """
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    network: Any = SanaTransformer2DModel.from_config(
        {name: value for name, value in config.items() if not name.startswith("_")}
        | {
            "num_layers": len(blocks),
            "qk_norm": "rms_norm_across_heads" if "blocks.0.attn.q_norm.weight" in state else None,
            "guidance_embeds": "cfg_embedder.mlp.0.weight" in state,
            "timestep_scale": time_scale / 1000,
        }
    )
    wanted: dict[str, dict[int, str]] = defaultdict(dict)
    ours = network.state_dict()
    for name in ours:
        original, (place,) = pieces_of(from_table(name, SANA) or name)
        wanted[original][place] = name
    found: dict[str, Tensor] = {}
    for original, pieces in wanted.items():
        names = [pieces[place] for place in sorted(pieces)]
        rows = [len(ours[name]) for name in names]
        if original not in state:
            raise UserError(f"the checkpoint has no {original}; is it a Sana network?")
        if len(state[original]) != sum(rows):
            raise UserError(
                f"{original} has {len(state[original])} rows, but the base's network would have {sum(rows)}; "
                "give a --base of the same size"
            )
        found |= dict(zip(names, state[original].split(rows), strict=True))
    more = sorted(name for name in state if name not in wanted and not name.startswith(UNUSED))
    if more:
        raise UserError(
            f"the checkpoint has {more[0]}, and {len(more) - 1} more, that a Sana network has no place for; "
            "is it a Sana checkpoint?"
        )
    try:
        network.load_state_dict(found)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"the checkpoint does not fit the base's network ({reason}); name a --base of the same size"
        ) from None
    return network


def convert(file: Path, base: str, out: Path, time_scale: Literal[1, 1000]) -> str:
    """Writes a pipeline folder: the checkpoint's network, all else from `base`; returns the pipeline's class.

    Args:
        file: a .pth (tensors only) or .safetensors under original names.
        base: a Sana pipeline of the same size, as a folder or a hub id.
        out: the folder.
        time_scale: what the network's own time counts to: 1000 of Sana, 1 of Sana-Sprint and of its teacher.

    Raises:
        UserError: one of them is not what it should be.
    """
    source = folder_of(base)
    classes = (SanaPipeline, SanaSprintPipeline)
    pipe: Any = load_pipeline(source, load_index(source), classes, torch.float32, network_only=False)
    network = network_of(read_original(file), pipe.transformer.config, time_scale)
    parts: dict[str, Any] = {name: pipe.components[name] for name in ("tokenizer", "text_encoder", "vae")}
    parts["transformer"] = network
    if network.config["guidance_embeds"]:
        scheduler: Any = SCMScheduler(prediction_type="trigflow", sigma_data=SIGMA_DATA)
        made: Any = SanaSprintPipeline(**parts, scheduler=scheduler)
    elif isinstance(pipe, SanaSprintPipeline):
        raise UserError(f"{base!r} is a SanaSprintPipeline, but the checkpoint embeds no guidance; give a SanaPipeline")
    else:
        made = SanaPipeline(**parts, scheduler=pipe.scheduler)
    with writing(out) as part:
        made.save_pretrained(part, safe_serialization=True)
    return type(made).__name__
