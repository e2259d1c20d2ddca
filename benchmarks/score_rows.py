"""Steps of methods with a fake score, heads or a reward, for `step.py --scores`: counted, in plain forward passes.

The count is of floating-point operations, over as many steps as a rollout's turns take, so that it is exact. The sum
beside it is of passes: a forward is 1, a backward with gradients of all weights 2, one to the input alone 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import show
from step_rows import Bench, Precision, Work, open_bench, settings
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stepfold.config import Config, load_config, to_yaml
from stepfold.objectives.adversarial import NAME
from stepfold.objectives.contract import Networks
from stepfold.objectives.denoising import FAKE
from stepfold.sampling.recipe import policy_of
from stepfold.scores import FakeSettings
from stepfold.spaces.records import pairs_per_prompt
from stepfold.spaces.rollout import rollout_length
from stepfold.students.starting import make_fake
from stepfold.students.whole import new_student
from stepfold.training.critics import critics_of
from stepfold.training.draws import draw
from stepfold.training.states import collect
from stepfold.training.terms import add_gradients, terms_of

ROLLED = ("space.kind=rollout", "fake.kind=whole")
SCORES: dict[str, tuple[str, ...]] = {
    "dmd, one step": (*ROLLED, "objective=matching", "rollout.steps=1", "fake.updates=5"),
    "dmd, four steps": (*ROLLED, "objective=matching", "rollout.steps=4", "fake.updates=5"),
    "vsd": (
        *ROLLED, "objective=matching", "rollout.steps=1", "fake.updates=1", "matching.fake_guidance=same",
        "fake.unprompted=0.1",
    ),
    "decoupled, four steps": (*ROLLED, "objective=decoupled", "rollout.steps=4", "fake.updates=5"),
    "phased, four steps": (*ROLLED, "objective=matching", "rollout.phased=true", "rollout.steps=4", "fake.updates=5"),
    "dp-dmd, four steps": (
        *ROLLED, "objective=matching", "rollout.steps=4", "rollout.first=2", "anchor.weight=0.05", "anchor.steps=1",
        "fake.updates=5",
    ),
    "rcm, four steps": ("fake.kind=whole", "matching.weight=0.02", "rollout.steps=4", "fake.updates=4"),
    "sid, four steps": (*ROLLED, "objective=identity", "rollout.steps=4", "fake.updates=1"),
    "sid, guided, four steps": (
        *ROLLED, "objective=identity", "rollout.steps=4", "fake.updates=1", "matching.fake_guidance=4.5",
        "fake.guidance=4.5",
    ),
    "dmd and a reward, one step": (
        *ROLLED, "objective=matching", "rollout.steps=1", "fake.updates=5", "reward.weight=0.05",
        "reward.space=rollout",
    ),
    "endpoint": ("objective=pair",),
    "pi-flow, four steps": ("objective=policy", "space.kind=policy"),
    "adversarial": ("space.kind=endpoints", "adversarial.weight=0.5"),
    "adversarial, alternating": (
        "space.kind=endpoints", "adversarial.weight=0.5", "adversarial.updates=2", "adversarial.r1_weight=100",
    ),
}  # fmt: skip
"""Row -> settings that differ from TBCM's."""


@dataclass(frozen=True)
class Count:
    """What a step of a row costs for each image, in plain forward passes.

    Attributes:
        units: counted.
        passes: the sum of the passes that it needs.
    """

    units: float
    passes: float


def passes_of(config: Config) -> float:
    """The sum of the passes of a step, for each prompt; heads and a reward's networks are left out."""
    if config.objective == "policy":  # its own path, the teacher's two branches at each state, and with a gradient
        return config.policy.steps * (1 + 2 * config.policy.states + 3)
    walked = 2 * config.space.route_steps
    pairs = pairs_per_prompt(config.space.route_steps, config.space.keep_first)
    if config.objective == "pair":
        return walked + 3 * pairs
    heads = config.adversarial
    if heads.weight:  # noised ends, the tangent's pass and back; the student's picture, its features, back through both
        real = 2 if heads.r1_weight else 1
        of_pair = (2 + 4) + (1 + 1 + 1 + 2) + (0 if heads.updates else real)
        return walked + of_pair * pairs + heads.updates * (1 + 1 + real)
    return passes_with_fake(config, walked + 4 * pairs)


