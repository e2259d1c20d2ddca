"""The samplers of students, by name; which one a student is for, and why no other."""

from collections.abc import Callable
from typing import get_args

from torch import Tensor

from stepfold.config import Config, phases_of
from stepfold.errors import UserError
from stepfold.methods import METHODS
from stepfold.sampling.consistency import sample_consistency
from stepfold.sampling.flow import sample_flow
from stepfold.sampling.flow_map import sample_flow_map
from stepfold.sampling.policy import sample_policy
from stepfold.teachers.contract import SamplerName

StudentSampler = Callable[..., Tensor]
"""(student, noise, condition, guidance, times, fresh_noise, sigma_data) -> x_0; see `sample_consistency`.

That of flow maps takes `gamma` too.
"""

SAMPLERS: dict[SamplerName, StudentSampler] = {
    "consistency": sample_consistency,
    "flow": sample_flow,
    "flow_map": sample_flow_map,
    "policy": sample_policy,
}
"""A new sampler is one file and its name here."""

NO_TARGET = "it is told one time and does not know where to jump"
ONE_F = "it gives one F at a time, and a policy is made of several"
SEVERAL_F = "it gives several F at a time, which only its policy puts together"
UNFIT: dict[tuple[SamplerName, SamplerName], str] = {
    ("consistency", "flow"): "its F points at the end of the trajectory, not along it, so Euler steps leave the path",
    ("consistency", "flow_map"): NO_TARGET,
    ("flow", "consistency"): "its F is a velocity, which points at the mean of all possible pictures: a blurred one",
    ("flow", "flow_map"): NO_TARGET,
    ("flow_map", "flow"): "its F is the mean velocity of a jump, not the velocity at a time",
    **{(name, "policy"): ONE_F for name in ("consistency", "flow", "flow_map")},
    **{("policy", name): SEVERAL_F for name in ("consistency", "flow", "flow_map")},
}
"""(sampler that a student was trained for, another one) -> why the other one is wrong for it.

Consistency sampling is right for a flow map, which jumps to 0 where it is told no target.
"""


def check_sampler(trained: SamplerName, asked: str) -> SamplerName:
    """The sampler that is asked for, if a student can be sampled with it.

    Args:
        trained: the student's own sampler.
        asked: what the user wants.

    Raises:
        UserError: there is no such sampler, or the student was not trained for it.
    """
    if asked not in SAMPLERS:
        raise UserError(f"--sampler is {asked!r}; choose {', '.join(get_args(SamplerName))}, or leave it out")
    if reason := UNFIT.get((trained, asked)):
        raise UserError(
            f"--sampler is {asked}, but this student was trained for {trained} sampling: {reason}; leave --sampler out"
        )
    return asked


def sampler_of(config: Config) -> SamplerName:
    """The sampler that a run's student is for: that of the objective which it is trained on last.

    A student of segments that is told one time jumps to the lower end of its segment: with Euler steps from end to end.
    """
    _, last = phases_of(config)[-1]
    if last.target.jumps:
        return "flow_map" if last.student.times == "two" else "flow"
    return METHODS[last.objective].sampler


def in_diffusers(sampler: SamplerName) -> SamplerName:
    """The sampler with which plain diffusers samples a student: it tells a network no target, so a map jumps to 0.

    A policy's steps come to Euler steps with a mean of its velocities.
    """
    return {"flow_map": "consistency", "policy": "flow"}.get(sampler, sampler)  # type: ignore[return-value]
