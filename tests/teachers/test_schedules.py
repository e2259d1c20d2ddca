"""What is read of schedulers: judged by the schedulers themselves, one row for each class."""

import inspect
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stepfold.errors import UserError
from stepfold.maths.formulations import vp_times
from stepfold.teachers import schedules
from stepfold.teachers.oracle import KnownPicture
from stepfold.teachers.schedules import FLOW, VP, Schedule, flow_shift, read_flow, read_trigflow, read_vp

DDPM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
AS_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
CLOSE = 0.05  # some solvers end above noise level 0, and v is no constant along a path


def make(name: str, **options: Any) -> Any:
    """A scheduler that clips nothing, with those of the options that its class takes."""
    kind: Any = getattr(diffusers, name)
    options = {"clip_sample": False} | options
    return kind(**{key: options[key] for key in inspect.signature(kind.__init__).parameters if key in options})


def led(schedule: Schedule, scheduler: Any, num_steps: int, mu: float | None = None) -> tuple[float, float]:
    """How far the scheduler's states and its end are from those of a known picture, as `oracle.Agreement` has them."""
    torch.manual_seed(0)
    known = KnownPicture(schedule, scheduler, (4, 8, 8), "cpu")
    scheduler.set_timesteps(num_steps, **({} if mu is None else {"mu": mu}))
    sample = torch.randn(3, 4, 8, 8) * (scheduler.init_noise_sigma if isinstance(schedule, schedules.VPSchedule) else 1)
    for timestep in scheduler.timesteps:
        sample, told = known.lead(*schedule.state(scheduler, sample, timestep), timestep)
        sample = scheduler.step(told, timestep, sample, return_dict=False)[0]
    return max(known.off), known.distance(sample)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", VP)
def test_a_scheduler_walks_as_its_schedule_was_read(name: str, prediction: str) -> None:
    scheduler = make(name, **DDPM, prediction_type=prediction)
    schedule = read_vp(scheduler)
    assert max(led(schedule, scheduler, 8)) < CLOSE
    # and it shows where something was misread
    linear = vp_times(diffusers.DDPMScheduler().alphas_cumprod)
    assert max(led(schedules.VPSchedule(linear, prediction, {}), scheduler, 8)) > 2 * CLOSE
    other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[prediction]
    assert max(led(schedules.VPSchedule(schedule.times, other, {}), scheduler, 8)) > 2 * CLOSE


@pytest.mark.parametrize("name", FLOW)
def test_a_flow_scheduler_walks_as_its_schedule_was_read(name: str) -> None:
    scheduler = make(name, **AS_FLOW, shift=3.0, flow_shift=3.0)
    schedule = read_flow(scheduler)
    assert max(led(schedule, scheduler, 8)) < CLOSE
    assert max(led(schedules.FlowSchedule(1500), scheduler, 8)) > 2 * CLOSE
    assert flow_shift(scheduler, 64) == 3.0


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_dynamic_shifting_is_a_shift(name: str, kind: str) -> None:
    scheduler = make(name, use_dynamic_shifting=True, time_shift_type=kind)
    shift = flow_shift(scheduler, 1024)
    scheduler.set_timesteps(5, mu=0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256))
    plain = make(name, shift=shift)
    plain.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25, 0.001])
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25, 0.001], mu=0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256))
    torch.testing.assert_close(scheduler.sigmas, plain.sigmas)
    assert shift != 1


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid", "exp", "own"])
@pytest.mark.parametrize("name", VP)
def test_the_schedule_is_the_classs_own(name: str, betas: str) -> None:
    """With its own defaults, whatever the names of its betas, and the terminal step of zero signal exact."""
    own = {"trained_betas": torch.linspace(0.001, 0.03, 100).tolist()} if betas == "own" else {"beta_schedule": betas}
    for options in ({}, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}):
        try:
            scheduler = make(name, num_train_timesteps=100, **own, **options)
        except NotImplementedError:
            return  # a name of betas that this class does not know
        read = read_vp(scheduler)
        torch.testing.assert_close(read.times[:-1], vp_times(scheduler.alphas_cumprod)[:-1], rtol=0, atol=1e-7)
        rescaled = options and "rescale_betas_zero_snr" in inspect.signature(type(scheduler).__init__).parameters
        last = torch.pi / 2 if rescaled else float(vp_times(scheduler.alphas_cumprod)[-1])
        assert float(read.times[-1]) == pytest.approx(last, abs=1e-7)
        student = diffusers.LCMScheduler(**read.options)  # what a student is sampled with
        torch.testing.assert_close(vp_times(student.alphas_cumprod), read.times, rtol=0, atol=1e-7)


