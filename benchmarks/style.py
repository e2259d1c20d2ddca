"""Is a style kept in few steps: the style first and distilled then, or a step-saver beside the style?

    python recipes/emoji_teacher/style_lora.py && python recipes/emoji_teacher/style_classifier.py
    python benchmarks/style.py --student RUN/student --step-saver RUN2/student

RUN is a LoRA student of the bundled teacher with the style LoRA, RUN2 one of the bundled teacher alone. All rows share
prompts, noise and guidance 3. `fluent` is the share of images that a small classifier takes for Fluent's, `fd_fluent`
and `fd_noto` are Frechet distances to renders, `named` and `named_noto` the share of images that show the name of their
prompt, by the mean features of Fluent renders, and by the bundled evaluator, which knows Noto alone. A stopped
measurement goes on with the row that it was at.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import make_parser, open_record, show, write_record
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from stepfold import assets
from stepfold.evaluation.judge import Judge, image_features, load_judge, text_features
from stepfold.evaluation.measure import (
    BATCH,
    Sampler,
    encode_distinct,
    evaluation_noise,
    student_sampler,
    teacher_sampler,
)
from stepfold.evaluation.metrics import StreamingMoments, accuracy, frechet_distance
from stepfold.evaluation.protocol import EMOJI, protocol_prompts
from stepfold.sections import LoraSettings, TeacherSettings
from stepfold.students.card import read_card
from stepfold.students.loading import load_student
from stepfold.students.lora import load_lora
from stepfold.teachers.loading import load_teacher
from stepfold.teachers.pipeline import PipelineTeacher

GUIDANCE = 3.0
COLUMNS = ("fluent", "fd_fluent", "fd_noto", "named", "named_noto")
SHOWN = 12


def samplers_of(style: str, student: Path, step_saver: Path) -> dict[str, tuple[PipelineTeacher, Sampler]]:
    """Row -> (teacher that decodes, sampler)."""
    bare = TeacherSettings(source="emoji", max_tokens=32)
    plain = load_teacher(bare, "cpu")
    styled = load_teacher(bare.model_copy(update={"lora": (LoraSettings(source=style),)}), "cpu")
    rows = {"teacher": partial(teacher_sampler, plain), "teacher with the style": partial(teacher_sampler, styled)}
    found: dict[str, tuple[PipelineTeacher, Sampler]] = {}
    _, first, card = load_student(student, "cpu")
    saver = read_card(step_saver)
    options = {"convolutions": saver.lora_convolutions, "two_times": saver.two_times}
    students = {
        "style first, then distilled": (first, card.recipe),
        "step-saver and style": (load_lora(styled, step_saver, saver.lora_rank, **options), saver.recipe),
        "step-saver alone": (load_lora(plain, step_saver, saver.lora_rank, **options), saver.recipe),
    }
    for name, (network, recipe) in students.items():
        found |= {f"{name} {k}": (plain, student_sampler(network, recipe, k, EMOJI.seed)) for k in (4, 1)}
    return found | {f"{name} {steps}": (plain, make(steps)) for steps in (4, 1, 20) for name, make in rows.items()}


@torch.no_grad()
def images_of(teacher: PipelineTeacher, sampler: Sampler, prompts: list[str]) -> Tensor:
    """Images [n, 3, 64, 64] in [0, 1] of the protocol's noise."""
    condition, parts = encode_distinct(teacher, prompts), []
    for start in range(0, len(prompts), BATCH):
        samples = range(start, min(start + BATCH, len(prompts)))
        noise = evaluation_noise(EMOJI.seed, samples, teacher, torch.device("cpu"))
        part = condition.rows(slice(samples.start, samples.stop)).trimmed()
        latents = sampler(noise, part, torch.full((len(samples),), GUIDANCE), samples)
        parts.append(teacher.decode(latents))
    return torch.cat(parts)


def read_work(work: Path) -> tuple[nn.Module, dict[str, Tensor], dict[str, float]]:
    """The classifier, the statistics of Fluent renders, and what was measured of both."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "emoji_teacher"))
    from style_classifier import make_classifier

    network = make_classifier()
    with safe_open(work / "classifier.safetensors", framework="pt") as file:
        said = json.loads((file.metadata() or {})["scores"])
    network.load_state_dict(load_file(work / "classifier.safetensors"))
    return network.eval(), load_file(work / "fluent_judge.safetensors"), said


@torch.no_grad()
def score(images: Tensor, targets: Tensor, judge: Judge, classifier: nn.Module, fluent: dict[str, Tensor]) -> dict:
    """One row: see the module."""
    features = image_features(judge, images)
    moments = StreamingMoments.empty(len(judge.mean)).updated(features)
    distance: Callable[[Tensor, Tensor], Tensor] = partial(frechet_distance, moments.mean, moments.covariance)
    return {
        "fluent": float((classifier(images * 2 - 1) > 0).float().mean()),
        "fd_fluent": float(distance(fluent["mean"], fluent["covariance"])),
        "fd_noto": float(distance(judge.mean, judge.covariance)),
        "named": float(accuracy(features, fluent["names"], targets)),
        "named_noto": float(accuracy(features, text_features(judge, judge.names), targets)),
    }


def strip(images: Tensor) -> Image.Image:
    """The first image of each of the first prompts, side by side."""
    pixels = (torch.cat([*images[: 2 * SHOWN : 2]], 2).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)


def rows_before(out: Path, command: str) -> dict[str, dict[str, Any]]:
    """What a stopped measurement of the same command has left."""
    record = json.loads(out.read_text()) if out.exists() else {}
    return record["rows"] if record.get("command") == command else {}


def main(argv: Sequence[str]) -> None:
    parser = make_parser(__doc__, "style", device=False)
    parser.add_argument("--work", type=Path, default=Path("build/emoji_style"), help="of the two recipes")
    parser.add_argument("--style", default="", help="LoRA file; the recipe's in --work")
    parser.add_argument("--student", type=Path, required=True, help="LoRA student of teacher and style")
    parser.add_argument("--step-saver", type=Path, required=True, help="LoRA student of the teacher alone")
    parser.add_argument("--n", type=int, default=300, help="images of each row (300)")
    parser.add_argument("--strips", type=Path, help="folder for the first images of each row")
    args = parser.parse_args(argv)
    record = open_record("style", argv, torch.device("cpu"))
    classifier, fluent, said = read_work(args.work)
    judge = load_judge(assets.JUDGE, "cpu")
    prompts, targets, _ = protocol_prompts(judge, replace(EMOJI, n=args.n, guidance=GUIDANCE))
    style = args.style or str(args.work / "pytorch_lora_weights.safetensors")
    rows = rows_before(args.out, record["command"])
    record |= {"n": args.n, "guidance": GUIDANCE, "classifier": said, "rows": rows}
    if args.strips:
        args.strips.mkdir(parents=True, exist_ok=True)
    for name, (teacher, sampler) in samplers_of(style, args.student, args.step_saver).items():
        if name not in rows:
            images = images_of(teacher, sampler, prompts)
            rows[name] = score(images, targets, judge, classifier, fluent)
            if args.strips:
                strip(images).save(args.strips / f"{name}.png")
            write_record(args.out, record)
    show("Style kept", ("row", *COLUMNS), [(name, *(f"{row[c]:.3f}" for c in COLUMNS)) for name, row in rows.items()])


if __name__ == "__main__":
    main(sys.argv[1:])
