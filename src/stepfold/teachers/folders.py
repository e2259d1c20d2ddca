"""A pipeline folder or a hub id: what its index says, and how it is loaded; safetensors only, nothing of it is run."""

import re
from collections.abc import Container, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants, get_session
from safetensors import SafetensorError, safe_open
from transformers import T5GemmaConfig
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from stepfold.errors import UserError, first_line
from stepfold.sections import CARD
from stepfold.teachers.live import config_of, copy_without, index_of, pipeline_at
from stepfold.teachers.lora_files import check_no_lora, names_of
from stepfold.teachers.quantised_files import read_quantised
from stepfold.teachers.safety import MODULAR_INDEX, OWNERS, check_files, check_index, is_part, modular_index, read_json

FILES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
"""Endings of one file's name, which no hub id has."""
DEVICE_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)
"""Errors of a GPU, which no folder is to blame for."""
VARIANT = re.compile(r"\.([a-z]\w*)(-\d+-of-\d+)?\.safetensors$")
"""The name of a variant, at the end of a file's: model.fp16.safetensors."""
HARMLESS = {
    "diffusers": {r"^pos_embed\.pos_embed$": "computed from the config, where the class does not take it"},
    "transformers": {
        r"(^|\.)position_ids$": "0, 1, 2, ..., which old versions saved",
        r"rotary_emb\.inv_freq$": "computed from the config",
        r"^(model\.)?(encoder\.)?embed_tokens\.weight$|^shared\.weight$": "one table of tokens, under its two names",
        r"^lm_head\.": "a language model's last layer, which an encoder does not have",
        r"^decoder\.": "T5's second half, which an encoder does not have",
        r"^(text_projection\.weight|logit_scale)$": "CLIP's projection, which CLIPTextModel does not have",
        r"^(vision_model|visual_projection)\.": "CLIP's other half, which a text encoder does not have",
    },
}
"""Library of a part -> weights that its files may hold although no layer takes them, and why."""


def load_index(source: str) -> dict[str, Any]:
    """A pipeline's model_index.json, from a folder or a hub id; or what it would be of a pipeline object.

    Raises:
        UserError: the folder lacks a part or holds what `check_folder` refuses, or there is no such pipeline.
    """
    if pipe := pipeline_at(source):
        index = index_of(pipe)
        check_index(source, index)
        return index
    folder = Path(source)
    if folder.exists():
        return check_folder(folder)
    if folder.suffix in FILES:
        raise UserError(f"there is no file {source!r}; give one that is there, a pipeline folder or a hub id")
    away = hub_is_away()
    try:
        config: Any = DiffusionPipeline.load_config(source)  # type: ignore[arg-type]
    except (OSError, ValueError) as error:
        reason = "the hub does not answer, and its cache here has none" if away else first_line(error)
        raise UserError(
            f"teacher {source!r} is neither a pipeline folder nor a hub id that can be reached ({reason}); is it spelt "
            "right?"
        ) from None
    check_index(source, config)
    return dict(config)


@cache
def hub_is_away() -> bool:
    """Whether the hub does not answer; asked once. The libraries then read their cache alone.

    By themselves they ask six times for each file, half a minute long.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # no network, a proxy's refusal, offline mode: each has errors of its own
        constants.HF_HUB_OFFLINE = True
        return True
    return False


def load_pipeline(
    source: str,
    index: dict[str, Any],
    classes: Sequence[type],
    dtype: torch.dtype | None,
    network_only: bool,
    variant: str | None = None,
    *,
    tokenizers_only: bool = False,
    unread: Sequence[str] = (),
    stand_ins: Sequence[str] = (),
) -> Any:
    """Loads a pipeline, all or without text encoders and VAE; safetensors only, of a variant where there is one.

    `tokenizers_only` leaves out all its networks; `unread` are parts that are left out in any case. Those of
    `stand_ins` are there without weights while the class reads their configs. Without a `dtype` each network has that
    of its files.

    Raises:
        UserError: it is of another class, or does not load.
    """
    names = {kind.__name__: kind for kind in classes}
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in names:
        raise UserError(f"teacher {source!r} is a {name}; here it must be a {' or a '.join(names)}")
    later = [part for part, spec in index.items() if is_part(spec) and part.startswith(("text_encoder", "vae"))]
    kind: Any = names[name]
    folder, absent = source, dict[str, Any](dict.fromkeys(later) if network_only else {})
    if tokenizers_only:
        absent = {part: None for part, spec in index.items() if is_part(spec) and is_network(spec)}
    absent |= {part: None for part in unread if part in index}
    if pipe := pipeline_at(source):
        return copy_without(pipe, [*absent])
    try:
        if not Path(source).exists():  # of a hub id all files come first, so that they are looked at before any is read
            folder = kind.download(source, use_safetensors=True, **absent)
            check_files(Path(folder))
        networks = load_networks(folder, index, dtype, variant, absent)
        for part in (hollow := set(stand_ins) & set(absent)):
            networks[part] = without_weights(source, part, index[part])  # a hub download leaves its config out
        given = absent | networks
        pipe = kind.from_pretrained(source, dtype=dtype, use_safetensors=True, variant=variant, **given)
        for part in hollow:
            setattr(pipe, part, None)
        return pipe
    except (UserError, *DEVICE_ERRORS):
        raise
    except Exception as error:  # what a config can be wrong in is without end, and so are the libraries' errors
        raise unloadable(source, error) from error


def load_networks(
    folder: str,
    index: Mapping[str, Any],
    dtype: torch.dtype | None,
    variant: str | None = None,
    absent: Container[str] = (),
) -> dict[str, Any]:
    """A pipeline's networks by their parts' names, but for those that are to be absent; see `load_network`."""
    return {
        part: load_network(folder, part, spec, dtype or stored_dtype(Path(folder) / part), variant)
        for part, spec in index.items()
        if part not in absent and is_part(spec) and is_network(spec)
    }


def stored_dtype(folder: Path) -> torch.dtype:
    """The precision of a network's files, by their first tensor; float32 where it is none of the usual ones."""
    files = sorted(folder.glob("*.safetensors"), key=lambda file: len(file.name))  # a variant's names are longer
    if not files:
        return torch.float32
    with safe_open(files[0], framework="pt") as tensors:
        name = tensors.get_slice(next(iter(tensors.keys()))).get_dtype()
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(name, torch.float32)


