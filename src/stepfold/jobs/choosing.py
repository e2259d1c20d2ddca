"""The method of a run that names none: a rule on teacher, machine and aim, its reasons, and the alternatives' cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from stepfold.jobs.facts import BYTES, Facts

if TYPE_CHECKING:
    from stepfold.config import Config
    from stepfold.teachers.contract import GuidanceKind

SAMPLING_STEPS = (1, 2, 4, 8)
ROOM = 0.8
"""Share of a device's memory for weights and states; activations add 11 and 17% to Sana 1.6B's and 0.6B's, counted."""
ENOUGH = 0.2
"""Share of a preset's steps below which a run is called short: on the bundled model it brings most of the quality."""
LARGE = 5.0
"""Billions of parameters from which a backward pass has one state: activations of such a network are not counted."""
FRAMES = 33
"""Of a video, as the video families' presets have it."""
QUANTISED = {
    "whole": "",
    "none": "",
    "int8": ", with the teacher in int8: its velocity is off by 0.9%",
    "nf4": ", with the teacher in nf4: its velocity is off by 14%",
}
FLOW_MAP = {
    "objective": "discrete",
    "student.times": "two",
    "target.rule": "edge",
    "target.segments": "{1: 0.5, 2: 0.1, 4: 0.2, 8: 0.2}",
    "target.draws": "2",
    "space.kind": "generation",
    "space.keep_first": "true",
}
POLICY = {
    "objective": "policy",
    "space.kind": "policy",
    "policy.states": "2",
    "evaluation.steps": "[4]",
}
MATCHING = {
    "objective": "decoupled",
    "space.kind": "rollout",
    "rollout.steps": "4",
    "fake.updates": "5",
    "fake.head_start": "40",
    "fake.rank": "64",
    "fake.lr_factor": "2.0",
    "optimiser.betas": "[0.0, 0.999]",
    "optimiser.weight_decay": "0.01",
    "training.prompts_per_step": "4",
    "training.steps": "500",
    "evaluation.steps": "[4]",
}
"""Decoupled matching with a LoRA as fake score, as docs/four-step-lora.md has it."""
FOLDED = (
    "Plain diffusers and ComfyUI take it after `stepfold export STUDENT --to lora --steps 8`, of rank 7 or more; all "
    "weights after `--to pipeline --steps 8`."
)
ALL_WEIGHTS = {"student.lora": "0", "optimiser.name": "came", "optimiser.lr": "1.0e-5"}
"""All weights in place of a four-step preset's LoRA."""
FIRST = {1: "[1, 2, 4]", 2: "[2, 4, 1]", 4: "[4, 2, 1]", 8: "[8, 4, 2, 1]"}
"""Sampling steps -> `evaluation.steps`, whose first number a student's card and `stepfold sample` take."""
ALONE = {"space.kind": "generation"}
ENDS = {"space.kind": "endpoints"}
BOTH = {"space.kind": "{generation: 1, endpoints: 1}"}


@dataclass(frozen=True)
class Choice:
    """What the rule says.

    Attributes:
        preset: of the teacher's family, to start from.
        changes: settings besides that differ from the preset's, by their names.
        method: in a few words.
        reasons: a line each.
        share: of the preset's steps that the hours are enough for, in (0, 1].
    """

    preset: str
    changes: Mapping[str, str]
    method: str
    reasons: tuple[str, ...] = ()
    share: float = 1.0

    @property
    def words(self) -> str:
        """The preset and its changes, as options."""
        return " ".join([f"--preset {self.preset}", *(f"--set {quoted(k, v)}" for k, v in self.changes.items())])


def quoted(key: str, value: str) -> str:
    """`key=value`, as a shell takes it."""
    return f"'{key}={value}'" if set(value) & set("{[ ") else f"{key}={value}"


def choose(facts: Facts) -> Choice:
    """The rule; every number in its words is the bundled teacher's, from docs/lab-log.md."""
    whole, why = trains_all(facts)
    changes, method, how = method_of(facts, whole)
    more, memory = room_for(facts, whole)
    share, time = time_for(facts, whole)
    changes |= (ALL_WEIGHTS if whole else {}) | more
    method = f"{method}, all weights" if whole else method
    return Choice(facts.preset, beyond(facts.preset, changes), method, (how, f"{why} {memory}", *time), share)


