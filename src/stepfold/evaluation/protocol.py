"""The frozen protocol: which prompts, how many pictures, which step counts. Numbers compare only at equal hash."""

import hashlib
import json
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stepfold.errors import UserError
from stepfold.evaluation.imagenet import FEATURES, imagenet_features
from stepfold.evaluation.judge import Judge, image_features, text_features
from stepfold.evaluation.metrics import StreamingMoments, accuracy, clip_score, diversity, frechet_distance
from stepfold.prompts.reading import shuffled_index
from stepfold.sampling.recipe import Recipe


@dataclass(frozen=True)
class Protocol:
    """Everything that a result depends on besides the sampler and the judge.

    Attributes:
        name: of the protocol.
        version: goes up whenever the same fields would give other prompts or other metrics.
        n: pictures per sampler and step count, >= 2.
        seed: of the prompts, the noise and the colours.
        samples_per_prompt: consecutive pictures that share a prompt, >= 2, as diversity needs.
        teacher_steps: step counts that the teacher is measured at; the first is the reference for agreement.
        student_steps: step counts that the student is measured at.
        guidance: scale that the teacher is given, and a student that was taught several.
    """

    name: str
    version: int
    n: int
    seed: int
    samples_per_prompt: int
    teacher_steps: tuple[int, ...] = (20, 4, 2, 1)
    student_steps: tuple[int, ...] = (4, 2, 1)
    guidance: float = 4.5

    def __post_init__(self) -> None:
        if self.samples_per_prompt < 2:
            raise UserError(f"samples_per_prompt is {self.samples_per_prompt}; diversity needs 2 or more")
        if self.n < self.samples_per_prompt:
            raise UserError(f"n is {self.n}; at least {self.samples_per_prompt} pictures are needed, 2000 is usual")
        if any(steps < 1 for steps in (*self.teacher_steps, *self.student_steps)):
            raise UserError(f"step counts {self.teacher_steps} and {self.student_steps}; each must be 1 or more")

    def hash(self) -> str:
        """sha256, in hexadecimal, of the fields as JSON with sorted keys and no spaces."""
        return fields_hash(self)


