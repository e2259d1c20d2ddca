"""From the pairs of a step to a gradient: each objective's loss, and the passes that share it."""

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepfold.config import Config
from stepfold.maths.formulations import euler_step, interpolate, unsqueeze_like
from stepfold.maths.routes import half_pi
from stepfold.maths.schedules import tangent_warmup
from stepfold.maths.tangent import total_derivative
from stepfold.objectives.adversarial import Discriminator, discriminator_loss, generator_loss
from stepfold.objectives.consistency import ConsistencyOptions, consistency_terms, tangent_direction
from stepfold.objectives.discrete import discrete_terms
from stepfold.sampling.consistency import predict_data
from stepfold.spaces.pairs import Pairs, pairs_per_prompt
from stepfold.teachers.contract import Student, Teacher
from stepfold.training.draws import JudgedDraw
from stepfold.training.processes import is_sharded
from stepfold.training.stages import Stages


@dataclass(frozen=True)
class Judgement:
    """What the adversarial term needs besides the pairs."""

    teacher: Teacher
    discriminator: Discriminator
    draw: JudgedDraw


def update(
    student: Student,
    pairs: Pairs,
    config: Config,
    step: int,
    sigma_data: float,
    accelerator: Accelerator,
    backend: str = "two_pass",
    *,
    judgement: Judgement | None = None,
    stages: Stages | None = None,
    denominator: float | None = None,
    most_pairs: int = 0,
) -> dict[str, Tensor]:
    """Adds the gradient of the mean loss over the pairs, in micro-batches; returns per-pair figures [M].

    `backend` is the tangent's. With a `judgement`, the discriminator gets the gradient of its own loss. `stages` notes
    what forward and backward passes take. Where several processes share a step, the mean is over `denominator`
    pairs, those of the others among them, and this one makes as many passes as one that has `most_pairs`.
    """
    stages = stages or Stages()
    denominator = denominator or (len(pairs) if config.space.filter_denominator == "kept" else pairs.num_walked)
    most = max(most_pairs, len(pairs))
    size = min(config.training.micro_batch or most, most)
    passes = [(slice(start, start + size), not pairs.stand_in) for start in range(0, len(pairs), size)]
    passes += [(slice(1), False)] * (-(-most // size) - len(passes))
    figures = defaultdict(list)
    for rows_of_pass, counts in passes:
        part = pairs.rows(rows_of_pass)
        with stages("student forward"):
            if config.objective == "discrete":
                whole_walks = (
                    config.space.kind == "generation"
                    and size % pairs_per_prompt(config.space.route_steps, config.space.keep_first) == 0
                )
                loss, rows = discrete_loss(student, part, config, sigma_data, accelerator, whole_walks)
            else:
                loss, rows = continuous_loss(student, part, config, step, sigma_data, accelerator, backend)
        for_heads = None
        if judgement:
            with stages("adversarial"):
                for_student, for_heads = adversarial_losses(student, part, judgement, config, accelerator)
            loss = loss + config.adversarial.weight * for_student
            rows |= {"loss": loss, "generator_loss": for_student, "discriminator_loss": for_heads}
        with stages("student backward"), student_attention(config.training.precision, pairs.x.device):
            inputs = None if is_sharded(student) else [p for p in student.parameters() if p.requires_grad]
            accelerator.backward(counts * (loss.sum() / denominator), inputs=inputs)
        if for_heads is not None:
            with stages("adversarial"):
                accelerator.backward(counts * (for_heads.sum() / denominator))
        for name, values in rows.items():
            figures[name].append(values.detach()[: None if counts else 0])
    return {name: torch.cat(values) for name, values in figures.items()}


def continuous_loss(
    student: Student,
    part: Pairs,
    config: Config,
    step: int,
    sigma_data: float,
    accelerator: Accelerator,
    backend: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Continuous-time consistency, per pair [M]: the loss, with gradient, and what to log."""
    c = config.consistency
    r = tangent_warmup(
        step,
        warmup=c.r_warmup,
        final=c.r_final,
        cooldown_start=c.r_cooldown_start,
        cooldown_steps=c.r_cooldown_steps,
        schedule=c.r_schedule,
    )

    def network(x_unit: Tensor, t: Tensor) -> Tensor:
        return student(x_unit, t, part.condition, part.guidance)

    dx, dt = tangent_direction(part.x, part.t, part.dxdt, sigma_data)
    with accelerator.autocast(), student_attention(config.training.precision, part.x.device):
        tangent = total_derivative(network, part.x / sigma_data, part.t, dx, dt, backend)
        log_variance = student.log_variance(part.t, part.guidance)
    terms = consistency_terms(
        tangent.F,
        tangent.dF,
        part.x,
        part.t,
        part.dxdt,
        log_variance.float(),
        r=r,
        sigma_data=sigma_data,
        options=ConsistencyOptions(c.prior_weight, c.adaptive_weight, c.normalise, c.normalise_constant),
    )
    return terms.loss, {
        "loss": terms.loss,
        "squared_error": terms.squared_error,
        "tangent_norm": terms.tangent_norm,
        "w_phi": -log_variance.detach(),
        "|F|": tangent.F.detach().flatten(1).norm(dim=1),
    }


def discrete_loss(
    student: Student,
    part: Pairs,
    config: Config,
    sigma_data: float,
    accelerator: Accelerator,
    whole_walks: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Discrete consistency, per pair [M]: the loss, with gradient, and what to log. The student is its own target.

    With `whole_walks`, each pair's step ends in the state of the pair after it, or at t = 0, where f is the identity:
    one forward pass yields pictures and targets.
    """

    def picture(x: Tensor, t: Tensor) -> Tensor:
        with accelerator.autocast(), student_attention(config.training.precision, x.device):
            return predict_data(student, x, t, part.condition, part.guidance, sigma_data)

    x_next = euler_step(part.x, part.t, part.t_next, part.dxdt)
    x0 = picture(part.x, part.t)
    if whole_walks:
        target = torch.where(unsqueeze_like(part.t_next > 0, x0), x0.roll(-1, 0), x_next)
    else:
        with torch.no_grad():
            target = picture(x_next, part.t_next)
    terms = discrete_terms(x0, target, config.discrete.huber_constant)
    return terms.loss, {"loss": terms.loss, "squared_error": terms.squared_error}


def adversarial_losses(
    student: Student,
    part: Pairs,
    judgement: Judgement,
    config: Config,
    accelerator: Accelerator,
) -> tuple[Tensor, Tensor]:
    """Sana-Sprint's adversarial term, per pair [M]: what the student minimises, and what the discriminator does.

    The student's picture, made from the pair's state or from pure noise, and the pair's clean latent are re-noised to
    one time, and heads on the frozen teacher's features tell them apart.
    """
    teacher, draw = judgement.teacher, judgement.draw.rows(part.number)
    x = torch.where(unsqueeze_like(draw.at_start, part.x), draw.start, part.x)
    t = torch.where(draw.at_start, min(half_pi(part.t.dtype), teacher.start_time), part.t)

    def features(picture: Tensor, noise: Tensor) -> list[Tensor]:
        return teacher.features(interpolate(picture, noise, draw.t), draw.t, part.condition, part.guidance)

    with accelerator.autocast(), student_attention(config.training.precision, x.device):
        fake = predict_data(student, x, t, part.condition, part.guidance, teacher.sigma_data)
        fake_features = features(fake, draw.noise[:, 0])
        for_student = generator_loss(judgement.discriminator(fake_features))
        with torch.no_grad():
            real_features = features(part.x0, draw.noise[:, 1])
        real_logits = judgement.discriminator(real_features)
        fake_logits = judgement.discriminator([feature.detach() for feature in fake_features])
    return for_student, discriminator_loss(real_logits, fake_logits)


def student_attention(precision: str, device: torch.device) -> AbstractContextManager:
    """Plain attention where fused attention is the slow one: backward in bfloat16 on a CPU (docs/lab-log.md).

    Around the backward pass too: blocks that it computes again have to take the way they took before.
    """
    return sdpa_kernel(SDPBackend.MATH) if precision == "bf16" and device.type == "cpu" else nullcontext()