def beyond(preset: str, changes: Mapping[str, str]) -> dict[str, str]:
    """The changes that a preset does not have already."""
    have, with_them = (settings_of(preset, each) for each in ((), tuple(f"{key}={changes[key]}" for key in changes)))
    return {key: value for key, value in changes.items() if have[key] != with_them[key]}


@cache
def settings_of(preset: str, changes: tuple[str, ...]) -> dict[str, Any]:
    """Dotted name -> value of a preset's settings, changed, for a teacher of one's own; of sections and their keys."""
    from stepfold.config import load_config

    values = load_config(preset, changes, teacher__source="x/y", prompts="").model_dump()
    sections = {name: inner for name, inner in values.items() if isinstance(inner, dict)}
    return values | {f"{name}.{key}": value for name, inner in sections.items() for key, value in inner.items()}


def trains_all(facts: Facts) -> tuple[bool, str]:
    """Whether the student has all weights of its own, and why."""
    if "none" not in facts.gib:
        return True, f"All weights are trained{f', since {facts.no_lora}' if facts.no_lora else ''}."
    if math.isinf(facts.gib["whole"]):
        return False, "A LoRA, as asked for."
    if facts.steps > 1:
        return False, "A LoRA, which was better than all weights at two and four steps (one seed)."
    if facts.gib["whole"] > ROOM * facts.memory_gib:
        return False, f"A LoRA: all weights need {facts.gib['whole']:.1f} GiB."
    if facts.hours and facts.full_hours and facts.hours - facts.fixed_hours < ENOUGH * facts.full_hours["whole"]:
        return False, "A LoRA: the hours are less than a fifth of what all weights take."
    rates = "AdamW at 4e-4, three seeds; the LoRA at 1e-3, one seed"
    return True, f"All weights, at one step three points better than a LoRA (85.8 against 82.8%: {rates})."


def method_of(facts: Facts, whole: bool) -> tuple[dict[str, str], str, str]:
    """Settings of objective and space, what they are in a few words, and why."""
    asked = {"evaluation.steps": FIRST[facts.steps]}
    if facts.steps == 8 and facts.second_time:
        told = "68, 92, 93 and 93% at one, two, four and eight steps as a LoRA, and 92% at eight with all weights"
        how = "70 steps of training, n = 300, one seed, so these two are not told apart"
        own = "The bundled teacher's own eight steps have 94%, at twice the calls."
        return FLOW_MAP | asked, "flow map", f"A flow map with discrete targets: {told} ({how}). {own} {FOLDED}"
    if facts.steps == 1:
        said = "Discrete consistency on trajectories: 83.9% at one step (three seeds), continuous 77.8% (one seed)."
        return {"objective": "discrete"} | ALONE | asked, "discrete, trajectories", said
    untold = "The network cannot be told a target time, so this is no flow map; eight steps are not measured. "
    before = untold if facts.steps == 8 else ""
    if facts.counts_to < 10:
        ends = "Continuous consistency, since timesteps are in [0, 1], with noised ends: at four steps 92%, without 83%"
        return asked | BOTH, "continuous, with noised ends", f"{before}{ends} (three seeds, all weights)."
    start = f"{before}Discrete consistency: with timesteps in [0, 1000] dF/dt is large, which a tangent cannot use."
    if whole:
        said = (
            f"{start} Noised ends alone: 87% at four steps, trajectories 81% in half the time (all weights, one seed)."
        )
        return asked | ENDS, "discrete, noised ends", said
    said = (
        f"{start} Trajectories alone: 90, 90 and 80% at four, two and one steps; with noised ends, in about the same "
        "time, 91, 86 and 73% (LoRA, two seeds)."
    )
    return asked | ALONE, "discrete, trajectories", said


def room_for(facts: Facts, whole: bool) -> tuple[dict[str, str], str]:
    """Settings that this network and this memory ask for, and what weights and states take."""
    room = ROOM * facts.memory_gib
    fitting = next((kind for kind in BYTES if facts.gib.get(kind, room + 1) <= room), "nf4")
    kind = "whole" if whole else fitting
    taken = facts.gib[kind]
    end = "" if taken <= room else "; it may not fit, which `stepfold plan` tries out"
    size = f"{taken:.1f} GiB" if taken >= 0.05 else f"{1024 * taken:.0f} MiB"
    words = f"Weights and states take {size} of {facts.memory_gib:.1f} GiB (counted){QUANTISED[kind]}{end}."
    changes = {} if kind in ("whole", "none") else {"teacher.quantise": kind}
    if facts.video or facts.billions >= LARGE:
        changes["training.micro_batch"] = "1"
        words += " Activations are not counted, so a backward pass has one state."
    if facts.video:
        changes["teacher.frames"] = str(FRAMES)
        words += f" Videos have {FRAMES} frames."
    if facts.guidance == "none":
        changes["space.guidance"] = "null"  # a family's preset has a scale, which this network cannot be told
    return changes, words


