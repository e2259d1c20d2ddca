"""What an objective is to the rest of the package: its students' sampler, its tangent, its target, its words."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """One objective.

    Attributes:
        words: what a student's card calls it, with its paper.
        no_tangent: why no tangent is computed for it; None where one is.
        sampler: that its students are for, where they jump to 0. Other targets make a flow map of them.
        aimed: whether it takes a target time.
    """

    words: str
    no_tangent: str | None = None
    sampler: Literal["consistency", "flow", "policy"] = "consistency"
    aimed: bool = False


METHODS: dict[str, Method] = {
    "auto": Method("consistency"),  # continuous or discrete
    "continuous": Method("continuous-time consistency (sCM, arXiv:2410.11081)", aimed=True),
    "discrete": Method(
        "discrete consistency (like LCM, arXiv:2310.04378)", "discrete consistency has none", aimed=True
    ),
    "velocity": Method("velocity matching (arXiv:2209.03003)", "velocity matching has none", "flow"),
    "pair": Method("regression on pairs of states (like CMT)", "pairs of states have none", aimed=True),
    "semigroup": Method(
        "jumps composed of two (as in CTM, arXiv:2310.02279, and shortcut models, arXiv:2410.12557)",
        "two legs have none",
        aimed=True,
    ),
    "lagrange": Method("the Lagrangian residual of a flow map (AYF, arXiv:2506.14603)", aimed=True),
    "matching": Method("distribution matching (arXiv:2405.14867)", "distribution matching has none"),
    "decoupled": Method("decoupled distribution matching (arXiv:2511.22677)", "distribution matching has none"),
    "identity": Method("score identity distillation (SiD, arXiv:2404.04057)", "score identity distillation has none"),
    "policy": Method("policy imitation (pi-Flow, arXiv:2510.14974)", "policy imitation has none", "policy"),
}
"""Objective, as settings call it -> what it is."""
