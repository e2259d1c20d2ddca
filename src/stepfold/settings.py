"""The sections of a run's settings: what may be set, in which ranges, and what it means."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from stepfold.maths.schedules import TangentSchedule
from stepfold.sections import LARGEST, Beta, Section, list_of

PriorWeight = Literal["inverse_tangent", "none"]
Normalisation = Literal["l2", "l2_per_element", "none"]
TangentWeight = Literal["trig", "meanflow", "ayf"]
SpaceName = Literal["generation", "endpoints", "images", "coupling", "prior", "rollout", "policy"]
ObjectiveName = Literal[
    "continuous",
    "discrete",
    "velocity",
    "pair",
    "semigroup",
    "lagrange",
    "matching",
    "decoupled",
    "identity",
    "policy",
]


class StudentSettings(Section):
    """What of the student is trained."""

    lora: int = Field(
        default=0,
        ge=0,
        description="rank of LoRA matrices on the linear layers of all blocks, beside the teacher's shared weights "
        "(extra lora); 0: all weights are the student's own",
    )
    lora_convolutions: bool = Field(
        default=False,
        description="LoRA matrices on the 1 x 1 convolutions of the blocks too, which hold 47% of Sana's weights",
    )
    depth: float = Field(
        default=1.0, gt=0, le=1, description="share of the teacher's blocks that the student keeps, evenly chosen"
    )
    times: Literal["one", "two"] = Field(
        default="one",
        description="what the student is told: `one`, the time of the state; `two`, the time to jump to as well (flow "
        "maps), by a second embedder that is saved beside its network",
    )

    init: str | None = Field(
        default=None,
        description="folder of an earlier student of the same teacher, to start from in place of the teacher",
    )

    @model_validator(mode="after")
    def _lora_fits(self) -> "StudentSettings":
        if self.lora and self.depth < 1:
            raise ValueError("student.lora shares all of the teacher's blocks; leave student.depth at 1")
        if self.lora_convolutions and not self.lora:
            raise ValueError("student.lora_convolutions is for LoRA students; set student.lora to a rank, such as 64")
        return self


Weight = Annotated[float, Field(ge=0, le=LARGEST)]


class SpaceSettings(Section):
    """Where the training pairs come from."""

    kind: SpaceName | dict[SpaceName, Weight] = Field(
        default="generation",
        description="`generation`, the teacher's walk itself (TBCM); `endpoints`, its end noised afresh (image-free "
        "sCM); `images`, noised (sCM); `coupling`, its end joined to its own noise (reflow); `prior`, pure noise alone "
        "(lagrange, semigroup); `rollout`, the student's own steps (matching, decoupled, identity); `policy`, the "
        "states of its own policy (objective policy). Each latent is noised to as many times as a walk would keep, "
        "drawn as the route says. Several with weights: `{generation: 1, endpoints: 0.5}`",
    )
    images: str | None = Field(
        default=None, description="folder of pictures with a metadata.jsonl of file_name and text, for kind images"
    )
    bank: str | None = Field(
        default=None,
        description="folder of `stepfold bank make`, whose ends kinds coupling and endpoints take in the place of new "
        "trajectories",
    )
    anneal_steps: int = Field(
        default=0,
        ge=0,
        description="of kind coupling: steps in which the noise that is joined to an end goes from a fresh one to the "
        "trajectory's own (SlimFlow), for students that start far from the teacher; 0 for its own at once",
    )
    cache_latents: bool = Field(
        default=False, description="encode all images once, before training, instead of each when its turn comes"
    )
    route: Literal["reference", "logit_normal", "random"] = Field(
        default="reference", description="how the times are drawn"
    )
    times: Literal["route", "u_shaped", "noise"] = Field(
        default="route",
        description="that latents are noised to: `route`, as the route says; `u_shaped`, mostly near the image and "
        "near pure noise (RF++); `noise`, pure noise alone, of kind coupling, for students of one step (one-step "
        "regression)",
    )
    route_steps: int = Field(default=16, ge=2, le=256, description="N, teacher steps per trajectory")
    route_shift: float = Field(default=2.5, gt=0, description="shift of the reference route's flow-Euler ladder")
    route_per: Literal["step", "prompt"] = Field(
        default="step", description="one route per training step, or one per prompt"
    )
    logit_mean: float = Field(default=0.2, description="P_mean of the logit-normal route")
    logit_std: float = Field(default=1.6, gt=0, description="P_std of the logit-normal route")
    keep_first: bool = Field(default=False, description="train on the state at t = pi/2 too")
    reuse: int = Field(
        default=1,
        ge=1,
        description="updates made of each step's pairs; 2 halves the teacher's share of the time. "
        "States of the student's own (kinds rollout and policy) are checkpointed after the last of them",
    )
    guidance: tuple[float, ...] | None = Field(
        default=None,
        min_length=1,
        description="guidance scales, one drawn per prompt; a single one is what the student stands for. Default: "
        "the pipeline's own, and half a unit around it where the student can be told which",
    )
    filter_rule: Literal["random", "hard", "off"] = Field(default="random", description="brightness filter")
    filter_threshold: float = Field(default=1.0, gt=0, description="mean squared distance to the black latent")
    filter_denominator: Literal["kept", "all"] = Field(
        default="kept",
        description="mean over the kept pairs, or over all (public code; the filter then scales the gradient)",
    )

    @property
    def weights(self) -> dict[SpaceName, float]:
        """Space -> weight of the objective on it; those of weight 0 are left out."""
        weights: dict[SpaceName, float] = {self.kind: 1.0} if isinstance(self.kind, str) else self.kind
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def first(self) -> SpaceName:
        """The space that terms without one of their own take their states from."""
        return next(iter(self.weights))

    _scales = field_validator("guidance", mode="before")(list_of("space.guidance"))

    @field_validator("kind", mode="before")
    @classmethod
    def _spaces_together(cls, kind: Any) -> Any:
        if not isinstance(kind, dict):
            return kind
        if any(":" in str(name) for name in kind) or not any(kind.values()):
            raise ValueError("no space has a weight above 0; write {generation: 1}, with a blank after the colon")
        if "images" in kind and len(kind) > 1:
            raise ValueError("images go with no other space, whose latents are those of walks; give one kind")
        return kind

    @model_validator(mode="after")
    def _couplings(self) -> Self:
        if self.bank and (others := sorted(set(self.weights) - {"coupling", "endpoints"})):
            raise ValueError(
                f"bank holds ends of trajectories, and {others[0]} needs more; give kind coupling or endpoints"
            )
        if self.times == "noise" and set(self.weights) != {"coupling"}:
            raise ValueError("times=noise regresses an end on its own noise; give kind coupling, or times=route")
        if self.anneal_steps and "coupling" not in self.weights:
            raise ValueError("anneal_steps is for kind coupling; leave it out")
        return self


class ConsistencySettings(Section):
    """Continuous-time consistency."""

    prior_weight: PriorWeight = Field(default="inverse_tangent", description="1 / (sigma_data tan t), or none")
    tangent_weight: TangentWeight = Field(
        default="trig",
        description="of the tangent, with D = t - s: `trig`, cos D; `meanflow`, that of flow matching's mean velocity, "
        "(sin t + cos t) / (sin s + cos s); `ayf`, sin D",
    )
    adaptive_weight: bool = Field(default=True, description="learn w_phi(t)")
    normalise: Normalisation = Field(default="l2", description="tangent normalisation")
    normalise_constant: float = Field(default=0.1, ge=0, description="c")
    r_schedule: TangentSchedule = Field(default="warmup_cooldown", description="course of r")
    r_final: float = Field(default=0.75, ge=0, le=1, description="where r ends")
    r_warmup: int = Field(default=4000, ge=0, description="H, steps")
    r_cooldown_start: int = Field(default=15000, ge=0, description="S_r, step")
    r_cooldown_steps: int = Field(default=2000, ge=0, description="T_r, steps")


class VelocitySettings(Section):
    """Velocity matching."""

    huber_constant: float = Field(
        default=0.0,
        ge=0,
        description="of the pseudo-Huber distance, per square root of elements, of F; 0: the square. RF++ has 0.00054 "
        "times the square root of elements: 0.098 for Sana at 1024 px",
    )


class DiscreteSettings(Section):
    """Discrete consistency."""

    huber_constant: float = Field(
        default=0.03, ge=0, description="of the pseudo-Huber distance, per square root of elements, in latent units"
    )
    jump_power: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="p of the factor n^p of the distance where n jumps lead from edge to edge (target.rule=edge): 0, "
        "all jumps count alike; 1, errors of one image's jumps add up",
    )


class AdversarialSettings(Section):
    """Sana-Sprint's adversarial term: hinge loss of heads on the frozen teacher's features of re-noised latents."""

    weight: float = Field(default=0.0, ge=0, description="lambda_adv, beside the consistency loss; 0 for none")
    max_time: float = Field(
        default=0.5, ge=0, le=1, description="share of the judged pictures that are made from pure noise, t = pi/2"
    )
    lr_factor: float = Field(default=1.0, gt=0, description="learning rate of the heads, in units of the student's")
    updates: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="of the heads alone, before each of the student's (alternating); 0: they learn on the student's "
        "passes",
    )
    r1_weight: float = Field(
        default=0.0,
        ge=0,
        description="of the heads' approximate R1, by which a small noise on real latents should not change their "
        "logits; 0 for none (APT: 100 and more)",
    )
    r1_noise: float = Field(default=0.1, gt=0, description="its standard deviation, in units of sigma_data")
    neighbours: bool = Field(
        default=False,
        description="whether each head has convolutions over tokens, so that it sees a token's neighbours",
    )
    logit_mean: float = Field(default=-0.6, description="of the times that pictures are re-noised to")
    logit_std: float = Field(default=1.0, gt=0, description="of the times that pictures are re-noised to")


class OptimiserSettings(Section):
    """The optimiser and its learning rate."""

    name: Literal["adamw", "came"] = Field(default="came", description="CAME (arXiv:2307.02047) or AdamW")
    lr: float = Field(default=1e-5, gt=0, description="learning rate; never rescaled behind your back")
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up of the learning rate")
    decay: float = Field(
        default=0.0, ge=0, le=1, description="last fraction of the run over which it falls linearly to 0"
    )
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.99), description="AdamW's")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled, in units of the learning rate")
    clip: float = Field(default=0.1, gt=0, description="largest gradient norm")


Precision = Literal["no", "bf16", "auto"]


PHASE_SETTINGS = ("objective", "space", "target", "consistency", "discrete", "velocity", "semigroup", "adversarial")
PHASE_SETTINGS += ("optimiser.lr", "optimiser.clip", "training.micro_batch", "training.tangent")
PHASE_SETTINGS += ("fake.updates", "rollout", "matching", "decoupled", "identity", "anchor", "reward")
FIXED_IN_PHASES = ("adversarial.neighbours", "space.reuse", "space.images", "space.cache_latents", "space.guidance")


class Phase(Section):
    """The first steps of a run, or those after the phase before, with some settings changed."""

    steps: int = Field(ge=1, description="how many steps it takes")
    set: dict[str, Any] = Field(default={}, description="dotted settings and their values, such as objective: discrete")

    @field_validator("set")
    @classmethod
    def _changeable(cls, changes: dict[str, Any]) -> dict[str, Any]:
        for key in changes:
            parents = [key.rsplit(".", n)[0] for n in range(key.count(".") + 1)]
            if key in FIXED_IN_PHASES or not set(parents) & {*PHASE_SETTINGS}:
                raise ValueError(f"{key} stays the same in all phases; these may change: {', '.join(PHASE_SETTINGS)}")
        return changes


class TrainingSettings(Section):
    """The loop."""

    steps: int = Field(default=20000, ge=1, description="optimiser steps")
    phases: tuple[Phase, ...] = Field(
        default=(),
        description="the run's first parts, each of so many steps with some settings changed; what is left of `steps` "
        "has the run's own. Discrete first: `[{steps: 300, set: {objective: discrete}}]`",
    )
    prompts_per_step: int = Field(default=1, ge=1, le=65536, description="trajectories per optimiser step")
    micro_batch: int = Field(
        default=0, ge=0, description="pairs per backward pass, 0 for all at once; same gradient, less memory"
    )
    encode_ahead: int = Field(
        default=1,
        ge=1,
        description="steps whose prompts are encoded at once; above 1 the text encoder is off the GPU in between (with "
        "`conditions` it is never there)",
    )
    tangent: Literal["auto", "two_pass", "one_pass", "block", "finite_difference"] = Field(
        default="auto",
        description="backend of the total derivative; auto: one_pass where this model allows it, block where memory is "
        "short, two_pass where one_pass cannot follow it",
    )
    checkpointing: bool = Field(
        default=False,
        description="compute each block's forward again in the backward pass instead of keeping its activations; less "
        "memory, a forward more time",
    )
    precision: Precision = Field(
        default="no", description="autocast of the student; auto: bf16 where the device has instructions for it"
    )
    walk_precision: Precision = Field(default="no", description="autocast of the teacher's walks; auto as above")
    compile: bool = Field(
        default=False,
        description="compile the blocks of teacher and student: a minute or so, then faster (CPU: needs a C++ "
        "compiler); prompts are padded to teacher.max_tokens, so keep that small; with a filter, each number of kept "
        "prompts is compiled for itself",
    )
    shard: Literal["none", "student", "all"] = Field(
        default="none",
        description="spread over the processes of a run the weights of the student, its average and the optimiser, or "
        "`all`: the teacher's too; less memory each, more to send (FSDP2); none: every process has all of them",
    )
    ema: float = Field(default=0.999, ge=0, lt=1, description="decay of the average that is exported")
    checkpoint_every: int = Field(default=200, ge=1, description="steps between checkpoints")
    background_checkpoints: bool | None = Field(
        default=None,
        description="copy a checkpoint and write it beside the next steps; takes CPU memory for the copy; default: "
        "where the student is on a GPU",
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="how many checkpoints stay, the newest ones")
    preview_every: int = Field(default=200, ge=1, description="steps between preview pictures")
    look_every: int | None = Field(
        default=None,
        ge=1,
        description="steps between two looks at the losses, which wait for the device; default: 1 "
        "on a CPU, 10 elsewhere",
    )
    skip_nonfinite: int = Field(
        default=0,
        ge=0,
        description="how many steps of a run may be left out because their gradient is not finite, each noted in the "
        "metrics; 0: the first one stops the run. Above 0 every step waits for the device",
    )
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = Field(
        default=("tensorboard",),
        description="where curves, previews and scores go; tensorboard is in the run folder, the others need the extra "
        "tracking. wandb stays offline unless WANDB_MODE says otherwise",
    )
    time_stages: bool = Field(
        default=False, description="wait for the GPU after every stage of a step, so that the stages' times are true"
    )

    _places = field_validator("trackers", mode="before")(list_of("training.trackers"))

    @model_validator(mode="after")
    def _precise(self) -> "TrainingSettings":
        if self.precision == "bf16" and self.tangent == "finite_difference":
            raise ValueError(
                "precision=bf16 does not go with tangent=finite_difference, since rounding swamps the difference; "
                "leave tangent at auto, or precision at no"
            )
        return self


StepCount = Annotated[int, Field(ge=1, le=64)]


class EvaluationSettings(Section):
    """The results at the end: the evaluator's table with the bundled teacher, the latent error with any other."""

    n: int = Field(
        default=500,
        ge=0,
        description="images per row of the report's table; at most 64 with a teacher of your own; 0 for no table",
    )
    guidance: float | None = Field(
        default=None, description="scale that the teacher is measured at; default: the one that the student stands for"
    )
    steps: tuple[StepCount, ...] | None = Field(
        default=None,
        min_length=1,
        description="numbers of sampling steps that the student is measured at; its README and `stepfold sample` take "
        "the first. Default: 1, 2 and 4",
    )
    clip: str | None = Field(
        default=None, description="folder or hub id of a CLIP: a CLIP score too, with a teacher of your own"
    )

    _listed = field_validator("steps", mode="before")(list_of("evaluation.steps"))

    @field_validator("n")
    @classmethod
    def _no_single_picture(cls, n: int) -> int:
        if n == 1:
            raise ValueError("diversity needs 2 or more; 0 for no table")
        return n
