"""`stepfold convert`: a checkpoint under its original names, one file, becomes a pipeline folder."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from diffusers import SanaPipeline, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm, fetch_diffusers_config
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stepfold.errors import UserError, first_line
from stepfold.export.casting import Half, rounded_parts
from stepfold.teachers.calls import parts_of
from stepfold.teachers.folders import load_index, load_pipeline, without_weights
from stepfold.teachers.layouts import SANA, from_table, layout, pieces_of
from stepfold.teachers.loading import FAMILIES, folder_of
from stepfold.teachers.lora_files import check_no_lora
from stepfold.teachers.pipeline import SIGMA_DATA, PipelineTeacher
from stepfold.training.runs import writing

Weights = Literal["last", "ema"]
SANAS = (SanaPipeline, SanaSprintPipeline)
NETWORK, AVERAGE, AUTOENCODER, ENCODERS = (
    "model.diffusion_model.", "model_ema.", ("first_stage_model.", "vae."),
    ("cond_stage_model.", "conditioner.", "text_encoders."),
)  # fmt: skip
"""What the names of a whole model's parts begin with."""
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
WRAPPERS = ("module.", "_orig_mod.")
"""What trainers put before every name: DistributedDataParallel, and torch.compile."""
SCHEDULE = ("alphas_cumprod", "betas", "sqrt_alphas_cumprod", "log_one_minus_alphas_cumprod", "posterior_", "sqrt_")
"""Tables that the base's scheduler computes; old checkpoints have them beside the weights."""
MARKS = ("v_pred", "ztsnr")
OF_PICKLES = (UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError)
"""What torch's reader of pickles ends in for a file that is none."""
SUFFIXES = (".safetensors", ".sft", ".pth", ".pt", ".ckpt", ".bin")
"""Files of tensors; all but the first two are read as pickles, of which nothing is run."""
UNUSED = ("pos_embed", "y_embedder.y_embedding", "logvar_linear.")
"""What a network in use has no need of: fixed positions, the empty prompt of training, the adaptive weight's head."""


