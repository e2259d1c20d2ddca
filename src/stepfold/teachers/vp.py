"""What teachers on a discrete variance-preserving schedule share: they predict noise or v at one of 1000 steps."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch import Tensor
from typing_extensions import override

from stepfold.errors import UserError
from stepfold.maths.formulations import F_from_epsilon, F_from_v, vp_step
from stepfold.teachers.contract import Condition, SamplerName
from stepfold.teachers.family import Predict
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.teachers.schedules import VPSchedule, read_vp

LCM_STEPS = 50  # of LCMScheduler's own ladder, `original_inference_steps`

Raw = Callable[[Any, Tensor, Tensor, Condition], Tensor]
"""(network, x / sigma_data [B, C, ...], training step [B], condition) -> prediction [B, C or more, ...]."""


def vp_network(
    network: Any,
    x_unit: Tensor,
    t: Tensor,
    condition: Condition,
    guidance: Tensor | None,
    *,
    raw: Raw,
    times: Tensor,
    prediction: str,
) -> Tensor:
    """F of a network that predicts noise or v; a variance that it has learned is dropped.

    Args:
        network: embeds no guidance; its time is a training step, with a fraction.
        x_unit, t, condition, guidance: see `Predict`.
        raw: calls it.
        times: TrigFlow times of the training steps.
        prediction: "epsilon" or "v_prediction".
    """
    step, t = vp_step(t, times)
    predicted = raw(network, x_unit, step, condition)[:, : x_unit.shape[1]]
    return F_from_v(predicted) if prediction == "v_prediction" else F_from_epsilon(x_unit, t, predicted)


class VPTeacher(PipelineTeacher):
    """The schedule's part of a teacher; the student takes its steps with LCMScheduler and without guidance.

    Pure noise stands at the schedule's last step, a little below pi/2: there a noise prediction still says something
    about the picture.
    """

    ode = "trigflow"

    schedule: VPSchedule

    @override
    def read_schedule(self) -> VPSchedule:
        return read_vp(self.pipe.scheduler)

    def raw(self) -> Raw:
        """How the network is called: a plain function, or a partial of one."""
        raise NotImplementedError

    @override
    def predictor(self) -> Predict:
        """Refuses a schedule that the student's sampler cannot take, or that ends where noise says nothing."""
        prediction, self.times = self.schedule.prediction, self.schedule.times
        self.start_time = float(self.times[-1])
        if len(self.times) % LCM_STEPS:
            raise UserError(
                f"this pipeline's schedule has {len(self.times)} steps, but its student's sampler, LCMScheduler, needs "
                f"a multiple of {LCM_STEPS}; give a pipeline with num_train_timesteps=1000"
            )
        if prediction == "epsilon" and self.times[-1].cos() < 1e-3:
            raise UserError(
                "this schedule ends in pure noise (zero terminal signal-to-noise), where a noise prediction says "
                "nothing about the picture; set rescale_betas_zero_snr to false in the scheduler's config"
            )
        times = self.times.to(self.device, self.work_dtype)  # here once, not at every call
        return partial(vp_network, raw=self.raw(), times=times, prediction=prediction)

    @override
    def latent_scale(self, vae: Any) -> tuple[Any, Any]:
        """These pipelines read no shift."""
        return vae.config.scaling_factor, 0.0

    @override
    def plain_scheduler(self, num_steps: int | None = None) -> Any:
        return DDIMScheduler(
            **self.schedule.options, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
        )

    @override
    def ddim_times(self, num_steps: int) -> Tensor:
        """The last step ends at 0."""
        scheduler = self.plain_scheduler()
        scheduler.set_timesteps(num_steps)
        return torch.cat([self.times[scheduler.timesteps], self.times.new_zeros(1)])

    @override
    def student_scheduler(self, sampler: SamplerName) -> Any:
        """LCM's adds fresh noise at each step, DDIM's none."""
        if sampler == "consistency":
            return LCMScheduler(**self.schedule.options)
        return self.plain_scheduler()

    @override
    def student_times(self, num_steps: int, sampler: SamplerName) -> list[float]:
        """Those of the scheduler."""
        scheduler = self.student_scheduler(sampler)
        scheduler.set_timesteps(num_steps)
        return self.times[scheduler.timesteps].tolist()

    @override
    def student_call(self, times: Sequence[float], guidance: float, sampler: SamplerName) -> dict[str, Any]:
        """Leaves the times to the scheduler, which knows them."""
        return {"num_inference_steps": len(times), **self.student_guidance(guidance), **self.usual_call()}
