"""What an optimiser step draws at random: prompts, noise, routes, guidance. A function of (seed, step) alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepfold.config import Config, SpaceSettings
from stepfold.errors import UserError
from stepfold.maths.routes import (
    half_pi,
    logit_normal_route,
    logit_normal_times,
    random_route,
    random_times,
    reference_route,
)
from stepfold.prompts.reading import Prompts, shuffled_index
from stepfold.randomness import normal, uniform
from stepfold.spaces.pairs import pairs_per_prompt
from stepfold.teachers.contract import Teacher
from stepfold.training.processes import ALONE, Processes


@dataclass(frozen=True)
class JudgedDraw:
    """What the adversarial term draws for every pair of a step.

    Attributes:
        start: [M, ...], pure noise of standard deviation sigma_data.
        at_start: bool [M], whether the judged picture is made from `start` instead of the pair's own state.
        t: [M], times that pictures are re-noised to.
        noise: [M, 2, ...], that they are re-noised with: the student's, and the real ones.
    """

    start: Tensor
    at_start: Tensor
    t: Tensor
    noise: Tensor

    def rows(self, index: Tensor) -> "JudgedDraw":
        """The pairs that `index` selects."""
        return JudgedDraw(self.start[index], self.at_start[index], self.t[index], self.noise[index])


@dataclass(frozen=True)
class Draw:
    """What one optimiser step starts from.

    Attributes:
        prompts: B strings.
        index: B numbers of the prompts in their file.
        noise: [B, ...], of standard deviation sigma_data.
        route: [B, N].
        guidance: [B], float32.
        uniform: [B], for the brightness filter.
        times: [B, M], falling, that diffusion space noises to; None in generation space.
        fresh_noise: [B, M, ...] like `noise`, that it noises with; None in generation space.
        judged: for the adversarial term; None without one.
        shape_index: number of its latents' shape among `Teacher.latent_shapes`.
    """

    prompts: list[str]
    index: list[int]
    noise: Tensor
    route: Tensor
    guidance: Tensor
    uniform: Tensor
    times: Tensor | None = None
    fresh_noise: Tensor | None = None
    judged: JudgedDraw | None = None
    shape_index: int = 0


def guidance_scales(config: Config, teacher: Teacher) -> tuple[float, ...]:
    """The guidance scales of a run's walks.

    Raises:
        UserError: several, for a student that cannot be told which one it stands for.
    """
    usual = teacher.default_guidance
    reads = teacher.guidance_kind == "embedded" if config.student.lora else teacher.student_reads_guidance
    if config.space.guidance is None:
        return (usual - 0.5, usual, usual + 0.5) if reads else (usual,)
    scales = config.space.guidance
    if len(set(scales)) > 1 and not reads:
        raise UserError(
            f"space.guidance has {len(set(scales))} scales, but this student's network takes none, so it "
            f"could not tell them apart; give one, for example --set space.guidance=[{usual:g}]"
        )
    return scales


def draw(
    step: int,
    prompts: Prompts,
    teacher: Teacher,
    config: Config,
    device: torch.device,
    processes: Processes = ALONE,
) -> Draw:
    """Prompts, noise, routes and guidance scales of a step, each from its own stream, per global sample number.

    Of several processes each draws its share; together they draw what one would.
    """
    seed, samples = config.seed, processes.share(step_samples(step, config))
    scales = torch.tensor(guidance_scales(config, teacher))
    picks: Tensor = torch.cat([uniform((1,), seed, "guidance", i) for i in samples]) * len(scales)
    index = prompt_index(samples, prompts, seed)
    shapes = teacher.latent_shapes
    shape_index = int(uniform((1,), seed, "size", step) * len(shapes)) if len(shapes) > 1 else 0
    times = fresh_noise = None
    if config.space.kind != "generation":
        drawn = torch.stack([draw_times(config.space, seed, step, i, teacher.sigma_data) for i in samples])
        times = send(drawn.clamp(max=teacher.start_time), device)
        fresh = (times.shape[1], *shapes[shape_index])
        fresh_noise = torch.stack([normal(fresh, seed, "fresh noise", i) for i in samples])
        fresh_noise = send(teacher.sigma_data * fresh_noise, device)
    noise = torch.stack([normal(shapes[shape_index], seed, "noise", i) for i in samples])
    route = torch.stack([draw_route(config.space, seed, step, i, teacher.sigma_data) for i in samples])
    return Draw(
        prompts=[prompts.prompt(i) for i in index],
        index=index,
        noise=send(teacher.sigma_data * noise, device),
        route=send(route.clamp(max=teacher.start_time), device),
        guidance=send(scales[picks.long()], device),
        uniform=send(torch.cat([uniform((1,), seed, "filter", i) for i in samples]), device),
        times=times,
        fresh_noise=fresh_noise,
        judged=draw_judged(samples, shapes[shape_index], teacher.sigma_data, config, device)
        if config.adversarial.weight
        else None,
        shape_index=shape_index,
    )


def step_samples(step: int, config: Config) -> range:
    """The numbers of a step's samples, counted over the whole run."""
    count = config.training.prompts_per_step
    return range(step * count, (step + 1) * count)


