"""Flow-matching schedulers of our own with levels of their own, for pipelines of diffusers."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from typing_extensions import override


class ListedScheduler(FlowMatchEulerDiscreteScheduler):
    """Abstract: takes the `levels` of its config, falling to 0, whatever levels and shift a pipeline gives.

    Attributes:
        made: what was done for these levels, in two words of its errors.
    """

    config: Any
    made: str

    @override
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """The config's levels.

        Raises:
            ValueError: another number of steps is asked for.
        """
        levels = torch.tensor(self.config.levels, dtype=torch.float32)
        asked = num_inference_steps or len(sigmas if sigmas is not None else levels[1:])
        if asked != len(levels) - 1:
            raise ValueError(
                f"this {self.made} for {len(levels) - 1} steps, not {asked}; give num_inference_steps={len(levels) - 1}"
            )
        self.num_inference_steps = asked
        self.sigmas, self.timesteps = levels, (levels[:-1] * self.config.num_train_timesteps).to(device)
        self._step_index = self._begin_index = None
