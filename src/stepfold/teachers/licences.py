"""Licences, as the model cards of a teacher and of its text encoders state them. Nothing is refused for one."""

import json
import re
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HTTPError

from stepfold import assets
from stepfold.teachers.folders import load_index
from stepfold.teachers.loading import folder_of

Licence = dict[str, str]
"""The fields `license`, `license_name` and `license_link` of a model card, as far as it has them."""


def is_hub_id(source: str) -> bool:
    """Whether this is OWNER/NAME, and no folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not Path(source).exists()


def file_of(source: str, name: str) -> Path | None:
    """A file of a folder, or of a hub id where it has been fetched."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    cached = try_to_load_from_cache(source, name) if is_hub_id(source) else None
    return Path(cached) if isinstance(cached, str) else None


def stated_licence(source: str) -> Licence:
    """What the model card of a folder or a hub id says; empty if it states none or cannot be reached."""
    if card := file_of(source, "README.md"):
        front = re.match(r"---\n(.*?)^---", card.read_text(encoding="utf-8-sig"), re.DOTALL | re.MULTILINE)
        lines = re.findall(r"^(license(?:_name|_link)?):\s*(\S.*?)\s*$", front[1] if front else "", re.MULTILINE)
        return {name: value.strip("'\"") for name, value in lines}
    try:
        told = HfApi().model_info(source, timeout=3).card_data if is_hub_id(source) else None
    except (OSError, HTTPError):
        return {}
    fields = told.to_dict() if told else {}
    return {name: str(fields[name]) for name in ("license", "license_name", "license_link") if fields.get(name)}


def licences_of(source: str) -> dict[str, Licence]:
    """Of a teacher (`emoji`, a folder or a hub id): `teacher`, and each of its text encoders by its part's name.

    A text encoder's is that of the model that its config says it comes from; a teacher's own does not cover it, but for
    the bundled one, which was made as a whole.
    """
    source = folder_of(source)
    found, bundled = {"teacher": stated_licence(source)}, source == str(assets.TEACHER)
    for part, spec in load_index(source).items():
        if part.startswith("text_encoder") and spec[0] is not None:
            config = file_of(source, f"{part}/config.json")
            origin = json.loads(config.read_text(encoding="utf-8")).get("_name_or_path", "") if config else ""
            found[part] = found["teacher"] if bundled else stated_licence(origin) if is_hub_id(origin) else {}
    return found


def in_words(licence: Licence) -> str:
    """`apache-2.0`; the name and the link of one that is the model's own; or that it is unknown."""
    name = licence.get("license_name") or licence.get("license") or "unknown: see the teacher's page"
    return f"{name} ({licence['license_link']})" if "license_link" in licence else name
