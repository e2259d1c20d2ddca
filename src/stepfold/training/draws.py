"""The random part of a batch: prompts, guidance scales, routes, noise. A function of (seed, batch number) alone."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepfold.config import Config, SpaceSettings
from stepfold.errors import UserError
from stepfold.maths.routes import (
    at_most,
    logit_normal_route,
    logit_normal_times,
    random_route,
    random_times,
    reference_route,
    u_shaped_times,
)
from stepfold.prompts.reading import Prompts, shuffled_index
from stepfold.randomness import Draws, normal, send, uniform
from stepfold.spaces.records import pairs_per_prompt
from stepfold.teachers.contract import Teacher
from stepfold.training.processes import ALONE, Processes


@dataclass(frozen=True)
class Batch:
    """What the sample spaces of a step start from.

    Attributes:
        number: of the batch; several steps may share one (`space.reuse`).
        prompts: B strings.
        index: B numbers of the prompts in their file.
        guidance: scales [B], float32.
        shape: of a latent [...].
        shape_index: number of that shape among `Teacher.latent_shapes`.
        sigma_data: standard deviation of the noise.
        start_time: where the teacher's pure noise stands.
        draws: all other random numbers.
    """

    number: int
    prompts: list[str]
    index: list[int]
    guidance: Tensor
    shape: tuple[int, ...]
    shape_index: int
    sigma_data: float
    start_time: float
    draws: Draws

    def rows(self, index: slice) -> "Batch":
        """The samples that `index` selects; each has the numbers that it has in the whole batch."""
        draws = replace(self.draws, samples=self.draws.samples[index], _kept={})
        return replace(
            self, prompts=self.prompts[index], index=self.index[index], guidance=self.guidance[index], draws=draws
        )  # fmt: skip

    def noise(self, name: str = "noise", *counts: int) -> Tensor:
        """Noise [B, *counts, ...] of standard deviation sigma_data, from the stream `name`."""
        return self.sigma_data * self.draws.normal(name, (*counts, *self.shape))

    def route(self, space: SpaceSettings) -> Tensor:
        """Times [B, N] that the teacher is walked down, from its start."""
        return self._of_samples(draw_route, space)

    def times(self, space: SpaceSettings) -> Tensor:
        """Times [B, M], falling, that latents are noised to."""
        return self._of_samples(draw_times, space)

    def _of_samples(self, draw_one: Callable[..., Tensor], space: SpaceSettings) -> Tensor:
        seed, samples = self.draws.seed, self.draws.samples
        drawn = [draw_one(space, seed, self.number, i, self.sigma_data, self.start_time) for i in samples]
        return send(torch.stack(drawn), self.draws.device)


def draw(
    number: int,
    prompts: Prompts,
    teacher: Teacher,
    config: Config,
    device: torch.device,
    processes: Processes = ALONE,
) -> Batch:
    """The batch `number`; of several processes each draws its share, and together they draw what one would."""
    seed, samples = config.seed, processes.share(step_samples(number, config))
    scales = torch.tensor(guidance_scales(config, teacher))
    picks: Tensor = torch.cat([uniform((1,), seed, "guidance", i) for i in samples]) * len(scales)
    index, shapes = prompt_index(samples, prompts, seed), teacher.latent_shapes
    shape_index = int(uniform((1,), seed, "size", number) * len(shapes)) if len(shapes) > 1 else 0
    return Batch(
        number=number,
        prompts=[prompts.prompt(i) for i in index],
        index=index,
        guidance=send(scales[picks.long()], device),
        shape=tuple(shapes[shape_index]),
        shape_index=shape_index,
        sigma_data=teacher.sigma_data,
        start_time=teacher.start_time,
        draws=Draws(seed, samples, device),
    )


def guidance_scales(config: Config, teacher: Teacher) -> tuple[float, ...]:
    """The guidance scales of a run's walks; that of no guidance for a teacher that has none.

    Raises:
        UserError: several, for a student that cannot be told which one it stands for; or any other for a teacher
            without guidance.
    """
    usual = teacher.default_guidance
    if teacher.guidance_kind == "none":
        if config.space.guidance is not None and set(config.space.guidance) != {teacher.no_guidance}:
            raise UserError(
                f"space.guidance is {list(config.space.guidance)}, but this teacher has no guidance that could be "
                "scaled; leave it out (--set space.guidance=null), or teacher.guidance where that is 'none'"
            )
        return (teacher.no_guidance,)
    reads = teacher.guidance_kind == "embedded" if config.student.lora else teacher.student_reads_guidance
    if config.space.guidance is None:
        return (usual - 0.5, usual, usual + 0.5) if reads else (usual,)
    scales = config.space.guidance
    if any(teacher.guidance_weight(scale) <= 0 for scale in scales) and teacher.guidance_kind == "classifier_free":
        raise UserError(
            f"space.guidance is {list(scales)}, and {teacher.guidance_scale(0.0):g} or less leaves the prompt out; "
            f"give {teacher.no_guidance:g}, which turns guidance off, or the pipeline's usual {usual:g}"
        )
    if len(set(scales)) > 1 and not reads:
        raise UserError(
            f"space.guidance has {len(set(scales))} scales, but this student's network takes none, so it "
            f"could not tell them apart; give one, for example --set 'space.guidance=[{usual:g}]'"
        )
    return scales


def unguided(config: Config, teacher: Teacher) -> str | None:
    """A note for walks at the scale that turns guidance off, where the pipeline's usual one is another."""
    scales, usual = guidance_scales(config, teacher), teacher.default_guidance
    if teacher.guidance_kind != "classifier_free" or set(scales) != {teacher.no_guidance} or usual in scales:
        return None
    return (
        f"space.guidance={list(scales)} turns guidance off: the student learns samples without it; the pipeline's "
        f"usual scale is {usual:g}"
    )