def without_weights(source: str, part: str, spec: Sequence[str]) -> Any:
    """A network of a pipeline that has its config alone."""
    kind: Any = getattr(OWNERS[spec[0]], spec[1])
    with torch.device("meta"):
        return kind.from_config(kind.load_config(source, subfolder=part))


def part_config(source: str, index: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The config of a pipeline's network or scheduler, a class of diffusers."""
    if pipe := pipeline_at(source):
        return config_of(getattr(pipe, part))
    kind: Any = getattr(diffusers, index[part][1])
    return dict(kind.load_config(source, subfolder=part))


def is_network(spec: Sequence[Any]) -> bool:
    """Whether a part is a network of the libraries'; what goes by an old name is left to the pipeline."""
    kind = getattr(OWNERS.get(spec[0]), spec[1] or "", None)
    return isinstance(kind, type) and issubclass(kind, torch.nn.Module)


def load_network(source: str, part: str, spec: Sequence[str], dtype: torch.dtype, variant: str | None) -> Any:
    """A network of a pipeline, from its folder or hub id; safetensors only.

    Raises:
        UserError: its files lack some of its weights, or hold others. The libraries only warn, and go on with random
            ones, or without.
    """
    if pipe := pipeline_at(source):
        return getattr(pipe, part)
    library, kind = spec
    reader, config = reader_of(library, kind, source, part)
    quantised = read_quantised(reader, Path(source) / part, dtype) if library == "diffusers" else None
    network, found = quantised or reader.from_pretrained(
        source,
        subfolder=part,
        use_safetensors=True,
        dtype=dtype,
        variant=variant_in(source, part, variant),
        output_loading_info=True,
        **config,
    )
    if isinstance(network, T5GemmaEncoder):  # diffusers reads the config of the encoder inside of one of the whole
        network.config.encoder = {n: v for n, v in network.config.to_dict().items() if n != "encoder"}
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"pipeline {source!r}: the files of its part {part!r} lack {len(missing)} of the weights of a {kind}, such "
            f"as {missing[0]}; copy the folder again, or save the pipeline again with save_pretrained"
        )
    harmless = re.compile("|".join(HARMLESS[library]))
    if surplus := sorted(name for name in found["unexpected_keys"] if not harmless.search(name)):
        raise UserError(
            f"pipeline {source!r}: the files of its part {part!r} hold {len(surplus)} weights that no layer of this "
            f"{kind} takes, such as {surplus[0]}; is its config.json that of these files? If they are left over, save "
            "the pipeline again with save_pretrained"
        )
    return network


def reader_of(library: str, kind: str, source: str, part: str) -> tuple[Any, dict[str, Any]]:
    """A network's class, and the config to read it with where that is not simply the part's own.

    diffusers has a class of its own in the place of T5Gemma's encoder, which finds its config in no subfolder, and
    whose saved part has a name that diffusers does not load.
    """
    if kind != T5GemmaEncoder.__name__:
        return getattr(OWNERS[library], kind), {}
    config, _ = T5GemmaConfig.get_config_dict(source, subfolder=part)
    return T5GemmaEncoder, {"config": T5GemmaConfig(encoder=config.get("encoder") or config).encoder}


