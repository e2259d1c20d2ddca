"""In which precision networks are called: autocast for the student, for the teacher's walks, and attention."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepfold.training.processes import is_sharded


@contextmanager
def student_precision(accelerator: Accelerator, precision: str) -> Iterator[None]:
    """Autocast as the run's `precision` says, and attention as `student_attention`: around a student's forward pass."""
    with accelerator.autocast(), student_attention(precision, accelerator.device):
        yield


def student_attention(precision: str, device: torch.device) -> AbstractContextManager:
    """Plain attention where fused attention is the slow one: backward in bfloat16 on a CPU (docs/lab-log.md).

    Around the backward pass too: blocks that it computes again have to take the way they took before.
    """
    return sdpa_kernel(SDPBackend.MATH) if precision == "bf16" and device.type == "cpu" else nullcontext()


@contextmanager
def walk_precision(precision: str, device: torch.device, network: nn.Module) -> Iterator[None]:
    """Autocast for the teacher's walks, which casts the weights of `network` once; its states stay in float32."""
    if precision != "bf16":
        yield
        return
    casts = nullcontext() if is_sharded(network) else cast_once(network)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16), casts:
        yield


@contextmanager
def cast_once(network: nn.Module) -> Iterator[None]:
    """Has autocast cast each frozen weight at its first use and keep the copy until the context ends.

    Autocast does so for trained weights alone. For calls without a gradient; their values stay the same to the bit.
    """
    frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)  # the flag that autocast's cache goes by
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
