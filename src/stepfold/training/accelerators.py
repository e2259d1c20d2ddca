"""The device, the precision and the processes of a run, as accelerate finds them."""

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from accelerate.state import AcceleratorState

from stepfold.errors import UserError
from stepfold.training.processes import Processes

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and accelerate say to each process, all of it."""
ALONE = {"RANK": "0", "WORLD_SIZE": "1"}
"""What they say to a process without others."""
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def make_accelerator(precision: str, *, several: bool = False, device: str = "auto") -> Accelerator:
    """The device and precision of this run.

    Args:
        precision: `no` or `bf16`.
        several: whether the caller can share its work between processes.
        device: cpu, cuda, cuda:1; auto: the accelerator if there is one, else the CPU.

    Raises:
        UserError: one numbered device for several processes; launched with several processes though the caller cannot,
            or with the launcher's own sharding; or the environment holds a part of a launch, or asks for accumulated
            gradients.
    """
    check_launch(os.environ)
    waits = InitProcessGroupKwargs(timeout=timedelta(hours=1))  # the first one may encode a folder of images
    wanted = None if device == "auto" else torch.device(device)
    if wanted is not None and wanted.index is not None:
        if environment_processes() > 1:
            raise UserError(f"--device {device} is one device for several processes; leave its number out")
        torch.accelerator.set_device_index(wanted.index)
    on_cpu = device == "cpu" or not torch.accelerator.is_available()  # said, or several processes do not meet there
    forget_other(precision, on_cpu)
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


def check_launch(environment: Mapping[str, str]) -> None:
    """Refuses variables that a launcher or a scheduler has left and that make no launch.

    Raises:
        UserError: with them this process would wait for others, or take itself for one of several.
    """
    there = {name: environment[name] for name in LAUNCHED if environment.get(name)}
    asks = "LOCAL_RANK" in there or any(there.get(name, alone) != alone for name, alone in ALONE.items())
    numbers = all(there.get(name, "0").isdecimal() for name in LAUNCHED[:3])
    if asks and not (numbers and len(there) == len(LAUNCHED)):
        lacks = [name for name in LAUNCHED if name not in there]
        raise UserError(
            f"the environment has {', '.join(f'{name}={value}' for name, value in there.items())}"
            + (f" but no {', '.join(lacks)}" if lacks else "")
            + f", which is no launch; unset {' '.join(there)}, or start this with torchrun or accelerate launch"
        )


def processes_of(accelerator: Accelerator) -> Processes:
    """The processes that this one was launched with."""
    return Processes(accelerator.num_processes, accelerator.process_index, accelerator.device)


def environment_processes() -> int:
    """How many processes a launcher says there are."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def forget_other(precision: str, on_cpu: bool) -> None:
    """Lets a second run in one Python process have another precision or device: accelerate keeps the first one's."""
    kept = AcceleratorState._shared_state
    if not kept or kept.get("num_processes") != 1:
        return
    moves = (kept["device"].type == "cpu") != on_cpu
    if moves or kept.get("_mixed_precision") != precision:
        AcceleratorState._reset_state(reset_partial_state=moves)
