"""The first step by the teacher, under guidance, the others by the student: the first decides most of the diversity."""

from collections.abc import Callable

import torch
from torch import Tensor

from stepfold.errors import UserError
from stepfold.maths.formulations import euler_step
from stepfold.sampling.recipe import Recipe
from stepfold.sampling.samplers import SAMPLERS
from stepfold.teachers.contract import Condition, Student, Teacher


@torch.no_grad()
def sample_hybrid(
    teacher: Teacher,
    student: Student,
    noise: Tensor,
    condition: Condition,
    guidance: Tensor,
    recipe: Recipe,
    num_steps: int,
    fresh_noise: Callable[[int], Tensor],
) -> Tensor:
    """One Euler step of the teacher's to the student's second time, then the student's steps.

    No noise is drawn before the student's first step: the state is the teacher's.

    Args:
        teacher: takes the first step; with classifier-free guidance it costs two network calls.
        student: takes the others.
        noise: [B, ...], of standard deviation sigma_data.
        condition: B rows.
        guidance: scales [B], for both.
        recipe: how the student is sampled.
        num_steps: 2 or more, the teacher's first one among them.
        fresh_noise: as of `sample_consistency`, from step 2 on.

    Returns:
        x_0 [B, ...].

    Reference: arXiv:2503.10637.

    Raises:
        UserError: one step, which would be the teacher's alone.
    """
    if num_steps < 2:
        raise UserError("the teacher takes the first step, so a sample takes 2 steps or more; give --steps 4, say")
    first, *rest = recipe.times_for(num_steps)
    t, t_next = (
        torch.full((len(noise),), time, dtype=noise.dtype, device=noise.device)
        for time in (min(first, teacher.start_time), rest[0])
    )
    x = euler_step(noise, t, t_next, teacher.velocity(noise, t, condition, guidance))
    sampler = SAMPLERS[recipe.sampler]
    return sampler(student, x, condition, guidance, rest, lambda i: fresh_noise(i + 1), recipe.sigma_data)
