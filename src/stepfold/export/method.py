"""The method that a student was made with, in words, from its run's settings."""

from collections.abc import Iterator, Mapping
from typing import Any

from stepfold.methods import METHODS

SPACES = {
    "generation": "the teacher's own sampling trajectories",
    "endpoints": "noised ends of the teacher's trajectories",
    "images": "noised images",
    "prior": "pure noise",
    "rollout": "the student's own rollouts",
    "coupling": "noise joined to the ends of the teacher's trajectories",
    "policy": "the path of the student's own policy",
}
NAMED: dict[tuple[str, tuple[str, ...]], str] = {
    ("continuous", ("generation",)): "trajectory-backward consistency (TBCM, arXiv:2511.20410)",
    ("velocity", ("coupling",)): "reflow (arXiv:2209.03003)",
    ("velocity", ("generation",)): "guidance distillation on trajectories (arXiv:2503.07274)",
    ("matching", ("rollout",)): "distribution matching (DMD2 without its discriminator, arXiv:2405.14867)",
    ("decoupled", ("rollout",)): "decoupled distribution matching (arXiv:2511.22677)",
    ("policy", ("policy",)): "policy imitation with the DX policy (pi-Flow, arXiv:2510.14974)",
    ("identity", ("rollout",)): "score identity distillation (SiD, arXiv:2404.04057)",
}
"""Objective on spaces that has a name of its own."""
BESIDE = {
    "adversarial.weight": " with an adversarial term (Sana-Sprint, arXiv:2503.09641)",
    "matching.weight": " with distribution matching beside it (rCM, arXiv:2510.08431)",
    "anchor.weight": ", its first step on the teacher's trajectory (DP-DMD, arXiv:2602.03139)",
}
"""Weight -> the term that it adds."""
FORMS = {
    "matching": BESIDE["matching.weight"],
    "decoupled": " with decoupled distribution matching (arXiv:2511.22677) beside it",
}
"""`matching.form` -> what matching beside another objective is."""
WALKED = {"generation", "endpoints", "coupling"}
"""Spaces of the teacher's trajectories."""


def method_of(config: Mapping[str, Any]) -> str:
    """The method of a run, with its paper; of a run in phases one after the other.

    Args:
        config: the run's settings as its student's card has them; those of earlier versions may lack some.
    """
    return ", then ".join(dict.fromkeys(map(_of_part, parts_of(config))))


def source_of(config: Mapping[str, Any]) -> str:
    """What a run learned from besides its teacher."""
    return "captioned images" if any("images" in spaces_of(part) for part in parts_of(config)) else "prompts alone"


def step_of(config: Mapping[str, Any]) -> str:
    """What a step of a run learned from: so many images, prompts, or trajectories of so many route steps."""
    count, spaces = config["training"]["prompts_per_step"], {name for p in parts_of(config) for name in spaces_of(p)}
    if "images" in spaces or config["space"].get("images"):
        return several(count, "image", "images")
    if spaces & WALKED or config.get("anchor", {}).get("weight"):
        return f"{several(count, 'trajectory', 'trajectories')}, {config['space']['route_steps']} route steps"
    return several(count, "prompt", "prompts")


def several(count: int, one: str, many: str) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{count:,} {one if count == 1 else many}"


def parts_of(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The dotted settings that a method depends on, of each phase and of what is left after them."""
    own = {
        "objective": config.get("objective", "continuous"),
        "space.kind": config.get("space", {}).get("kind", "generation"),
    } | {name: config.get(name.split(".")[0], {}).get("weight", 0) for name in BESIDE}
    own["matching.form"] = config.get("matching", {}).get("form", "matching")
    training = config.get("training", {})
    phases = training.get("phases") or ()
    yield from (own | phase["set"] for phase in phases)
    if not phases or sum(phase["steps"] for phase in phases) < training["steps"]:
        yield own


def spaces_of(part: Mapping[str, Any]) -> tuple[str, ...]:
    """The spaces that states are trained on."""
    kind = part["space.kind"]
    return (kind,) if isinstance(kind, str) else tuple(name for name, weight in kind.items() if weight)


def _of_part(part: Mapping[str, Any]) -> str:
    objective, spaces = part["objective"], spaces_of(part)
    named = NAMED.get((objective, spaces))
    where = " and ".join(SPACES.get(space, space) for space in spaces)
    said = named or f"{METHODS[objective].words if objective in METHODS else objective} on {where}"
    own = {"matching.weight"} if "rollout" in spaces else set[str]()
    beside = BESIDE | {"matching.weight": FORMS[part["matching.form"]]}
    return said + "".join(text for name, text in beside.items() if part[name] and name not in own)