def fields_hash(record: Any) -> str:
    """sha256, in hexadecimal, of a dataclass's fields as JSON with sorted keys and no spaces."""
    return hashlib.sha256(json.dumps(asdict(record), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


TEACHER_AT, TEACHER_OF, SEARCHED = "teacher at guidance ", "teacher of ", "teacher, searched "


def teacher_at(guidance: float) -> str:
    """The name of the teacher's results at another scale than the protocol's."""
    return f"{TEACHER_AT}{guidance:g}"


def teacher_of(name: str) -> str:
    """The name of a teacher's results that has other settings than the first student's: that of the student `name`."""
    return f"{TEACHER_OF}{name}"


def teachers_of(result: Mapping[str, Any]) -> list[str]:
    """Which keys of a report are results of a teacher: the protocol's scale first."""
    return [who for who in result if who == "teacher" or who.startswith((TEACHER_AT, TEACHER_OF, SEARCHED))]


EMOJI = Protocol(name="emoji", version=1, n=500, seed=0, samples_per_prompt=2)
MAP_STEPS = 8


def check_steps(recipes: Sequence[Recipe], steps: Sequence[int] | None) -> None:
    """Refuses a number of steps that no student has times for, and a student with times for none of the numbers.

    Pipelines without a student take any number.

    Raises:
        UserError: see `Recipe.times_for`.
    """
    for k in steps or ():
        if recipes and not any(k in recipe.times for recipe in recipes):
            recipes[0].times_for(k)
    for recipe in recipes:
        if steps and not any(k in recipe.times for k in steps):
            recipe.times_for(steps[0])


def emoji_protocol(recipes: Iterable[Recipe], steps: Iterable[int] | None, n: int, guidance: float) -> Protocol:
    """The bundled teacher's protocol for some students: EMOJI, and for flow maps 8 steps too, the teacher beside them.

    Args:
        recipes: of the students.
        steps: that they are measured at; None for the usual ones.
        n: images a row.
        guidance: scale of the teacher.
    """
    maps = any(recipe.sampler == "flow_map" for recipe in recipes)
    student = {*(steps or (*EMOJI.student_steps, *[MAP_STEPS] * maps))}
    teacher = {*EMOJI.teacher_steps, *[MAP_STEPS] * (maps and MAP_STEPS in student)}
    student_steps, teacher_steps = (tuple(sorted(counts, reverse=True)) for counts in (student, teacher))
    return replace(EMOJI, n=n, guidance=guidance, student_steps=student_steps, teacher_steps=teacher_steps)


@dataclass(frozen=True)
class Scores:
    """One sampler at one step count.

    Attributes:
        accuracy: share of pictures whose nearest name is the prompt's, in [0, 1].
        clip_score: 100 x mean cosine to the prompt, in [0, 100].
        fd: Frechet distance to real pictures in the judge's features (not an Inception FID).
        diversity: mean feature distance between pictures of one prompt.
        agreement: latent error against the teacher's reference from the same noise, in latent variances, or None.
        images_per_sec: pictures made per second, the judge's own time left out; timed once, so for who times it again.
        calls: of the network for one picture, both branches of classifier-free guidance counted; None if not known.
        fd_imagenet: Frechet distance to real pictures in the features of a network of ImageNet; None without it.
    """

    accuracy: float
    clip_score: float
    fd: float
    diversity: float
    agreement: float | None
    images_per_sec: float
    calls: int | None = None
    fd_imagenet: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """A plain dict, ready for json.dumps and for the report; `fd_imagenet` only where it was measured."""
        return {key: value for key, value in asdict(self).items() if key != "fd_imagenet" or value is not None}


def protocol_prompts(judge: Judge, protocol: Protocol) -> tuple[list[str], Tensor, Tensor]:
    """The prompts of a protocol, "NAME on COLOUR background": every name once before any comes again.

    With the same seed, a smaller n gives the first prompts of a larger n.

    Returns:
        prompts: n strings, `samples_per_prompt` consecutive ones equal.
        target: int64 [n], the prompt's name as an index into judge.names.
        group: int64 [n], which prompt a row belongs to: 0, 0, 1, 1, 2, ...
    """
    colour = random.Random(protocol.seed)
    num_prompts = -(-protocol.n // protocol.samples_per_prompt)
    names = [shuffled_index(i, len(judge.names), protocol.seed) for i in range(num_prompts)]
    drawn = [judge.colours[int(colour.random() * len(judge.colours))] for _ in names]
    distinct = [f"{judge.names[name]} on {word} background" for name, word in zip(names, drawn, strict=True)]
    group = torch.arange(protocol.n) // protocol.samples_per_prompt
    return [distinct[i] for i in group.tolist()], torch.tensor(names)[group], group


def score_images(
    judge: Judge,
    images: Iterable[Tensor],
    prompts: Sequence[str],
    targets: Tensor,
    groups: Tensor,
    agreement: float | None = None,
) -> Scores:
    """Judges a stream of pictures; only their features are kept.

    Args:
        judge: the judge.
        images: yields float batches [B, 3, H, W] in [0, 1], in the order of the prompts. The time that the next batch
            takes is what `images_per_sec` measures, so a generator that samples as it goes is timed as it samples.
        prompts: N strings.
        targets: int64 [N], index of each prompt's name in judge.names.
        groups: int64 [N], equal for pictures of one prompt.
        agreement: the latent error, measured by the caller, to go with the scores.

    Raises:
        NonFiniteError: a picture holds NaN or infinity.
    """
    parts: list[Tensor] = []
    moments, second, other = StreamingMoments.empty(len(judge.mean)), judge.imagenet, StreamingMoments.empty(FEATURES)
    sampling_sec = 0.0
    for batch, elapsed_sec in _timed(images):
        sampling_sec += elapsed_sec
        parts.append(image_features(judge, batch))
        moments = moments.updated(parts[-1])
        if second is not None:
            other = other.updated(imagenet_features(second.weights, batch))
    assert moments.count == len(prompts) == len(targets) == len(groups), (
        f"{moments.count} images, {len(prompts)} prompts, {len(targets)} targets, {len(groups)} groups"
    )
    features = torch.cat(parts)
    return Scores(
        accuracy=accuracy(features, text_features(judge, judge.names), targets.cpu()).item(),
        clip_score=clip_score(features, text_features(judge, prompts)).item(),
        fd=frechet_distance(moments.mean, moments.covariance, judge.mean, judge.covariance).item(),
        diversity=diversity(features, groups.cpu()).item(),
        agreement=agreement,
        images_per_sec=moments.count / sampling_sec,
        fd_imagenet=second.distance(other) if second is not None else None,
    )


def counted(steps: int) -> str:
    """`1 step`, `2 steps`."""
    return f"{steps} step{'' if steps == 1 else 's'}"


def fd_title(n: int | None, name: str = "FD") -> str:
    """`FD (n = 500)`: it compares at equal n only, so it never stands without."""
    return f"{name} (n = {n:,})" if n else name


def rows_by_steps(scores: dict[str, Scores], *, timed: bool = False) -> dict[str, dict[str, Any]]:
    """{"teacher 20": scores} -> {"teacher": {"20": {...}}}; with `images_per_sec` only where it is `timed` apart."""
    out: dict[str, dict[str, Any]] = {"teacher": {}, "student": {}}
    for name, row in scores.items():
        who, steps = name.rsplit(" ", 1)
        values = row.to_json()
        if not timed:
            del values["images_per_sec"]
        out.setdefault(who, {})[steps] = values
    return out


def protocol_record(protocol: Protocol) -> dict[str, Any]:
    """The protocol and its hash, as every result carries them."""
    return asdict(protocol) | {"hash": protocol.hash()}


def _timed(batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, float]]:
    """Each batch with the seconds it took to come, queued GPU work included."""
    start = time.perf_counter()
    for batch in batches:
        if batch.device.type != "cpu":
            torch.accelerator.synchronize(batch.device)
        yield batch, time.perf_counter() - start
        start = time.perf_counter()
