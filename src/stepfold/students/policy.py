"""Networks that give N velocities at a time, for policy students: the last layer's rows, N times."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepfold.errors import UserError
from stepfold.maths.policy import Policy
from stepfold.sampling.recipe import Recipe
from stepfold.students.policy_scheduler import scheduler_of
from stepfold.teachers.contract import Student
from stepfold.teachers.pipeline import PipelineTeacher

HEAD = "policy_head.safetensors"
"""The last layer of a LoRA student."""
SCHEDULER = "policy_scheduler"
"""Folder of a student's `PolicyScheduler`."""


def head_of(teacher: PipelineTeacher) -> str:
    """Name of the layer of the teacher's network that gives the velocity, which can be made N times as wide.

    Raises:
        UserError: its class is fixed to one velocity.
    """
    if teacher.head:
        return teacher.head
    raise UserError(
        f"objective=policy needs a network that can give several velocities at a time, as those of Sana, Stable "
        f"Diffusion 3 and FLUX.1 can; a {type(teacher.pipe).__name__}'s cannot, so choose another objective"
    )


@torch.no_grad()
def widen(network: Any, name: str, nodes: int) -> None:
    """Has a network give N times what it gives now, node by node along the channels.

    Args:
        network: of diffusers, whose config says `out_channels`; changed in place.
        name: of its last layer, with C rows for each place of a patch.
        nodes: N.
    """
    layer, channels = network.get_submodule(name), network.config.out_channels or network.config.in_channels
    _put(network, name, layer.weight.view(-1, 1, channels, layer.in_features).repeat(1, nodes, 1, 1),
         layer.bias.view(-1, 1, channels).repeat(1, nodes, 1), nodes * channels)  # fmt: skip


@torch.no_grad()
def narrow(network: Any, name: str, weights: Tensor) -> None:
    """The inverse of `widen`, for a mean of the N velocities: exact, since the last layer is linear.

    Args:
        network: changed in place.
        name: of its last layer.
        weights: [N], of sum 1.
    """
    layer, channels = network.get_submodule(name), network.config.out_channels // len(weights)
    weight = layer.weight.double().view(-1, len(weights), channels, layer.in_features)
    bias = layer.bias.double().view(-1, len(weights), channels)
    mean = weights.double().to(weight.device)
    _put(network, name, torch.einsum("n,pnch->pch", mean, weight), torch.einsum("n,pnc->pc", mean, bias), channels)


def _put(network: Any, name: str, weight: Tensor, bias: Tensor, channels: int) -> None:
    """Replaces the last layer [..., H], and says the new number of channels."""
    old = network.get_submodule(name)
    new = nn.Linear(old.in_features, bias.numel(), device="meta")
    new.weight = nn.Parameter(weight.reshape(-1, old.in_features).to(old.weight.dtype))
    new.bias = nn.Parameter(bias.flatten().to(old.bias.dtype))
    network.set_submodule(name, new)
    network.register_to_config(out_channels=channels)
    network.out_channels = channels  # what the classes unfold patches by


def save_policy(teacher: PipelineTeacher, student: Student, folder: Path, recipe: Recipe, *, lora: bool) -> None:
    """Writes what goes with a policy student's network: its scheduler, and of a LoRA its last layer; else nothing."""
    if recipe.policy is None:
        return
    scheduler_of(recipe, teacher.num_train_timesteps).save_config(folder / SCHEDULER)
    if lora:
        layer = student.get_submodule(f"transformer.{head_of(teacher)}")
        save_file({k: v.contiguous() for k, v in layer.state_dict().items()}, folder / HEAD)


def load_head(teacher: PipelineTeacher, network: Any, folder: Path, policy: Policy | None) -> None:
    """Reads the last layer of a LoRA student's network, which is wide already; nothing without a policy.

    Raises:
        UserError: the file is not there, or of another network.
    """
    if policy is None:
        return
    try:
        network.get_submodule(head_of(teacher)).load_state_dict(load_file(folder / HEAD))
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder / HEAD} does not load ({reason}); copy the student folder again") from None
