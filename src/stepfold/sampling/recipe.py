"""How a student is sampled: the part of its card that code obeys."""

import warnings
from collections.abc import Sequence
from itertools import pairwise

from pydantic import Field, field_validator, model_validator

from stepfold.config import Config, phases_of
from stepfold.errors import Caution, UserError
from stepfold.jumps import ANYWHERE
from stepfold.maths.policy import Policy
from stepfold.maths.routes import START
from stepfold.sampling.samplers import check_sampler, sampler_of
from stepfold.settings import Section
from stepfold.teachers.contract import SamplerName, Teacher

NUM_STEPS: dict[SamplerName, tuple[int, ...]] = {
    "consistency": (1, 2, 3, 4, 5, 6, 7, 8),
    "flow": (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 28, 50),
    "flow_map": (1, 2, 3, 4, 5, 6, 7, 8),
    "policy": (1, 2, 3, 4, 5, 6, 7, 8),
}
"""Sampler -> numbers of steps that a card lists times for."""


class Recipe(Section):
    """How a student is sampled.

    Attributes:
        sampler: its name in `samplers.SAMPLERS`.
        times: number of steps -> their times, falling from pi/2 or the teacher's start, without the final 0. Empty in
            cards older than the recipe until their teacher, which knows them, is loaded.
        taught: guidance scales of the teacher's walks.
        guidance: scale that the student is told unless another one is asked for.
        sigma_data: standard deviation of its latents.
        jumps_anywhere: whether the student was trained to jump from any time to any other, as gamma-sampling needs.
        policy: the form of a policy student's policy; None for others.
    """

    sampler: SamplerName
    times: dict[int, tuple[float, ...]]
    taught: tuple[float, ...] = Field(min_length=1)
    guidance: float
    sigma_data: float = Field(gt=0)
    jumps_anywhere: bool = False
    policy: Policy | None = None

    @field_validator("times")
    @classmethod
    def _falling(cls, times: dict[int, tuple[float, ...]]) -> dict[int, tuple[float, ...]]:
        for num_steps, listed in times.items():
            inside = all(0 < time <= START for time in listed)
            if num_steps < 1 or len(listed) != num_steps or not inside or any(a < b for a, b in pairwise(listed)):
                raise ValueError(
                    f"times of {num_steps} steps are not as many falling numbers in (0, pi/2]; copy the folder again"
                )
        return times

    @model_validator(mode="after")
    def _has_times(self) -> "Recipe":
        if not self.times and self.sampler != "consistency":
            raise ValueError(f"a {self.sampler} student's card lists its times; copy the folder again")
        if (self.policy is None) == (self.sampler == "policy"):
            raise ValueError(
                "the card of a policy student, and no other, says the form of its policy; copy the folder again"
            )
        return self

    @property
    def jumps_to_zero(self) -> bool:
        """Whether consistency sampling, which tells a student no target but 0, is what it was trained for.

        A map of segments alone is not: but for the last one, 0 lies beyond its edge. Nor is a policy.
        """
        return self.sampler != "policy" and (self.sampler != "flow_map" or self.jumps_anywhere or 1 in self.times)

    def without_target(self, listed: dict[int, tuple[float, ...]]) -> dict[int, tuple[float, ...]]:
        """Those of a consistency model's times that a flow map may be sampled at when it is told no target."""
        if self.jumps_anywhere or (1 in self.times and len(self.times) > 1):
            return listed
        return {1: listed[1]} if self.jumps_to_zero else {}

    def sampled_by(self, asked: str | None) -> "Recipe":
        """This recipe with another sampler.

        Args:
            asked: its name; None for the student's own.

        Raises:
            UserError: there is no such sampler, or the student was not trained for it.
        """
        if asked == "consistency" and self.sampler == "flow_map" and not self.jumps_to_zero:
            raise UserError(
                "--sampler is consistency, but this student was trained to jump from edge to edge of its segments, not "
                "to 0; leave --sampler out"
            )
        return self if asked is None else self.model_copy(update={"sampler": check_sampler(self.sampler, asked)})

    def times_for(self, num_steps: int) -> tuple[float, ...]:
        """The times of so many steps.

        Raises:
            UserError: the card does not list them.
        """
        if num_steps not in self.times:
            known, several = ", ".join(map(str, sorted(self.times))), len(self.times) > 1
            raise UserError(
                f"this student's card has times for {known} step{'' if known == '1' else 's'}, not for {num_steps}; "
                f"{'choose one of these' if several else f'give --steps {known}'}"
            )
        return self.times[num_steps]

    def scale_for(self, asked: float | None) -> float:
        """The guidance scale to tell the student; warns of one outside of those that it was taught.

        Args:
            asked: scale that the user wants; None for the student's usual one.

        Raises:
            UserError: the student was taught one scale, and another one is asked for.
        """
        if asked is not None and len(set(self.taught)) == 1 and asked not in self.taught:
            raise UserError(
                f"--guidance is {asked:g}, but this student was taught at {self.taught[0]:g} alone and stands for "
                "that; leave --guidance out"
            )
        if asked is None:
            return self.guidance
        if not (least := min(self.taught)) <= asked <= (most := max(self.taught)):
            outside = f"guidance {asked:g} is outside of {least:g} to {most:g}, which the student was taught"
            warnings.warn(outside, Caution, stacklevel=2)
        return asked

    def gamma_for(self, asked: float) -> float:
        """The share of fresh noise in the student's steps.

        Args:
            asked: in [0, 1]; 0 is none.

        Raises:
            UserError: the student was not trained for any.
        """
        if asked and self.sampler != "flow_map":
            raise UserError(
                f"--gamma is {asked:g}, but {self.sampler} sampling has no such share of fresh noise; leave --gamma out"
            )
        if asked and not self.jumps_anywhere:
            raise UserError(
                f"--gamma is {asked:g}, but this student was trained to jump between a few times alone, and fresh "
                "noise needs jumps to others; leave --gamma out"
            )
        return asked