def test_what_another_class_left_in_the_config_is_not_read() -> None:
    scheduler = diffusers.PNDMScheduler.from_config(
        {**DDPM, "rescale_betas_zero_snr": True, "use_flow_sigmas": True, "timestep_type": "continuous", "shift": 5.0}
    )
    assert scheduler.config.rescale_betas_zero_snr and scheduler.config.use_flow_sigmas
    assert torch.equal(read_vp(scheduler).times, vp_times(scheduler.alphas_cumprod)) and flow_shift(scheduler, 1) == 1


def test_every_option_of_every_class_is_known() -> None:
    """Where diffusers adds one, somebody has to say what it does to a teacher."""
    known = schedules.OBEYED | schedules.SAMPLING | schedules.CLIPS | schedules.CLIP_SETTINGS | schedules.ONLY.keys()
    for name in {*VP, *FLOW, "SCMScheduler"}:
        taken = inspect.signature(getattr(diffusers, name).__init__).parameters.keys() - {"self"}
        assert taken <= known, f"{name}: {taken - known}"


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EDMEulerScheduler(), diffusers.EDMDPMSolverMultistepScheduler(), diffusers.IPNDMScheduler(),
        diffusers.CMStochasticIterativeScheduler(), diffusers.UnCLIPScheduler(), diffusers.SCMScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.CogVideoXDDIMScheduler(),
        diffusers.DDIMInverseScheduler(),
        diffusers.UniPCMultistepScheduler(**AS_FLOW), diffusers.UniPCMultistepScheduler(use_flow_sigmas=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)  # fmt: skip
def test_another_schedule_than_noise_or_v_is_refused_by_its_class(scheduler: Any) -> None:
    with pytest.raises(UserError, match=rf"{type(scheduler).__name__}.* predict noise or v are understood, .*; give"):
        read_vp(scheduler)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(), diffusers.UniPCMultistepScheduler(), diffusers.EDMEulerScheduler(),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True),  # of a network that predicts noise
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
        diffusers.FlowMapEulerDiscreteScheduler(),
        diffusers.DEISMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)  # fmt: skip
def test_another_schedule_than_a_flow_is_refused_by_its_class(scheduler: Any) -> None:
    with pytest.raises(UserError, match=rf"{type(scheduler).__name__}.* predict a flow are understood, .*; give"):
        read_flow(scheduler)


def test_another_schedule_than_trigflow_is_refused() -> None:
    assert read_trigflow(diffusers.SCMScheduler(sigma_data=1.0)).sigma_data == 1.0
    with pytest.raises(UserError, match=r"FlowMatchEuler.* predict in TrigFlow are understood"):
        read_trigflow(diffusers.FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize(
    ("scheduler", "option"),
    [
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous"), "timestep_type='continuous', and only"),
        (diffusers.EulerDiscreteScheduler(interpolation_type="log_linear"), "interpolation_type='log_linear'"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True, and only False"),
        (diffusers.FlowMatchLCMScheduler(scale_factors=[0.5, 1.0]), r"scale_factors=\[0.5, 1.0\], and only None"),
    ],
)  # fmt: skip
def test_options_that_change_the_networks_calls_are_refused(scheduler: Any, option: str) -> None:
    read = read_flow if "FlowMatch" in type(scheduler).__name__ else read_vp
    with pytest.raises(UserError, match=option):
        read(scheduler)


@pytest.mark.parametrize("prediction", ["sample", "flow_prediction"])
def test_other_predictions_are_refused(prediction: str) -> None:
    with pytest.raises(UserError, match=f"predicts '{prediction}'; only 'epsilon' and 'v_prediction'"):
        read_vp(diffusers.EulerDiscreteScheduler(prediction_type=prediction))


LADDERS: list[dict[str, Any]] = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}]


@settings(max_examples=60)
@given(
    name=st.sampled_from(VP),
    betas=st.sampled_from([DDPM, {"beta_start": 1e-4, "beta_end": 0.02}]),
    prediction=st.sampled_from(["epsilon", "v_prediction"]),
    spacing=st.sampled_from(["leading", "linspace", "trailing"]),
    ladder=st.sampled_from(LADDERS),
    options=st.sampled_from([{}, {"steps_offset": 1}, {"set_alpha_to_one": True}, {"skip_prk_steps": True}]),
    zero=st.booleans(),
    steps=st.integers(8, 30),
    total=st.sampled_from([500, 1000]),
)
def test_any_sampling_options_leave_what_was_read(
    name: str, betas: Any, prediction: str, spacing: str, ladder: Any, options: Any, zero: bool, steps: int, total: int
) -> None:
    scheduler = make(
        name, **betas, **ladder, **options, prediction_type=prediction, timestep_spacing=spacing,
        num_train_timesteps=total, rescale_betas_zero_snr=zero and prediction == "v_prediction" and not ladder,
    )  # fmt: skip
    # diffusers' own faults: PNDM averages v's of several times, and steps to other times than linspace has
    assume(name != "PNDMScheduler" or (prediction == "epsilon" and spacing != "linspace"))
    assert max(led(read_vp(scheduler), scheduler, steps)) < 2 * CLOSE