def variant_in(source: str, part: str, variant: str | None) -> str | None:
    """The variant, if that part of a pipeline's folder has weights of it; as pipelines do, the plain ones otherwise."""
    return variant if variant and any((Path(source) / part).glob(f"*.{variant}*.safetensors")) else None


def check_teaches(folder: Path, as_lora: str = "") -> None:
    """Refuses a student's folder as a teacher, unless its network is a velocity at all times.

    Args:
        folder: a teacher's, or that of a LoRA of its.
        as_lora: that LoRA as it was given; empty for a teacher.

    Raises:
        UserError: it is a LoRA, or knows few times, or predicts the image or a jump.
    """
    try:
        card = read_json(folder / CARD, CARD)
        recipe, config = card["recipe"], card["config"]
        sampler, times = recipe.get("sampler", "consistency"), len(recipe.get("times", {}))
        lora = config.get("student", {}).get("lora", 0) and not card.get("merged")
    except (UserError, OSError, LookupError, TypeError, AttributeError):
        return  # no student, or a damaged card, which is no teacher's
    way_out = "give the teacher that it was distilled from; --init STUDENT goes on with a student"
    name = f"LoRA {as_lora!r}" if as_lora else f"teacher {str(folder)!r}"
    if sampler != "flow" or times == 1:
        what = "for one number of steps" if times == 1 else f"sampled by {sampler.replace('_', ' ')}"
        raise UserError(f"{name} is a student {what}, which has no trajectories; {way_out}")
    if lora and not as_lora:
        raise UserError(
            f"teacher {str(folder)!r} is a student that is a LoRA; make it whole first: "
            f"stepfold export {folder} --to pipeline"
        )


def unloadable(source: str, error: Exception) -> UserError:
    """What is said of a teacher that diffusers does not load."""
    return UserError(f"teacher {source!r} does not load: {first_line(error)}; {fix_for(error, Path(source))}")


def fix_for(error: Exception, folder: Path) -> str:
    """The usual fix for an error that a library raises while it reads a folder."""
    if isinstance(error, ImportError):
        return "install what it names"
    if "variant=" in str(error):
        return "leave teacher.variant out, if its files have no variant in their names"
    if isinstance(error, OSError | SafetensorError):
        variants = {path.parent: VARIANT.search(path.name) for path in sorted(folder.glob("*/*.safetensors"))}
        if found := [match[1] for match in variants.values() if match]:
            return f"its weights are of a variant; set teacher.variant={found[0]}"
        return "a file is damaged or not there; copy the whole folder again"
    return "what its configs say does not fit its files or the library; copy the folder again from where it was made"


def check_folder(folder: Path) -> dict[str, Any]:
    """Refuses a pipeline folder with a missing part, or with anything that `safety` refuses; returns its index.

    Raises:
        UserError: naming what is missing or not allowed.
    """
    index, modular = folder / "model_index.json", (folder / MODULAR_INDEX).is_file()
    inside = [] if (folder / "config.yaml").exists() else sorted(folder.glob("*.safetensors"))  # a run has one, too
    single = folder if folder.is_file() else next(iter(inside), None)
    if not folder.exists():
        bundled = "; the bundled student is emoji-student" * (str(folder) == "emoji")
        raise UserError(f"there is no folder {str(folder)!r}; give one that is there{bundled}")
    if folder.is_file() and folder.suffix not in (*FILES, ".gguf", ".sft"):
        raise UserError(f"{str(folder)!r} is no model; give a pipeline folder or a hub id")
    if not index.is_file() and not modular and (folder.parent / "model_index.json").is_file():
        raise UserError(f"{str(folder)!r} is a part of the pipeline in {str(folder.parent)!r}; give that folder")
    if not index.is_file() and single and not modular:
        check_no_lora(single, names_of(single))
        raise UserError(
            f"teacher {str(folder)!r} is one file, and a pipeline folder is needed; make one: "
            f"stepfold convert {single} --base PIPELINE --out FOLDER"
        )
    if not index.is_file() and (folder / "config.yaml").is_file():
        raise UserError(f"{str(folder)!r} is a run; give its teacher or a pipeline folder, not a run")
    if not index.is_file() and not modular:
        raise UserError(
            f"teacher folder {str(folder)!r} has no model_index.json; give a folder written by save_pretrained"
        )
    check_files(folder)
    parts = read_json(index, str(index)) if index.is_file() else modular_index(folder)
    if not isinstance(parts, dict):
        raise UserError(f"{index} describes no pipeline; save the pipeline again with save_pretrained")
    check_index(str(folder), parts)
    for part, spec in parts.items():
        present = is_part(spec) and spec[0] is not None
        if present and not part.startswith("_") and not (folder / part).is_dir():
            raise UserError(f"teacher folder {str(folder)!r} lacks its part {part!r}; copy the whole pipeline folder")
    return parts
