"""What tells one teacher from another that lies in the same place: its weights, its encoders."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from stepfold import assets
from stepfold.config import TeacherSettings
from stepfold.errors import UserError
from stepfold.fingerprints import sampled_sha256
from stepfold.teachers.folders import VARIANT
from stepfold.teachers.live import object_fingerprint, pipeline_at
from stepfold.teachers.loading import family_of, folder_of, place_of
from stepfold.teachers.safety import read_json

ENCODERS = ("text_encoder", "tokenizer", "vae", "text_conditioner", "t5_tokenizer")
"""How the names of parts begin that conditions and pictures are made with."""


def encoder_fingerprint(source: str) -> str:
    """Tells text encoders (and VAEs) apart: by all that a folder's files hold, or by a hub id's revision.

    Raises:
        UserError: the hub id has not been fetched yet, so its revision is not known.
    """
    if pipe := pipeline_at(source):
        return object_fingerprint(pipe, ENCODERS)
    folder = Path(folder_of(source))
    if not folder.is_dir():
        return revision_of(source)
    digest = hashlib.sha256()
    for path in files_of(folder, ENCODERS):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def teacher_fingerprint(settings: TeacherSettings, *, network_only: bool) -> str:
    """Tells teachers apart by what a run takes from them: network, scheduler, LoRA, encoders.

    A copy of the same files is the same teacher; see `sampled_sha256`. A hub id is known by its revision, a
    pipeline object by its weights.

    Args:
        settings: which teacher.
        network_only: without the encoders, of a run whose conditions come from disk.

    Raises:
        UserError: a hub id has not been fetched yet.
    """
    place = place_of(settings)
    folder = Path(folder_of(place))
    pipe = pipeline_at(place)
    if pipe or folder.is_dir():
        parts = (family_of(place).network_part, "scheduler", *(() if network_only else ENCODERS))
        found = [object_fingerprint(pipe, parts) if pipe else sampled_sha256(files_of(folder, parts), folder)]
    else:
        found = [revision_of(place)]
    return " ".join([*found, *_loras(settings, by_name=True)])


def network_fingerprint(settings: TeacherSettings) -> str:
    """Tells the networks apart that LoRA students are for: by weights and configs of folders, objects and LoRA files.

    A hub id and its LoRAs are taken as they are; empty where nothing else is. Each part is a word.

    Args:
        settings: which teacher.
    """
    place = place_of(settings)
    folder, pipe, part = Path(place), pipeline_at(place), family_of(place).network_part
    found = [object_fingerprint(pipe, (part,))] if pipe else []
    if not pipe and folder.is_dir():
        found = [_network_sha256(folder, part, settings.variant)]
    return " ".join([*found, *_loras(settings, by_name=False)])


def _network_sha256(folder: Path, part: str, variant: str | None) -> str:
    """Changes with the files of weights that are loaded, and with what its configs say; not with who wrote them."""
    weights = [path for path in files_of(folder, (part,)) if path.suffix == ".safetensors"]
    kinds = {path: match[1] if (match := VARIANT.search(path.name)) else None for path in weights}
    loaded = [path for path in weights if kinds[path] == variant] or [path for path in weights if not kinds[path]]
    digest = hashlib.sha256(sampled_sha256(loaded or weights, folder).encode())
    for path in (path for path in files_of(folder, (part,)) if path.name == "config.json"):
        said = read_json(path, f"{path}")
        if isinstance(said, dict):
            said = {key: value for key, value in said.items() if not key.startswith("_")}
        digest.update(json.dumps(said, sort_keys=True).encode())
    return digest.hexdigest()


def _loras(settings: TeacherSettings, *, by_name: bool) -> list[str]:
    """Fingerprints of LoRAs that lie here; with `by_name` also those of the hub, names and scales."""
    found: list[str] = []
    for lora in settings.lora:
        where = Path(assets.lora_place(lora.source))
        files = [path for path in where.rglob("*") if path.is_file()] if where.is_dir() else [where]
        if where.exists():
            found.append(sampled_sha256(files, where.parent if by_name else where))
        elif by_name:
            found.append(f"hub {lora.source}")
        found += [f"scale {lora.scale!r}"] * (by_name and lora.scale != 1)
    return found


def module_fingerprint(network: nn.Module) -> str:
    """Tells networks of one's own apart, by all their weights."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def files_of(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """The files of a pipeline's parts whose names begin so, in order."""
    for part in sorted(path for path in folder.iterdir() if path.name.startswith(parts)):
        yield from sorted(path for path in part.rglob("*") if path.is_file())


def revision_of(source: str) -> str:
    """A hub id and the commit that was fetched.

    Raises:
        UserError: none was.
    """
    cached = try_to_load_from_cache(source, "model_index.json")
    if not isinstance(cached, str):
        raise UserError(f"teacher {source!r} is neither a folder nor a hub id that has been fetched; load it once")
    return f"hub {source} at {Path(cached).parent.name}"
