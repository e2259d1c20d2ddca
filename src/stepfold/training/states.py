"""From a batch to the states of every sample space that the run's terms name."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepfold import randomness
from stepfold.config import Config
from stepfold.errors import UserError
from stepfold.maths.formulations import equivalent_noise
from stepfold.maths.routes import random_ladder
from stepfold.objectives.contract import Networks
from stepfold.sampling.consistency import predict_data
from stepfold.spaces.anchor import anchored_pairs
from stepfold.spaces.coupling import coupled_pairs
from stepfold.spaces.diffusion import noised_pairs
from stepfold.spaces.generation import Trajectory, brightness_filter, pairs_from, walk
from stepfold.spaces.policy import policy_states
from stepfold.spaces.prior import prior_states
from stepfold.spaces.records import States, pairs_per_prompt
from stepfold.spaces.rollout import rolled_states, rollout_length
from stepfold.spaces.targets import Kind, Rules, aimed
from stepfold.teachers.contract import Condition, Teacher
from stepfold.training.draws import Batch


@dataclass(frozen=True)
class Start:
    """What the sample spaces of one batch have in common.

    Attributes:
        batch: prompts and random numbers.
        condition: B rows.
        networks: teacher, student.
        config: the settings.
        step: the number of the step.
        trajectory: the teacher's walk; None where no space needs one.
        x0: clean latents [B, ...]: the walk's end, or those of the images; None where there are none.
        keep: bool [B], from the brightness filter; None for all.
        is_padding: the filter left nothing; what is kept counts for nothing.
        noise: that the trajectories of a bank began with [B, ...]; None where they are walked.
    """

    batch: Batch
    condition: Condition
    networks: Networks
    config: Config
    step: int
    trajectory: Trajectory | None = None
    x0: Tensor | None = None
    keep: Tensor | None = None
    is_padding: bool = False
    noise: Tensor | None = None


def collect(
    spaces: Iterable[str],
    batch: Batch,
    condition: Condition,
    networks: Networks,
    config: Config,
    step: int = 0,
    *,
    black: Tensor | None = None,
    x0: Tensor | None = None,
    noise: Tensor | None = None,
    pads: bool = False,
) -> dict[str, States]:
    """The states of each space; the teacher is walked once for all of them, and dark pictures are dropped.

    Args:
        spaces: names of SPACES.
        batch: see `Batch`.
        condition: of its prompts, B rows.
        networks: teacher, and the student for rollouts.
        config: the settings.
        step: the number of the step, which counts rollouts.
        black: the unit-variance latent of a black picture [...], where `space.filter_rule` is on.
        x0: clean latents [B, ...] of the images, for the space `images`, or of a bank.
        noise: of a bank [B, ...], whose ends `x0` are; the teacher is not walked then.
        pads: whether a batch of which the filter leaves nothing becomes states that count for nothing.
    """
    spaces = list(spaces)
    with networks.walk_precision():
        start = started(spaces, batch, condition, networks, config, step, black=black, x0=x0, noise=noise, pads=pads)
        found = {name: SPACES[name](start) for name in spaces if name in FROM_CLEAN}
    found |= {name: SPACES[name](start) for name in spaces if name not in FROM_CLEAN}
    if config.target.rules == {"zero"}:
        return found
    return {
        name: states if name in WITHOUT_TARGETS else with_targets(states, name, batch, networks.teacher, config)
        for name, states in found.items()
    }


def with_targets(states: States, space: str, batch: Batch, teacher: Teacher, config: Config) -> States:
    """The states of a space, each as often as it has targets, with target times as `target` says.

    Each state's draws are its own. The states of a walk are in a row, then those of the same walk for the next target.

    Which rule a state has is drawn in the host's memory, so that no device is waited for; states that a filter has
    dropped have been waited for already.
    """
    target, count = config.target, states.num_drawn // len(batch.index)
    states = repeated(states, count, target.draws)
    grids = grids_of(config, teacher) if "edge" in target.rules else ()
    rules = Rules({str(name): share for name, share in target.shares.items()}, target.gap_mean, target.gap_std, grids)
    on_host = replace(batch.draws, device=torch.device("cpu"), _kept={})
    choice = on_host.uniform(f"target rule on {space}", (target.draws * count,)).flatten()
    uniform = batch.draws.uniform(f"target on {space}", (target.draws * count,)).flatten()
    if len(states) < states.num_drawn:
        choice, uniform = choice[states.number.cpu()], uniform[states.number]
    grid = drawn_grids(target.grids, target.draws, space, batch)[states.number // count] if len(grids) > 1 else None
    return aimed(states, rules, choice, uniform.to(states.t.dtype), grid)


def repeated(states: Kind, count: int, times: int) -> Kind:
    """The `count` states of each prompt so many times, one round of them after the other."""
    if times == 1:
        return states
    rounds = torch.arange(times, device=states.t.device)
    index = torch.arange(len(states), device=states.t.device).view(-1, 1, count).expand(-1, times, -1)
    again = states.rows(index.flatten())
    number = states.number.view(-1, 1, count) % count + count * rounds[:, None]
    number = number + times * (states.number.view(-1, 1, count) // count * count)
    return replace(again, number=number.flatten(), num_drawn=times * states.num_drawn)


def grids_of(config: Config, teacher: Teacher) -> list[list[float]]:
    """The times of the student's own steps, one for each segment of the rule `edge`, for each number of segments."""
    return [teacher.student_times(segments, "flow_map") for segments in config.target.grids]


