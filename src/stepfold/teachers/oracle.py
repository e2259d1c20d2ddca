"""The pipeline's own loop with its own scheduler, as the judge of what was read from both."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from stepfold.maths.formulations import equivalent_noise, interpolate, interpolate_velocity
from stepfold.teachers.contract import Condition
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.teachers.schedules import Schedule, without_clipping

COMPARED = 4
"""Calls of the network that are made a second time, to be compared."""
CONTRAST = 3.0
"""Standard deviation of the known picture: above 1, so that its share of a state shows through the noise."""
PICTURE_SEED = 1_000_003  # of none of the noises


@dataclass(frozen=True)
class Agreement:
    """How a teacher and its pipeline's own loop agree.

    Attributes:
        network: the largest relative difference between what the pipeline predicts, guided, and what the teacher does
            at the same states; of the first COMPARED calls.
        schedule: the largest difference between a known picture's share of a state and cos t; see `KnownPicture`.
        end: the relative distance of the last state from that picture.
        left_out: the scheduler's options that clip, and were off.
    """

    network: float
    schedule: float
    end: float
    left_out: str


class KnownPicture:
    """Leads a scheduler to a known picture: it is told what a network would predict that knew no other.

    Data of one picture m have the exact velocity cos t z - sin t m, with z the noise of the state. Every solver, with
    fresh noise or without, keeps the states at cos t m + sin t z and ends at m, if schedule, time and prediction were
    read as the scheduler has them.

    Attributes:
        picture: m [1, ...].
        off: |m's share of the state - cos t| at each step after the first.
    """

    def __init__(self, schedule: Schedule, scheduler: Any, shape: tuple[int, ...], device: torch.device | str) -> None:
        numbers = torch.Generator().manual_seed(PICTURE_SEED)
        self.picture = (CONTRAST * torch.randn(1, *shape, generator=numbers)).to(device)
        self.schedule, self.scheduler, self.off = schedule, scheduler, list[float]()
        self._began = False

    def lead(self, x_unit: Tensor, t: Tensor, timestep: Tensor | float) -> tuple[Tensor, Tensor]:
        """The scheduler's own state [B, ...], and what it is told that the network predicts there.

        Args:
            x_unit: [B, ...]; the first one is pure noise, and becomes a state of the forward process.
            t: [B].
            timestep: the scheduler's.
        """
        picture = self.picture.expand_as(x_unit)
        if self._began:
            share = (x_unit * picture).flatten(1).sum(1) / picture.square().flatten(1).sum(1)
            self.off.append(float((share.mean() - t[0].cos()).abs()))
        else:
            x_unit, self._began = interpolate(picture, x_unit, t), True
        F = interpolate_velocity(picture, equivalent_noise(x_unit, t, picture), t)
        state = self.schedule.sample(self.scheduler, x_unit, t, timestep)
        return state, self.schedule.output(x_unit, t, F)

    def distance(self, made: Tensor) -> float:
        """The relative distance of latents [B, ...] from the picture."""
        return float((made.float() - self.picture).norm() / self.picture.expand_as(made).norm())


def agreement(
    teacher: PipelineTeacher, prompts: Sequence[str], condition: Condition, guidance: Tensor, num_steps: int = 8
) -> Agreement:
    """Runs the pipeline with a scheduler of its own class and options, and compares; see `Agreement`.

    Args:
        teacher: whose pipeline.
        prompts: B strings.
        condition: their encoding, B rows.
        guidance: scales [B], all the same.
        num_steps: of the scheduler; the fewer, the further some solvers stray from their own schedule.
    """
    if teacher.one_by_one and len(prompts) > 1:
        rows = [slice(i, i + 1) for i in range(len(prompts))]
        each = [agreement(teacher, prompts[i], condition.rows(i), guidance[i], num_steps) for i in rows]
        return Agreement(*(max(getattr(found, field.name) for found in each) for field in fields(Agreement)))
    scheduler, left_out = without_clipping(teacher.pipe.scheduler)
    known = KnownPicture(teacher.schedule, scheduler, teacher.latent_shape, teacher.device)
    network, step, count = list[float](), scheduler.step, len(prompts)

    @functools.wraps(step)
    def watched(output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        x_unit, t = teacher.schedule.state(scheduler, teacher.unpack(sample).to(teacher.work_dtype), timestep)
        if len(network) < COMPARED:
            x, time = teacher.sigma_data * x_unit[:count], t[:count]  # DiT's rows come twice
            F = teacher.velocity(x, time, condition, guidance) / teacher.sigma_data
            ours, theirs = teacher.schedule.output(x_unit[:count], time, F), teacher.unpack(output)[:count]
            network.append(float((ours - theirs).norm() / theirs.norm()))
        state, told = (teacher.pack(values) for values in known.lead(x_unit, t, timestep))
        return step(told.to(output.dtype), timestep, state.to(sample.dtype), *args, **kwargs)

    scheduler.step = watched
    draws = [torch.Generator().manual_seed(i) for i in range(count)]
    made = teacher.pipeline_latents(prompts, draws, float(guidance[0]), num_steps, scheduler)
    return Agreement(max(network), max(known.off), known.distance(made), left_out)
