"""The device, the precision and the processes of a run, as accelerate finds them."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from accelerate.state import AcceleratorState

from stepfold.errors import UserError
from stepfold.training.processes import Processes

ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def make_accelerator(precision: str, *, several: bool = False) -> Accelerator:
    """The device and precision of this run.

    Args:
        precision: `no` or `bf16`.
        several: whether the caller can share its work between processes.

    Raises:
        UserError: launched with several processes though the caller cannot, or with the launcher's own sharding; or the
            environment asks for accumulated gradients.
    """
    waits = InitProcessGroupKwargs(timeout=timedelta(hours=1))  # the first one may encode a folder of images
    forget_other_precision(precision)
    on_cpu = not torch.accelerator.is_available()  # has to be said, or several processes do not find each other there
    accelerator = Accelerator(
        cpu=on_cpu, mixed_precision=precision, kwargs_handlers=[waits], gradient_accumulation_steps=1
    )
    if accelerator.gradient_accumulation_steps != 1:  # the environment wins over the argument
        raise UserError(
            f"the environment has {ACCUMULATION}={os.environ[ACCUMULATION]}, by which every gradient would be divided; "
            f"unset {ACCUMULATION}, and split a step with training.micro_batch"
        )
    if accelerator.num_processes > 1 and not several:
        raise UserError(
            f"started on {accelerator.num_processes} processes, but this command works in one; "
            "start it without a launcher"
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"started with the launcher's {accelerator.distributed_type.value}; launch plainly, and spread the weights "
            "with --set training.shard=student (or all: the teacher's too)"
        )
    return accelerator


def processes_of(accelerator: Accelerator) -> Processes:
    """The processes that this one was launched with."""
    return Processes(accelerator.num_processes, accelerator.process_index, accelerator.device)


def forget_other_precision(precision: str) -> None:
    """Lets a second run in one Python process have another precision: accelerate keeps the first one's for all."""
    kept = AcceleratorState._shared_state
    if kept and kept.get("_mixed_precision") != precision and kept.get("num_processes") == 1:
        AcceleratorState._reset_state()