def make_recipe(config: Config, teacher: Teacher, taught: Sequence[float], usual: float) -> Recipe:
    """The recipe of a run's student.

    Args:
        config: the run's settings.
        teacher: gives the times.
        taught: guidance scales of its walks.
        usual: scale that a student of several scales is told unless another one is asked for.

    Raises:
        UserError: `evaluation.steps` has a number that a student of this sampler has no times for.
    """
    sampler = sampler_of(config)
    if unknown := [steps for steps in config.evaluation.steps or () if steps not in NUM_STEPS[sampler]]:
        known = ", ".join(map(str, NUM_STEPS[sampler]))
        raise UserError(
            f"evaluation.steps has {unknown[0]}, but a {sampler} student has times for {known}; choose of these"
        )
    times, trained = times_of(teacher, sampler), trained_steps(config)
    return Recipe(
        sampler=sampler,
        times={n: listed for n, listed in times.items() if trained is None or n in trained},
        taught=tuple(taught),
        guidance=usual if len(set(taught)) > 1 else taught[0],
        sigma_data=teacher.sigma_data,
        jumps_anywhere=sampler == "flow_map" and trained is None,
        policy=policy_of(config, teacher),
    )


def policy_of(config: Config, teacher: Teacher) -> Policy | None:
    """The form of a run's student's policy; None where it has none."""
    part = config.policy
    if config.objective != "policy":
        return None
    return Policy(part.nodes, part.substeps, teacher.shift_at(part.steps))


def trained_steps(config: Config) -> set[int] | None:
    """The numbers of steps that a run's student is trained to take; None for all.

    Of segments it is their number: a student's own steps go from edge to edge. From pure noise alone it is one step.
    """
    _, last = phases_of(config)[-1]
    if last.objective == "policy":
        return {last.policy.steps}
    if last.space.times == "noise":
        return {1}
    if not last.target.jumps:
        return None
    if set(last.space.weights) == {"prior"}:
        return {1}
    if last.target.rules & ANYWHERE:
        return None
    return set(last.target.grids) | ({1} if "zero" in last.target.rules else set())


def times_of(teacher: Teacher, sampler: SamplerName) -> dict[int, tuple[float, ...]]:
    """Number of steps -> the times at which a student of the teacher takes them."""
    return {num_steps: tuple(teacher.student_times(num_steps, sampler)) for num_steps in NUM_STEPS[sampler]}
