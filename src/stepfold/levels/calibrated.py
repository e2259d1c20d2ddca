"""Calibrated multistep: Euler steps with corrections by earlier velocities, fitted to the teacher's own trajectory.

No scheduler of diffusers takes such coefficients, so `CalibratedScheduler` is one of our own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor
from typing_extensions import override

from stepfold.levels.search import Reference
from stepfold.levels.solvers import Velocity
from stepfold.teachers.listed_scheduler import ListedScheduler

RIDGE = 1e-3  # of the mean diagonal of the normal equations


def corrected(x: Tensor, step: float, velocities: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """x + h v_i + h sum_j w_j (v_i - v_j) over the earlier velocities j < i.

    Args:
        x: state [B, ...].
        step: h, the next level less this one.
        velocities: v_0, ..., v_i.
        weights: i numbers.
    """
    *earlier, slope = velocities
    for weight, other in zip(weights, earlier, strict=True):
        slope = slope + weight * (velocities[-1] - other)
    return x + step * slope


def calibrate(
    velocity: Velocity, fine: Reference, levels: Sequence[float], ridge: float = RIDGE
) -> tuple[list[list[float]], Tensor]:
    """Weights of `corrected`, step by step on the solver's own states, by ridge least squares.

    Args:
        velocity: of the teacher.
        fine: its trajectory; `levels` are among its levels.
        levels: k + 1.
        ridge: part of the mean diagonal that is added to it; without it, few prompts make weights explode.

    Returns:
        The weights of each step, of which the first has none, and the end [B, ...].

    Reference: arXiv:2403.01329 (bespoke non-stationary solvers), whose coefficients are fitted by descent.
    """
    x, velocities, weights = fine.noise, [], []
    for i, level in enumerate(levels[:-1]):
        step, wanted = levels[i + 1] - level, fine.states[fine.levels.index(levels[i + 1])]
        velocities.append(velocity(x, level))
        differences = [(step * (velocities[-1] - other)).double().flatten() for other in velocities[:-1]]
        fitted: list[float] = []
        if differences:
            columns = torch.stack(differences)
            left = (wanted - x - step * velocities[-1]).double().flatten()
            normal = columns @ columns.T
            normal += ridge * normal.diagonal().mean() * torch.eye(len(columns), dtype=torch.float64)
            fitted = torch.linalg.solve(normal, columns @ left).tolist()
        x = corrected(x, step, velocities, fitted)
        weights.append(fitted)
    return weights, x


def calibrated_rollout(
    velocity: Velocity, noise: Tensor, levels: Sequence[float], weights: Sequence[Sequence[float]]
) -> Tensor:
    """The end of calibrated steps from noise [B, ...]."""
    x, velocities = noise, []
    for i, level in enumerate(levels[:-1]):
        velocities.append(velocity(x, level))
        x = corrected(x, levels[i + 1] - level, velocities, weights[i])
    return x


class CalibratedScheduler(ListedScheduler):
    """A scheduler for pipelines of flow-matching teachers that takes the levels and weights of one search.

    It is a class of this package: a pipeline that is saved with it needs the package to load.

    Examples:
        pipe.scheduler = CalibratedScheduler(levels=[...], weights=[...])
        pipe("a fox in snow", num_inference_steps=4)
    """

    made = "scheduler was fitted"

    @register_to_config
    def __init__(
        self,
        levels: Sequence[float] = (1.0, 0.0),
        weights: Sequence[Sequence[float]] = ((),),
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps)
        self.velocities: list[Tensor] = []

    @override
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **other: Any) -> Any:
        """The next state; see `corrected`."""
        i = self._step_index or 0
        self._step_index, self.velocities = i + 1, [*self.velocities[:i], model_output.float()]
        step = self.config.levels[i + 1] - self.config.levels[i]
        x = corrected(sample.float(), step, self.velocities, self.config.weights[i]).to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(x) if return_dict else (x,)  # type: ignore[arg-type]
