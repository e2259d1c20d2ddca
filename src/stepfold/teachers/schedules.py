"""Reads a pipeline's scheduler: which schedule its network was trained on, what it predicts, what its time means.

A scheduler's other options say how its own sampler steps. They leave the network's function of (x, t) as it is, so a
teacher's walk does not depend on them.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from stepfold.errors import UserError
from stepfold.maths.formulations import (
    epsilon_from_F,
    flow_input,
    flow_time,
    flow_velocity,
    trigflow_input,
    trigflow_time,
    v_from_F,
    vp_times,
)

EITHER = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler")
"""Classes of schedulers for both: flow matching with `use_flow_sigmas`, else a variance-preserving schedule."""
VP = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    *EITHER,
)
"""Classes for networks that predict noise or v on a discrete variance-preserving schedule."""
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", *EITHER)
"""Classes for networks that predict a flow-matching velocity."""

OBEYED = frozenset(
    {
        "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
        "prediction_type", "use_flow_sigmas", "flow_shift", "shift", "use_dynamic_shifting", "base_shift", "max_shift",
        "base_image_seq_len", "max_image_seq_len", "time_shift_type", "sigma_data",
    }
)  # fmt: skip
"""Options that say what the network is, or where its flow sampler has its noise levels."""
SAMPLING = frozenset(
    {
        "timestep_spacing", "steps_offset", "set_alpha_to_one", "skip_prk_steps", "variance_type", "solver_order",
        "algorithm_type", "solver_type", "lower_order_final", "euler_at_final", "final_sigmas_type", "predict_x0",
        "disable_corrector", "solver_p", "predictor_order", "corrector_order", "tau_func", "use_karras_sigmas",
        "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "lambda_min_clipped", "sigma_min", "sigma_max",
        "shift_terminal", "stochastic_sampling", "original_inference_steps", "timestep_scaling", "upscale_mode",
    }
)  # fmt: skip
"""Options of the pipeline's own sampler: its steps, solver and fresh noise."""
CLIPS = frozenset({"clip_sample", "thresholding"})
"""Options that clip a predicted picture to [-1, 1]; latents go beyond, so neither teacher nor student is clipped."""
CLIP_SETTINGS = frozenset({"clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"})
ONLY = {"timestep_type": "discrete", "interpolation_type": "linear", "invert_sigmas": False, "scale_factors": None}
"""Options that change what the network is called with -> the one value that is understood."""
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""Names of betas that all VP schedulers know."""


@dataclass(frozen=True)
class VPSchedule:
    """A discrete variance-preserving schedule and what a network on it predicts.

    Attributes:
        times: float64 [T], rising: the TrigFlow times of the training steps.
        prediction: "epsilon" or "v_prediction".
        options: of any scheduler in `VP`, for this same schedule.
    """

    times: Tensor
    prediction: str
    options: dict[str, Any]

    def state(self, scheduler: Any, sample: Tensor, timestep: Tensor | float) -> tuple[Tensor, Tensor]:
        """The (x_unit [B, ...], t [B]) at which the network is called, of a state of the scheduler's.

        Args:
            scheduler: of the pipeline, in the middle of its loop.
            sample: [B, ...], in the scheduler's own coordinates.
            timestep: what the network is told, a training step or between two.
        """
        step = torch.as_tensor(timestep, dtype=torch.float64, device="cpu").clamp(0, len(self.times) - 1)
        below = step.floor().long().clamp(max=len(self.times) - 2)
        t = torch.lerp(self.times[below], self.times[below + 1], step - below)
        return scheduler.scale_model_input(sample, timestep), t.to(sample).expand(len(sample))

    def sample(self, scheduler: Any, x_unit: Tensor, t: Tensor, timestep: Tensor | float) -> Tensor:
        """The inverse of `state`: the scheduler's own state [B, ...]."""
        ones = torch.ones_like(x_unit)
        return x_unit / scheduler.scale_model_input(ones, timestep)

    def output(self, x_unit: Tensor, t: Tensor, F: Tensor) -> Tensor:
        """What the network predicts where its F is this."""
        return epsilon_from_F(x_unit, t, F) if self.prediction == "epsilon" else v_from_F(F)


@dataclass(frozen=True)
class FlowSchedule:
    """Flow matching, whose network's time counts to `num_train_timesteps`; methods as of `VPSchedule`."""

    num_train_timesteps: int

    def state(self, scheduler: Any, sample: Tensor, timestep: Tensor | float) -> tuple[Tensor, Tensor]:
        """As of `VPSchedule`."""
        t_flow = torch.as_tensor(timestep).to(sample) / self.num_train_timesteps
        t_flow = t_flow.expand(len(sample))
        return trigflow_input(sample, t_flow, 1.0), trigflow_time(t_flow)

    def sample(self, scheduler: Any, x_unit: Tensor, t: Tensor, timestep: Tensor | float) -> Tensor:
        """As of `VPSchedule`."""
        return flow_input(x_unit, t, 1.0)

    def output(self, x_unit: Tensor, t: Tensor, F: Tensor) -> Tensor:
        """As of `VPSchedule`."""
        return flow_velocity(flow_input(x_unit, t, 1.0), flow_time(t), F)