def drawn_grids(shares: dict[int, float], draws: int, space: str, batch: Batch) -> Tensor:
    """Which of the grids each walk of a batch has, for each of its targets: int64 [B draws].

    The draws of a walk are stratified: one in each of as many equal parts of [0, 1).
    """
    drawn = batch.draws.uniform(f"segments on {space}", (draws,))
    drawn = ((drawn + torch.arange(draws, device=drawn.device)) / draws).flatten()
    borders = torch.tensor(list(shares.values())).cumsum(0)[:-1]
    return torch.bucketize(drawn, randomness.send(borders, drawn.device), right=True)


def started(
    spaces: Sequence[str],
    batch: Batch,
    condition: Condition,
    networks: Networks,
    config: Config,
    step: int,
    *,
    black: Tensor | None,
    x0: Tensor | None,
    noise: Tensor | None,
    pads: bool,
) -> Start:
    """Walks the teacher where a space needs it, and filters; arguments as of `collect`."""
    space, trajectory, keep, padding = config.space, None, None, False
    if noise is None and any(name in FROM_WALKS for name in spaces):
        trajectory = walk(networks.teacher.velocity, batch.noise(), batch.route(space), condition, batch.guidance)
        x0 = trajectory.x0
    if x0 is not None and space.filter_rule != "off":
        assert black is not None
        uniform = batch.draws.uniform("filter", (1,)).squeeze(1)
        keep = brightness_filter(
            x0, black, batch.sigma_data, uniform, threshold=space.filter_threshold, rule=space.filter_rule
        )
        if pads and not keep.any():
            keep[0] = True
            padding = True
    return Start(batch, condition, networks, config, step, trajectory, x0, keep, padding, noise)


def from_walk(start: Start) -> States:
    """Generation space: the states of the teacher's walk."""
    assert start.trajectory is not None
    space, guidance = start.config.space, start.batch.guidance
    pairs = pairs_from(start.trajectory, start.condition, guidance, keep_first=space.keep_first, keep=start.keep)
    return replace(pairs, is_padding=start.is_padding)


def from_clean(start: Start) -> States:
    """Diffusion space: the ends of the walks, or images, noised afresh."""
    assert start.x0 is not None
    batch, times = start.batch, start.batch.times(start.config.space)
    noise = batch.noise("fresh noise", times.shape[1])
    velocity = start.networks.teacher.velocity
    pairs = noised_pairs(velocity, start.x0, times, noise, start.condition, batch.guidance, start.keep)
    return replace(pairs, is_padding=start.is_padding)


def from_couplings(start: Start) -> States:
    """Coupling space: each walk's own noise and end; at first another noise, where that is annealed.

    Reference: arXiv:2407.12718 (SlimFlow), z' = sqrt(1 - b^2) z + b e with b falling from 1 to 0.
    """
    assert start.x0 is not None
    batch, noise, anneal = start.batch, start.noise, start.config.space.anneal_steps
    noise = batch.noise() if noise is None else noise
    if start.step < anneal:
        share = 1 - start.step / anneal
        noise = math.sqrt(1 - share**2) * noise + share * batch.noise("annealed noise")
    if batch.start_time < torch.pi / 2:  # the walk began beside pure noise: what lies behind its first state
        t = torch.full((len(noise),), batch.start_time, dtype=noise.dtype, device=noise.device)
        noise = equivalent_noise(noise, t, start.x0)
    times = batch.times(start.config.space)
    pairs = coupled_pairs(start.x0, noise, times, start.condition, batch.guidance, start.keep)
    return replace(pairs, is_padding=start.is_padding)


