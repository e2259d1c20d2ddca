"""A scheduler of our own for policy students: no scheduler of diffusers takes N velocities in an image's layout.

diffusers' `PiflowScheduler` takes channels last, and no levels of ours.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor
from typing_extensions import override

from stepfold.maths.formulations import flow_time
from stepfold.sampling.recipe import Recipe
from stepfold.teachers.listed_scheduler import ListedScheduler


class PolicyScheduler(ListedScheduler):
    """Euler steps with a mean of N velocities, of weights of its own for each step: the student's policy, exactly.

    It is a class of this package: plain diffusers needs the package for it.

    Examples:
        pipe.scheduler = PolicyScheduler.from_pretrained("FOLDER", subfolder="policy_scheduler")
        pipe("a fox in snow", num_inference_steps=4, guidance_scale=1.0)
    """

    made = "student was trained"

    @register_to_config
    def __init__(
        self,
        levels: Sequence[float] = (1.0, 0.0),
        weights: Sequence[Sequence[float]] = ((1.0,),),
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps)

    @override
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **other: Any) -> Any:
        """The next state: channels are the dimension that is N times that of the sample."""
        i = self._step_index or 0
        self._step_index, weights = i + 1, self.config.weights[i]
        wide = next(d for d, size in enumerate(model_output.shape) if size != sample.shape[d])
        velocity = sum(w * v for w, v in zip(weights, model_output.float().chunk(len(weights), wide), strict=True))
        x = sample.float() + (self.config.levels[i + 1] - self.config.levels[i]) * torch.as_tensor(velocity)
        x = x.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(x) if return_dict else (x,)  # type: ignore[arg-type]


def scheduler_of(recipe: Recipe, num_train_timesteps: int) -> PolicyScheduler:
    """The scheduler of a policy student."""
    assert recipe.policy is not None, "the caller checks"
    ((_, times),) = recipe.times.items()
    whole = (*times, 0.0)
    weights = [recipe.policy.path(*pair).means[-1].tolist() for pair in pairwise(whole)]
    levels = flow_time(torch.tensor(whole, dtype=torch.float64)).clamp(max=1.0).tolist()
    return PolicyScheduler(levels, weights, num_train_timesteps)
