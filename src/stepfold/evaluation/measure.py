"""Samples teacher and student under one protocol, from the same prompts and the same noise, and scores them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from stepfold.evaluation.judge import Judge
from stepfold.evaluation.metrics import latent_error
from stepfold.evaluation.protocol import Protocol, Scores, protocol_prompts, score_images, teacher_at
from stepfold.randomness import normal
from stepfold.sampling.hybrid import sample_hybrid
from stepfold.sampling.recipe import Recipe
from stepfold.sampling.samplers import SAMPLERS
from stepfold.sampling.teacher import sample_teacher
from stepfold.teachers.contract import Condition, Student, Teacher, concatenate

BATCH = 50

Sampler = Callable[[Tensor, Condition, Tensor, range], Tensor]
"""(noise [B, ...], condition, guidance [B], sample numbers) -> x_0 [B, ...]."""


def teacher_sampler(teacher: Teacher, num_steps: int) -> Sampler:
    """The teacher at `num_steps` Euler steps of even noise levels."""
    return lambda noise, condition, guidance, _: sample_teacher(
        teacher, noise, condition, guidance, num_steps, even=True
    )


def student_sampler(student: Student, recipe: Recipe, num_steps: int, seed: int, gamma: float = 0.0) -> Sampler:
    """The student's steps as its recipe says, its fresh noise drawn per sample; `gamma` is for flow maps.

    Raises:
        UserError: the recipe lists no times for so many steps, or the student was not trained for this gamma.
    """
    times, sigma_data = recipe.times_for(num_steps), recipe.sigma_data
    options = {"gamma": recipe.gamma_for(gamma)} if gamma else {}

    def sample(noise: Tensor, condition: Condition, guidance: Tensor, samples: range) -> Tensor:
        fresh = _fresh(sigma_data, noise, seed, samples)
        return SAMPLERS[recipe.sampler](student, noise, condition, guidance, times, fresh, sigma_data, **options)

    return sample


def hybrid_sampler(teacher: Teacher, student: Student, recipe: Recipe, num_steps: int, seed: int) -> Sampler:
    """The teacher's first step, then the student's; see `sample_hybrid`."""

    def sample(noise: Tensor, condition: Condition, guidance: Tensor, samples: range) -> Tensor:
        fresh = _fresh(recipe.sigma_data, noise, seed, samples)
        return sample_hybrid(teacher, student, noise, condition, guidance, recipe, num_steps, fresh)

    return sample


def _fresh(sigma_data: float, like: Tensor, seed: int, samples: range) -> Callable[[int], Tensor]:
    """Step index -> noise of those samples, the same however they are batched."""

    def fresh(i: int) -> Tensor:
        parts = [normal(tuple(like.shape[1:]), seed, "evaluation fresh noise", i, s) for s in samples]
        return sigma_data * torch.stack(parts).to(like)

    return fresh


def evaluation_noise(protocol_seed: int, samples: range, teacher: Teacher, device: torch.device) -> Tensor:
    """The noise of the given samples [B, ...], of standard deviation sigma_data; the same for every sampler."""
    parts = [normal(teacher.latent_shape, protocol_seed, "evaluation noise", s) for s in samples]
    return teacher.sigma_data * torch.stack(parts).to(device)


def encode_distinct(teacher: Teacher, prompts: list[str]) -> Condition:
    """One row a prompt; equal prompts are encoded once."""
    distinct = list(dict.fromkeys(prompts))
    condition = concatenate([teacher.encode(distinct[i : i + BATCH]) for i in range(0, len(distinct), BATCH)])
    row = {prompt: i for i, prompt in enumerate(distinct)}
    return condition.rows(torch.tensor([row[p] for p in prompts], device=condition.mask.device))


def measure(
    judge: Judge,
    protocol: Protocol,
    teacher: Teacher,
    samplers: dict[str, Sampler],
    device: torch.device,
    tick: Callable[[str, int], None] = lambda name, count: None,
) -> dict[str, Scores]:
    """Scores every sampler on the protocol's prompts.

    Args:
        judge: scores the pictures.
        protocol: prompts, noise and guidance.
        teacher: encodes prompts and decodes latents.
        samplers: name -> sampler. The first is the reference of `agreement`.
        device: where the noise goes.
        tick: called with (name, pictures made) after every batch.

    Returns:
        name -> scores, in the order of `samplers`.
    """
    prompts, targets, groups = protocol_prompts(judge, protocol)
    condition = encode_distinct(teacher, prompts)
    reference: Tensor | None = None
    rows = {}
    for name, sampler in samplers.items():
        latents: list[Tensor] = []

        def pictures(name: str = name, sampler: Sampler = sampler, latents: list[Tensor] = latents) -> Iterator[Tensor]:
            for start in range(0, protocol.n, BATCH):
                samples = range(start, min(start + BATCH, protocol.n))
                noise = evaluation_noise(protocol.seed, samples, teacher, device)
                guidance = torch.full((len(samples),), protocol.guidance, device=device)
                part = condition.rows(slice(samples.start, samples.stop)).trimmed()
                latents.append(sampler(noise, part, guidance, samples))
                yield teacher.decode(latents[-1])
                tick(name, len(samples))

        scores = score_images(judge, pictures(), prompts, targets, groups)
        x0 = torch.cat(latents)
        if reference is None:
            reference, error = x0, None
        else:
            error = float(latent_error(x0, reference, teacher.sigma_data))
        rows[name] = replace(scores, agreement=error)
    return rows


def protocol_samplers(
    teacher: Teacher,
    students: Mapping[str, tuple[Student, Recipe]],
    protocol: Protocol,
    guidance: float | None = None,
    searched: Mapping[str, Sampler] | None = None,
) -> dict[float, dict[str, Sampler]]:
    """Guidance scale -> what is measured at it: the teacher first, then the students that stand for it.

    At the protocol's own scale the teacher is measured at all its step counts, at others at its most.

    Args:
        teacher: of the protocol.
        students: name -> network, and how it is sampled.
        protocol: step counts and seed.
        guidance: scale that the students are told; None for the usual one of each.
        searched: the teacher under searched levels, measured at the protocol's own scale too.

    Raises:
        UserError: a student was taught one scale, and another one is asked for.
    """
    scales = {name: recipe.scale_for(guidance) for name, (_, recipe) in students.items()}
    groups: dict[float, dict[str, Sampler]] = {}
    for scale in dict.fromkeys([protocol.guidance, *scales.values()]):
        if scale == protocol.guidance:
            group = {f"teacher {k}": teacher_sampler(teacher, k) for k in protocol.teacher_steps} | dict(searched or {})
        else:
            most = protocol.teacher_steps[0]
            group = {f"{teacher_at(scale)} {most}": teacher_sampler(teacher, most)}
        for name, (student, recipe) in students.items():
            for k in steps_of(recipe, protocol) if scales[name] == scale else ():
                group[f"{name} {k}"] = student_sampler(student, recipe, k, protocol.seed)
        groups[scale] = group
    return groups


def steps_of(recipe: Recipe, protocol: Protocol) -> list[int]:
    """The protocol's step counts that a student is sampled at; those that it was trained for, where it has none."""
    return [k for k in protocol.student_steps if k in recipe.times] or sorted(recipe.times, reverse=True)


def measure_groups(
    judge: Judge,
    protocol: Protocol,
    teacher: Teacher,
    groups: Mapping[float, dict[str, Sampler]],
    device: torch.device,
    tick: Callable[[str, int], None] = lambda name, count: None,
) -> dict[str, Scores]:
    """Scores of `protocol_samplers`, each beside the teacher at its own guidance scale."""
    scores = {}
    for scale, samplers in groups.items():
        rows = measure(judge, replace(protocol, guidance=scale), teacher, samplers, device, tick)
        scores |= {name: replace(row, calls=calls_of(name, teacher, scale)) for name, row in rows.items()}
    return scores


def calls_of(name: str, teacher: Teacher, scale: float) -> int:
    """Network calls an image of `teacher 20`, `student 4` or `student NAME 4` takes."""
    guided = teacher.guidance_kind == "classifier_free" and scale != teacher.no_guidance
    branches = 2 if name.startswith("teacher") and guided else 1
    return branches * int(name.rsplit(" ", 1)[1])
