"""Classifier-free guidance of a family's pipeline, and how a run may change it."""

import torch
from torch import Tensor

from stepfold.errors import UserError
from stepfold.maths.formulations import flow_state, flow_velocity, guide, trigflow_output, trigflow_time, unsqueeze_like
from stepfold.teachers.calls import PipelineCalls


class Guiding(PipelineCalls):
    """Abstract: the part of `Family` that puts the branches of guidance together.

    Attributes:
        source: folder or hub id.
        guided_times: lowest and highest time at which classifier-free guidance acts; None for all.
        zero_star: whether guidance is CFG-Zero*'s.
    """

    guided_times: tuple[float, float] | None = None
    zero_star: bool = False
    source: str

    def guided(self, x_unit: Tensor, t: Tensor, without: Tensor, with_prompt: Tensor, weight: Tensor) -> Tensor:
        """F of the two branches of classifier-free guidance -> F under guidance, as the pipeline does it by default.

        Both predictions are there in full, so a family may rescale token by token, or guide x_0 = cos t x_unit - sin t
        F and go back. Flow velocities are `formulations.flow_velocity` of F at `flow_state(x_unit, t)`.

        Args:
            x_unit, t: as of `Predict`.
            without, with_prompt: F of either branch [B, ...].
            weight: w [B], `guidance_weight` of the scales.
        """
        return guide(without, with_prompt, weight)

    def guide_between(self, lowest: float, highest: float) -> None:
        """Lets classifier-free guidance act between two flow-matching noise levels alone.

        Reference: arXiv:2404.07724 (guidance in a limited interval), whose levels are EDM's.

        Raises:
            UserError: this teacher's guidance is not classifier-free.
        """
        if self.guidance_kind != "classifier_free":
            raise UserError(
                f"teacher.guidance_interval is set, but the guidance of {self.source!r} is {self.guidance_kind}, not "
                "classifier_free, and cannot be switched off; leave it out"
            )
        low, high = trigflow_time(torch.tensor([lowest, highest], dtype=torch.float64)).tolist()
        self.guided_times = low, high

    def weight_at(self, t: Tensor, guidance: Tensor | None) -> Tensor | None:
        """Weights w [B] of classifier-free guidance at times t [B]; None where none acts, which costs half."""
        if guidance is None or self.guidance_kind != "classifier_free":
            return None
        weight = self.guidance_weight(guidance)
        if self.guided_times is None:
            return weight
        acts = (t >= self.guided_times[0]) & (t <= self.guided_times[1])
        return torch.where(acts, weight, 1.0) if acts.any() else None

    def guide_from_zero_star(self) -> None:
        """Lets guidance be CFG-Zero*'s; see `zero_star_branch`.

        Raises:
            UserError: this teacher's guidance is not classifier-free.
        """
        if self.guidance_kind != "classifier_free":
            raise UserError(
                f"teacher.guidance_rule is zero_star, but the guidance of {self.source!r} is {self.guidance_kind}, not "
                "classifier_free, and has no branch to scale; leave it out"
            )
        self.zero_star = True

    def guided_branches(self, x_unit: Tensor, t: Tensor, without: Tensor, with_prompt: Tensor, w: Tensor) -> Tensor:
        """F under this run's guidance. Arguments of `guided`, which it asks."""
        if self.zero_star:
            without = zero_star_branch(x_unit, t, without, with_prompt)
        return self.guided(x_unit, t, without, with_prompt, w)


def zero_star_branch(x_unit: Tensor, t: Tensor, without: Tensor, with_prompt: Tensor) -> Tensor:
    """F of s v_u, with the factor s = <v_c, v_u> / ||v_u||^2 of each sample that brings it nearest to v_c.

    v are flow-matching velocities. Formed of F, the factor would be another.

    Args:
        x_unit: x / sigma_data [B, ...].
        t: [B].
        without: F without the prompt [B, ...].
        with_prompt: F with it [B, ...].

    Reference: arXiv:2503.18886 (CFG-Zero*).
    Deviation: no zero-init, which is a start at the second noise level.
    """
    x_flow, t_flow = flow_state(x_unit, t)
    unprompted, prompted = flow_velocity(x_flow, t_flow, without), flow_velocity(x_flow, t_flow, with_prompt)
    dot, square = (prompted * unprompted).flatten(1).sum(1), unprompted.square().flatten(1).sum(1)
    factor = dot / square.clamp(min=torch.finfo(square.dtype).tiny)
    return trigflow_output(x_flow, t_flow, unsqueeze_like(factor, x_flow) * unprompted)
