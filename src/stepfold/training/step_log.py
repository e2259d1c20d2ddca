"""What a step leaves behind: a line of the metrics file, or an error that says where it went wrong."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from stepfold.errors import NonFiniteError
from stepfold.spaces.records import States
from stepfold.training.processes import Processes

UNLOGGED = ("t", "|x|", "|dxdt|", "|F|", "|x0|", "|v_real|", "|v_fake|", "missed", "apart")
"""Metrics that an error message needs, or another number, and the metrics file does not."""
SKETCH = "sketch_"
"""How the names of numbers begin that are logged as `spread` alone; see `objectives.matching.sketches`."""


@dataclass(frozen=True)
class Metrics:
    """Numbers of the states of one space, or of a critic's updates.

    Attributes:
        prompt: int64 [M], which prompt of the batch each state belongs to.
        values: name -> [M], in order of computation.
        kept: how many states there were, those of other processes among them.
        num_drawn: how many there were before filtering.
    """

    prompt: Tensor
    values: dict[str, Tensor]
    kept: int
    num_drawn: int


@dataclass(frozen=True)
class StepRecord:
    """What a step leaves behind for the log, still on the device.

    Attributes:
        step: its number.
        prompts: its prompts.
        spaces: sample space -> the numbers of its states; empty where the student did not learn.
        critics: critic with updates of its own -> the numbers of those.
        norms: the student's or a critic's name -> norm of its gradient.
        rate: the learning rate; None where the student did not learn.
        skipped: the gradient was not finite, and the update was left out as `training.skip_nonfinite` allows.
        head_start: only critics learned.
    """

    step: int
    prompts: list[str]
    spaces: dict[str, Metrics] = field(default_factory=dict)
    critics: dict[str, Metrics] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    rate: float | None = None
    skipped: bool = False
    head_start: bool = False


def metrics_of(states: States, values: Mapping[str, Tensor], kept: int, num_drawn: int) -> Metrics:
    """See `Metrics`; with the times and sizes of the states. States that are padding leave none."""
    states = states.rows(slice(0)) if states.is_padding else states
    sizes = {"t": states.t, "|x|": states.x.flatten(1).norm(dim=1)}
    if (dxdt := getattr(states, "dxdt", None)) is not None:
        sizes["|dxdt|"] = dxdt.flatten(1).norm(dim=1)
    return Metrics(states.prompt, sizes | dict(values), kept, num_drawn)


def of_all(record: StepRecord, processes: Processes, most_prompts: int) -> StepRecord:
    """The record of a process, with its states and all others', in the order that one process would have them.

    Args:
        record: its `prompts` are those of all processes.
        processes: all of them call this.
        most_prompts: the most prompts that one has.
    """
    first = processes.share(range(len(record.prompts))).start

    def whole(metrics: Metrics) -> Metrics:
        rows = torch.stack([metrics.prompt + first, *(values.float() for values in metrics.values.values())], 1)
        most = most_prompts * metrics.num_drawn // len(record.prompts)
        prompt, *columns = processes.gather(rows, most).unbind(1)
        return replace(metrics, prompt=prompt.long(), values=dict(zip(metrics.values, columns, strict=True)))

    return replace(
        record,
        spaces={name: whole(metrics) for name, metrics in record.spaces.items()},
        critics={name: whole(metrics) for name, metrics in record.critics.items()},
    )


def row_of(record: StepRecord) -> dict[str, Any]:
    """A step's line of the metrics file; here the device is waited for.

    The metrics of a run's one space have plain names. Of several spaces, and of critics, the name comes before a slash.

    Raises:
        NonFiniteError: a loss or a gradient is not finite; it names the step, the prompts, t and the norms.
    """
    row: dict[str, Any] = {"step": record.step}
    if record.spaces:
        first = next(iter(record.spaces.values()))
        row["kept"] = first.kept / first.num_drawn
    if record.head_start:
        row["head_start"] = 1
    if not record.norms:
        return row
    tables = {name: on_host(metrics) for name, metrics in (record.spaces | record.critics).items() if metrics.values}
    if record.skipped:
        places = [nonfinite_place(metrics.values)[0] for metrics in tables.values()]
        place = next((place for place in places if place != "gradient"), "gradient")
        return row | {"skipped": 1, "nonfinite": f"{place} is not finite"}
    for name, metrics in sorted(tables.items(), key=lambda table: table[0] not in record.critics):  # they come first
        check_finite(record.step, record.prompts, metrics, norm_beside(name, record))
    for name, metrics in tables.items():
        prefix = f"{name}/" if name in record.critics or len(record.spaces) > 1 else ""
        row |= {prefix + key: value for key, value in means(metrics).items()}
    if len(record.spaces) > 1:
        row["loss"] = sum(row[f"{name}/loss"] for name in record.spaces)
    for name, norm in record.norms.items():
        row["grad_norm" if name == "student" else f"grad_norm/{name}"] = float(norm)
    return row if record.rate is None else row | {"lr": record.rate}


def on_host(metrics: Metrics) -> Metrics:
    """The same in the host's memory."""
    return replace(
        metrics, prompt=metrics.prompt.cpu(), values={name: values.cpu() for name, values in metrics.values.items()}
    )


