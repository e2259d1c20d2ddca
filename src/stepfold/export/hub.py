"""A student on the Hugging Face hub, with a card that says what it is made of."""

import json
import re
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from stepfold.errors import UserError, first_line
from stepfold.export.files import README, listing
from stepfold.export.pipeline import metrics_beside, model_card
from stepfold.students.card import CARD, Card, read_card
from stepfold.students.intact import check_digests
from stepfold.teachers.folders import check_folder
from stepfold.teachers.licences import is_hub_id, licences_of
from stepfold.teachers.live import is_live

MEASURED = re.compile(r"^## Measured\n.*?(?=^## )", re.MULTILINE | re.DOTALL)
"""The section of a README that has the scores."""


def hub_card(folder: Path, repo: str) -> str:
    """A student's README for the hub: licences as they can be found now, and its name there in the example.

    Raises:
        UserError: the folder is no student, or `repo` is no OWNER/NAME.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no name on the hub ({first_line(error)}); give OWNER/NAME") from None
    if "/" not in repo:
        raise UserError(f"{repo!r} names no owner; give OWNER/NAME, for example you/{repo}")
    card = read_card(folder)
    if not card.lora_rank:
        check_folder(folder)
    check_digests(folder, card.digests)
    if not is_live(card.teacher):
        card = card.model_copy(update={"licences": licences_of(card.teacher)})
    metrics = metrics_beside(folder)
    text = model_card(without_folders(card), metrics, repo, listing(folder))
    own = folder / README
    section = MEASURED.search(own.read_text(encoding="utf-8")) if own.is_file() and metrics is None else None
    return text.replace("## Licence\n", f"{section[0]}## Licence\n", 1) if section else text


def without_folders(card: Card) -> Card:
    """A card for others: of files and folders here it has the names alone; hub ids stay."""
    return card.model_copy(update={"teacher": name_alone(card.teacher), "config": name_alone(card.config)})


def name_alone(value: Any) -> Any:
    """The last part of a path; of a mapping or a list the same of each value in it."""
    if isinstance(value, dict):
        return {key: name_alone(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [name_alone(inner) for inner in value]
    is_path = isinstance(value, str) and re.search(r"[/\\]", value) and not is_hub_id(value)
    return PureWindowsPath(value).name if is_path else value


def configs_for_others(folder: Path) -> dict[str, str]:
    """The student's card and its networks' configs, where diffusers notes a folder, without folders here.

    Returns:
        Name in the folder -> text.
    """
    found = {CARD: without_folders(read_card(folder)).model_dump(mode="json")}
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if "_name_or_path" in config:
            name = path.relative_to(folder).as_posix()
            found[name] = config | {"_name_or_path": name_alone(config["_name_or_path"])}
    return {name: json.dumps(values, indent=2) + "\n" for name, values in found.items()}


def teacher_of_nobody_else(folder: Path) -> str | None:
    """The local folder that a LoRA student's card loads its teacher from, if it does."""
    card = read_card(folder)
    return card.teacher if card.lora_rank and not is_hub_id(card.teacher) else None


def push(folder: Path, repo: str, *, private: bool, api: Any = None) -> str:
    """Uploads a student folder, which stays as it is, with a README and a card for others; returns the page's address.

    Args:
        folder: of a student, or of one exported as a pipeline.
        repo: OWNER/NAME; made if it does not exist.
        private: whether it is: made so, or refused if it is there and public.
        api: has the methods of HfApi, which it is by default.

    Raises:
        UserError: see `hub_card`; or the repository is public and should not be; or the hub cannot be reached, or takes
            nothing from this user.
    """
    ours = {README: hub_card(folder, repo)} | configs_for_others(folder)
    api = api or HfApi()
    told: dict[str, Any] = {"repo_id": repo, "commit_message": "A few-step student, made with stepfold"}
    try:
        page = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise UserError(
                f"{repo} is there and public, so --private would publish the student; give another name, or make the "
                "repository private on its page"
            )
        api.upload_folder(folder_path=folder, ignore_patterns=list(ours), **told)
        with TemporaryDirectory() as place:
            for name, text in ours.items():
                path = Path(place) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            api.upload_folder(folder_path=Path(place), **told)
    except (OSError, HTTPError) as error:
        raise UserError(
            f"cannot push to {repo}: {first_line(error)}; log in with `hf auth login`, with a token that may write "
            "there, and check the connection"
        ) from None
    return str(page)
