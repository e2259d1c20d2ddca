"""The runs that `equal.py` compares, and what two versions of the source may call differently."""

import re
from dataclasses import dataclass, fields
from typing import Any, Literal

SAME_SETTINGS = (("training.rollout_precision", "training.walk_precision"),)
"""Names that a setting has had; a case may use any of them, and a run gets the one that its source knows."""
SAME_KEYS: dict[str, str] = {}
"""Older name -> newer name of a key of the metrics."""
EXTRA_KEYS: dict[str, str] = {
    "r": "the tangent warm-up, logged since terms",
    "grad_norm/discriminator": "logged since critics; it only had to be finite before",
}
"""Key of the metrics that only one of the versions may have -> the reason."""
TIMES = re.compile(r"(^|_)sec$")
"""Keys of the metrics that no two runs have in common."""

PROMPTS = ("a red heart", "a cat on a blue background", "an umbrella, black background")
TINY_PROMPTS = ("red heart", "a cat", "a fish")
KILL_AFTER = 25  # steps: the checkpoint of step 20 is there, that of step 40 is not
BASE = {
    "training.steps": 40, "training.checkpoint_every": 20, "training.keep_checkpoints": 1,
    "training.preview_every": 1000, "training.prompts_per_step": 1, "teacher.max_tokens": 16, "space.route_steps": 4,
    "evaluation.n": 0,
}  # fmt: skip
CONTINUOUS = {"consistency.r_warmup": 10, "consistency.r_cooldown_start": 25, "consistency.r_cooldown_steps": 10}
FLOAT32 = {"training.precision": "no", "training.rollout_precision": "no"}
BF16 = {"training.precision": "bf16", "training.rollout_precision": "bf16"}
TINY = FLOAT32 | {
    "training.steps": 12, "training.checkpoint_every": 6, "space.filter_rule": "off", "optimiser.name": "adamw",
    "optimiser.lr": 1e-3, "consistency.r_warmup": 6,
}  # fmt: skip
TWO = {"training.prompts_per_step": 2}
DROPS = {"space.filter_threshold": 3.5}  # some of the prompts; those of the presets keep all
PARTS = TWO | {"training.micro_batch": 4}  # of six pairs


@dataclass(frozen=True)
class Case:
    """A run: its preset, what it changes, and how it is started.

    Attributes:
        preset: whose settings it starts from.
        changes: dotted settings -> values, over `BASE`.
        teacher: the name of a tiny pipeline, `make_NAME` in tests/tiny.py; else the bundled teacher.
        data: `PROMPTS`, these encoded before the run, all prompts of the bundled teacher, or pictures that have
            `PROMPTS` as captions.
        processes: that share the run.
        killed: after KILL_AFTER steps; then it is resumed.
        equals: another case, whose numbers it must have.
    """

    preset: str
    changes: dict[str, Any]
    teacher: str = ""
    data: Literal["few", "encoded", "bundled", "images"] = "few"
    processes: int = 1
    killed: bool = False
    equals: str = ""


def continuous(preset: str = "reproduce", **changes: Any) -> Case:
    """A case of the continuous objective; `training__tangent` stands for training.tangent."""
    return Case(preset, CONTINUOUS | {name.replace("__", "."): value for name, value in changes.items()})


def tiny(teacher: str, preset: str = "default", processes: int = 1, **changes: Any) -> Case:
    """A case with a tiny pipeline of another family."""
    changes = TINY | {name.replace("__", "."): value for name, value in changes.items()}
    return Case(preset, changes, teacher=teacher, processes=processes)


CASES = {
    "demo": Case("demo", TWO, data="bundled"),
    "reproduce": continuous(),
    "scm-endpoints": continuous("scm-endpoints"),
    "sana-sprint-endpoints": continuous("sana-sprint-endpoints"),
    "lcm": Case("lcm", {}),
    "lora": continuous(student__lora=4),
    "two_pass": continuous(training__tangent="two_pass"),
    "one_pass": continuous(training__tangent="one_pass"),
    "block": continuous(training__tangent="block"),
    "finite_difference": continuous(training__tangent="finite_difference"),
    "bfloat16": Case("reproduce", CONTINUOUS | BF16),
    "bfloat16-lcm": Case("lcm", BF16),
    "micro-continuous": Case("reproduce", CONTINUOUS | PARTS),
    "micro-discrete": Case("lcm", PARTS),
    "micro-adversarial": Case("sana-sprint-endpoints", CONTINUOUS | PARTS),
    "paper": Case("paper", CONTINUOUS | FLOAT32 | TWO | DROPS),  # CAME, hard filter, mean over the kept
    "released": Case("released", CONTINUOUS | FLOAT32 | TWO | DROPS),  # CAME, random filter, mean over all
    "images": Case("scm", CONTINUOUS | TWO | {"space.route_steps": 2}, data="images"),
    "images-adversarial": Case("sana-sprint", CONTINUOUS | {"space.cache_latents": True}, data="images"),
    "reuse": continuous(space__reuse=2, training__encode_ahead=3),
    "route-logit-normal": continuous(space__route="logit_normal"),
    "route-random": Case("lcm", {"space.route": "random"}),
    "plain": continuous(
        consistency__adaptive_weight=False, consistency__prior_weight="none", consistency__normalise="none",
        consistency__r_schedule="none", space__keep_first=True,
    ),
    "depth": Case("lcm", {"student.depth": 0.5, "training.checkpointing": True, "training.skip_nonfinite": 1}),
    "lora-bfloat16": Case("lcm", {"student.lora": 4, "teacher.dtype": "bfloat16"}),
    "encoded": Case("lcm", {}, data="encoded", equals="lcm"),
    "evaluated": Case("lcm", {"training.steps": 2, "evaluation.n": 4}),
    "resumed": Case("reproduce", CONTINUOUS, killed=True, equals="reproduce"),
    "resumed-adversarial": Case("sana-sprint-endpoints", CONTINUOUS, killed=True, equals="sana-sprint-endpoints"),
    "two-processes": tiny("sana", processes=2, training__prompts_per_step=3, adversarial__weight=0.5),
    "sharded": tiny("sana", processes=2, training__prompts_per_step=3, training__shard="all"),
    "sprint": tiny("sprint"),
    "sd1": tiny("sd1"),
    "sd2": tiny("sd2"),
    "sdxl-lora": tiny("sdxl", student__lora=2),
    "sd3-adversarial": tiny("sd3", space__kind="endpoints", adversarial__weight=0.5),
    "flux": tiny("flux"),
    "pixart": tiny("pixart"),
    "dit": tiny("dit"),
    "lumina2": tiny("lumina2", teacher__max_tokens=32),  # 18 of them are its own
    "wan-lora": tiny("wan", student__lora=2),
}  # fmt: skip


def note_of(case: Case) -> dict[str, Any]:
    """All that a case's numbers depend on but for the source; settings under the first of their names."""
    changes = {same_names(name)[0]: value for name, value in (BASE | case.changes).items()}
    plain = {f.name: getattr(case, f.name) for f in fields(case) if getattr(case, f.name) != f.default}
    return plain | {"changes": changes, "prompts": list(TINY_PROMPTS if case.teacher else PROMPTS)}


def same_names(name: str) -> tuple[str, ...]:
    """All names that a setting has had."""
    return next((names for names in SAME_SETTINGS if name in names), (name,))


def spelt(name: str, known: set[str]) -> str:
    """The name under which a source knows a setting."""
    return next((other for other in same_names(name) if other in known), name)
