"""Consistency sampling: predict x_0, add fresh noise, repeat."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepfold.maths.formulations import data_prediction, interpolate
from stepfold.teachers.contract import Condition, Student


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
def sample_consistency(
    student: Student,
    noise: Tensor,
    condition: Condition,
    guidance: Tensor,
    times: Sequence[float],
    fresh_noise: Callable[[int], Tensor],
    sigma_data: float,
) -> Tensor:
    """Multi-step consistency sampling.

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
