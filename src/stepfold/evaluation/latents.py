"""The latent error: how far few steps end from the teacher's long trajectory. It needs no images and no evaluator."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from stepfold.evaluation.measure import Sampler, evaluation_noise, student_sampler, teacher_sampler
from stepfold.evaluation.metrics import relative_error
from stepfold.evaluation.mjhq import ClipScorer
from stepfold.evaluation.preview import to_image
from stepfold.evaluation.protocol import counted, fields_hash
from stepfold.prompts.reading import shuffled_index
from stepfold.sampling.recipe import Recipe
from stepfold.teachers.contract import Condition, Student, Teacher
from stepfold.teachers.pipeline import PipelineTeacher

NUM_PROMPTS, TEACHER_STEPS, STEPS = 64, 20, (8, 4, 2, 1)
BATCH, VIDEO_BATCH = 8, 2  # samples at once: as many as a preview draws


@dataclass(frozen=True)
class LatentProtocol:
    """Everything that a latent error depends on besides the two networks.

    Attributes:
        n: prompts, one sample each.
        steps: numbers of steps of the student, and of the teacher beside it, most first.
        guidance: scale of the teacher, which the student is told too.
        prompts_sha256: of the file of prompts.
        index: numbers of the prompts in that file.
        seed: of the noise.
        teacher_steps: of the reference.
        name, version: of the protocol.
    """

    n: int
    steps: tuple[int, ...]
    guidance: float
    prompts_sha256: str
    index: tuple[int, ...]
    seed: int = 0
    teacher_steps: int = TEACHER_STEPS
    name: str = "latents"
    version: int = 1

    def record(self) -> dict[str, Any]:
        """The fields and their hash, as every result carries them."""
        return asdict(self) | {"hash": fields_hash(self)}


@dataclass(frozen=True)
class Chosen:
    """Prompts to evaluate on.

    Attributes:
        index: their numbers in the file.
        unseen: how many of them the run did not train on; None where that is not known.
    """

    index: tuple[int, ...]
    unseen: int | None

    @property
    def said(self) -> str:
        """In words."""
        n = len(self.index)
        if self.unseen is None:
            return f"{n} prompts"
        if self.unseen == n:
            return f"{n} held-out prompts"
        held = f"{self.unseen} of them held out" if self.unseen else "all of them trained on"
        return f"{n} prompts, {held}: the file has too few"


def held_out(count: int, trained: int, seed: int, n: int, rows: int | None = None) -> Chosen:
    """The prompts that a run reaches last or not at all.

    Args:
        count: prompts in the file.
        trained: samples that the run trained on, in its order from the first.
        seed: of the run.
        n: prompts wanted; fewer where the file has fewer.
        rows: of the bank that the run trained on, in which row r is of prompt r % count; None without a bank.
    """
    n = min(n, count)
    late = (shuffled_index(position, count, seed) for position in reversed(range(count)))
    if rows in (None, count):  # each prompt once an epoch
        return Chosen(tuple(islice(late, n))[::-1], max(0, min(n, count - trained)))
    assert rows is not None
    met = dict.fromkeys(shuffled_index(position, rows, seed) % count for position in range(min(trained, rows)))
    unseen = tuple(islice((i for i in late if i not in met), n))
    return Chosen((*list(reversed(met))[: n - len(unseen)], *unseen), len(unseen))


def known_steps(recipe: Recipe, asked: Sequence[int] | None = None) -> tuple[int, ...]:
    """Numbers of steps to measure, most first: what is asked for, or 8, 4, 2, 1 as far as the card has times.

    Raises:
        UserError: the card has no times for one that is asked for.
    """
    if asked:
        for steps in asked:
            recipe.times_for(steps)
        return tuple(sorted(set(asked), reverse=True))
    return tuple(k for k in STEPS if k in recipe.times) or (min(recipe.times),)


def calls_per_step(teacher: Teacher) -> int:
    """Network rows of one of the teacher's steps: 2 with classifier-free guidance, else 1."""
    return 2 if teacher.guidance_kind == "classifier_free" else 1


def cost(protocol: LatentProtocol, teacher: Teacher) -> str:
    """What the evaluation takes, to be said before it starts."""
    each, ours = calls_per_step(teacher), sum(protocol.steps)
    calls = protocol.n * (each * (protocol.teacher_steps + ours) + ours)
    listed = ", ".join(map(str, reversed(protocol.steps)))
    return f"{calls:,} network calls: the teacher at {counted(protocol.teacher_steps)}, teacher and student at {listed}"


