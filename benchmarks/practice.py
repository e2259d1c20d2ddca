"""A TBCM step as its public code and its peers take it today, written plainly; what ours is measured against.

In forward passes of the student, per trained pair: 2 of the teacher (guidance), 2 for a forward-mode derivative whose
own output is thrown away, 1 forward pass with a graph, 1 for its checkpointed blocks once more, 2 for the backward
pass. The text encoder runs within the step, and it and the autoencoder stay in memory. Attention is unfused everywhere,
since forward-mode differentiation has no fused kernel and the models are switched as a whole.

Where practice differs from one code to the next, it gets the kinder form: both branches of guidance in one batch,
prompts cut to their own length, the derivative taken without a graph, the unconditional prompt encoded once. The moving
average of the weights, which not all of them keep, is left to the caller: it costs both sides the same.

Reference: arXiv:2511.20410, Algorithm 1.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepfold.config import Config
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
    student: Student, x: Tensor, t: Tensor, dxdt: Tensor, condition: Condition, guidance: Tensor, sigma_data: float
) -> Tensor:
    """Continuous-time consistency, per pair [M]."""

    def network(x_unit: Tensor, t: Tensor) -> Tensor:
        return student(x_unit, t, condition, guidance)

    cos, sin = t.cos()[:, None, None, None], t.sin()[:, None, None, None]
    with torch.no_grad():
        direction = (cos * sin * dxdt / sigma_data, t.cos() * t.sin())
        dF = torch.func.jvp(network, (x / sigma_data, t), direction)[1]  # its output [0] is thrown away
    F = network(x / sigma_data, t).float()
    w = -student.log_variance(t, guidance).float()

    F_minus = F.detach()
    g = -(cos**2) * (sigma_data * F_minus - dxdt) - (cos * sin * x + sigma_data * dF.float())
    g = g / (g.flatten(1).norm(dim=1)[:, None, None, None] + 0.1)
    error = (F - F_minus - g).square().flatten(1).mean(1)
    return w.exp() * error - w
