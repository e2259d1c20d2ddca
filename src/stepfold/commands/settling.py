"""The settings of `stepfold distill` and `stepfold plan`: a preset's, or the rule's where none is named."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepfold.commands.options import chosen_preset, config_of, short_forms
from stepfold.errors import UserError
from stepfold.jobs.choosing import ALL_WEIGHTS, SAMPLING_STEPS, Choice, alternatives, choose, passes
from stepfold.jobs.devices import usable_device
from stepfold.jobs.facts import Facts, foreign_preset, read_facts

if TYPE_CHECKING:
    from stepfold.config import Config

R_STEPS = ("r_warmup", "r_cooldown_start", "r_cooldown_steps")


@dataclass(frozen=True)
class Settled:
    """The settings of a run, and how they came about.

    Attributes:
        config: the settings.
        name: of the preset, or the run's folder where that is resumed.
        changes: of `--set`.
        given: short forms, by their names in `options.SETTINGS`.
        facts, choice: of the rule; None where it did not choose.
        unread: options that the run in the folder, which goes on, does not read.
    """

    config: "Config"
    name: str
    changes: tuple[str, ...]
    given: dict[str, Any]
    facts: Facts | None = None
    choice: Choice | None = None
    unread: tuple[str, ...] = ()

    def notes_on_rate(self) -> list[str]:
        """That all weights train at the rate of a LoRA, where they do."""
        optimiser, usual = self.config.optimiser, ALL_WEIGHTS["optimiser.lr"]
        whole = self.name.endswith("lora-4step") and not self.config.student.lora
        if not whole or optimiser.name != "adamw" or optimiser.lr <= float(usual):
            return []
        return [
            f"all weights train with AdamW at {optimiser.lr:g}, a LoRA's rate; the rule takes --lr {usual} --set "
            f"optimiser.name={ALL_WEIGHTS['optimiser.name']} --set space.kind=endpoints for them"
        ]

    def notes(self) -> list[str]:
        """What the rule chose, and why; which options nothing reads; or that the preset is another family's."""
        if self.unread:
            return [f"the run goes on with the settings that it began with; {' and '.join(self.unread)} change nothing"]
        if self.choice is None:
            teacher = self.config.teacher
            foreign = foreign_preset(self.name, teacher.source, teacher.max_tokens)
            return [*([foreign] if foreign else []), *self.notes_on_rate()]
        first, *others = self.choice.reasons
        steps = self.config.training.steps
        first = f"{first} {steps:,} optimiser step{'s' * (steps != 1)}."
        return [f"method: {self.choice.words}", f"why (accuracies are the bundled model's): {first}", *others]


def settle(
    preset: str | None,
    changes: Sequence[str] | None,
    *,
    steps: int | None,
    hours: float | None,
    device: str,
    out: Path | None = None,
    resume: bool = False,
    **given: Any,
) -> Settled:
    """The settings of a run.

    Args:
        preset: as of `--preset`.
        changes: of `--set`.
        steps: sampling steps that the student is for; None for four.
        hours: that the run may take.
        device: as of `--device`.
        out: folder of the run; None for `runs/PRESET`.
        resume: the run in it goes on, with the settings that are there already.
        **given: short forms.

    Raises:
        UserError: an option is wrong, or asks for a choice where there is none.
    """
    if device != "auto":
        usable_device(device)  # before the teacher is looked for, on the hub maybe
    own, teacher = tuple(changes or ()), given.get("teacher")
    told = given.get("train_steps") is not None or any(change.startswith("training.steps=") for change in own)
    check_wishes(steps, hours, told)
    wishes = tuple(name for name, value in (("--steps", steps), ("--hours", hours)) if value is not None)
    if resume and out and not (preset or teacher):
        if not (out / "config.yaml").is_file():
            raise UserError(f"{out} holds no run to go on with{near(out)}; --preset or --teacher begins one there")
        return as_there(out, own, given, wishes)
    if preset or teacher in (None, "emoji"):
        if name := next(iter(wishes), None):
            reason = f"--preset {preset} is one" if preset else "the bundled teacher has presets (stepfold presets)"
            raise UserError(f"{name} is for choosing a method, and {reason}; leave it out")
        return Settled(config_of(preset, own, **given), chosen_preset(preset, teacher), own, given)
    if out and resume and (out / "config.yaml").is_file():
        return as_there(out, own, given, wishes)
    if hours and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--hours counts on a trial in one process, and there are several; give --train-steps")
    of_teacher = [change for change in own if change.startswith("teacher.") and "quantise" not in change]
    source = {name: given.get(name) for name in ("teacher", "revision", "variant")}
    settings = config_of("default", of_teacher, prompts="", **source).teacher
    facts = read_facts(settings, wished_rank(own, given.get("lora")), steps or 4, hours, device)
    if not out and resume and (Path("runs") / facts.preset / "config.yaml").is_file():
        return as_there(Path("runs") / facts.preset, own, given, wishes)
    choice = choose(facts)
    return Settled(config_by(choice, own, given), choice.preset, own, given, facts, choice)


def near(folder: Path) -> str:
    """The run beside a folder whose name is the most like its, for an error; empty where there is none."""
    names = [path.parent.name for path in folder.parent.glob("*/config.yaml")]
    close = difflib.get_close_matches(folder.name, names, n=1)
    return f"; did you mean {folder.parent / close[0]}?" if close else ""


