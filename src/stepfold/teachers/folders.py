"""A pipeline folder or a hub id: what its index says, and how it is loaded; safetensors only, nothing of it is run."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from stepfold.errors import UserError
from stepfold.teachers.safety import PICKLES, check_files, check_index, is_part, read_json


def load_index(source: str) -> dict[str, Any]:
    """A pipeline's model_index.json, from a folder or a hub id.

    Raises:
        UserError: the folder lacks a part or holds what `check_folder` refuses, or there is no such pipeline.
    """
    folder = Path(source)
    if folder.exists():
        return check_folder(folder)
    try:
        config: Any = DiffusionPipeline.load_config(source)  # type: ignore[arg-type]
    except (OSError, ValueError) as error:
        raise UserError(
            f"teacher {source!r} is neither a pipeline folder nor a hub id that can be reached "
            f"({first_line(error)}); is it spelt right?"
        ) from None
    check_index(source, config)
    return dict(config)


def load_pipeline(
    source: str,
    index: dict[str, Any],
    classes: Sequence[type],
    dtype: torch.dtype,
    network_only: bool,
    variant: str | None = None,
) -> Any:
    """Loads a pipeline, all or without text encoders and VAE; safetensors only, of a variant where there is one.

    Raises:
        UserError: it is of another class, or does not load.
    """
    names = {kind.__name__: kind for kind in classes}
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in names:
        raise UserError(f"teacher {source!r} is a {name}; here it must be a {' or a '.join(names)}")
    later = [part for part in index if part.startswith("text_encoder") or part == "vae"]
    kind: Any = names[name]
    try:
        parts: dict[str, Any] = dict.fromkeys(later) if network_only else {}
        if not Path(source).exists():  # of a hub id all files come first, so that they are looked at before any is read
            check_files(Path(kind.download(source, use_safetensors=True, **parts)))
        return kind.from_pretrained(source, dtype=dtype, use_safetensors=True, variant=variant, **parts)
    except UserError:
        raise
    except Exception as error:  # what a config can be wrong in is without end, and so are the libraries' errors
        raise unloadable(source, error) from error


def variant_in(source: str, part: str, variant: str | None) -> str | None:
    """The variant, if that part of a pipeline's folder has weights of it; as pipelines do, the plain ones otherwise."""
    return variant if variant and any((Path(source) / part).glob(f"*.{variant}*.safetensors")) else None


def unloadable(source: str, error: Exception) -> UserError:
    """What is said of a teacher that diffusers does not load."""
    return UserError(f"teacher {source!r} does not load: {first_line(error)}; save it again with save_pretrained")


def merge_lora(pipe: Any, source: str, read_text_encoders: Callable[[], None]) -> None:
    """Merges a LoRA in diffusers' format into a pipeline's weights; safetensors only.

    Args:
        pipe: the pipeline.
        source: file, folder or hub id.
        read_text_encoders: called where the LoRA changes them; the pipeline may have been loaded without.

    Raises:
        UserError: it does not load, or does not fit.
    """
    place = Path(source)
    for file in [place, *(place.iterdir() if place.is_dir() else ())]:
        if file.suffix.lower() in PICKLES:
            raise UserError(
                f"LoRA {source!r} is or holds a pickle, {file.name}, which could run code; save it as safetensors with "
                "save_lora_weights(..., safe_serialization=True) where you trust it"
            )
    try:
        found = pipe.lora_state_dict(source, use_safetensors=True)
        named = {name.split(".")[0] for name in (found[0] if isinstance(found, tuple) else found)}
        if any(part.startswith("text_encoder") for part in named):
            read_text_encoders()
        pipe.load_lora_weights(source, use_safetensors=True)
        taken = list(pipe.get_list_adapters())
        lost = {part for part in named if re.fullmatch(r"unet|transformer|text_encoder\w*", part)} - {*taken}
        if lost or not taken:
            of = f" for {' and '.join(sorted(lost))}" if lost else ""
            raise UserError(
                f"LoRA {source!r} does not load: {type(pipe).__name__} takes none of its weights{of}; "
                f"give one that was made for this teacher{', or a copy without those' if lost else ''}"
            )
        pipe.fuse_lora(components=taken)  # by itself it would leave out FLUX's text encoder
        pipe.unload_lora_weights()
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the hub's client, peft and safetensors have kinds of their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"LoRA {source!r} does not load ({reason}); give a safetensors file that "
            f"{type(pipe).__name__}.load_lora_weights reads (it needs peft: pip install peft)"
        ) from None


def check_folder(folder: Path) -> dict[str, Any]:
    """Refuses a pipeline folder with a missing part, or with anything that `safety` refuses; returns its index.

    Raises:
        UserError: naming what is missing or not allowed.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"teacher folder {str(folder)!r} has no model_index.json; give a folder written by save_pretrained"
        )
    check_files(folder)
    parts = read_json(index, str(index))
    if not isinstance(parts, dict):
        raise UserError(f"{index} describes no pipeline; save the pipeline again with save_pretrained")
    check_index(str(folder), parts)
    for part, spec in parts.items():
        present = is_part(spec) and spec[0] is not None
        if present and not part.startswith("_") and not (folder / part).is_dir():
            raise UserError(f"teacher folder {str(folder)!r} lacks its part {part!r}; copy the whole pipeline folder")
    return parts


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
