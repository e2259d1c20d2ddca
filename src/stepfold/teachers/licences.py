"""Licences, as the model cards of a teacher and of its text encoders state them. Nothing is refused for one."""

import json
import re
from pathlib import Path

from huggingface_hub import hf_hub_download

from stepfold.teachers.loading import folder_of
from stepfold.teachers.pipeline import load_index

Licence = dict[str, str]
"""The fields `license`, `license_name` and `license_link` of a model card, as far as it has them."""


def is_hub_id(source: str) -> bool:
    """Whether this is OWNER/NAME, and no folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not Path(source).exists()


def file_of(source: str, name: str) -> Path | None:
    """A file of a folder, or of a hub id where the cache or the hub has it."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name, etag_timeout=3))
    except (OSError, ValueError):  # not there, no connection, no such id
        return None


def stated_licence(source: str) -> Licence:
    """What the front matter of a model card says; empty if there is none or it cannot be reached."""
    card = file_of(source, "README.md")
    front = (
        re.match(r"---\n(.*?)^---", card.read_text(encoding="utf-8-sig"), re.DOTALL | re.MULTILINE) if card else None
    )
    lines = re.findall(r"^(license(?:_name|_link)?):\s*(\S.*?)\s*$", front[1] if front else "", re.MULTILINE)
    return {name: value.strip("'\"") for name, value in lines}


def licences_of(source: str) -> dict[str, Licence]:
    """Of a teacher (`emoji`, a folder or a hub id): `teacher`, and each of its text encoders by its part's name.

    A text encoder's is that of the model that its config says it comes from; a teacher's own does not cover it.
    """
    source = folder_of(source)
    found = {"teacher": stated_licence(source)}
    for part, spec in load_index(source).items():
        if part.startswith("text_encoder") and spec[0] is not None:
            config = file_of(source, f"{part}/config.json")
            origin = json.loads(config.read_text()).get("_name_or_path", "") if config else ""
            found[part] = stated_licence(origin) if is_hub_id(origin) else {}
    return found


def in_words(licence: Licence) -> str:
    """`apache-2.0`; the name and the link of one that is the model's own; or that it is unknown."""
    name = licence.get("license_name") or licence.get("license") or "unknown: see the teacher's page"
    return f"{name} ({licence['license_link']})" if "license_link" in licence else name
