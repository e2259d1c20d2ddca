"""`stepfold retime`: a network whose time counts to 1000 learns to read [0, 1], from its own walks.

The tangent of continuous consistency contains dF/dt, which sinusoids of 1000 t make large. First the time embedder is
fitted alone to what it gave before, then the whole network to its own unguided predictions.
"""

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from stepfold.config import Config
from stepfold.display import Display
from stepfold.objectives.consistency import derivative_size
from stepfold.objectives.contract import Networks
from stepfold.prompts.reading import PromptFile
from stepfold.spaces.records import Pairs
from stepfold.teachers.contract import Condition, concatenate
from stepfold.teachers.family import Predict
from stepfold.teachers.once import compute_afresh
from stepfold.teachers.pipeline import PipelineTeacher
from stepfold.training.draws import Batch, draw
from stepfold.training.looks import Progress
from stepfold.training.optimisers import learning_rate, make_optimiser
from stepfold.training.precision import walk_precision
from stepfold.training.runs import (
    append_metrics,
    checkpoints,
    load_checkpoint,
    rewind_metrics,
    save_checkpoint,
)
from stepfold.training.states import collect
from stepfold.training.step_log import StepRecord, metrics_of, row_of
from stepfold.training.stopping import stop_requests


def retimed_network(
    teacher: PipelineTeacher,
    prompts: PromptFile,
    conditions: Callable[[Sequence[int]], Condition],
    config: Config,
    folder: Path,
    autocast: Callable[[], AbstractContextManager[Any]],
    display: Display,
) -> tuple[nn.Module, dict[str, float]]:
    """A copy of the teacher's network that reads times of [0, 1], and what was measured on the way.

    Args:
        teacher: whose time counts to 1000.
        prompts, conditions: the training prompts; numbers of B prompts -> their conditions.
        config: the settings.
        folder: an open run folder; a checkpoint in it is continued from.
        autocast: gives the context of the trained network's calls.
        display: where progress is shown.
    """
    network = copy.deepcopy(teacher.transformer).requires_grad_(True)
    compute_afresh(network.modules())
    predict = partial(cast(Any, teacher.predict), time_scale=1.0)
    if config.training.checkpointing:
        network.enable_gradient_checkpointing()
    unseen = draw(config.training.steps, prompts, teacher, config, teacher.device)
    held_out = some_pairs(teacher, unseen, conditions(unseen.index), config)
    found = {"size of dF/dt before": tangent_size(teacher, network, teacher.predict, held_out)}
    if not checkpoints(folder):
        display.note("fitting the time embedder alone")
        old, new = teacher.time_embedder(teacher.transformer), teacher.time_embedder(network)
        fit_time_embedder(old, new, teacher.time_scale, 1.0)
        found["error, time embedder fitted"] = prediction_error(teacher, network, predict, held_out)
    with display.training(config.training.steps):
        train(teacher, network, predict, prompts, conditions, config, folder, autocast, display)
    found["error, network trained"] = prediction_error(teacher, network, predict, held_out)
    found["size of dF/dt after"] = tangent_size(teacher, network, predict, held_out)
    return network, found


