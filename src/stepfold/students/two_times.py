"""Students told two times: the state's t, and the target time s that they jump to."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepfold.errors import UserError
from stepfold.students.heads import NUM_WAVES, target_waves
from stepfold.teachers.contract import Student

Result = TypeVar("Result")
EMBEDDER = "target_embedder"
"""Where a student has its `TargetEmbedder`, and the name of the file that holds it."""


class TargetEmbedder(nn.Module):
    """E(s), added to a network's time embedding: zero for every s at first, and at s = 0 for ever.

    So the student starts as its teacher for every target time, and at s = 0 its network alone is the consistency
    function: plain diffusers samples that without the embedder. Nothing is lost by it, since the bias of the network's
    own embedder stands for any constant.

    Deviation: published flow maps embed t - s (AYF, arXiv:2506.14603) or have E(0) != 0, which cannot be folded into a
    stock network for all t at once.
    """

    def __init__(self, network: nn.Module, part: str) -> None:
        """For one network.

        Args:
            network: the student's.
            part: name of the part of it whose output is the time embedding [B, D], or [B, 1, D].

        Raises:
            UserError: see `embedding_width`.
        """
        super().__init__()
        self.part, width = part, embedding_width(network, part)
        self.linear_1, self.act = nn.Linear(2 * NUM_WAVES, width, bias=False), nn.SiLU()
        self.linear_2 = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.linear_2.weight)

    def forward(self, s: Tensor) -> Tensor:
        """s [B], in [0, pi/2] -> [B, D]."""
        return self.linear_2(self.act(self.linear_1(target_waves(s).to(self.linear_1.weight.dtype))))


def embedding_width(network: nn.Module, part: str) -> int:
    """Width D of what a part of a network gives: that of its last linear layer.

    Raises:
        UserError: the network has no such part, or that has no linear layer.
    """
    try:
        layers = [layer for layer in network.get_submodule(part).modules() if isinstance(layer, nn.Linear)]
    except AttributeError:
        layers = []
    if not layers:
        raise UserError(
            f"a {type(network).__name__} has no part {part!r} that ends in a linear layer; name the one that embeds "
            "its time, for example time_part='time_embedder'"
        )
    return layers[-1].out_features


def told(network: nn.Module, embedder: TargetEmbedder | None, s: Tensor | None, call: Callable[[], Result]) -> Result:
    """What a call of a network gives while E(s) is added to its time embedding.

    The embedding is made outside the network's blocks and given to them, so blocks that the backward pass computes
    again get what they got before.

    Args:
        network: the student's.
        embedder: None for a student told one time.
        s: target times [B], as many as the network is given states; None for 0.
        call: calls the network.
    """
    return call() if embedder is None or s is None else _told(network, embedder, s, call)


@torch.compiler.disable()  # compiled code would go on with the first call's s; blocks are compiled apart
def _told(network: nn.Module, embedder: TargetEmbedder, s: Tensor, call: Callable[[], Result]) -> Result:
    def add(part: nn.Module, args: tuple[Tensor, ...], embedding: Tensor) -> Tensor:
        return embedding + embedder(s).to(embedding.dtype).view_as(embedding)

    handle = network.get_submodule(embedder.part).register_forward_hook(add)
    try:
        return call()
    finally:
        handle.remove()


def save_embedder(student: Student, folder: Path) -> None:
    """Writes the embedder of a student told two times beside its network; nothing for others."""
    if student.reads_target:
        state = student.get_submodule(EMBEDDER).state_dict()
        save_file({name: value.contiguous() for name, value in state.items()}, folder / f"{EMBEDDER}.safetensors")


def load_embedder(student: Student, folder: Path) -> None:
    """Reads what `save_embedder` wrote; nothing for students told one time.

    Raises:
        UserError: it is not there, or of another network.
    """
    if not student.reads_target:
        return
    file = folder / f"{EMBEDDER}.safetensors"
    try:
        student.get_submodule(EMBEDDER).load_state_dict(load_file(file))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{file} does not load ({reason}); copy the student folder again") from None