def time_for(facts: Facts, whole: bool) -> tuple[float, tuple[str, ...]]:
    """The share of the preset's steps that the hours are enough for, and a line about it."""
    if facts.hours is None or not facts.full_hours:
        return 1.0, ()
    full = facts.full_hours["whole" if whole else "lora"]
    share = min(1.0, (facts.hours - facts.fixed_hours) / full)
    if share == 1:
        taken = f"{full + facts.fixed_hours:.2g} h (counted), which fit into {facts.hours:g} h"
        return share, (f"All steps of the preset take {taken}.",)
    short = "" if share >= ENOUGH else ", which is short: a fifth brought most of the quality"
    return share, (f"{facts.hours:g} h are enough for {share:.0%} of the preset's steps{short}.",)


def alternatives(facts: Facts) -> list[Choice]:
    """The choice, those for other numbers of steps, all weights, pi-Flow, decoupled matching, and the preset as it is.

    Args:
        facts: without hours, which price no method.
    """
    found = [choose(facts), *(choose(replace(facts, steps=steps)) for steps in (1, 4, 8))]
    if math.isfinite(facts.gib["whole"]):
        all_weights = replace(facts, gib={"whole": facts.gib["whole"]})
        found += [choose(replace(all_weights, steps=steps)) for steps in (1, 4)]
    if facts.widens:
        whole = trains_all(replace(facts, steps=4))[0]
        changes = POLICY | (ALL_WEIGHTS if whole else {}) | room_for(facts, whole)[0]
        method = "pi-Flow, all weights" if whole else "pi-Flow"
        found.append(Choice(facts.preset, beyond(facts.preset, changes), method))
    if "none" in facts.gib:
        room = room_for(facts, False)[0]
        if facts.guidance == "classifier_free":
            found.append(Choice(facts.preset, beyond(facts.preset, MATCHING | room), "decoupled matching"))
        changes = beyond(facts.preset, room)
        found.append(Choice(facts.preset, changes, "the preset as it is"))
    different: dict[Any, Choice] = {}
    for choice in found:
        different.setdefault(frozenset(choice.changes.items()), choice)
    return list(different.values())


def passes(config: "Config", guidance: "GuidanceKind") -> int:
    """Forward passes of one image in a step of trajectories, noised ends, a policy or decoupled matching.

    A backward pass counts as two.

    The student's: forward, backward, the blocks once more with `training.checkpointing`, and one for the tangent, or
    for a discrete target that no other state gives.

    Args:
        config: the settings, with an objective that is not auto.
        guidance: the teacher's; classifier-free guidance calls it twice.
    """
    from stepfold.training.states import states_per_prompt

    space, training, target = config.space, config.training, config.target
    prompts, calls = training.prompts_per_step, 2 if guidance == "classifier_free" else 1
    if config.objective == "policy":
        states = prompts * states_per_prompt("policy", config)
        walk = states * (1 + calls * config.policy.states)  # the student's own, and the teacher's velocities on it
        return -(-walk // space.reuse) + states * (3 + training.checkpointing)
    if config.objective == "decoupled":
        sampled, trained = (config.rollout.steps + 1) / 2, 2 + training.checkpointing  # to an image; its way back
        scores = calls + 2  # guidance's branches, then the teacher without guidance and the fake score
        return round(prompts * (sampled + trained + scores + config.fake.updates * (sampled + 1 + trained)))
    teacher, student = -(-calls * prompts * space.route_steps // space.reuse), 0
    for name in space.weights:
        states = prompts * states_per_prompt(name, config)
        walk = states // (prompts * target.draws)
        shared = name == "generation" and target.shared and not training.micro_batch % walk
        own = 0 if config.objective == "discrete" and shared else 1
        student += states * (3 + own + training.checkpointing)
        teacher += calls * states // target.draws if name == "endpoints" else 0
    return teacher + student
