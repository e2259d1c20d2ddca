"""Settings of methods that compare the score of the student's pictures with the teacher's, and what goes together."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from stepfold.sections import LARGEST, Beta, Section

Weighting = Literal["dmd", "kl", "vsd", "uniform", "sid", "velocity"]
Level = Annotated[float, Field(gt=0, le=1)]
PictureSpace = Literal["rollout", "generation", "endpoints"]
MATCHING = ("matching", "decoupled", "identity")
"""Objectives whose student's pictures are compared with the teacher by two scores."""


class RolloutSettings(Section):
    """The student's own steps, which some terms and critics learn from."""

    steps: int = Field(default=4, ge=1, le=64, description="K, steps of the student; each is trained in its turn")
    lengths: Literal["fixed", "cycled"] = Field(
        default="fixed", description="`fixed`, always K steps; `cycled`, 1, 2, ..., K in turn (few-step SiD, rCM)"
    )
    ladder: Literal["student", "random"] = Field(
        default="student",
        description="times of the steps: `student`, those that it is sampled at; `random`, drawn for each rollout "
        "below the first",
    )
    first: int = Field(
        default=1, ge=1, description="the first step that is trained; above 1 those before it are left to `anchor`"
    )

    phased: bool = Field(
        default=False,
        description="both scores see a step's pictures above the next step's time alone (Phased DMD)",
    )

    @model_validator(mode="after")
    def _trains_a_step(self) -> "RolloutSettings":
        if self.first > self.steps or (self.first > 1 and self.lengths == "cycled"):
            raise ValueError(
                f"rollout.first={self.first} leaves no step to train with rollout.steps={self.steps}, "
                f"rollout.lengths={self.lengths}; give rollout.first=1"
            )
        return self


class RenoisedSettings(Section):
    """Times that pictures are noised to again."""

    times: Literal["level", "logit_normal"] = Field(
        default="level",
        description="of the noise that its pictures get: `level`, uniform in flow-matching level, with the teacher's "
        "shift; `logit_normal`, log(sigma_d tan t) is normal",
    )
    lowest_level: float = Field(default=0.02, gt=0, lt=1, description="of the noise that its pictures get, in [0, 1]")
    highest_level: Level = Field(default=0.98, description="of the noise that its pictures get, in [0, 1]")
    logit_mean: float = Field(default=0.0, description="of log(sigma_d tan t), with times=logit_normal")
    logit_std: float = Field(default=1.6, gt=0, description="of log(sigma_d tan t), with times=logit_normal")


class FakeSettings(RenoisedSettings):
    """The fake score: a second network that learns the score of the student's own pictures."""

    updates: int = Field(default=0, ge=0, le=1000, description="G, its updates for each of the student's; 0 for none")
    kind: Literal["lora", "whole"] = Field(
        default="lora", description="LoRA matrices beside the teacher's own weights (extra lora), or a whole network"
    )
    rank: int = Field(default=64, ge=1, description="of the LoRA; at least that of a LoRA student")
    head_start: int = Field(default=100, ge=0, description="first steps, in which it learns and the student does not")
    lr_factor: float = Field(default=10.0, gt=0, description="learning rate, in units of the student's")
    betas: tuple[Beta, Beta] = Field(default=(0.0, 0.999), description="AdamW's")
    guidance: float = Field(
        default=1.0,
        gt=0,
        description="weight of its guidance while it learns (SiD-LSG: that of matching.fake_guidance); 1: none",
    )
    unprompted: float = Field(
        default=0.0, ge=0, le=1, description="share of its pictures that it learns without their prompts (VSD: 0.1)"
    )


Scale = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]


