"""Named random streams: a draw depends on what it is for, never on batch size, process or earlier draws."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


def generator(seed: int, name: str, *indices: int) -> torch.Generator:
    """A CPU generator for one purpose, such as `generator(seed, "noise", step, sample)`."""
    key = "/".join([str(seed), name, *map(str, indices)])
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def normal(shape: tuple[int, ...], seed: int, name: str, *indices: int) -> Tensor:
    """Standard normal draws, float32 on the CPU, of `shape`."""
    return torch.randn(shape, generator=generator(seed, name, *indices))


def uniform(shape: tuple[int, ...], seed: int, name: str, *indices: int) -> Tensor:
    """Draws from U[0, 1), float32 on the CPU, of `shape`."""
    return torch.rand(shape, generator=generator(seed, name, *indices))


def send(values: Tensor, device: torch.device) -> Tensor:
    """To the device; to a GPU without waiting for what it still has to do."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch: a stream for each (seed, name, sample), and for each update of a critic.

    What was drawn once is kept, so that micro-batches take rows of the same numbers.

    Attributes:
        seed: of the run.
        samples: numbers of the batch's B samples, counted over the whole run.
        device: where the numbers are needed.
        update: the number of a critic's update within the step; empty for the step's own draws.
    """

    seed: int
    samples: Sequence[int]
    device: torch.device
    update: tuple[int, ...] = ()
    _kept: dict[tuple[str, str, tuple[int, ...]], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal draws [B, *shape], float32, on the device."""
        return self._draw(normal, name, shape)

    def uniform(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Draws from U[0, 1) [B, *shape], float32, on the device."""
        return self._draw(uniform, name, shape)

    def of_update(self, number: int) -> "Draws":
        """The draws of a critic's update `number`: other streams of the same samples."""
        return replace(self, update=(number,), _kept={})

    def _draw(self, kind: Callable[..., Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
        key = (kind.__name__, name, shape)
        if key not in self._kept:
            drawn = torch.stack([kind(shape, self.seed, name, *self.update, i) for i in self.samples])
            self._kept[key] = send(drawn, self.device)
        return self._kept[key]
