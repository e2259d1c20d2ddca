"""Pipelines under the protocols of others: GenEval and MJHQ-30k."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepfold.errors import UserError

if TYPE_CHECKING:
    from stepfold.display import Display
    from stepfold.evaluation.pipelines import Drawer


def open_drawer(folder: Path, device: str) -> "Drawer":
    """The pipeline of a folder, called as a student's card says where it is a student.

    Raises:
        UserError: the folder is no pipeline, or a student that is none by itself.
    """
    from stepfold.evaluation.pipelines import Drawer
    from stepfold.students.card import is_student, read_card, student_folder
    from stepfold.teachers.loading import load_any_pipeline

    if not is_student(folder):
        return Drawer(load_any_pipeline(folder, device))
    card, given, folder = read_card(folder), folder, student_folder(folder)
    if card.lora_rank or card.network_only:
        raise UserError(
            f"{folder} holds a student without the rest of its pipeline; make it whole first: "
            f"stepfold export {given} --to pipeline"
        )
    card.check_calls()
    return Drawer(load_any_pipeline(folder, device), card.calls)


def run_geneval(
    folder: Path,
    prompts: Path,
    out: Path,
    *,
    steps: int | None,
    guidance: float | None,
    display: "Display",
    device: str,
) -> None:
    """A pipeline's pictures for GenEval's scorer; a run that was stopped goes on where it was.

    Raises:
        UserError: the folder is no pipeline, or the prompts are not GenEval's.
    """
    from stepfold.evaluation.pipelines import claim, geneval_prompts, write_geneval
    from stepfold.fingerprints import listing_sha256

    rows = geneval_prompts(prompts)
    drawer = open_drawer(folder, device)
    count = steps or drawer.usual_steps[-1]
    claim(out, {"pipeline": listing_sha256(folder), "steps": count, "guidance": guidance})
    with display.measuring({"prompts": len(rows)}) as tick:
        write_geneval(drawer, rows, out, count, guidance, partial(tick, "prompts"))


def run_mjhq(
    folders: Sequence[Path],
    images: Path,
    inception: Path,
    clip: str,
    out: Path,
    *,
    steps: Sequence[int] | None,
    n: int,
    guidance: float | None,
    display: "Display",
    device: str,
) -> dict[str, Any]:
    """FID and CLIP score of pipelines on MJHQ-30k; pictures go to OUT and are not drawn twice.

    Raises:
        UserError: a folder is no pipeline; the benchmark or the networks that judge are not where they belong.
    """
    from stepfold.evaluation import mjhq
    from stepfold.evaluation.pipelines import claim
    from stepfold.evaluation.report import versions
    from stepfold.fingerprints import listing_sha256

    data = mjhq.open_mjhq(images, n)
    features, scorer = mjhq.inception_features(inception, device), mjhq.load_clip(clip, device)
    meta, weights = (hashlib.sha256(file.read_bytes()).hexdigest() for file in (images / mjhq.META, inception))
    protocol = mjhq.MjhqProtocol(n=n, seed=0, images_sha256=meta, inception_sha256=weights, clip=clip)
    out.mkdir(parents=True, exist_ok=True)
    with display.measuring({"real pictures": n}) as tick:
        cache = out / f"reals_{protocol.hash()[:12]}.safetensors"
        reals = mjhq.real_moments(data, features, cache, partial(tick, "real pictures"))
    rows: dict[str, Any] = {}
    for folder in folders:
        drawer = open_drawer(folder, device)
        for k in steps or drawer.usual_steps:
            made_by = {"pipeline": listing_sha256(folder), "steps": k, "guidance": guidance, "prompts": meta}
            key = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:12]
            with display.measuring(dict.fromkeys(("draw", "judge"), n)) as tick:
                pictures = out / key
                claim(pictures, made_by)
                paths = mjhq.draw_all(drawer, data, pictures, k, guidance, protocol.seed, partial(tick, "draw"))
                scores = mjhq.measure(paths, data, reals, features, scorer, partial(tick, "judge"))
            rows.setdefault(str(folder), {})[str(k)] = scores
    record = asdict(protocol) | {"hash": protocol.hash()}
    return {"versions": versions(), "protocol": record, "pipelines": rows}