class MatchingSettings(RenoisedSettings):
    """Distribution matching: the student's pictures move from the fake score's prediction to the teacher's."""

    weight: float = Field(
        default=0.0,
        ge=0,
        description="lambda, of matching beside another objective; 0 for none (rCM: 0.02)",
    )
    form: Literal["matching", "decoupled"] = Field(
        default="matching",
        description="the loss beside another objective: `matching`, or `decoupled`, with guidance's part apart",
    )
    space: PictureSpace = Field(
        default="rollout",
        description="states beside another objective, of which the student makes the pictures; `objective=matching` "
        "takes those of space.kind",
    )
    unit: Literal["auto", "sum", "mean"] = Field(
        default="auto",
        description="of its loss, over a picture's numbers; auto: `sum` beside continuous consistency with its "
        "adaptive weight, which is one too, else `mean`",
    )
    weighting: Weighting = Field(
        default="dmd",
        description="omega, of the difference of two predictions: `dmd`, 1 / mean |x_0 - teacher's prediction|; `kl`, "
        "1 / tan^2 t, the gradient of a KL divergence; `vsd`, sin t cos t; `uniform`; `sid`, 1 - level; `velocity`, "
        "1 / sin t",
    )
    guidance: Scale | tuple[Scale, Scale] | None = Field(
        default=None,
        description="weight w of the teacher's guidance; two numbers: drawn between them for each picture. Default: "
        "that of the prompt's own scale",
    )
    fake_guidance: Scale | Literal["same"] = Field(
        default=1.0,
        description="weight kappa of the fake score's guidance; `same`: w, as in VSD. Any but 1 asks it without a "
        "prompt too",
    )

    @field_validator("guidance")
    @classmethod
    def _rising(cls, guidance: Any) -> Any:
        if isinstance(guidance, tuple) and guidance[0] > guidance[1]:
            raise ValueError(f"the lower number comes first; give [{guidance[1]:g}, {guidance[0]:g}]")
        return guidance


class IdentitySettings(Section):
    """Score identity distillation (SiD), `objective=identity`; its scales, times and omega are those of `matching`."""

    alpha: float = Field(
        default=1.0,
        ge=0,
        description="0.5 is the Fisher divergence's gradient, 1 that with the sampling law held; above 1 the push may "
        "be the wrong way",
    )


class DecoupledSettings(Section):
    """Decoupled distribution matching, `objective=decoupled`; its scales, times and omega are those of `matching`."""

    guidance_times: Literal["below", "all"] = Field(
        default="below",
        description="times of guidance's part: `below`, less noisy than the student's own step; `all`, as matching's",
    )
    statistics_weight: float = Field(
        default=0.0,
        ge=0,
        description="of the divergence of each picture's mean and variance from `statistics`, which holds saturation "
        "back; 0 for none",
    )
    statistics: tuple[Scale, Annotated[float, Field(gt=0, le=LARGEST)]] = Field(
        default=(0.0, 1.0),
        description="mean and standard deviation of a picture's latents, in units of sigma_data; `stepfold doctor` "
        "prints the teacher's own",
    )


class AnchorSettings(Section):
    """DP-DMD: the student's first step follows the teacher's walk, so that prompts keep their diversity."""

    weight: float = Field(
        default=0.0,
        ge=0,
        description="of the first step's regression beside matching, with rollout.first=2; 0 for none",
    )
    steps: int = Field(
        default=3, ge=1, description="of the teacher's walk, after which it is where the first step should lead"
    )


class RewardSettings(Section):
    """A differentiable score of the student's decoded pictures, which it raises beside its other terms (ReFL)."""

    weight: float = Field(default=0.0, ge=0, description="beta, small (DMDR: 0.05); 0 for none")
    clip: str | None = Field(
        default=None,
        description="folder or hub id of a CLIP in safetensors (CLIP, PickScore, HPS), whose cosine of picture and "
        "prompt is the score; never the one that evaluates. Default: `score` of the Python API",
    )
    from_step: int = Field(default=0, ge=0, description="first step of the run that has it; late is safer")
    space: PictureSpace = Field(default="rollout", description="states of which the student makes its pictures")


def matches(config: Any) -> bool:
    """Whether a term of these settings compares two scores."""
    return config.objective in MATCHING or config.matching.weight > 0


def form_of(config: Any) -> str:
    """The loss that compares two scores: the objective, or what stands beside another one."""
    return config.objective if config.objective in MATCHING else config.matching.form


def picture_spaces(config: Any) -> list[str]:
    """The spaces whose states the student makes its pictures of, for the fake score too; in turn, if several."""
    return list(config.space.weights) if config.objective in MATCHING else [config.matching.space]


def critic_spaces(config: Any) -> set[str]:
    """The spaces whose states critics' own updates learn from, without rollouts, which are made for each update."""
    heads = {config.space.first} if config.adversarial.weight and config.adversarial.updates else set()
    return (set(picture_spaces(config)) | heads) - {"rollout"}