def measure_latents(
    teacher: PipelineTeacher,
    student: Student,
    recipe: Recipe,
    protocol: LatentProtocol,
    condition: Condition,
    prompts: Sequence[str],
    clip: ClipScorer | None = None,
    tick: Callable[[str, int], None] = lambda name, count: None,
    searched: Mapping[str, Sampler] | None = None,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Latent errors of student and teacher at few steps against the teacher's long trajectory, from the same noise.

    Args:
        teacher: the reference.
        student: the network.
        recipe: how it is sampled.
        protocol: how many prompts, steps and guidance.
        condition: n rows.
        prompts: n strings, for the CLIP.
        clip: scores decoded images; None for none.
        tick: called with (name of `samplers_of`, samples made) after every batch.
        searched: the teacher under searched levels, `teacher, searched SOLVER STEPS` -> sampler.

    Returns:
        {"teacher": {steps: scores}, "student": {steps: scores}}, and searched ones; the reference has no error.
    """
    rows: dict[str, dict[str, dict[str, float | None]]] = {"teacher": {}, "student": {}}
    reference: list[Tensor] = []
    for name, sampler in (samplers_of(teacher, student, recipe, protocol) | dict(searched or {})).items():
        errors, scores = [], []
        for i, (samples, x0) in enumerate(sampled(sampler, teacher, protocol, condition)):
            if name.startswith("reference"):
                reference.append(x0.cpu())
            else:
                errors.append(relative_error(x0.cpu(), reference[i]))
            if clip:
                pictures = [to_image(picture) for picture in teacher.decode(x0)]
                scores.append(clip.score(pictures, prompts[samples.start : samples.stop]))
            tick(name, len(samples))
        who, steps = name.rsplit(" ", 1)
        row: dict[str, float | None] = {"latent_error": torch.cat(errors).mean().item() if errors else None}
        if clip:
            row["clip_score"] = torch.cat(scores).mean().item()
        rows.setdefault("teacher" if who == "reference" else who, {})[steps] = row
    return rows


def sampled(
    sampler: Sampler, teacher: PipelineTeacher, protocol: LatentProtocol, condition: Condition
) -> Iterator[tuple[range, Tensor]]:
    """The protocol's samples, batch by batch: their numbers and x_0."""
    batch = BATCH if teacher.frames == 1 else VIDEO_BATCH
    for start in range(0, protocol.n, batch):
        samples = range(start, min(start + batch, protocol.n))
        noise = evaluation_noise(protocol.seed, samples, teacher, teacher.device)
        guidance = torch.full((len(samples),), protocol.guidance, device=teacher.device)
        yield samples, sampler(noise, condition.rows(slice(samples.start, samples.stop)).trimmed(), guidance, samples)


def measure_change(
    teacher: PipelineTeacher,
    students: Mapping[str, Student],
    recipe: Recipe,
    protocol: LatentProtocol,
    condition: Condition,
    tick: Callable[[str, int], None] = lambda name, count: None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Latent errors of forms of one student, and how far each is from the first form, all from the same noise.

    Args:
        teacher: the reference.
        students: name -> network; the first is what the others change.
        recipe: how they are sampled.
        protocol: how many prompts, steps and guidance.
        condition: n rows.
        tick: called with (`reference 20`, or a name and its steps, samples made) after every batch.

    Returns:
        {name: {steps: {"latent_error", and for all but the first "change"}}}.
    """
    first = next(iter(students))
    samplers = {f"reference {protocol.teacher_steps}": teacher_sampler(teacher, protocol.teacher_steps)}
    for steps in protocol.steps:
        samplers |= {
            f"{n} {steps}": student_sampler(each, recipe, steps, protocol.seed) for n, each in students.items()
        }
    ends: dict[str, Tensor] = {}
    for name, sampler in samplers.items():
        parts = []
        for samples, x0 in sampled(sampler, teacher, protocol, condition):
            parts.append(x0.cpu())
            tick(name, len(samples))
        ends[name] = torch.cat(parts)
    reference = ends[f"reference {protocol.teacher_steps}"]
    rows: dict[str, dict[str, dict[str, float]]] = {name: {} for name in students}
    for name in students:
        for steps in protocol.steps:
            end = ends[f"{name} {steps}"]
            row = {"latent_error": relative_error(end, reference).mean().item()}
            if name != first:
                row["change"] = relative_error(end, ends[f"{first} {steps}"]).mean().item()
            rows[name][str(steps)] = row
    return rows


def samplers_of(teacher: Teacher, student: Student, recipe: Recipe, protocol: LatentProtocol) -> dict[str, Sampler]:
    """`reference 20`, then `teacher 8`, `student 8` and so on."""
    samplers = {f"reference {protocol.teacher_steps}": teacher_sampler(teacher, protocol.teacher_steps)}
    for steps in protocol.steps:
        if steps != protocol.teacher_steps:
            samplers[f"teacher {steps}"] = teacher_sampler(teacher, steps)
        samplers[f"student {steps}"] = student_sampler(student, recipe, steps, protocol.seed)
    return samplers
