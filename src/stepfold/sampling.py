"""Sampling: the student's few steps and the teacher's many. Previews, commands and tests all come through here."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stepfold.maths.formulations import (
    data_prediction,
    euler_step,
    flow_time,
    flow_velocity,
    interpolate,
    trigflow_input,
    unsqueeze_like,
)
from stepfold.maths.routes import even_flow_times, flow_euler_times
from stepfold.teachers.contract import Condition, Student, Teacher


def predict_data(
    student: Student, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor, sigma_data: float
) -> Tensor:
    """The consistency function f(x, t) = cos t x - sin t sigma_data F(x / sigma_data, t).

    Args:
        student: gives F.
        x: [M, ...], at time t.
        t: [M], in [0, pi/2].
        condition: M rows.
        guidance: scales [M].
        sigma_data: standard deviation of the data.

    Returns:
        x_0 [M, ...], of x's dtype under autocast too.

    Reference: arXiv:2410.11081, Sec. 3; arXiv:2511.20410, Sec. 3.
    """
    F = student(x / sigma_data, t, condition, guidance)
    return data_prediction(x, t, sigma_data * F.to(x.dtype))


@torch.no_grad()
def sample_student(
    student: Student,
    noise: Tensor,
    condition: Condition,
    guidance: Tensor,
    times: Sequence[float],
    fresh_noise: Callable[[int], Tensor],
    sigma_data: float,
) -> Tensor:
    """Multi-step consistency sampling: predict x_0, add fresh noise of the next time, repeat.

    Args:
        student: gives F.
        noise: [B, ...], of standard deviation sigma_data.
        condition: B rows.
        guidance: scales [B].
        times: falling from pi/2, without the final 0; one network call each.
        fresh_noise: step index (from 1) -> noise like `noise`, of standard deviation sigma_data.
        sigma_data: standard deviation of the data.

    Returns:
        x_0 [B, ...].

    Reference: arXiv:2303.01469, Algorithm 1, in TrigFlow; equal to diffusers' SCMScheduler.
    """
    x, x0 = noise, noise
    for i, time in enumerate(times):
        t = torch.full((len(noise),), time, dtype=noise.dtype, device=noise.device)
        if i:
            x = interpolate(x0, fresh_noise(i), t)
        x0 = predict_data(student, x, t, condition, guidance, sigma_data)
    return x0


@dataclass(frozen=True)
class Step:
    """One step of the teacher's own sampler.

    Attributes:
        x: [B, ...], the state it began at.
        t: [B], its time.
        dxdt: [B, ...], the velocity it was taken with.
        x_next: [B, ...], the state it ended at; after the last step x_0.
    """

    x: Tensor
    t: Tensor
    dxdt: Tensor
    x_next: Tensor


def sample_teacher(
    teacher: Teacher, noise: Tensor, condition: Condition, guidance: Tensor, num_steps: int, *, even: bool = False
) -> Tensor:
    """Where `teacher_steps` end: x_0 [B, ...]. Arguments as there."""
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
        even: of a flow teacher, noise levels 1, 1 - 1/n, ..., 1/n instead of the scheduler's own, whose last one is
            0.001 for every n: its two steps are one step and a touch. The fairer ladder to measure a teacher with at
            few steps.

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
    times = (even_flow_times if even else flow_euler_times)(num_steps, teacher.shift).tolist()
    x_flow = noise / sigma_data
    for time, time_next in pairwise(times):
        t = torch.full((len(noise),), min(time, math.pi / 2), dtype=noise.dtype, device=noise.device)
        t_flow, t_flow_next = flow_time(t), flow_time(torch.full_like(t, time_next))
        x = trigflow_input(x_flow, t_flow, sigma_data)
        dxdt = teacher.velocity(x, t, condition, guidance)
        velocity = flow_velocity(x_flow, t_flow, dxdt / sigma_data)
        x_flow = x_flow + unsqueeze_like(t_flow_next - t_flow, x_flow) * velocity
        yield Step(x, t, dxdt, trigflow_input(x_flow, t_flow_next, sigma_data))
