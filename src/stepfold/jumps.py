"""Settings of students that are told where to jump to, and what goes together with them."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator, model_validator

from stepfold.methods import METHODS
from stepfold.sections import LARGEST, Section

TargetRule = Literal["zero", "diagonal", "gap", "uniform", "edge", "later"]
Key = TypeVar("Key")
Leg = Literal["teacher", "student", "average"]
Share = Annotated[float, Field(ge=0, le=LARGEST)]
MOST_SEGMENTS = 8

ON_WALKS = {"zero", "later", "diagonal"}
"""Rules whose targets are states of a walk."""
ANYWHERE = {"gap", "uniform", "later"}
"""Rules whose students jump from any time to any other."""


def normalised(shares: dict[Key, float]) -> dict[Key, float]:
    """Shares that sum to 1, without those of 0."""
    total = sum(shares.values())
    return {key: share / total for key, share in shares.items() if share}


class TargetSettings(Section):
    """Where a student is asked to jump to."""

    rule: TargetRule | dict[TargetRule, Share] = Field(
        default="zero",
        description="target time s of a state at time t: `zero`, the picture; `diagonal`, s = t, its velocity; `gap`, "
        "a logit-normal distance below t; `uniform`, anywhere below t; `edge`, the lower end of t's segment; `later`, "
        "that of a later state of the same walk. Several with shares: `{uniform: 0.75, diagonal: 0.25}`",
    )
    gap_mean: float = Field(default=-0.8, description="of the logit of the gap, in flow-matching time")
    gap_std: float = Field(default=1.0, gt=0, description="of the logit of the gap")
    segments: int | dict[int, Share] = Field(
        default=4,
        description="of rule edge: those between the student's own steps. Several with shares, for students of several "
        "numbers of steps, of which each trajectory has one: `{1: 0.5, 2: 0.2, 4: 0.2, 8: 0.1}`",
    )
    draws: int = Field(
        default=1,
        ge=1,
        le=8,
        description="targets of each state, each a pair of its own; 2 halves the teacher's share of the time",
    )

    @field_validator("rule", "segments")
    @classmethod
    def _some_share(cls, given: Any, info: ValidationInfo) -> Any:
        if isinstance(given, dict) and not any(given.values()):
            example = "{uniform: 0.75, diagonal: 0.25}" if info.field_name == "rule" else "{1: 0.5, 4: 0.5}"
            raise ValueError(f"none has a share above 0; give one, for example {example}")
        return given

    @field_validator("segments")
    @classmethod
    def _as_many_as_steps(cls, given: Any) -> Any:
        wrong = [count for count in ([given] if isinstance(given, int) else given) if not 1 <= count <= MOST_SEGMENTS]
        if wrong:
            raise ValueError(f"{wrong[0]} is no number of segments; give 1 to {MOST_SEGMENTS}, such as 4")
        return given

    @property
    def shares(self) -> dict[TargetRule, float]:
        """Rule -> its share of the states; they sum to 1, and those of share 0 are left out."""
        return normalised({self.rule: 1.0} if isinstance(self.rule, str) else self.rule)

    @property
    def grids(self) -> dict[int, float]:
        """Number of segments -> its share of the walks, of those that the rule edge draws from; they sum to 1."""
        return normalised({self.segments: 1.0} if isinstance(self.segments, int) else self.segments)

    @property
    def shared(self) -> bool:
        """Whether the states of a walk have one target until they reach it."""
        return self.rules in ({"zero"}, {"edge"})

    @property
    def rules(self) -> set[str]:
        """The rules that have a share."""
        return set(self.shares)

    @property
    def jumps(self) -> bool:
        """Whether any state is asked to jump elsewhere than to 0, or to stay."""
        return self.rules - {"zero", "diagonal"} != set()


class SemigroupSettings(Section):
    """Two legs in place of one: X(x, t, s) should be X(X(x, t, m), m, s)."""

    first: Leg = Field(default="teacher", description="who makes the leg from t to m, without a gradient")
    second: Leg = Field(default="student", description="who makes the leg from m to s, without a gradient")
    alpha: float | None = Field(
        default=None, gt=0, le=1, description="m = t - alpha (t - s); default: m is the next time of the route"
    )
    alpha_final: float | None = Field(
        default=None, gt=0, le=1, description="where alpha ends, after alpha_steps; default: it stays"
    )
    alpha_steps: int = Field(default=0, ge=0, description="steps over which alpha goes to alpha_final, linearly")
    huber_constant: float = Field(
        default=0.03, ge=0, description="of the pseudo-Huber distance, per square root of elements, of F"
    )

    @model_validator(mode="after")
    def _course_of_alpha(self) -> "SemigroupSettings":
        if self.alpha_final is not None and (self.alpha is None or not self.alpha_steps):
            raise ValueError(
                "semigroup.alpha_final is where a course of alpha ends; give semigroup.alpha=1 and "
                "semigroup.alpha_steps too"
            )
        return self

    def alpha_at(self, step: int) -> float | None:
        """alpha at a step of the phase; None for the route's own steps."""
        if self.alpha is None or self.alpha_final is None:
            return self.alpha
        done = min(step / self.alpha_steps, 1.0)
        return (1 - done) * self.alpha + done * self.alpha_final