def from_prior(start: Start) -> States:
    """Prior space: pure noise."""
    batch = start.batch
    return prior_states(batch.noise(), batch.start_time, start.condition, batch.guidance)


def from_anchor(start: Start) -> States:
    """Anchor space: pure noise, and where the teacher's walk is after `anchor.steps` steps."""
    batch, steps, velocity = start.batch, start.config.anchor.steps, start.networks.teacher.velocity
    with start.networks.walk_precision():
        route = batch.route(start.config.space)[:, : steps + 1]
        return anchored_pairs(velocity, batch.noise(), route, start.condition, batch.guidance)


def from_rollout(start: Start) -> States:
    """Rollout space: the student's own steps, up to the one that is this step's turn."""
    return rollout(start.batch, start.condition, start.networks, start.config, start.step)


def rollout(batch: Batch, condition: Condition, networks: Networks, config: Config, count: int) -> States:
    """The student's rollout number `count`, of a batch; its noise has streams of its own, apart from the walks'."""
    teacher, student, part = networks.teacher, networks.student, config.rollout
    num_steps, stop = rollout_length(count, part.steps, cycled=part.lengths == "cycled", first=part.first - 1)
    if part.ladder == "random":
        seed, update = batch.draws.seed, batch.draws.update
        uniform = randomness.uniform((num_steps - 1,), seed, "rollout ladder", *update, count)
        times = random_ladder(uniform, teacher.shift, batch.start_time)
    else:
        times = [min(time, batch.start_time) for time in teacher.student_times(num_steps, "consistency")]

    def picture(x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        with networks.precision():
            return predict_data(student, x, t, condition, guidance, teacher.sigma_data)

    return rolled_states(
        picture, batch.noise("rollout noise"), times, stop, lambda i: batch.noise(f"rollout noise of step {i}"),
        condition, batch.guidance, phased=part.phased,
    )  # fmt: skip


def from_policy(start: Start) -> States:
    """Policy space: the student's own policy from noise on, and the teacher's velocities at its states."""
    batch, networks, part = start.batch, start.networks, start.config.policy
    student, teacher = networks.student, networks.teacher
    if student.policy is None:
        raise UserError(
            "objective=policy needs a student that gives several F at a time, and this one gives one; give a pipeline "
            "of Sana, Stable Diffusion 3 or FLUX.1, or another objective"
        )
    times = [min(time, batch.start_time) for time in teacher.student_times(part.steps, "policy")]

    def heads(x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        with networks.precision():
            F = student(x / teacher.sigma_data, t, condition, guidance)
        return teacher.sigma_data * F.to(x.dtype)

    def velocity(x: Tensor, t: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        with networks.walk_precision():
            return teacher.velocity(x, t, condition, guidance)

    uniform = batch.draws.uniform("policy states", (part.steps, part.states))
    return policy_states(
        heads, velocity, student.policy, batch.noise(), times, uniform, start.condition, batch.guidance
    )  # fmt: skip


SPACES: dict[str, Callable[[Start], States]] = {
    "generation": from_walk,
    "endpoints": from_clean,
    "images": from_clean,
    "coupling": from_couplings,
    "prior": from_prior,
    "rollout": from_rollout,
    "anchor": from_anchor,
    "policy": from_policy,
}
"""All sample spaces by the names that settings call them."""
FROM_WALKS = {"generation", "endpoints", "coupling"}
FROM_CLEAN = FROM_WALKS | {"images"}
WITHOUT_TARGETS = {"rollout", "anchor", "policy"}
"""Spaces whose target times do not come from `target`."""
FOLLOW_STUDENT = {"rollout", "policy"}
"""Spaces of the student's own states, which cannot be made again once it has learnt from them."""


def states_per_prompt(space: str, config: Config) -> int:
    """How many states a space has of each prompt."""
    if space == "policy":
        return config.policy.steps
    if space == "coupling" and config.space.times == "noise":
        return 1
    draws = 1 if space in WITHOUT_TARGETS else config.target.draws
    return draws * (pairs_per_prompt(config.space.route_steps, config.space.keep_first) if space in FROM_CLEAN else 1)
