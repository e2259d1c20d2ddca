"""Training steps as public codes take them today, written plainly; what ours are measured against.

First a TBCM step, as its public code and its peers take it. In forward passes of the student, per trained pair: 2 of
the teacher (guidance), 2 for a forward-mode derivative whose own output is thrown away, 1 forward pass with a graph, 1
for its checkpointed blocks once more, 2 for the backward pass. The text encoder runs within the step, and it and the
autoencoder stay in memory. Attention is unfused everywhere, since forward-mode differentiation has no fused kernel and
the models are switched as a whole.

Where practice differs from one code to the next, it gets the kinder form: both branches of guidance in one batch,
prompts cut to their own length, the derivative taken without a graph, the unconditional prompt encoded once. The moving
average of the weights, which not all of them keep, is left to the caller: it costs both sides the same.

Reference: arXiv:2511.20410, Algorithm 1.

Then the peers of time_to_quality.py, each a class with the method `update`, one step of its script's loop. They learn
from clean latents that are there already, which costs them nothing, and share what the bundled teacher asks for: one
guidance scale, one precision, a learning rate for minutes in place of days.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepfold.config import Config
from stepfold.maths.formulations import data_prediction, euler_step, interpolate, interpolate_velocity, trigflow_time
from stepfold.maths.routes import half_pi, logit_normal_times
from stepfold.objectives.adversarial import Discriminator, discriminator_loss, generator_loss
from stepfold.sampling.consistency import predict_data
from stepfold.teachers.contract import Condition, Student, concatenate
from stepfold.teachers.sana import SanaTeacher, trigflow_network
from stepfold.training.draws import Batch
from stepfold.training.stages import Stages


def without_shortcuts(transformer: Any) -> Any:
    """A transformer as diffusers made it: every call computes everything, whatever the package has put around it."""
    for module in transformer.modules():
        module.__dict__.pop("forward", None)
    return transformer


def practice_gradient(
    teacher: SanaTeacher,
    transformer: Any,
    student: Student,
    batch: Batch,
    condition: Condition,
    config: Config,
    stages: Stages,
) -> None:
    """Adds the gradient of the mean loss to the student, whose blocks are checkpointed; `transformer` is the teacher's.

    Of the settings it follows those that `step.py` uses: no filter, no prior weight, the public tangent normalisation,
    a learnt weight and r = 1.
    """
    bf16 = config.training.precision == "bf16"
    device = batch.guidance.device
    with sdpa_kernel(SDPBackend.MATH):
        with stages("teacher"), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x, t, dxdt = walk_teacher(teacher, transformer, batch, condition, config)
        count = x.shape[1]
        x, t, dxdt = x.flatten(0, 1), t.flatten(), dxdt.flatten(0, 1)
        condition, guidance = condition.repeat_interleave(count), batch.guidance.repeat_interleave(count)
        size = config.training.micro_batch or len(x)
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            with stages("student forward"), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = pair_losses(
                    student, x[part], t[part], dxdt[part], condition.rows(part), guidance[part], teacher.sigma_data
                )
            with stages("student backward"):
                (loss.sum() / len(x)).backward()


@torch.no_grad()
def walk_teacher(
    teacher: SanaTeacher, transformer: Any, batch: Batch, condition: Condition, config: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """States, times and velocities of the walks [B, N - 1, ...]; the first state, pure noise, is not trained on."""
    x, states, times, velocities = batch.noise(), [], [], []
    route = batch.route(config.space)
    route = torch.cat([route, torch.zeros_like(route[:, :1])], dim=1)
    for n in range(route.shape[1] - 1):
        t, step = route[:, n], (route[:, n] - route[:, n + 1])[:, None, None, None]
        x_unit, both = x / teacher.sigma_data, concatenate([teacher.null(condition), condition])
        F = trigflow_network(
            transformer, torch.cat([x_unit, x_unit]), torch.cat([t, t]), both, None, teacher.time_scale
        )
        without, with_prompt = F.float().chunk(2)
        dxdt = teacher.sigma_data * (without + batch.guidance[:, None, None, None] * (with_prompt - without))
        if n > 0:
            states.append(x)
            times.append(t)
            velocities.append(dxdt)
        x = step.cos() * x - step.sin() * dxdt
    return torch.stack(states, 1), torch.stack(times, 1), torch.stack(velocities, 1)


def pair_losses(
    student: Student,
    x: Tensor,
    t: Tensor,
    dxdt: Tensor,
    condition: Condition,
    guidance: Tensor,
    sigma_data: float,
    r: float = 1.0,
) -> Tensor:
    """Continuous-time consistency, per pair [M]; r is the tangent's warm-up."""

    def network(x_unit: Tensor, t: Tensor) -> Tensor:
        return student(x_unit, t, condition, guidance)

    cos, sin = t.cos()[:, None, None, None], t.sin()[:, None, None, None]
    with torch.no_grad():
        direction = (cos * sin * dxdt / sigma_data, t.cos() * t.sin())
        dF = torch.func.jvp(network, (x / sigma_data, t), direction)[1]  # its output [0] is thrown away
    F = network(x / sigma_data, t).float()
    w = -student.log_variance(t, guidance).float()

    F_minus = F.detach()
    g = -(cos**2) * (sigma_data * F_minus - dxdt) - r * (cos * sin * x + sigma_data * dF.float())
    g = g / (g.flatten(1).norm(dim=1)[:, None, None, None] + 0.1)
    error = (F - F_minus - g).square().flatten(1).mean(1)
    return w.exp() * error - w