@dataclass(frozen=True)
class TrigFlowSchedule:
    """SCMScheduler's, in TrigFlow itself; methods as of `VPSchedule`."""

    sigma_data: float

    def state(self, scheduler: Any, sample: Tensor, timestep: Tensor | float) -> tuple[Tensor, Tensor]:
        """As of `VPSchedule`."""
        return sample / self.sigma_data, torch.as_tensor(timestep).to(sample).expand(len(sample))

    def sample(self, scheduler: Any, x_unit: Tensor, t: Tensor, timestep: Tensor | float) -> Tensor:
        """As of `VPSchedule`."""
        return self.sigma_data * x_unit

    def output(self, x_unit: Tensor, t: Tensor, F: Tensor) -> Tensor:
        """As of `VPSchedule`."""
        return self.sigma_data * F


Schedule = VPSchedule | FlowSchedule | TrigFlowSchedule


def read_vp(scheduler: Any) -> VPSchedule:
    """The schedule of a network that predicts noise or v.

    Raises:
        UserError: the scheduler's class, or one of its options, is not understood.
    """
    own = options_of(scheduler)
    if type(scheduler).__name__ not in VP or own.get("use_flow_sigmas", False):
        raise _not_for(scheduler, own, "predict noise or v", "a DDIMScheduler, EulerDiscreteScheduler or alike")
    prediction = own["prediction_type"]
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(f"this network predicts {prediction!r}; only 'epsilon' and 'v_prediction' are understood")
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    options = {name: own[name] for name in names}
    options["rescale_betas_zero_snr"] = bool(own.get("rescale_betas_zero_snr", False))
    if own["trained_betas"] is None and own["beta_schedule"] not in BETA_SCHEDULES:
        options |= {"trained_betas": scheduler.betas.tolist(), "rescale_betas_zero_snr": False}  # rescaled already
    return VPSchedule(vp_times(DDIMScheduler(**options).alphas_cumprod), prediction, options)


def read_flow(scheduler: Any) -> FlowSchedule:
    """The schedule of a network that predicts a flow-matching velocity.

    Raises:
        UserError: the scheduler's class, or one of its options, is not understood.
    """
    own, name = options_of(scheduler), type(scheduler).__name__
    fits = own.get("use_flow_sigmas", False) and own["prediction_type"] == "flow_prediction" if name in EITHER else True
    if name not in FLOW or not fits:
        raise _not_for(scheduler, own, "predict a flow", "a FlowMatchEulerDiscreteScheduler")
    return FlowSchedule(own["num_train_timesteps"])


def read_trigflow(scheduler: Any) -> TrigFlowSchedule:
    """The schedule of a network in TrigFlow.

    Raises:
        UserError: the scheduler is no SCMScheduler, or is not set to TrigFlow.
    """
    own = options_of(scheduler)
    if type(scheduler).__name__ != "SCMScheduler" or own["prediction_type"] != "trigflow":
        raise _not_for(scheduler, own, "predict in TrigFlow", "an SCMScheduler with prediction_type='trigflow'")
    return TrigFlowSchedule(own["sigma_data"])


def options_of(scheduler: Any) -> dict[str, Any]:
    """A scheduler's options that its class takes; what else its config holds is left over from another class.

    Raises:
        UserError: one changes what the network is called with, in a way that is not understood.
    """
    taken = inspect.signature(type(scheduler).__init__).parameters
    own = {name: scheduler.config[name] for name in taken if name in scheduler.config}
    for name, value in own.items():
        if name in OBEYED | SAMPLING | CLIPS | CLIP_SETTINGS:
            continue
        understood = ONLY.get(name, taken[name].default)
        if value != understood:
            raise UserError(
                f"this pipeline's {type(scheduler).__name__} has {name}={value!r}, and only {understood!r} is "
                "understood; give a pipeline without that option"
            )
    return own


def _not_for(scheduler: Any, own: Mapping[str, Any], networks: str, classes: str) -> UserError:
    said = [f"{name}={own[name]!r}" for name in ("use_flow_sigmas", "prediction_type") if name in own]
    options = f" ({', '.join(said)})" if said else ""
    return UserError(
        f"this pipeline's scheduler is {type(scheduler).__name__}{options}; of its kind, networks that {networks} are "
        f"understood, with {classes}; give one that was trained so, or, if this one was, save it with such a scheduler"
    )


def without_clipping(scheduler: Any) -> tuple[Any, str]:
    """A scheduler of the same class and options that clips no prediction, and the names of what was on.

    Latents go beyond [-1, 1]: a pipeline that clips them draws other pictures than its network's ODE.
    """
    on = sorted(name for name in CLIPS if options_of(scheduler).get(name))
    return type(scheduler).from_config(scheduler.config, **dict.fromkeys(on, False)), " and ".join(on)


def flow_shift(scheduler: Any, tokens: int, mu: float | None = None) -> float:
    """The shift of a flow scheduler's noise levels.

    Args:
        scheduler: read before by `read_flow`.
        tokens: of the picture, which dynamic shifting goes by as diffusers' pipelines compute it.
        mu: what the pipeline gives a scheduler that shifts dynamically, where it has a rule of its own.
    """
    own = options_of(scheduler)
    if not own.get("use_dynamic_shifting", False):
        return float(own.get("shift", own.get("flow_shift", 1.0)))
    if mu is None:
        first, last = own.get("base_image_seq_len", 256), own.get("max_image_seq_len", 4096)
        low, high = own.get("base_shift", 0.5), own.get("max_shift", 1.15)
        mu = float(low + (tokens - first) / (last - first) * (high - low))
    return math.exp(mu) if own.get("time_shift_type", "exponential") == "exponential" else mu
