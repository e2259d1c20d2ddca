"""A student on the Hugging Face hub, with a card that says what it is made of."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from stepfold.errors import UserError, first_line
from stepfold.export.files import listing
from stepfold.export.pipeline import metrics_beside, model_card
from stepfold.students.card import read_card
from stepfold.teachers.folders import check_folder
from stepfold.teachers.licences import is_hub_id, licences_of
from stepfold.teachers.live import is_live
from stepfold.training.runs import writing


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
    if not is_live(card.teacher):
        card = card.model_copy(update={"licences": licences_of(card.teacher)})
    return model_card(card, metrics_beside(folder), repo, listing(folder))


def teacher_of_nobody_else(folder: Path) -> str | None:
    """The local folder that a LoRA student's card loads its teacher from, if it does."""
    card = read_card(folder)
    return card.teacher if card.lora_rank and not is_hub_id(card.teacher) else None


def push(folder: Path, repo: str, *, private: bool, api: Any = None) -> str:
    """Writes the card into the student folder and uploads all of it; returns the page's address.

    Args:
        folder: of a student, or of one exported as a pipeline.
        repo: OWNER/NAME; made if it does not exist.
        private: whether a new one is.
        api: has `create_repo` and `upload_folder` as HfApi, which it is by default.

    Raises:
        UserError: see `hub_card`; or the hub cannot be reached, or takes nothing from this user.
    """
    readme = hub_card(folder, repo)
    with writing(folder / "README.md") as part:
        part.write_text(readme, encoding="utf-8")
    api = api or HfApi()
    try:
        page = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="A few-step student, made with stepfold")
    except (OSError, HTTPError) as error:
        raise UserError(
            f"cannot push to {repo}: {first_line(error)}; log in with `hf auth login`, with a token that may write "
            "there, and check the connection"
        ) from None
    return str(page)
