"""Smaller students: some of the teacher's blocks, evenly chosen."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from stepfold.errors import UserError


def kept_blocks(count: int, depth: float) -> list[int]:
    """Numbers of the blocks that stay of `count`: about the share `depth`, evenly spaced, first and last among them.

    Args:
        count: >= 1.
        depth: in (0, 1].
    """
    keep = min(count, max(2, round(depth * count)))
    return torch.linspace(0, count - 1, keep).round().long().tolist()


def drop_blocks(network: Any, stacks: Mapping[str, str], depth: float) -> None:
    """Leaves the share `depth` of a diffusers network's blocks, in place; its config says so.

    Args:
        network: a network of its own, not shared.
        stacks: name of a list of blocks -> the config's name of its length.
        depth: in (0, 1].

    Raises:
        UserError: there are no such lists in this network.
    """
    if depth == 1:
        return
    if not stacks:
        raise UserError(f"a {type(network).__name__} cannot lose blocks; leave student.depth at 1")
    for blocks, length in stacks.items():
        old = getattr(network, blocks)
        kept = kept_blocks(len(old), depth)
        setattr(network, blocks, nn.ModuleList(old[i] for i in kept))
        network.register_to_config(**{length: len(kept)})
        if dual := network.config.get("dual_attention_layers"):  # of Stable Diffusion 3.5: numbers of blocks
            network.register_to_config(dual_attention_layers=tuple(i for i, k in enumerate(kept) if k in dual))