def fit_time_embedder(
    source: Any, target: Any, from_scale: float, to_scale: float, steps: int = 2000, batch: int = 1024
) -> float:
    """Trains target's embedder so that target(to_scale t) is source(from_scale t) over t in [0, 1].

    Args:
        source, target: modules with `time_proj` and `timestep_embedder`, the latter a copy of the former.
        from_scale, to_scale: what their times count to.
        steps, batch: of AdamW, whose rate falls from 2e-3 to 0; times are drawn anew at each step.

    Returns:
        The relative error that is left, over [0, 1].
    """
    embedder = target.timestep_embedder
    device, dtype = next(embedder.parameters()).device, next(embedder.parameters()).dtype
    optimiser = torch.optim.AdamW(embedder.parameters(), lr=2e-3, weight_decay=0.0)
    generator, own = torch.Generator().manual_seed(0), source.time_proj.scale  # a factor that both put on themselves

    def both(t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            wanted = source.timestep_embedder(source.time_proj(from_scale / own * t).to(dtype))
        return embedder(target.time_proj(to_scale / own * t).to(dtype)), wanted

    for step in range(steps):
        ours, wanted = both(torch.rand(batch, generator=generator).to(device, dtype))
        optimiser.zero_grad()
        (ours - wanted).square().mean().backward()
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        optimiser.step()
    with torch.no_grad():
        ours, wanted = both(torch.linspace(0, 1, 1001).to(device, dtype))
        return float((ours - wanted).norm() / wanted.norm())


def some_pairs(teacher: PipelineTeacher, batch: Batch, condition: Condition, config: Config) -> tuple[Pairs, Condition]:
    """The states of the teacher's walks of a batch; every fourth has the unconditional branch's condition, if any."""
    precision = partial(walk_precision, config.training.walk_precision, teacher.device, teacher.network)
    networks: Any = Networks(cast(Any, None), teacher, walk_precision=precision)  # there is no student yet
    pairs = cast(Pairs, collect(["generation"], batch, condition, networks, config)["generation"])
    if teacher.guidance_kind != "classifier_free":
        return pairs, pairs.condition
    both = concatenate([pairs.condition, teacher.null(pairs.condition)])
    row = torch.arange(len(pairs), device=teacher.device)
    return pairs, both.rows(row + len(pairs) * (row % 4 == 3))


def train(
    teacher: PipelineTeacher,
    network: nn.Module,
    predict: Predict,
    prompts: PromptFile,
    conditions: Callable[[Sequence[int]], Condition],
    config: Config,
    folder: Path,
    autocast: Callable[[], AbstractContextManager[Any]],
    display: Display,
) -> None:
    """Least squares between the network's predictions and the teacher's; resumes from a checkpoint."""
    training, modules = config.training, {"network": network}
    optimiser = make_optimiser(network.parameters(), config.optimiser)
    saved = checkpoints(folder)
    start = load_checkpoint(saved[-1], modules, optimiser) if saved else 0
    rewind_metrics(folder, start)
    with stop_requests() as stop:
        for step in range(start, training.steps):
            began = time.perf_counter()
            batch = draw(step, prompts, teacher, config, teacher.device)
            pairs, condition = some_pairs(teacher, batch, conditions(batch.index), config)
            losses, size = [], training.micro_batch or len(pairs)
            for start_row in range(0, len(pairs), size):
                rows = slice(start_row, start_row + size)
                with autocast():
                    ours, theirs = predictions(teacher, network, predict, pairs.rows(rows), condition.rows(rows))
                losses.append((ours.float() - theirs.float()).square().flatten(1).mean(1))
                (losses[-1].sum() / len(pairs)).backward()
            loss = torch.cat([part.detach() for part in losses])
            norm = nn.utils.clip_grad_norm_(network.parameters(), config.optimiser.clip)
            rate = learning_rate(step, training.steps, config.optimiser)
            walked = metrics_of(pairs, {"loss": loss}, len(pairs), pairs.num_drawn)
            norms = {"student": norm}
            row = row_of(StepRecord(step, batch.prompts, {"generation": walked}, norms=norms, rate=rate))
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            append_metrics(folder, row)
            display.step(Progress(step + 1, row | {"pairs": len(pairs), "sec": time.perf_counter() - began}))
            asked = stop.requested  # read once: a request in between waits a step
            if asked or step + 1 == training.steps or (step + 1) % training.checkpoint_every == 0:
                save_checkpoint(folder, step + 1, modules, optimiser, training.keep_checkpoints)
            if asked:
                raise KeyboardInterrupt
        if stop.requested:  # since the last step; what is left of the run is made when it goes on
            raise KeyboardInterrupt


def predictions(
    teacher: PipelineTeacher, network: Any, predict: Predict, pairs: Pairs, condition: Condition
) -> tuple[Tensor, Tensor]:
    """F of the network, with a graph, and of the teacher: unguided, or at the walks' scales where both embed them."""
    x_unit, scales = pairs.x / teacher.sigma_data, embedded_scales(teacher, pairs)
    with torch.no_grad():
        theirs = teacher.predict(teacher.transformer, x_unit, pairs.t, condition, scales)
    return predict(network, x_unit, pairs.t, condition, scales), theirs


def embedded_scales(teacher: PipelineTeacher, pairs: Pairs) -> Tensor | None:
    """The walks' guidance scales, for a network that embeds them."""
    return pairs.guidance if teacher.guidance_kind == "embedded" else None


@torch.no_grad()
def prediction_error(
    teacher: PipelineTeacher, network: Any, predict: Predict, held_out: tuple[Pairs, Condition]
) -> float:
    """Root mean square difference of the predictions, in sizes of the teacher's."""
    ours, theirs = predictions(teacher, network, predict, *held_out)
    return float((ours - theirs).norm() / theirs.norm())


def tangent_size(teacher: PipelineTeacher, network: Any, predict: Predict, held_out: tuple[Pairs, Condition]) -> float:
    """`derivative_size` of the network's predictions, as `stepfold doctor` measures it."""
    pairs, condition = held_out
    scales = embedded_scales(teacher, pairs)
    return derivative_size(
        lambda x, t: predict(network, x, t, condition, scales), pairs.x, pairs.t, pairs.dxdt, teacher.sigma_data
    )