@dataclass(frozen=True)
class Clean:
    """A batch of a peer's loop.

    Attributes:
        x0: clean latents [B, ...], of standard deviation sigma_data.
        condition: of their prompts, B rows.
        guidance: scales [B].
        generator: of the step's random numbers.
    """

    x0: Tensor
    condition: Condition
    guidance: Tensor
    generator: torch.Generator

    def noise(self, sigma_data: float) -> Tensor:
        """Pure noise [B, ...]."""
        return sigma_data * torch.randn(self.x0.shape, generator=self.generator)

    def uniform(self) -> Tensor:
        """U[0, 1) [B]."""
        return torch.rand(len(self.x0), generator=self.generator)


class Peer:
    """A loop that moves a student; `average` is what it hands over.

    Attributes:
        decay: of the average.
        betas, weight_decay: of AdamW.
    """

    decay, betas, weight_decay = 0.98, (0.9, 0.999), 0.01

    def __init__(self, teacher: SanaTeacher, student: Student, lr: float) -> None:
        self.teacher, self.student, self.lr, self.step = teacher, student, lr, 0
        self.average = copy.deepcopy(student).requires_grad_(False)
        self.optimiser = self.adamw(student.parameters())

    def adamw(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """An optimiser with the script's numbers."""
        return torch.optim.AdamW(parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)

    def move(self, optimiser: torch.optim.Optimizer, loss: Tensor, clip: float) -> None:
        """One step down the mean of a loss [B]."""
        loss.mean().backward()
        nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def move_student(self, loss: Tensor, clip: float = 1.0) -> None:
        """One step of the student, and its average after it."""
        self.move(self.optimiser, loss, clip)
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for a, p in zip(self.average.parameters(), self.student.parameters(), strict=True):
                a.lerp_(p, 1 - decay)

    def update(self, batch: Clean) -> None:
        """One step of the script's loop."""
        raise NotImplementedError

    def picture(self, student: Student, x: Tensor, t: Tensor, batch: Clean) -> Tensor:
        """f(x, t) [B, ...]."""
        return predict_data(student, x, t, batch.condition, batch.guidance, self.teacher.sigma_data)


class LCM(Peer):
    """Latent consistency, as diffusers' train_lcm_distill scripts do it: one state an image, a solver of 50 steps.

    In forward passes an image: 2 of the teacher, 1 for the target, 3 of the student.

    Reference: arXiv:2310.04378; the average of decay 0.95 is the target, the pseudo-Huber constant 0.001.
    """

    solver_steps, huber = 50, 0.001
    decay = 0.95

    def update(self, batch: Clean) -> None:
        level = torch.ceil(self.solver_steps * (1 - batch.uniform())).clamp(min=1)
        t, t_next = (trigflow_time((level - less) / self.solver_steps) for less in (0, 1))
        x = interpolate(batch.x0, batch.noise(self.teacher.sigma_data), t)
        with torch.no_grad():
            dxdt = self.teacher.velocity(x, t, batch.condition, batch.guidance)
            x_next = euler_step(x, t, t_next, dxdt)
            target = self.picture(self.average, x_next, t_next, batch)
            target = torch.where((level > 1).view(-1, *[1] * (x.ndim - 1)), target, x_next)
        distance = (self.picture(self.student, x, t, batch) - target).square()
        self.move_student(((distance + self.huber**2).sqrt() - self.huber).flatten(1).mean(1))
        self.step += 1


class Sprint(Peer):
    """sCM with heads on the teacher's features, as Sana-Sprint's script does it: student and heads take turns.

    In forward passes an image: 2 of the teacher, 2 for the tangent, 3 of the student, and for the heads' part 3 of the
    student and 3 through the teacher's features; the heads' own turn takes 1 of the student and 2 of the teacher.

    Reference: arXiv:2503.09641; weight 0.5, pure noise in half of the judged images.
    """

    warmup, weight = 0.2, 0.5  # of r, in shares of the run's steps

    def __init__(self, teacher: SanaTeacher, student: Student, lr: float, steps: int = 1000) -> None:
        super().__init__(teacher, student, lr)
        self.steps = steps
        self.heads = Discriminator(teacher.feature_widths)
        self.optimiser_of_heads = self.adamw(self.heads.parameters())

    def judged(self, batch: Clean) -> tuple[Tensor, Tensor]:
        """A state and its time that the judged image is made from."""
        t = logit_normal_times(torch.randn(len(batch.x0), generator=batch.generator), self.teacher.sigma_data)
        t = torch.where(batch.uniform() < 0.5, half_pi(t.dtype), t)
        return interpolate(batch.x0, batch.noise(self.teacher.sigma_data), t), t

    def features(self, x0: Tensor, batch: Clean, t: Tensor) -> list[Tensor]:
        """The teacher's, of images that are noised again."""
        x = interpolate(x0, batch.noise(self.teacher.sigma_data), t)
        return self.teacher.features(x, t, batch.condition, batch.guidance)

    def update(self, batch: Clean) -> None:
        sigma_data = self.teacher.sigma_data
        again = logit_normal_times(torch.randn(len(batch.x0), generator=batch.generator), sigma_data, -0.6, 1.0)
        if self.step % 2:
            with torch.no_grad():
                fake = self.features(self.picture(self.student, *self.judged(batch), batch), batch, again)
                real = self.features(batch.x0, batch, again)
            self.move(self.optimiser_of_heads, discriminator_loss(self.heads(real), self.heads(fake)), 1.0)
        else:
            t = logit_normal_times(torch.randn(len(batch.x0), generator=batch.generator), sigma_data)
            x = interpolate(batch.x0, batch.noise(sigma_data), t)
            dxdt = self.teacher.velocity(x, t, batch.condition, batch.guidance)
            r = min(1.0, self.step / max(self.warmup * self.steps, 1))
            with sdpa_kernel(SDPBackend.MATH):
                loss = pair_losses(self.student, x, t, dxdt, batch.condition, batch.guidance, sigma_data, r)
            picture = self.picture(self.student, *self.judged(batch), batch)
            adversarial = generator_loss(self.heads(self.features(picture, batch, again)))
            self.move_student(loss + self.weight * adversarial, clip=0.1)
            self.optimiser_of_heads.zero_grad(set_to_none=True)
        self.step += 1


class DMD2(Peer):
    """Distribution matching with a whole fake score, one step, as DMD2's script does it without images.

    The fake score learns in each step, and the student in each fifth. In forward passes an image: 1 of the student and
    3 of the fake score, and in the fifth 3 of the student, 2 of the teacher and 1 of the fake score besides.

    Reference: arXiv:2405.14867; times in [0.02, 0.98] of the schedule.
    """

    betas = (0.0, 0.999)
    turns = 5

    def __init__(self, teacher: SanaTeacher, student: Student, lr: float) -> None:
        super().__init__(teacher, student, lr)
        self.fake = copy.deepcopy(student)
        self.optimiser_of_fake = self.adamw(self.fake.parameters())

    def update(self, batch: Clean) -> None:
        sigma_data, t = self.teacher.sigma_data, trigflow_time(0.02 + 0.96 * batch.uniform())
        start = torch.full_like(t, half_pi(t.dtype))
        if self.step % self.turns == 0:
            picture = self.picture(self.student, batch.noise(sigma_data), start, batch)
            with torch.no_grad():
                x = interpolate(picture, batch.noise(sigma_data), t)
                real = data_prediction(x, t, self.teacher.velocity(x, t, batch.condition, batch.guidance))
                fake = self.picture(self.fake, x, t, batch)
                size = (picture - real).abs().flatten(1).mean(1).view(-1, *[1] * (x.ndim - 1))
                target = picture - (fake - real) / size
            self.move_student(0.5 * (picture - target).square().flatten(1).mean(1), clip=10.0)
        with torch.no_grad():
            picture = self.picture(self.student, batch.noise(sigma_data), start, batch)
        z = batch.noise(sigma_data)
        x = interpolate(picture, z, t)
        F = self.fake(x / sigma_data, t, batch.condition, batch.guidance)
        velocity = interpolate_velocity(picture, z, t) / sigma_data
        self.move(self.optimiser_of_fake, (F - velocity).square().flatten(1).mean(1), clip=10.0)
        self.step += 1


PEERS: dict[str, type[Peer]] = {"lcm": LCM, "sana-sprint": Sprint, "dmd2": DMD2}
