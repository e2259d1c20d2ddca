"""What people get wrong about a pipeline, in words: its guidance scale, its time, its output, its noise levels."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from stepfold.maths.formulations import flow_time
from stepfold.teachers.contract import SamplerName
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.teachers.schedules import FlowSchedule, TrigFlowSchedule, VPSchedule

STEPS = (1, 2, 4)
"""Numbers of steps whose noise levels are said."""
FLOWS = {
    "noise": "velocity z - x_0, from data x_0 to noise z",
    "data": "velocity x_0 - z, from noise z to data x_0: the other sign than in most pipelines",
}
"""`rises_to` of a family -> what its flow networks give."""
OUTPUT = "output of the network"
"""The name of what a network predicts, among the conventions."""
PREDICTIONS = {"epsilon": "noise z, at x = cos t x_0 + sin t z", "v_prediction": "v = cos t z - sin t x_0"}


def conventions(
    teacher: PipelineTeacher, times: Mapping[int, Sequence[float]] | None = None, sampler: SamplerName = "consistency"
) -> dict[str, str]:
    """What `stepfold doctor` and a student's card say of a teacher's pipeline: name -> words.

    Args:
        teacher: the teacher.
        times: number of steps -> the times of its student's steps; None for those of one, two and four steps.
        sampler: the student's, in plain diffusers.
    """
    if times is None:
        times = {steps: teacher.student_times(steps, sampler) for steps in STEPS}
    return {
        "guidance scale s and weight w": scale_meaning(teacher),
        "timesteps of the network": time_range(teacher),
        OUTPUT: output_meaning(teacher),
        **{levels_name(n): noise_levels(teacher, each, sampler) for n, each in times.items()},
    }


def levels_name(num_steps: int) -> str:
    """What the noise levels of a student's steps are called."""
    return f"noise levels, {num_steps} step" + "s" * (num_steps > 1)


def scale_meaning(teacher: PipelineTeacher) -> str:
    """How the pipeline counts its guidance scale s: the weight w of v_u + w (v_c - v_u), and which s turns it off."""
    s = teacher.default_guidance
    return {
        "classifier_free": f"s = {s:g} of the pipeline is w = {teacher.guidance_weight(s):g} of v_u + w (v_c - v_u); "
        f"s = {teacher.no_guidance:g} turns guidance off",
        "embedded": f"the network is told s, {s:g} by default; one call a step",
        "none": "no guidance; one call a step",
    }[teacher.guidance_kind]


def time_range(teacher: PipelineTeacher) -> str:
    """What the network's own time counts to, and which way; dF/dt grows with it."""
    return f"in [0, {teacher.time_scale:g}], {teacher.rises_to} at {teacher.time_scale:g}"


def output_meaning(teacher: PipelineTeacher) -> str:
    """What the network predicts, with its sign."""
    if isinstance(teacher.schedule, VPSchedule):
        return PREDICTIONS[teacher.schedule.prediction]
    return FLOWS[teacher.rises_to]


def noise_levels(teacher: PipelineTeacher, times: Sequence[float], sampler: SamplerName) -> str:
    """Where a student takes its steps: as its network sees it, and what a scheduler that shifts has to be given."""
    seen = levels_seen(teacher, times, sampler)
    if not isinstance(teacher.schedule, FlowSchedule):
        return f"{seen}; no shift"
    shift, end = teacher.shift_at(len(times)), teacher.pipe.scheduler.config.get("shift_terminal")
    if end:
        return f"{seen}; the pipeline's own scheduler cannot take them, since it ends at {end:g}"
    if math.isclose(shift, 1):
        return f"{seen}; no shift"
    return f"{seen}; before a scheduler's shift of {shift:.4g}: {in_words(unshifted(sigmas_of(times), shift))}"


def levels_seen(teacher: PipelineTeacher, times: Sequence[float], sampler: SamplerName) -> str:
    """The noise levels, timesteps or times at which a student's network is called."""
    if isinstance(teacher.schedule, VPSchedule):
        scheduler = teacher.student_scheduler(sampler)
        scheduler.set_timesteps(len(times))
        return f"timesteps {in_words(scheduler.timesteps.tolist())} of {type(scheduler).__name__}"
    if isinstance(teacher.schedule, TrigFlowSchedule):
        return f"times {in_words(times)} of TrigFlow"
    return in_words(sigmas_of(times))


def sigmas_of(times: Sequence[float]) -> list[float]:
    """The noise levels of flow matching at some times."""
    return flow_time(torch.tensor(times, dtype=torch.float64)).clamp(max=1).tolist()


def in_words(numbers: Iterable[float]) -> str:
    """`1, 0.7071`."""
    return ", ".join(f"{number:.4g}" for number in numbers)


def unshifted(sigmas: Iterable[float], shift: float) -> list[float]:
    """The noise levels in [0, 1] that a flow scheduler's shift turns into these."""
    return [sigma / (shift - (shift - 1) * sigma) for sigma in sigmas]
