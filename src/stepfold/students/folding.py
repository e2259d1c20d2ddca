"""A flow map for one number of steps as a stock network: the target times go into its time embedder's last layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepfold.errors import UserError
from stepfold.students.two_times import TargetEmbedder
from stepfold.teachers.contract import Condition, Student
from stepfold.teachers.family import Predict

MOST_ERROR = 1e-4
"""Largest relative error of the time embedding after a fold, in float32."""


class _Embedded(Exception):
    """The time embedder has been called; the rest of the network need not be."""


def last_layer(network: nn.Module, part: str) -> tuple[str, nn.Linear]:
    """The last linear layer of the part that embeds the time, with its name in the network."""
    found = [
        (name, layer) for name, layer in network.get_submodule(part).named_modules() if isinstance(layer, nn.Linear)
    ]
    name, layer = found[-1]
    return f"{part}.{name}" if name else part, layer


@torch.no_grad()
def hidden_states(
    student: Student, predict: Predict, times: Sequence[float], condition: Condition, latent_shape: tuple[int, ...]
) -> Tensor:
    """What the time embedder's last layer is given at each time, [n, H].

    Args:
        student: told two times.
        predict: calls its network, with the time counted as it will be after the fold.
        times: n of them.
        condition: n rows of any prompts, on which it does not depend.
        latent_shape: without the batch.
    """
    network, embedder = student.get_submodule("transformer"), _embedder(student)
    _, layer = last_layer(network, embedder.part)
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Embedded

    like = condition.embeds
    x, t = like.new_zeros(len(times), *latent_shape), like.new_tensor(list(times))
    handle = layer.register_forward_pre_hook(keep)
    try:
        predict(network, x, t, condition, torch.ones_like(t))
    except _Embedded:
        pass
    finally:
        handle.remove()
    return seen[0]


def least_change(weight: Tensor, hidden: Tensor, wanted: Tensor) -> Tensor:
    """The least change dW [D, H] of a layer's weight with (W + dW) h_i = e_i for all i.

    Args:
        weight: W [D, H].
        hidden: h [n, H], the layer's inputs at the n times.
        wanted: e [n, D], what it is to give there, without its bias.

    Returns:
        dW in float64, of rank n at most.

    Raises:
        UserError: the inputs are so alike that float32 cannot tell the times apart after the change.
    """
    h, e = hidden.double(), wanted.double()
    change = (torch.linalg.pinv(h, rtol=1e-14) @ (e - h @ weight.double().T)).T
    missed = (h @ (weight.double() + change).T - e).norm(dim=1)
    rounding = torch.finfo(torch.float32).eps * change.norm() * h.norm(dim=1)
    error = float(((missed + rounding) / e.norm(dim=1).clamp(min=1e-12)).max())
    if error > MOST_ERROR:
        raise UserError(
            f"the time embedder hardly tells the {len(h)} times of the steps apart (error {error:.0e} in float32), as "
            "one does that reads times in [0, 1]; export for fewer steps, or use stepfold sample"
        )
    return change


@torch.no_grad()
def fold_targets(
    student: Any, predict: Predict, times: Sequence[float], condition: Condition, latent_shape: tuple[int, ...]
) -> tuple[str, Tensor]:
    """The layer that holds the jumps between listed times, and its change.

    With that change the network, told t_i alone, gives what it gives now when told t_i and t_{i+1}. Euler's steps over
    these times are then the flow map's jumps. Other times are not served.

    Args:
        student: told two times, in float32.
        predict: calls its network as it will be called after the fold: its time may count to 1000 from then on, which
            keeps the layer's inputs apart.
        times: falling, without the final 0.
        condition: as many rows as times.
        latent_shape: without the batch.

    Returns:
        The layer's name in the network, and the change of its weight in float64.

    Raises:
        UserError: see `least_change`.

    Reference: arXiv:2506.14603 for the map; the fold is ours.
    """
    embedder = _embedder(student)
    name, layer = last_layer(student.get_submodule("transformer"), embedder.part)
    told, counted = (
        hidden_states(student, each, times, condition, latent_shape) for each in (student.predict, predict)
    )
    wanted = told.double() @ layer.weight.double().T + embedder(told.new_tensor([*times[1:], 0.0])).double()
    return name, least_change(layer.weight, counted, wanted)


def fold(student: Any, name: str, change: Tensor) -> None:
    """Adds the change to the layer; the student is told one time from here on."""
    network: Any = student.get_submodule("transformer")
    weight = network.get_submodule(name).weight
    weight.data = (weight.double() + change.to(weight.device)).to(weight.dtype)
    student.target_embedder, student.reads_target = None, False


def _embedder(student: Student) -> TargetEmbedder:
    embedder = getattr(student, "target_embedder", None)
    assert isinstance(embedder, TargetEmbedder), "the caller checks the card"
    return embedder
