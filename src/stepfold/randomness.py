"""Named random streams: a draw depends on what it is for, never on batch size, process or earlier draws."""

import hashlib

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