def passes_with_fake(config: Config, continuous: float) -> float:
    """The same of a method with a fake score; `continuous` are those of a consistency term."""
    first, last = config.rollout.first - 1, config.rollout.steps - 1
    before = (first + last) / 2  # of a rollout, on average
    fake = 2 if config.matching.fake_guidance != 1 else 1
    student = before + 3 + 2 + fake  # its own, the teacher's two branches, the fake score's
    if config.objective == "decoupled":
        student += 1  # the teacher without guidance, at a time of its own
    if config.objective == "identity":
        student += 2 * (2 + fake)  # both again with a graph, and back to the input
    if config.anchor.weight:
        student += 3 + 2 * config.anchor.steps  # its first step, and the teacher's walk
    if config.objective == "continuous":
        student += continuous
    if config.reward.weight:
        student += 3  # its own pass and back
    learns = 2 if config.fake.guidance != 1 else 1
    return student + config.fake.updates * (before + 1 + 3 * learns)


class Heads(nn.Module):
    """In place of the discriminator's: without products, which are few beside those of a network of real size."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Feature maps [M, tokens, width] -> logits [M, all tokens of all maps]."""
        return self.scale * torch.cat([feature.mean(2) for feature in features], 1)


def backward_of_convolution(out: Any, x: Any, weight: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    """Its operations, from shapes; torch 2's own count takes grouped convolutions for whole ones."""
    to_input, to_weight, _ = rest[-1]
    return 2 * math.prod(out) * math.prod(weight[1:]) * (to_input + to_weight)


def counting() -> FlopCounterMode:
    """Counts floating-point operations."""
    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: backward_of_convolution}
    )  # fmt: skip


def config_of(bench: Bench, changes: tuple[str, ...]) -> Config:
    """The settings of a row."""
    path = bench.work.place.folder / "row.yaml"
    path.write_text(to_yaml(settings(bench.work, "float32")))
    return load_config(str(path), changes)


def count(bench: Bench, config: Config) -> Count:
    """See `Count`; mean over the turns of the rollouts."""
    precision: Any = Precision(bench.device, bf16=False)
    modules: dict[str, nn.Module] = {NAME: Heads()} if config.adversarial.weight else {}
    if config.fake.updates:
        modules[FAKE] = make_fake(bench.teacher, FakeSettings(kind="whole")).to(bench.device)
    policy = policy_of(config, bench.teacher)
    student = new_student(bench.teacher, policy=policy) if policy else bench.student
    networks = Networks(
        student, bench.teacher, modules, tangent="one_pass", reward=lambda x0, samples: x0.flatten(1).mean(1)
    )
    steps, first = config.rollout.steps, config.rollout.first - 1
    turns = steps - first
    stops = {rollout_length(turn, steps, cycled=False, first=first)[1] for turn in range(turns)}
    assert stops == set(range(first, steps))
    batch = draw(0, bench.prompts, bench.teacher, config, bench.device)
    condition = bench.cache.rows(batch.index).to(bench.device, bench.teacher.dtype)
    x, t = batch.noise(), torch.full((len(condition),), 0.8, device=bench.device)
    with torch.no_grad(), counting() as unit:
        bench.student(x / bench.teacher.sigma_data, t, condition, batch.guidance)
    with counting() as counter:
        for turn in range(turns):
            terms = terms_of(config)
            found = collect(dict.fromkeys(term.space for term in terms), batch, condition, networks, config, turn)
            for critic in critics_of(config, modules).values():
                for update in range(critic.updates):
                    assert critic.states is not None and critic.loss is not None
                    number = turn * critic.updates + update
                    states = critic.states(networks, batch, condition, config, number, found)
                    critic.loss(networks, batch, states, config).value.mean().backward()
            add_gradients(terms, networks, found, batch.draws, config, turn, precision)
    student.zero_grad(set_to_none=True)
    return Count(counter.get_total_flops() / turns / unit.get_total_flops(), passes_of(config))


def count_scores(work: Work, only: Sequence[str] = ()) -> dict[str, Count]:
    """Every row of SCORES, or those whose names have one of the texts; prints the table."""
    bench, rows = open_bench(work, ("ours",)), SCORES
    if only:
        rows = {name: changes for name, changes in SCORES.items() if any(text in name for text in only)}
    found = {name: count(bench, config_of(bench, changes)) for name, changes in rows.items()}
    show(
        "A step with a fake score, heads or a reward, for each prompt, in plain forward passes",
        ["", "counted", "sum of passes", "ratio"],
        [
            [name, f"{each.units:.1f}", f"{each.passes:g}", f"{each.units / each.passes:.2f}"]
            for name, each in found.items()
        ],
    )
    return found
