"""Licences, as the model cards of a teacher and of its text encoders state them. Nothing is refused for one."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from stepfold import assets
from stepfold.teachers.folders import load_index
from stepfold.teachers.live import origin_of_object, pipeline_at
from stepfold.teachers.loading import folder_of
from stepfold.teachers.safety import is_part

FIELDS = ("license", "license_name", "license_link")
Licence = dict[str, Any]
"""The `FIELDS` of a model card, as far as it has them: texts, or a list of several licences."""


def is_hub_id(source: str) -> bool:
    """Whether this is OWNER/NAME as the hub allows it, and no folder here."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return source.count("/") == 1 and not Path(source).exists()


def file_of(source: str, name: str) -> Path | None:
    """A file of a folder, or of a hub id where it has been fetched."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    cached = try_to_load_from_cache(source, name) if is_hub_id(source) else None
    return Path(cached) if isinstance(cached, str) else None


def stated_licence(source: str) -> Licence:
    """What the model card of a folder or a hub id says; empty if it states none, or cannot be reached or read."""
    try:
        if card := file_of(source, "README.md"):
            text = card.read_text(encoding="utf-8-sig")
            told = ModelCard(text).data if text.startswith("---") else None  # it warns where there is no front matter
        else:
            told = HfApi().model_info(source, timeout=3).card_data if is_hub_id(source) else None
        fields = told.to_dict() if told else {}
    except Exception:  # a licence is only shown: whatever is wrong with a card, it ends no run
        return {}
    return {name: fields[name] for name in FIELDS if fields.get(name)}


def licences_of(source: str) -> dict[str, Licence]:
    """Of a teacher (`emoji`, a folder, a hub id or an object): `teacher`, and its text encoders by their parts' names.

    A text encoder's is that of the model that its config says it comes from; a teacher's own does not cover it, but for
    the bundled one, which was made as a whole.
    """
    source, pipe = folder_of(source), pipeline_at(source)
    place = origin_of_object(pipe) if pipe else source
    found, bundled = {"teacher": stated_licence(place)}, source == str(assets.TEACHER)
    for part, spec in load_index(source).items():
        if part.startswith("text_encoder") and is_part(spec) and spec[0] is not None:
            origin = origin_of_object(getattr(pipe, part)) if pipe else origin_of(source, part)
            found[part] = found["teacher"] if bundled else stated_licence(origin)
    return found


def origin_of(source: str, part: str) -> str:
    """The hub id that a part's config names as its origin; empty if it names none."""
    try:
        config = file_of(source, f"{part}/config.json")
        name = json.loads(config.read_text(encoding="utf-8"))["_name_or_path"] if config else ""
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return name if isinstance(name, str) and is_hub_id(name) else ""


def in_words(licence: Licence) -> str:
    """`apache-2.0`; the name and the link of one that is the model's own; or that it is unknown."""
    name = licence.get("license_name") or licence.get("license") or "unknown: see the teacher's page"
    name = ", ".join(map(str, name)) if isinstance(name, list) else name
    return f"{name} ({licence['license_link']})" if "license_link" in licence else name
