"""Training-free few-step sampling: the teacher under diffusers' solvers, as a baseline."""

import math
from typing import Any, Literal, get_args

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor

from stepfold.errors import UserError
from stepfold.evaluation.measure import Sampler
from stepfold.maths.formulations import flow_velocity, trigflow_input, trigflow_time
from stepfold.teachers.contract import Condition, Teacher

Solver = Literal["euler", "heun", "dpmsolver++"]
NUM_TRAIN_TIMESTEPS = 1000


def make_scheduler(solver: Solver, shift: float) -> Any:
    """A flow-matching scheduler of diffusers with its own ladder of noise levels, shifted as the teacher's is.

    Raises:
        UserError: unknown solver.
    """
    if solver == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    if solver == "heun":
        return FlowMatchHeunDiscreteScheduler(shift=shift)
    if solver == "dpmsolver++":
        return DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", solver_order=2, prediction_type="flow_prediction", use_flow_sigmas=True,
            flow_shift=shift,
        )  # fmt: skip
    raise UserError(f"unknown solver {solver!r}; use one of {', '.join(get_args(Solver))}")


def solver_sampler(teacher: Teacher, solver: Solver, num_steps: int) -> Sampler:
    """The teacher under a solver. Heun calls the network 2 num_steps - 1 times, the others num_steps times."""

    @torch.no_grad()
    def sample(noise: Tensor, condition: Condition, guidance: Tensor, samples: range) -> Tensor:
        scheduler = make_scheduler(solver, teacher.shift_at(num_steps))
        scheduler.set_timesteps(num_steps, device=noise.device)
        x_flow = noise / teacher.sigma_data
        for timestep in scheduler.timesteps:
            t_flow = (timestep / NUM_TRAIN_TIMESTEPS).to(noise).clamp(max=1).expand(len(noise))
            t = trigflow_time(t_flow).clamp(max=math.pi / 2)
            dxdt = teacher.velocity(trigflow_input(x_flow, t_flow, teacher.sigma_data), t, condition, guidance)
            velocity = flow_velocity(x_flow, t_flow, dxdt / teacher.sigma_data)
            x_flow = scheduler.step(velocity, timestep, x_flow, return_dict=False)[0]
        return teacher.sigma_data * x_flow

    return sample
