"""Unfused attention whose memory is bounded: a chunk of queries at a time meets all keys."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stepfold.maths.blocks import CompiledBlock

QUERY_CHUNK = 1024
"""Queries whose attention to all keys is in memory at once."""


def query_chunks(count: int, mask: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
    """Spans of QUERY_CHUNK of `count` queries, each with its rows of the attention mask [..., queries or 1, keys]."""
    for start in range(0, count, QUERY_CHUNK):
        span = slice(start, min(start + QUERY_CHUNK, count))
        yield span, mask[..., span, :] if mask is not None and mask.shape[-2] > 1 else mask


class LongestAttention(TorchFunctionMode):
    """While active, notes how many queries torch's attention has had at once.

    Attributes:
        queries: the largest number; 0 without attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queries = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `func` as it is."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            self.queries = max(self.queries, query.shape[-2])
        return func(*args, **kwargs)


class ChunkedAttention(TorchFunctionMode):
    """While active, torch's attention takes its queries in chunks; each kernel is the caller's choice.

    For passes without a graph: only there do the chunks' scores leave memory at once. Causal attention, and attention
    with dropout, stays whole. Compiled blocks run uncompiled, so that their attention passes through here too.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `func`, in chunks if it is attention to many queries."""
        kwargs = kwargs or {}
        if isinstance(func, CompiledBlock):
            with self:  # off within this method
                return func.uncompiled(*args, **kwargs)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        query, mask = given["query"], given.get("attn_mask")
        if query.shape[-2] <= QUERY_CHUNK or given.get("is_causal") or given.get("dropout_p"):
            return func(*args, **kwargs)
        parts = (
            func(**given | {"query": query[..., span, :], "attn_mask": part})
            for span, part in query_chunks(query.shape[-2], mask)
        )
        return torch.cat(list(parts), dim=-2)
