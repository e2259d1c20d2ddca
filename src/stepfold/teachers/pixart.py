"""PixArt-Sigma: noise prediction on a discrete variance-preserving schedule, classifier-free guidance."""

import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler, PixArtSigmaPipeline
from torch import Tensor

from stepfold.errors import UserError
from stepfold.maths.formulations import F_from_epsilon, vp_step, vp_times
from stepfold.teachers.contract import Condition, Student
from stepfold.teachers.pipeline import PipelineTeacher, Predict

NO_SIZES = {"resolution": None, "aspect_ratio": None}


def pixart_network(
    transformer: Any, x_unit: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, times: Tensor
) -> Tensor:
    """F [B, C, H, W] of a PixArtTransformer2DModel that predicts noise; a variance that it has learned is dropped.

    Args:
        transformer: embeds no guidance; its time is a training step.
        x_unit, t, condition, guidance: see `Predict`.
        times: TrigFlow times of the training steps.
    """
    step, t = vp_step(t, times)
    predicted = transformer(
        x_unit,
        encoder_hidden_states=condition.embeds,
        encoder_attention_mask=condition.mask,
        timestep=step,
        added_cond_kwargs=NO_SIZES,
        return_dict=False,
    )[0]
    return F_from_epsilon(x_unit, t, predicted[:, : x_unit.shape[1]])


class PixArtTeacher(PipelineTeacher):
    """PixArtSigmaPipeline; the student is one too, with LCMScheduler and without guidance.

    Pure noise stands at the schedule's last step, a little below pi/2: there the noise prediction still says something
    about the picture.
    """

    pipelines = (PixArtSigmaPipeline,)
    ode = "trigflow"

    def predictor(self) -> Predict:
        """See `PipelineTeacher`."""
        schedule: Any = DDPMScheduler.from_config(self.pipe.scheduler.config)
        if schedule.config.prediction_type != "epsilon":
            raise UserError(
                f"this PixArt predicts {schedule.config.prediction_type!r}; only 'epsilon' is understood, as published"
            )
        self.times = vp_times(schedule.alphas_cumprod)
        self.start_time = float(self.times[-1])
        if self.times[-1].cos() < 1e-3:
            raise UserError(
                "this schedule ends in pure noise (zero terminal signal-to-noise), where a noise prediction says "
                "nothing about the picture; set rescale_betas_zero_snr to false in the scheduler's config"
            )
        return partial(pixart_network, times=self.times)

    def geometry(self, factor: int) -> tuple[int, int, int]:
        """See `PipelineTeacher`."""
        config = self.transformer.config
        return config.in_channels, factor * config.patch_size, config.sample_size * factor

    def encode_texts(self, prompts: Sequence[str]) -> Condition:
        """See `PipelineTeacher`; captions are cleaned as the pipeline does by default."""
        embeds, mask, *_ = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device, max_sequence_length=self.max_tokens,
            clean_caption=inspect.signature(self.pipe.__call__).parameters["clean_caption"].default,
        )  # fmt: skip
        return Condition(embeds.to(self.dtype), mask)

    def call_options(self) -> dict[str, Any]:
        """See `PipelineTeacher`."""
        return {"use_resolution_binning": False}

    def plain_scheduler(self) -> Any:
        """See `PipelineTeacher`."""
        return DDIMScheduler.from_config(
            self.pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
        )

    def ddim_times(self, num_steps: int) -> Tensor:
        """See `Teacher`; the last step ends at 0."""
        scheduler = self.plain_scheduler()
        scheduler.set_timesteps(num_steps)
        return torch.cat([self.times[scheduler.timesteps], self.times.new_zeros(1)])

    def student_parts(self) -> dict[str, Any]:
        """See `PipelineTeacher`."""
        return self.pipe.components | {"scheduler": LCMScheduler.from_config(self.pipe.scheduler.config)}

    def student_times(self, num_steps: int) -> list[float]:
        """See `Teacher`; LCMScheduler's."""
        scheduler = self.student_parts()["scheduler"]
        scheduler.set_timesteps(num_steps)
        return self.times[scheduler.timesteps].tolist()

    def student_call(self, times: Sequence[float], guidance: float) -> dict[str, Any]:
        """See `PipelineTeacher`."""
        return {"num_inference_steps": len(times), "guidance_scale": 1.0, **self._usual_call()}

    def lora_student(self, rank: int) -> Student:
        """See `PipelineTeacher`."""
        raise UserError("PixArtSigmaPipeline loads no LoRA; train all weights (leave student.lora at 0)")

    def load_lora(self, folder: Path, rank: int) -> Student:
        """See `PipelineTeacher`."""
        return self.lora_student(rank)
