"""Schedules over optimiser steps."""

from typing import Literal, get_args

from stepfold.errors import UserError

TangentSchedule = Literal["warmup_cooldown", "warmup", "none"]


def tangent_warmup(
    step: int,
    *,
    warmup: int,
    final: float,
    cooldown_start: int,
    cooldown_steps: int,
    schedule: TangentSchedule = "warmup_cooldown",
) -> float:
    """r, the weight of the second bracket of the tangent.

    `warmup_cooldown`: r = min(1, step / warmup), blended into `final` over `cooldown_steps` from `cooldown_start` on.
    `warmup`: linear from 0 straight to `final` over `warmup` steps. `none`: `final` throughout.

    Args:
        step: optimiser step, from 0.
        warmup: H, steps; 0 starts at the top. Released code: 4000.
        final: r_final in [0, 1]. Best in the paper: 0.75.
        cooldown_start: S_r. Released code: 15000.
        cooldown_steps: T_r; 0 jumps. Released code: 2000.
        schedule: which of the three.

    Returns:
        r in [0, 1].

    Raises:
        UserError: a value out of range.

    Examples:
        >>> released = {"warmup": 4000, "final": 0.75, "cooldown_start": 15000, "cooldown_steps": 2000}
        >>> [tangent_warmup(step, **released) for step in (0, 2000, 4000, 16000, 20000)]
        [0.0, 0.5, 1.0, 0.875, 0.75]

    Reference: arXiv:2511.20410, Sec. 4.3.
    """
    if schedule not in get_args(TangentSchedule):
        raise UserError(f"unknown tangent schedule {schedule!r}; use one of {', '.join(get_args(TangentSchedule))}")
    if not 0 <= final <= 1:
        raise UserError(f"the final tangent weight is {final}, but it must lie in [0, 1]; 0.75 is usual")
    for name, value in (("warmup", warmup), ("cooldown_start", cooldown_start), ("cooldown_steps", cooldown_steps)):
        if value < 0:
            raise UserError(f"{name} is {value}, but it counts optimiser steps; set it to 0 or more")
    risen = _progress(step, 0, warmup)
    if schedule == "none":
        return float(final)
    if schedule == "warmup":
        return final * risen
    cooled = _progress(step, cooldown_start, cooldown_steps)
    return (1 - cooled) * risen + cooled * final


def _progress(step: int, start: int, length: int) -> float:
    """How much of a ramp of `length` steps from `start` is done, in [0, 1]; a ramp of length 0 is a jump."""
    if length == 0:
        return float(step >= start)
    return min(max((step - start) / length, 0.0), 1.0)
