"""What a step leaves behind: a line of the metrics file, or an error that says where it went wrong."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from stepfold.errors import NonFiniteError
from stepfold.spaces.pairs import Pairs
from stepfold.training.processes import Processes


@dataclass(frozen=True)
class StepRecord:
    """What a step leaves behind for the log, still on the device.

    Attributes:
        step: its number.
        prompts: its prompts.
        pairs: how many pairs it trained on.
        num_walked: how many there would have been, had none been filtered out.
        prompt: int64 [M], which prompt each pair belongs to.
        numbers: per pair [M]: the time, norms, and the figures of the objective.
        norm: of the gradient.
        rate: the learning rate.
        skipped: the gradient was not finite, and the update was left out as `training.skip_nonfinite` allows.
    """

    step: int
    prompts: list[str]
    pairs: int
    num_walked: int
    prompt: Tensor | None = None
    numbers: dict[str, Tensor] = field(default_factory=dict)
    norm: Tensor | None = None
    rate: float = 0.0
    skipped: bool = False


def record_of(
    step: int, prompts: list[str], pairs: Pairs, figures: dict[str, Tensor], norm: Tensor, rate: float
) -> StepRecord:
    """See `StepRecord`; of no pairs where they only stand in for some."""
    pairs = pairs.rows(slice(0)) if pairs.stand_in else pairs
    sizes = {"t": pairs.t, "|x|": pairs.x.flatten(1).norm(dim=1), "|dxdt|": pairs.dxdt.flatten(1).norm(dim=1)}
    return StepRecord(step, prompts, len(pairs), pairs.num_walked, pairs.prompt, sizes | figures, norm, rate)


def of_all(record: StepRecord, processes: Processes, most_prompts: int) -> StepRecord:
    """The record of a process, with its pairs and all others', in the order that one process would have them.

    Args:
        record: its `prompts` are those of all processes.
        processes: all of them call this.
        most_prompts: the most prompts that one has.
    """
    assert record.prompt is not None
    own = processes.share(range(len(record.prompts)))
    rows = torch.stack([record.prompt + own.start, *(values.float() for values in record.numbers.values())], 1)
    most_pairs = most_prompts * record.num_walked // len(record.prompts)
    prompt, *numbers = processes.gather(rows, most_pairs).unbind(1)
    return replace(record, prompt=prompt.long(), numbers=dict(zip(record.numbers, numbers, strict=True)))


def row_of(record: StepRecord) -> dict[str, Any]:
    """A step's line of the metrics file; the place where the device is waited for.

    Raises:
        NonFiniteError: the loss or the gradient is not finite; it names the step, the prompts, t and the norms.
    """
    row: dict[str, Any] = {"step": record.step, "kept": record.pairs / record.num_walked}
    if record.norm is None or record.prompt is None:
        return row
    numbers = {name: values.cpu() for name, values in record.numbers.items()}
    if record.skipped:
        return row | {"skipped": 1, "nonfinite": f"{nonfinite_place(numbers)[0]} is not finite"}
    check_finite(record.step, record.prompts, record.prompt.tolist(), numbers, float(record.norm))
    row |= {name: values.mean().item() for name, values in numbers.items() if name not in ("t", "|x|", "|dxdt|", "|F|")}
    row |= {"grad_norm": float(record.norm), "lr": record.rate}
    if "tangent_norm" in numbers:
        row |= tangent_by_time(numbers["t"], numbers["tangent_norm"])
    return row


def tangent_by_time(t: Tensor, norm: Tensor, bins: int = 4) -> dict[str, float]:
    """Mean tangent norm in equal bins of t over [0, pi/2]; it falls as the student becomes consistent."""
    index = (t / (torch.pi / 2) * bins).long().clamp(max=bins - 1)
    return {f"tangent_norm_{b}": norm[index == b].mean().item() for b in range(bins) if (index == b).any()}


PLACES = {
    "|x|": "teacher's output", "|dxdt|": "teacher's output", "|F|": "student's output", "tangent_norm": "tangent",
    "loss": "loss",
}  # fmt: skip
"""Figures of a pair, in the order in which they are computed -> what each is a figure of."""


def nonfinite_place(numbers: dict[str, Tensor]) -> tuple[str, Tensor]:
    """Where in a step the first number that is not finite came up, and for which pairs, bool [M].

    The gradient, and no pair, where all of them are finite.
    """
    for name, place in PLACES.items():
        if name in numbers and (bad := ~torch.isfinite(numbers[name])).any():
            return place, bad
    return "gradient", torch.zeros_like(numbers["loss"], dtype=torch.bool)


def check_finite(
    step: int, prompts: list[str], prompt: list[int], numbers: dict[str, Tensor], grad_norm: float
) -> None:
    """Stops the run with everything one needs to look into it.

    Args:
        step: its number.
        prompts: B strings.
        prompt: which of them each pair belongs to, M numbers.
        numbers: per pair [M], `loss` among them.
        grad_norm: of the whole gradient.

    Raises:
        NonFiniteError: naming the step, the prompts, t and the norms.
    """
    if math.isfinite(grad_norm) and bool(torch.isfinite(numbers["loss"]).all()):
        return
    place, bad = nonfinite_place(numbers)
    rows = bad.nonzero().squeeze(1)[:4] if bad.any() else torch.arange(min(4, len(prompt)))
    where = "; ".join(
        f"prompt {prompts[prompt[i]]!r} " + " ".join(f"{k}={v[i]:.4g}" for k, v in numbers.items() if k != "loss")
        for i in rows.tolist()
    )
    what = f"{place} of {int(bad.sum())} of {len(prompt)} pairs" if bad.any() else place
    raise NonFiniteError(
        f"step {step}: {what} is not finite (gradient norm {grad_norm:.3g}): {where}. "
        "The last checkpoint is intact; a lower optimiser.lr, a longer consistency.r_warmup or "
        "training.precision=no usually helps."
    )
