"""`stepfold evaluate` of students whose teacher has no evaluator: the latent error against that teacher."""

import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepfold import assets
from stepfold.errors import UserError
from stepfold.jobs.finishing import latent_scores, open_clip, trained_samples

if TYPE_CHECKING:
    from stepfold.display import Display
    from stepfold.evaluation.latents import Chosen, LatentProtocol
    from stepfold.images.reading import ImageFolder
    from stepfold.prompts.reading import PromptFile
    from stepfold.students.card import Card
    from stepfold.web.drawing import Models

NUM_PROMPTS, SHOWN = 64, 8  # prompts that are measured, and of the grid

OTHER_TEACHERS = "these students have different teachers, LoRAs or sizes; their latent errors do not compare"
OTHER_PROMPTS = "these runs held out different prompts (seeds, lengths, files); --prompts FILE gives all the same"


def is_own(folder: Path) -> bool:
    """Whether a folder is a student of another teacher than the bundled one."""
    from stepfold.students.card import CARD, read_card, student_folder

    return (student_folder(folder) / CARD).is_file() and read_card(folder).teacher != "emoji"


def run_own(
    folders: Sequence[Path],
    *,
    steps: Sequence[int] | None,
    n: int,
    guidance: float | None,
    prompts: Path | None,
    clip: str | None,
    out: Path | None,
    display: "Display",
    device: str,
    command: str | None = None,
    schedule: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Latent errors of students, each against its own teacher; with `out`, images and a report each.

    Args:
        folders: of students.
        steps: of student and teacher; None for 1, 2, 4 and 8 as far as the card has times.
        n: prompts.
        guidance: scale of the teacher and the student; None for the student's usual one.
        prompts: a file of them; None for those of the run's file that it did not train on.
        clip: folder or hub id of a CLIP; None for no CLIP score.
        out: folder for a report; None for none.
        display: shows how far it is.
        device: torch device.
        command: for the reports, which say how to get them again; None for none.
        schedule: levels that were searched for the teacher; None for none.

    Returns:
        name -> what is in its report.json.

    Raises:
        UserError: a folder is no student, its teacher or its prompts are gone, or the report is there already.
    """
    from stepfold.evaluation.latents import LatentProtocol, calls_per_step, known_steps
    from stepfold.evaluation.report import versions
    from stepfold.levels.record import searched_samplers
    from stepfold.prompts.conditions import encoded
    from stepfold.students.card import read_card
    from stepfold.web.drawing import load_models

    names = list(dict.fromkeys(map(str, folders)))
    places = {name: None if out is None else out / str(i) if len(names) > 1 else out for i, name in enumerate(names, 1)}
    if there := [place for place in places.values() if place and (place / "report.json").exists()]:
        raise UserError(f"{there[0]} holds a report already; choose another --out")
    cards = {name: read_card(Path(name)) for name in names}
    evaluated = {name: choose(Path(name), card, prompts, n) for name, card in cards.items()}
    for note in differences(cards.values(), evaluated.values()):
        display.note(note)
    found: dict[str, dict[str, Any]] = {}
    for (name, place), (texts, chosen) in zip(places.items(), evaluated.values(), strict=True):
        models = load_models(Path(name), None, device)
        recipe, teacher = models.card.recipe, models.teacher
        protocol = LatentProtocol(
            n=len(chosen.index),
            steps=known_steps(recipe, steps),
            guidance=recipe.scale_for(guidance),
            prompts_sha256=texts.sha256,
            index=chosen.index,
        )
        scores = latent_scores(
            protocol, chosen, teacher, models.student, recipe,
            partial(encoded, teacher, texts),
            texts, open_clip(clip, teacher), display,
            searched_samplers(schedule, teacher, models.card.teacher_settings(), protocol.guidance) if schedule else {},
        )  # fmt: skip
        result = {
            "title": f"{name}: few-step student of {models.card.teacher}",
            "student_folder": name,
            "usual_steps": models.card.usual_steps,
            "fresh_noise": recipe.sampler == "consistency",
            "command": command,
            "versions": versions(),
            "teacher_calls_per_step": calls_per_step(teacher),
            "facts": [f"device {device}", scores["protocol"]["prompts"]],
            "use": [("Sample", f"stepfold sample {shlex.quote(name)} {shlex.quote(texts.prompt(chosen.index[0]))}")],
        } | scores
        found[name] = write_images(place, result, models, protocol, texts) if place else result
    return found


def differences(cards: "Iterable[Card]", evaluated: "Iterable[tuple[Any, Chosen]]") -> Iterator[str]:
    """Why the numbers of several students do not compare, a line each."""
    teachers = [card.teacher_settings() for card in cards]
    if len({(each.source, str(each.lora), each.height, each.width, each.frames) for each in teachers}) > 1:
        yield OTHER_TEACHERS
    if len({(texts.sha256, chosen.index) for texts, chosen in evaluated}) > 1:
        yield OTHER_PROMPTS


def choose(
    folder: Path, card: "Card", prompts: Path | None, n: int
) -> "tuple[PromptFile | ImageFolder, Chosen]":  # fmt: skip
    """The prompts to evaluate on: the first of a file that is given, else the run's own that it did not train on.

    Raises:
        UserError: the run's prompts are gone.
    """
    from stepfold.config import validate
    from stepfold.evaluation.latents import Chosen, held_out
    from stepfold.images.reading import open_images
    from stepfold.prompts.reading import open_prompts

    if prompts:
        texts = open_prompts(prompts, card.teacher_settings().image_column)
        return texts, Chosen(tuple(range(min(n, len(texts)))), None)
    try:
        student = card.config.get("student", {})
        unfolded = {"student": student | {"times": "two"}} if card.folded_steps and "target" in card.config else {}
        config = validate(card.config | unfolded)
        own: PromptFile | ImageFolder = (
            open_images(config.space.images)
            if config.space.images
            else open_prompts(config.prompts or assets.PROMPTS, config.teacher.image_column)
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"the run's own prompts cannot be read ({error}); give others with --prompts FILE") from None
    rows = noted(folder, "bank", "count") if config.space.bank else None
    chosen = held_out(len(own), trained_samples(config), config.seed, n, rows)
    known = noted(folder, "prompts", "sha256") in (None, own.sha256) and (rows is not None or not config.space.bank)
    return own, chosen if known else replace(chosen, unseen=None)


def noted(folder: Path, kind: str, name: str) -> Any:
    """`sha256` or `count` that a run noted of its `prompts` or `bank`; None where no note is beside the student."""
    from stepfold.students.card import student_folder

    try:
        found = json.loads((student_folder(folder).resolve().parent / f"{kind}.json").read_text(encoding="utf-8"))
        return {"sha256": str, "count": int}[name](found[name])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def write_images(
    folder: Path, result: dict[str, Any], models: "Models", protocol: "LatentProtocol", texts: Any
) -> dict[str, Any]:
    """Draws teacher and student side by side, and writes the report; returns what is in report.json."""
    from stepfold.evaluation.measure import evaluation_noise, student_sampler, teacher_sampler
    from stepfold.evaluation.preview import NUM_FRAMES, sample_rows, save_grid, thinned
    from stepfold.evaluation.protocol import counted
    from stepfold.evaluation.report import write_report
    from stepfold.prompts.conditions import encoded

    teacher, recipe = models.teacher, models.card.recipe
    index = protocol.index[: SHOWN if teacher.frames == 1 else 2]
    shown = [texts.prompt(i) for i in index]
    most, fewest = protocol.teacher_steps, min(protocol.steps)
    samplers = {f"teacher {counted(most)}": teacher_sampler(teacher, most)}
    for k in reversed(protocol.steps):
        samplers[f"student {counted(k)}"] = student_sampler(models.student, recipe, k, protocol.seed)
    samplers[f"teacher {counted(fewest)}"] = teacher_sampler(teacher, fewest)
    noise = evaluation_noise(protocol.seed, range(len(shown)), teacher, teacher.device)
    latents = sample_rows(samplers, noise, encoded(teacher, texts, index), protocol.guidance)
    rows = {name: thinned(teacher.decode(x0), teacher.frames, NUM_FRAMES) for name, x0 in latents.items()}
    save_grid(rows, folder / "images.png", prompts=shown)
    report = result | {"images": {"Teacher and student, from the same noise": "images.png"}}
    write_report(folder, report)
    return report