def prompt_index(samples: Iterable[int], prompts: Prompts, seed: int) -> list[int]:
    """The numbers of the samples' prompts in their file."""
    return [shuffled_index(i, len(prompts), seed) for i in samples]


def draw_judged(
    samples: Sequence[int], shape: tuple[int, ...], sigma_data: float, config: Config, device: torch.device
) -> JudgedDraw:
    """See `JudgedDraw`; the pairs of a sample one after the other, each of a shape [...]."""
    seed, adversarial = config.seed, config.adversarial
    count = pairs_per_prompt(config.space.route_steps, config.space.keep_first)
    three = (count, 3, *shape)
    noise = send(sigma_data * torch.cat([normal(three, seed, "judged noise", i) for i in samples]), device)
    times = torch.cat([normal((count,), seed, "judged times", i) for i in samples])
    picks = torch.cat([uniform((count,), seed, "judged starts", i) for i in samples])
    return JudgedDraw(
        start=noise[:, 0],
        at_start=send(picks < adversarial.max_time, device),
        t=send(logit_normal_times(times, sigma_data, adversarial.logit_mean, adversarial.logit_std), device),
        noise=noise[:, 1:],
    )


def draw_route(space: SpaceSettings, seed: int, step: int, sample: int, sigma_data: float) -> Tensor:
    """One route [N]; shared by the prompts of a step unless `route_per` is `prompt`."""
    key = ("route", step) if space.route_per == "step" else ("route of sample", sample)
    if space.route == "logit_normal":
        return logit_normal_route(
            normal((1, space.route_steps), seed, *key), sigma_data, space.logit_mean, space.logit_std
        )[0]
    numbers = uniform((1, space.route_steps), seed, *key)
    if space.route == "random":
        return random_route(numbers)[0]
    return reference_route(numbers, space.route_shift)[0]


def draw_times(space: SpaceSettings, seed: int, step: int, sample: int, sigma_data: float) -> Tensor:
    """As many times [M], falling, as a walk would keep: one from each cell of the reference ladder, or independent."""
    count = pairs_per_prompt(space.route_steps, space.keep_first)
    if space.route == "reference":
        return draw_route(space, seed, step, sample, sigma_data)[-count:]
    if space.route == "logit_normal":
        numbers = normal((count,), seed, "times of sample", sample)
        times = logit_normal_times(numbers, sigma_data, space.logit_mean, space.logit_std)
    else:
        times = random_times(uniform((count,), seed, "times of sample", sample))
    return times.sort(descending=True).values.clamp(max=half_pi(times.dtype))


def send(values: Tensor, device: torch.device) -> Tensor:
    """To the device; to a GPU without waiting for what it still has to do."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
