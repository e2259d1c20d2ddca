"""The teacher's own sampler: first-order steps of its probability-flow ODE."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stepfold.maths.formulations import euler_step, flow_time, flow_velocity, trigflow_input, unsqueeze_like
from stepfold.maths.routes import even_flow_times, flow_euler_times
from stepfold.teachers.contract import Condition, Teacher


@dataclass(frozen=True)
class Step:
    """One step of the teacher's own sampler.

    Attributes:
        x: [B, ...], the state where the step began.
        t: [B], its time.
        dxdt: [B, ...], the velocity there.
        x_next: [B, ...], the state where the step ended; after the last step x_0.
    """

    x: Tensor
    t: Tensor
    dxdt: Tensor
    x_next: Tensor


def sample_teacher(
    teacher: Teacher, noise: Tensor, condition: Condition, guidance: Tensor, num_steps: int, *, even: bool = False
) -> Tensor:
    """The end of `teacher_steps`: x_0 [B, ...]. Arguments as there."""
    x = noise
    for step in teacher_steps(teacher, noise, condition, guidance, num_steps, even=even):
        x = step.x_next
    return x


@torch.no_grad()
def teacher_steps(
    teacher: Teacher, noise: Tensor, condition: Condition, guidance: Tensor, num_steps: int, *, even: bool = False
) -> Iterator[Step]:
    """The teacher's own sampler, as its pipeline runs it with diffusers' flow-Euler scheduler, or with DDIM's.

    Args:
        teacher: gives dx/dt.
        noise: [B, ...], of standard deviation sigma_data.
        condition: B rows.
        guidance: scales [B].
        num_steps: Euler steps; each calls the network for both branches of guidance.
        even: take noise levels 1, 1 - 1/n, ..., 1/n of a flow teacher instead of its scheduler's own. Those end at
            0.001 for every n, so that two steps are little more than one: the even ladder is the fairer baseline.

    Yields:
        Each step when it is taken.
    """
    if teacher.ode == "trigflow":
        x = noise
        for pair in pairwise(teacher.ddim_times(num_steps).tolist()):
            t, t_next = (torch.full((len(noise),), time, dtype=noise.dtype, device=noise.device) for time in pair)
            dxdt = teacher.velocity(x, t, condition, guidance)
            step = Step(x, t, dxdt, euler_step(x, t, t_next, dxdt))
            yield step
            x = step.x_next
        return
    sigma_data = teacher.sigma_data
    times = (even_flow_times if even else flow_euler_times)(num_steps, teacher.shift_at(num_steps)).tolist()
    x_flow = noise / sigma_data
    for time, time_next in pairwise(times):
        t = torch.full((len(noise),), min(time, math.pi / 2), dtype=noise.dtype, device=noise.device)
        t_flow, t_flow_next = flow_time(t), flow_time(torch.full_like(t, time_next))
        x = trigflow_input(x_flow, t_flow, sigma_data)
        dxdt = teacher.velocity(x, t, condition, guidance)
        velocity = flow_velocity(x_flow, t_flow, dxdt / sigma_data)
        x_flow = x_flow + unsqueeze_like(t_flow_next - t_flow, x_flow) * velocity
        yield Step(x, t, dxdt, trigflow_input(x_flow, t_flow_next, sigma_data))
