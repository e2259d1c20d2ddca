"""Prior space: pure noise at the teacher's first time; nothing is walked."""

import torch
from torch import Tensor

from stepfold.spaces.records import States
from stepfold.teachers.contract import Condition


def prior_states(noise: Tensor, start_time: float, condition: Condition, guidance: Tensor) -> States:
    """One state a prompt, where every sampler begins.

    Args:
        noise: [B, ...], of standard deviation sigma_data.
        start_time: where pure noise stands, in (0, pi/2]; see `Teacher.start_time`.
        condition: B rows.
        guidance: scales [B].

    Reference: arXiv:2306.05544 (BOOT), which trains on such states alone.
    """
    index = torch.arange(len(noise), device=noise.device)
    return States(
        x=noise,
        t=torch.full((len(noise),), start_time, dtype=noise.dtype, device=noise.device),
        condition=condition,
        guidance=guidance,
        prompt=index,
        number=index,
        num_drawn=len(noise),
    )