def as_there(folder: Path, changes: tuple[str, ...], given: dict[str, Any], wishes: tuple[str, ...]) -> Settled:
    """The settings of the run in a folder, under those that the user gives again."""
    from stepfold.config import from_yaml

    config = config_of(from_yaml(folder / "config.yaml"), changes, **given)
    return Settled(config, folder.name, changes, given, unread=wishes)


def wished_rank(changes: Sequence[str], lora: int | None) -> int | None:
    """The rank of a LoRA that the user asks for; 0 for all weights, None for no wish."""
    asked = [change.partition("=")[2] for change in changes if change.partition("=")[0].strip() == "student.lora"]
    return int(asked[0]) if asked and asked[0].strip().isdecimal() else lora


def check_wishes(steps: int | None, hours: float | None, told: bool) -> None:
    """Refuses numbers that are no wish; `told` is whether the user says how many optimiser steps there are.

    Raises:
        UserError: naming the option.
    """
    if steps is not None and steps not in SAMPLING_STEPS:
        raise UserError(
            f"--steps is {steps}, but it counts the student's sampling steps: 1, 2, 4 or 8; optimiser steps are "
            "--train-steps"
        )
    if hours is not None and not 0 < hours <= 10000:
        raise UserError(f"--hours is {hours:g}; give more than 0, at most 10000")
    if hours is not None and told:
        raise UserError("--hours and --train-steps both say how long the run is; give one of them")


def config_by(choice: Choice, changes: Sequence[str], given: dict[str, Any]) -> "Config":
    """The settings of a choice, under the user's own.

    Raises:
        UserError: they do not go together.
    """
    users = {change.partition("=")[0].strip() for change in changes} | set(short_forms(changes, **given))
    own = {key: value for key, value in choice.changes.items() if key not in users}
    config = config_of(choice.preset, [*(f"{key}={value}" for key, value in own.items()), *changes], **given)
    if choice.share == 1:
        return config
    scaled = {f"consistency.{name}": getattr(config.consistency, name) for name in R_STEPS}
    scaled |= {"training.steps": config.training.steps, "optimiser.warmup": config.optimiser.warmup}
    kept = {key: value for key, value in scaled.items() if value and key not in users}
    less = [f"{key}={max(1, round(choice.share * value))}" for key, value in kept.items()]
    return config_by(replace(choice, share=1.0), [*changes, *less], given)


def within_hours(settled: Settled, step_sec: float, fixed_sec: float) -> Settled:
    """The choice again, with as many steps as the hours are enough for.

    Args:
        settled: the choice before.
        step_sec: of a step, by a trial.
        fixed_sec: of all that takes as long however many steps there are.

    Raises:
        UserError: the hours are not enough for that.
    """
    assert settled.facts and settled.choice and settled.facts.hours
    fixed_hours = fixed_sec / 3600
    if settled.facts.hours <= fixed_hours:
        raise UserError(
            f"--hours is {settled.facts.hours:g}, but start and evaluation alone take {fixed_hours:.2g} h; give more, "
            "or --set evaluation.n=0"
        )
    pass_sec, facts = pass_seconds(settled, step_sec), replace(settled.facts, hours=None)
    all_weights = replace(facts, gib={"whole": facts.gib["whole"]})
    lora = replace(facts, gib={**facts.gib, "whole": float("inf")})
    full = {}
    for kind, each in (("whole", all_weights), ("lora", lora)):
        try:
            full[kind] = hours_of(config_by(choose(each), settled.changes, settled.given), facts, pass_sec)
        except UserError:  # the user's own settings are for the other kind alone
            full[kind] = float("inf")
    facts = replace(settled.facts, full_hours=full, fixed_hours=fixed_hours)
    choice = choose(facts)
    config = config_by(choice, settled.changes, settled.given)
    return replace(settled, config=config, name=choice.preset, facts=facts, choice=choice)


def pass_seconds(settled: Settled, step_sec: float) -> float:
    """Of a forward pass, where a step takes so long."""
    assert settled.facts
    return step_sec / passes_of(settled.config, settled.facts)


def passes_of(config: "Config", facts: Facts) -> int:
    """Forward passes of one image in a step; what `auto` becomes is as in `choose_objective`."""
    auto = "discrete" if facts.counts_to >= 10 else "continuous"
    return passes(config.model_copy(update={"objective": auto} if config.objective == "auto" else {}), facts.guidance)


def hours_of(config: "Config", facts: Facts, pass_sec: float) -> float:
    """Of all its steps."""
    return config.training.steps * passes_of(config, facts) * pass_sec / 3600


def priced(settled: Settled, step_sec: float, fixed_sec: float) -> list[dict[str, Any]]:
    """The choice and its alternatives: preset and changes, method, passes a step, GiB of weights and states, hours."""
    assert settled.facts and settled.choice
    facts, pass_sec, rows = settled.facts, pass_seconds(settled, step_sec), []
    for choice in alternatives(replace(facts, hours=None)):
        try:
            config = config_by(choice, settled.changes, settled.given)
        except UserError:  # the user's own settings are not for it
            continue
        gib = facts.gib.get(config.teacher.quantise if config.student.lora else "whole")
        if gib and config.fake.updates:
            gib += facts.gib.get("fake", 0.0)
        rows.append(
            {
                "preset": choice.preset, "method": choice.method, "settings": choice.words,
                "changes": dict(choice.changes), "sampling_steps": list(config.evaluation.steps or (1, 2, 4)),
                "passes": passes_of(config, facts), "gib": gib, "steps": config.training.steps,
                "hours": hours_of(config, facts, pass_sec) + fixed_sec / 3600,
            }
        )  # fmt: skip
    return rows
