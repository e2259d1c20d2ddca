"""Several processes that train one student: who does which samples, what they add up, and how weights are spread.

A step is the same whatever number of processes shares it: each takes some of its prompts, and the gradients are summed.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from stepfold.errors import UserError, first_line
from stepfold.teachers.contract import PartlyCalled

BUCKET = 2**26
"""Gradients that are summed in one message, in numbers."""
SHARDS_SINCE = "2.13"
"""The torch whose FSDP2 gathers weights inside a tangent pass; older ones were tried and fail there."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run; one by default.

    Attributes:
        count: how many.
        rank: the number of this one; 0 writes and shows.
        device: of this one.
    """

    count: int = 1
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and shows."""
        return self.rank == 0

    def share(self, samples: range, rank: int | None = None) -> range:
        """The samples of a process, in one piece; the shares differ by at most one sample."""
        rank, total = self.rank if rank is None else rank, len(samples)
        return samples[rank * total // self.count : (rank + 1) * total // self.count]

    def largest_share(self, total: int) -> int:
        """The most samples of `total` that a process has."""
        return -(-total // self.count)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the processes, in every process."""
        if self.count > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return flag if self.count == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def gather(self, rows: Tensor, most: int) -> Tensor:
        """Rows [M, K] of every process, rank by rank, in every process; M may differ between them, up to `most`.

        Padding rows are NaN; column 0 of a real row never is.
        """
        if self.count == 1:
            return rows
        padded = rows.new_full((most, rows.shape[1]), torch.nan)
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(parts, padded)
        together = torch.cat(parts)
        return together[~together[:, 0].isnan()]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sums the gradients that every process has of its own pairs; those of sharded weights come averaged."""
        if self.count == 1:
            return
        parameters = list(parameters)
        there = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        for parameter, anywhere in zip(parameters, self.sum(there).tolist(), strict=True):
            if anywhere and parameter.grad is None:  # no sample of this process picked the network that it is in
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        averaged = [local(gradient) for gradient in gradients if isinstance(gradient, DTensor)]
        if averaged:
            torch._foreach_mul_(averaged, self.count)
        for bucket in buckets(gradient for gradient in gradients if not isinstance(gradient, DTensor)):
            flat = self.sum(_flatten_dense_tensors(bucket))
            torch._foreach_copy_(bucket, list(_unflatten_dense_tensors(flat, bucket)))

    def wait(self) -> None:
        """Barrier."""
        if self.count > 1:
            self.sum(torch.zeros((), device=self.device))

    def agree(self, check: Callable[[], None]) -> None:
        """The first process checks and the others wait for its verdict, so that none sees what comes after.

        Raises:
            UserError: as `check` in the first process, in all of them.
        """
        if self.count == 1:
            return check()
        verdict: list[str | None] = [None]
        if self.first:
            try:
                check()
            except UserError as error:
                verdict = [str(error)]
        dist.broadcast_object_list(verdict, src=0, device=self.device)
        if verdict[0] is not None:
            raise UserError(verdict[0])


ALONE = Processes()


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in their order, those of one dtype together, about BUCKET numbers at a time."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for of_dtype in by_dtype.values():
        bucket, size = [], 0
        for tensor in of_dtype:
            bucket.append(tensor)
            size += tensor.numel()
            if size >= BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket


@contextmanager
def lost_process() -> Iterator[None]:
    """Says in one line that another process is gone.

    Raises:
        UserError: the processes can no longer talk to each other.
    """
    try:
        yield
    except RuntimeError as error:  # torch's own classes of them are RuntimeErrors, and gloo's are nothing more
        if not isinstance(error, dist.DistError) and not re.match(r"\[[^]]*/gloo/", str(error)):
            raise
        reason = first_line(error).split("] ", 1)[-1].split(". ")[0]
        raise UserError(
            f"another process of this run is gone or out of reach ({reason}); what it said last is above, if anything. "
            "Earlier checkpoints are intact: start all of them again with --resume"
        ) from None


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The outermost repeated blocks of a network: the members of its module lists."""
    found: list[nn.Module] = []
    for child in network.children():
        found += child if isinstance(child, nn.ModuleList) else blocks_of(child)
    return found


def shard(network: nn.Module, processes: Processes, *methods: str) -> None:
    """Spreads a network's weights over the processes (FSDP2): each holds a part, and a block is whole while it works.

    Args:
        network: equal in all processes.
        processes: more than one.
        methods: names of methods beside `forward` that need whole weights.

    Raises:
        UserError: this torch cannot carry tangents through spread weights.
    """
    if torch.__version__ < SHARDS_SINCE:
        raise UserError(
            f"training.shard needs torch {SHARDS_SINCE} or newer, this is {torch.__version__}; "
            "install a newer one, or leave the weights whole with training.shard=none"
        )
    if any(isinstance(module, PartlyCalled) for module in network.modules()):
        raise UserError(
            "training.shard spreads one network, and this teacher has two, of which a process may call one alone; "
            "leave the weights whole with training.shard=none"
        )
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # nothing changes it in place
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for block in blocks_of(network):
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)  # without a backward pass nothing else would
    for method in methods:
        register_fsdp_forward_method(network, method)


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` has spread it."""
    return isinstance(network, FSDPModule)


def whole(value: Tensor) -> Tensor:
    """A tensor with all its parts; of a sharded one a copy, which every process has to ask for."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered(state: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors, sharded ones one after the other and on the CPU; nothing where they are not to be kept.

    No two of them share memory, as tied weights do: safetensors writes none that do.
    """
    found, taken = {}, set[int]()
    for name, value in state.items():
        full = whole(value)
        if keep:
            full = (full.cpu() if isinstance(value, DTensor) else full).contiguous()
            memory = full.untyped_storage().data_ptr()
            found[name] = full.clone() if memory in taken else full
            taken.add(memory)
    return found


def local(value: Tensor) -> Tensor:
    """This process's part of a tensor, the same memory; all of one that is not sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def placed(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, equal in all processes, spread as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def placed_state(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A whole state_dict, spread as the module's own is."""
    there = module.state_dict()
    return {name: placed(value, there[name]) if name in there else value for name, value in state.items()}