def check_scores(config: Any) -> None:
    """Refuses settings of score methods that do not go together.

    Args:
        config: `config.Config`.

    Raises:
        ValueError: what does not go together, and the way out.
    """
    spaces, objective, fake, kappa = (
        set(config.space.weights),
        config.objective,
        config.fake,
        config.matching.fake_guidance,
    )
    if "rollout" in spaces and objective not in MATCHING:
        raise ValueError(
            f"space.kind=rollout is the student's own steps, which objective={objective} does not take; give "
            "objective=matching, decoupled or identity, or space.kind=generation"
        )
    if objective in MATCHING and not spaces <= set(get_args(PictureSpace)):
        raise ValueError(
            f"objective={objective} is trained on {', '.join(get_args(PictureSpace))}, not on "
            f"{', '.join(sorted(spaces))}; give space.kind=rollout"
        )
    if matches(config) and set(picture_spaces(config)) != {"rollout"} and config.space.filter_rule != "off":
        raise ValueError(
            f"matching on {', '.join(picture_spaces(config))} learns from every prompt, so nothing may be filtered; "
            "give space.filter_rule=off"
        )
    if matches(config) and not fake.updates:
        raise ValueError(
            "matching needs a fake score that learns; give fake.updates=5, or matching.weight=0 where the objective is "
            "another"
        )
    if matches(config) and form_of(config) == "decoupled" and kappa != 1:
        raise ValueError(
            f"matching.fake_guidance={kappa} does not go with decoupled matching, whose fake score is not guided; "
            "give matching.fake_guidance=1, or objective=matching"
        )
    if config.rollout.phased and set(picture_spaces(config)) != {"rollout"}:
        raise ValueError(
            f"rollout.phased is for the student's own steps, not for matching on {', '.join(picture_spaces(config))}; "
            "give rollout.phased=false"
        )
    if matches(config) and fake.head_start >= config.training.steps:
        raise ValueError(
            f"fake.head_start={fake.head_start} leaves the student none of the training.steps={config.training.steps}; "
            "give fewer, for example fake.head_start=1, or train longer"
        )
    check_anchor(config)
    check_heads(config)
    check_reward(config)
    if fake.updates and fake.kind == "lora" and fake.rank < config.student.lora:
        raise ValueError(
            f"a fake score of rank {fake.rank} cannot follow a student of rank {config.student.lora}; give "
            f"fake.rank={config.student.lora} or more, or fake.kind=whole"
        )
    if matches(config) and kappa != 1 and fake.guidance == 1 and not fake.unprompted:
        raise ValueError(
            f"matching.fake_guidance={kappa} asks the fake score without a prompt, which it does not learn; give "
            "fake.unprompted=0.1, or fake.guidance"
        )


def check_heads(config: Any) -> None:
    """Refuses updates of the discriminator's own where a filter takes prompts away.

    Raises:
        ValueError: as `check_scores`.
    """
    heads = config.adversarial
    if heads.weight and heads.updates and config.space.filter_rule != "off":
        raise ValueError(
            f"adversarial.updates={heads.updates} learns from every prompt, so nothing may be filtered; give "
            "space.filter_rule=off, or adversarial.updates=0"
        )


def check_reward(config: Any) -> None:
    """Refuses a reward that the run is measured by, or whose CLIP nobody needs.

    Raises:
        ValueError: as `check_scores`.
    """
    part = config.reward
    if part.weight and part.clip is not None and part.clip == config.evaluation.clip:
        raise ValueError(
            f"reward.clip={part.clip} is the CLIP that evaluates, which would then measure how well it was fooled; "
            "give another one as evaluation.clip"
        )


def check_anchor(config: Any) -> None:
    """Refuses a first step that two terms train, or none, and an anchor beyond the walk.

    Raises:
        ValueError: as `check_scores`.
    """
    weight, steps = config.anchor.weight, config.anchor.steps
    if weight and not matches(config):
        raise ValueError("anchor.weight goes with matching of the later steps; give objective=matching, or 0")
    later = config.rollout.first > 1
    alone = config.objective in MATCHING  # beside another objective, that one trains the first step
    if matches(config) and ((weight and not later) or (alone and later and not weight)):
        raise ValueError(
            f"anchor.weight={weight:g} with rollout.first={config.rollout.first} leaves the first step to nobody or to "
            "both; give anchor.weight=0.05 with rollout.first=2, or 0 with 1"
        )
    if weight and steps >= config.space.route_steps:
        raise ValueError(
            f"anchor.steps={steps} is the whole walk of space.route_steps={config.space.route_steps}; give fewer"
        )