class PolicySettings(Section):
    """pi-Flow: one call of the student gives several velocities, and a policy takes many steps with them."""

    steps: int = Field(default=4, ge=1, le=MOST_SEGMENTS, description="network calls that the student is trained for")
    nodes: int = Field(
        default=10,
        ge=3,
        le=32,
        description="N, velocities of a call, each the network's channels once more; not 2, which pipelines take for a "
        "learned variance",
    )
    substeps: int = Field(default=32, ge=1, le=256, description="the policy's own Euler steps for each network call")
    states: int = Field(
        default=4, ge=1, le=64, description="of each call's part of the path, at which the teacher is asked"
    )

    @model_validator(mode="after")
    def _has_states(self) -> "PolicySettings":
        if self.states > self.substeps:
            raise ValueError(
                f"policy.states is {self.states}, but there are {self.substeps} substeps to take them from; give "
                f"policy.states={self.substeps} or less"
            )
        return self


def check_policy(config: Any) -> None:
    """Refuses settings that do not go with a policy student, which gives several F at a time.

    Raises:
        ValueError: as `check_targets`.
    """
    spaces, later = set(config.space.weights), [phase.set for phase in config.training.phases]
    names = {config.objective, *(changes.get("objective", config.objective) for changes in later)}
    if "policy" not in names | spaces:
        return
    if names != {"policy"} or spaces != {"policy"}:
        raise ValueError(
            "a policy's states and its objective go together, in all phases; give objective=policy and "
            "space.kind=policy, or neither"
        )
    for other in ("adversarial", "matching", "anchor", "reward"):
        if getattr(config, other).weight:
            raise ValueError(f"{other}.weight has no place beside objective=policy; set {other}.weight=0")
    if config.student.times == "two":
        raise ValueError("a policy student jumps between its own times; leave student.times at one")


def check_targets(config: Any) -> None:
    """Refuses settings whose target times fit neither the student nor the objective nor the space.

    Args:
        config: `config.Config`.

    Raises:
        ValueError: what does not go together, and the way out.
    """
    target, objective, spaces = config.target, config.objective, set(config.space.weights)
    rules, told_one = target.rules, config.student.times == "one"
    given = ", ".join(sorted(rules))
    if rules != {"zero"} and not METHODS[objective].aimed:
        raise ValueError(
            f"target.rule={given} does not go with objective={objective}, which has no target time; give "
            "objective=continuous, discrete, pair, semigroup or lagrange"
        )
    if told_one and "edge" in rules and len(target.grids) > 1:
        raise ValueError(
            f"target.segments has {' and '.join(map(str, target.grids))} segments for a student that is told one time; "
            "give student.times=two, or one number of segments"
        )
    if target.draws > 1 and (rules == {"zero"} or (rules == {"edge"} and len(target.grids) == 1)):
        raise ValueError(
            f"target.draws={target.draws} gives each state the same target again with target.rule={given}; leave "
            "target.draws out, or give target.segments shares, for example {1: 0.5, 4: 0.5}"
        )
    if objective == "discrete" and "diagonal" in rules:
        raise ValueError(
            "objective=discrete compares where jumps land, and rule diagonal asks for a jump of no length; give "
            "target.rule without diagonal"
        )
    if rules == {"diagonal"}:
        raise ValueError("target.rule=diagonal alone is velocity matching; give objective=velocity")
    if told_one and rules not in ({"zero"}, {"edge"}):
        raise ValueError(
            f"target.rule={given} needs a student that is told where to jump to; give student.times=two, or "
            "target.rule=zero or edge alone"
        )
    if objective == "lagrange" and (told_one or not target.jumps):
        raise ValueError(
            "objective=lagrange moves the target time; give student.times=two and, for example, "
            "target.rule={uniform: 0.75, diagonal: 0.25}"
        )
    if "later" in rules and spaces != {"generation"}:
        raise ValueError("target.rule=later takes states of the teacher's walk; give space.kind=generation")
    if objective == "pair" and (spaces != {"generation"} or not rules <= ON_WALKS):
        raise ValueError(
            f"objective=pair has states of the teacher's walk as targets, not target.rule={given} on "
            f"{', '.join(sorted(spaces))}; give space.kind=generation and target.rule=zero or later"
        )
    if "diagonal" in rules and config.consistency.tangent_weight == "ayf" and objective == "continuous":
        raise ValueError(
            "consistency.tangent_weight=ayf is 0 where target.rule=diagonal; give consistency.tangent_weight=trig, or "
            "leave diagonal out"
        )
    if config.space.times == "noise" and objective != "velocity":
        raise ValueError(
            f"space.times=noise is one-step regression, not objective={objective}; give objective=velocity"
        )
    if "prior" in spaces:
        check_prior(config)
    check_policy(config)


def check_prior(config: Any) -> None:
    """Refuses what needs more than pure noise.

    Raises:
        ValueError: as `check_targets`.
    """
    if config.objective not in ("semigroup", "lagrange") or config.adversarial.weight:
        raise ValueError(
            "space.kind=prior is pure noise, without walks or pictures; give objective=lagrange or semigroup and "
            "adversarial.weight=0, or space.kind=generation"
        )
    if config.objective == "semigroup" and config.semigroup.alpha is None:
        raise ValueError("space.kind=prior has no route whose next time could be m; give semigroup.alpha=0.5")