def step_samples(number: int, config: Config) -> range:
    """The numbers of a batch's samples, counted over the whole run."""
    count = config.training.prompts_per_step
    return range(number * count, (number + 1) * count)


def prompt_index(samples: Iterable[int], prompts: Prompts, seed: int) -> list[int]:
    """The numbers of the samples' prompts in their file."""
    return [shuffled_index(i, len(prompts), seed) for i in samples]


def draw_route(
    space: SpaceSettings, seed: int, number: int, sample: int, sigma_data: float, start_time: float = math.pi / 2
) -> Tensor:
    """One route [N] from the teacher's start; shared by the prompts of a batch unless `route_per` is `prompt`."""
    key = ("route", number) if space.route_per == "step" else ("route of sample", sample)
    if space.route == "logit_normal":
        return logit_normal_route(
            normal((1, space.route_steps), seed, *key), sigma_data, space.logit_mean, space.logit_std, start_time
        )[0]
    numbers = uniform((1, space.route_steps), seed, *key)
    if space.route == "random":
        return random_route(numbers, start_time)[0]
    return reference_route(numbers, space.route_shift, start_time)[0]


def draw_times(
    space: SpaceSettings, seed: int, number: int, sample: int, sigma_data: float, start_time: float = math.pi / 2
) -> Tensor:
    """As many times [M], falling, as a walk would keep: one from each cell of the reference ladder, or independent.

    They are shared by the prompts of a batch unless `route_per` is `prompt`. Of `space.times=noise` it is one.
    """
    count = pairs_per_prompt(space.route_steps, space.keep_first)
    if space.times == "noise":
        return torch.full((1,), at_most(start_time, torch.float32))
    if space.route == "reference" and space.times == "route":
        return draw_route(space, seed, number, sample, sigma_data, start_time)[-count:]
    key = ("times of step", number) if space.route_per == "step" else ("times of sample", sample)
    if space.times == "u_shaped":
        times = u_shaped_times(uniform((count,), seed, *key), start_time)
    elif space.route == "logit_normal":
        numbers = normal((count,), seed, *key)
        times = logit_normal_times(numbers, sigma_data, space.logit_mean, space.logit_std, start_time)
    else:
        times = random_times(uniform((count,), seed, *key), start_time)
    return times.sort(descending=True).values.clamp(max=at_most(start_time, times.dtype))