def norm_beside(name: str, record: StepRecord) -> float:
    """The gradient norm that belongs to a table of metrics: a critic's own; else the first that is not finite."""
    if name in record.critics:
        return float(record.norms[name])
    norms = [float(norm) for who, norm in record.norms.items() if who not in record.critics]
    return next((norm for norm in norms if not math.isfinite(norm)), norms[0])


def means(metrics: Metrics) -> dict[str, float]:
    """The logged numbers of a table: means over its states, what is made of those, and the tangent's norm by time."""
    logged = (name for name in metrics.values if name not in UNLOGGED and not name.startswith(SKETCH))
    found = {name: metrics.values[name].mean().item() for name in logged}
    if (spread := spread_of(metrics)) is not None:
        found["spread"] = spread
    if "missed" in metrics.values:
        found["miss"] = (metrics.values["missed"].mean() / metrics.values["apart"].mean().clamp(min=1e-12)).item()
    if "tangent_norm" in metrics.values:
        found |= tangent_by_time(metrics.values["t"], metrics.values["tangent_norm"])
    return found


def spread_of(metrics: Metrics) -> float | None:
    """Standard deviation of the student's pictures around their mean, in units of sigma_data; None where there is one.

    It is the root mean square over a picture's numbers.
    """
    parts = [values for name, values in metrics.values.items() if name.startswith(SKETCH)]
    if not parts or len(parts[0]) < 2:
        return None
    return torch.stack(parts).var(1).sum().sqrt().item()


def tangent_by_time(t: Tensor, norm: Tensor, bins: int = 4) -> dict[str, float]:
    """Mean tangent norm in equal bins of t over [0, pi/2]; it falls as the student becomes consistent."""
    index = (t / (torch.pi / 2) * bins).long().clamp(max=bins - 1)
    return {f"tangent_norm_{b}": norm[index == b].mean().item() for b in range(bins) if (index == b).any()}


def shown(name: str) -> bool:
    """Whether an error message has a per-state number."""
    return name != "loss" and not name.startswith(SKETCH)


PLACES = {
    "|x|": "teacher's output", "|dxdt|": "teacher's output", "|F|": "student's output",
    "|x0|": "student's output", "|v_real|": "teacher's output", "|v_fake|": "fake score's output",
    "tangent_norm": "tangent", "loss": "loss",
}  # fmt: skip
"""Per-state metrics in order of computation -> the quantity that each one measures."""


def nonfinite_place(numbers: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """Where in a step the first number that is not finite came up, and for which states, bool [M].

    The gradient, and no state, where all of them are finite.
    """
    for name, place in PLACES.items():
        if name in numbers and (bad := ~torch.isfinite(numbers[name])).any():
            return place, bad
    return "gradient", torch.zeros_like(numbers["loss"], dtype=torch.bool)


def check_finite(step: int, prompts: list[str], metrics: Metrics, grad_norm: float) -> None:
    """Stops the run with everything one needs to look into it.

    Args:
        step: its number.
        prompts: B strings.
        metrics: of the states, `loss` among them.
        grad_norm: of the whole gradient.

    Raises:
        NonFiniteError: naming the step, the prompts, t and the norms.
    """
    numbers, prompt = metrics.values, metrics.prompt.tolist()
    if math.isfinite(grad_norm) and bool(torch.isfinite(numbers["loss"]).all()):
        return
    place, bad = nonfinite_place(numbers)
    rows = bad.nonzero().squeeze(1)[:4] if bad.any() else torch.arange(min(4, len(prompt)))
    where = "; ".join(
        f"prompt {prompts[prompt[i]]!r} " + " ".join(f"{k}={v[i]:.4g}" for k, v in numbers.items() if shown(k))
        for i in rows.tolist()
    )
    what = f"{place} of {int(bad.sum())} of {len(prompt)} pairs" if bad.any() else place
    rate = f"optimiser.lr, {'a longer consistency.r_warmup or ' * ('tangent_norm' in numbers)}training.precision=no"
    fix = f"a lower {rate} usually helps"
    if place == PLACES["|x|"]:  # which no rate changes
        fix = "look at the teacher with stepfold doctor, and at these prompts; training.precision=no may help"
    raise NonFiniteError(
        f"step {step}: {what} is not finite (gradient norm {grad_norm:.3g}): {where}. "
        f"Earlier checkpoints are intact; {fix}."
    )