def read_original(file: Path, weights: Weights | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint; of a pickle nothing but tensors is read, and nothing in it is run.

    Args:
        file: what a trainer saved.
        weights: which ones, where it holds the last ones and their average (ema).

    Raises:
        UserError: there is no such file, it holds something else, or two sets of weights and nobody said which.
    """
    if not file.exists():
        raise UserError(f"there is no file {file}; give a checkpoint, .safetensors or .pth")
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file} is no checkpoint; give one of {', '.join(SUFFIXES)}")
    try:
        if file.suffix in SUFFIXES[:2]:
            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, *OF_PICKLES) as error:
        raise UserError(
            f"{file} is no checkpoint that can be read safely ({first_line(error)}); give a .pth or .safetensors file "
            "of tensors"
        ) from None
    state = chosen(state, weights) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} holds something else than named tensors; give the checkpoint of a network")
    for wrapper in WRAPPERS:
        if state and all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    check_no_lora(file, state)
    return state


def chosen(state: Mapping[str, Any], weights: Weights | None) -> Any:
    """One of the sets of weights that a checkpoint holds.

    Raises:
        UserError: it holds two, and nobody said which; or not the one that was asked for.
    """
    sets = {"last": "state_dict", "ema": next((name for name in ("state_dict_ema", "ema") if name in state), "")}
    there = [name for name, key in sets.items() if isinstance(state.get(key), Mapping)]
    if not there:
        return state if weights != "ema" else refuse_weights(["last"])
    if weights is None and len(there) == 2:
        raise UserError("the checkpoint holds its last weights and their average; choose with --weights last or ema")
    if weights is not None and weights not in there:
        refuse_weights(there)
    return state[sets[weights or there[0]]]


def refuse_weights(there: list[str]) -> None:
    """Says which weights a checkpoint has."""
    raise UserError(f"the checkpoint has no such weights; it has {' and '.join(there)}: --weights {there[0]}")


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
    fill(network, state, partial(from_table, names=SANA), UNUSED)
    return network


def fill(
    network: Any, state: Mapping[str, Tensor], name_of: Callable[[str], str | None], unused: tuple[str, ...] = ()
) -> None:
    """Gives a network the tensors of an original checkpoint; the inverse of `single_file.original_state`.

    Args:
        network: of diffusers.
        state: original name -> tensor.
        name_of: the original name of a tensor, as `single_file.layout` has them.
        unused: beginnings of names that may be left over.

    Raises:
        UserError: the checkpoint lacks a tensor, has one too many, or one of another shape.
    """
    kind, ours = type(network).__name__, network.state_dict()
    rows: dict[str, dict[int, int]] = defaultdict(dict)
    places_of = {name: pieces_of(name_of(name) or name) for name in ours}
    for name, (original, places) in places_of.items():
        rows[original].update((place, len(ours[name]) // len(places)) for place in places)
    pieces: dict[str, dict[int, Tensor]] = {}
    for original, sizes in rows.items():
        if original not in state:
            own = f"it has the names of diffusers: put it into the {kind}'s folder" if {*ours} <= {*state} else ""
            raise UserError(f"the checkpoint has no {original}; {own or f'is it that of a {kind}?'}")
        if len(state[original]) != sum(sizes.values()):
            raise UserError(
                f"{original} has {len(state[original])} rows, but the base's network would have "
                f"{sum(sizes.values())}; give a --base of the same size"
            )
        order = sorted(sizes)
        split = state[original].split([sizes[place] for place in order])
        pieces[original] = dict(zip(order, split, strict=True))
    more = sorted(name for name in state if name not in rows and not name.startswith(unused))
    if more:
        scaled = " (scaled fp8: give the file in bf16 or fp16)" if "scale_weight" in more[0] else ""
        raise UserError(
            f"the checkpoint has {more[0]}, and {len(more) - 1} more, that the base's {kind} has no place for{scaled}; "
            "give a --base of the same kind"
        )
    parts_of_each = {name: [pieces[original][at] for at in places] for name, (original, places) in places_of.items()}
    found = {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in parts_of_each.items()}
    try:
        network.load_state_dict(found, assign=True)  # in the file's precision, and without a copy
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"the checkpoint does not fit the base's network ({reason}); name a --base of the same size"
        ) from None


def part_of(state: Mapping[str, Tensor], *beginnings: str) -> dict[str, Tensor]:
    """The tensors whose names begin so."""
    return {name: value for name, value in state.items() if name.startswith(beginnings)}


def of_other_family(state: dict[str, Tensor], pipe: Any, source: str, network_only: bool) -> Any:
    """A pipeline with the checkpoint's network, its autoencoder and text encoders where it has them, else the base's.

    Args:
        state: original name -> tensor.
        pipe: the base, loaded.
        source: its folder or hub id.
        network_only: whether all but the network is the base's, whatever the checkpoint has.

    Raises:
        UserError: it does not fit, or has text encoders that cannot be read.
    """
    part = FAMILIES[type(pipe).__name__].network_part
    network = getattr(pipe, part)
    inner = part_of(state, NETWORK)
    whole = part_of(state, AVERAGE, *AUTOENCODER, *ENCODERS, *SCHEDULE, *MARKS)
    prefix = NETWORK if inner else ""
    name_of = layout(network)
    bare = inner or {name: value for name, value in state.items() if name not in whole}
    if inner and (more := sorted(set(state) - {*inner, *whole})):
        raise UserError(
            f"the checkpoint has {more[0]}, and {len(more) - 1} more, that belong to no part that is known; give the "
            "file of a whole model, or of its network alone"
        )
    said = "v_prediction" if "v_pred" in state else None
    if said and (own := pipe.scheduler.config.get("prediction_type")) != said:
        raise UserError(
            f"the checkpoint says that it predicts v, but the base's network predicts {own!r}; give another --base"
        )
    fill(network, {name.removeprefix(prefix): value for name, value in bare.items()}, name_of)
    changed: dict[str, Any] = {part: network}
    if not network_only:
        if part_of(state, *AUTOENCODER):
            vae: Any = type(pipe.vae)
            dtype = precision_of(part_of(state, *AUTOENCODER))
            changed["vae"] = vae.from_single_file(dict(state), config=source, subfolder="vae", dtype=dtype)
        if part_of(state, *ENCODERS):
            changed |= text_encoders(state, pipe, source)
    return type(pipe)(**(parts_of(pipe) | changed))


def text_encoders(state: dict[str, Tensor], pipe: Any, source: str) -> dict[str, Any]:
    """The text encoders of a whole checkpoint of Stable Diffusion 1, 2 or XL.

    Raises:
        UserError: it is of another family, or they do not fit those of the base.
    """
    if "UNet" not in type(getattr(pipe, "unet", None)).__name__:
        raise UserError(
            f"the text encoders in a {type(pipe).__name__}'s file are not read here; add --network-only to take the "
            "base's, if they are the same"
        )
    names = [name for name in ("text_encoder", "text_encoder_2") if getattr(pipe, name, None) is not None]
    try:
        made = {
            name: create_diffusers_clip_model_from_ldm(
                type(getattr(pipe, name)), dict(state), subfolder=name, config=source
            )
            for name in names
        }
        return {name: encoder.to(precision_of(part_of(state, *ENCODERS))) for name, encoder in made.items()}
    except (ValueError, RuntimeError, LookupError) as error:
        raise UserError(
            f"the checkpoint's text encoders are not those of the base ({first_line(error)}); give a --base of the "
            "same kind"
        ) from None


def usual_precision(value: Tensor) -> Tensor:
    """A tensor in a precision that pipelines are saved in: 8 bits become bfloat16, float64 becomes float32."""
    if not value.is_floating_point() or value.dtype in PRECISIONS:
        return value
    return value.to(torch.bfloat16 if value.dtype.itemsize == 1 else torch.float32)


def precision_of(state: Mapping[str, Tensor]) -> torch.dtype:
    """The precision that most of the numbers have."""
    sizes: dict[torch.dtype, int] = defaultdict(int)
    for value in state.values():
        sizes[value.dtype] += value.numel() * value.is_floating_point()
    return max(sizes, key=sizes.__getitem__)


def usual_base(state: dict[str, Tensor]) -> str:
    """A hub id of a pipeline of a checkpoint's kind, as diffusers guesses it.

    It knows SD XL by its text encoders; the network alone is known by its embedder of sizes.
    """
    if any("label_emb.0.0.weight" in name for name in state):
        return "stabilityai/stable-diffusion-xl-base-1.0"
    return fetch_diffusers_config(dict(state))["pretrained_model_name_or_path"]


def convert(
    file: Path,
    base: str | None,
    out: Path,
    time_scale: Literal[1, 1000] = 1000,
    weights: Weights | None = None,
    network_only: bool = False,
    dtype: Half | None = None,
) -> str:
    """Writes a pipeline folder: what the checkpoint has, all else from `base`; returns the pipeline's class.

    Each part has the precision that it has in the checkpoint or in the base.

    Args:
        file: a .pth (tensors only) or .safetensors under original names.
        base: a pipeline of the same kind and size, as a folder or a hub id.
        out: the folder.
        time_scale: what a Sana's own time counts to: 1000 of Sana, 1 of Sana-Sprint and of its teacher.
        weights: which ones, where it holds the last ones and their average.
        network_only: whether autoencoder and text encoders are the base's, whatever the checkpoint has.
        dtype: that the networks and text encoders are rounded to, but not the autoencoder; None for none.

    Raises:
        UserError: one of them is not what it should be.
    """
    state = {name: usual_precision(value) for name, value in read_original(file, weights).items()}
    if base is None:
        raise UserError(f"--base is missing: a pipeline of the same kind, for all else; such as {usual_base(state)}")
    source = folder_of(base)
    classes = [kind for family in FAMILIES.values() for kind in family.pipelines]
    index = load_index(source)
    part = FAMILIES.get(str(index.get("_class_name")), PipelineTeacher).network_part
    pipe: Any = load_pipeline(source, index, classes, None, network_only=False, unread=(part,), stand_ins=(part,))
    setattr(pipe, part, without_weights(source, part, index[part]))
    if isinstance(pipe, SANAS):
        made = sana_pipeline(state, pipe, base, time_scale)
    else:
        made = of_other_family(state, pipe, source, network_only)
    if dtype:
        rounded_parts(made, dtype)
    with writing(out) as folder:
        made.save_pretrained(folder, safe_serialization=True)
    return type(made).__name__


def sana_pipeline(state: dict[str, Tensor], pipe: Any, base: str, time_scale: Literal[1, 1000]) -> Any:
    """A Sana or a Sana-Sprint with the checkpoint's network; see `convert`."""
    network = network_of(state, pipe.transformer.config, time_scale)
    parts: dict[str, Any] = {name: pipe.components[name] for name in ("tokenizer", "text_encoder", "vae")}
    parts["transformer"] = network
    if network.config["guidance_embeds"]:
        scheduler: Any = SCMScheduler(prediction_type="trigflow", sigma_data=SIGMA_DATA)
        return SanaSprintPipeline(**parts, scheduler=scheduler)
    if isinstance(pipe, SanaSprintPipeline):
        raise UserError(f"{base!r} is a SanaSprintPipeline, but the checkpoint embeds no guidance; give a SanaPipeline")
    return SanaPipeline(**parts, scheduler=pipe.scheduler)
