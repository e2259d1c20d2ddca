"""A network's blocks, compiled one by one; where a tangent is carried, block and tangent are one piece of code."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import tree_flatten, tree_unflatten

from stepfold.errors import UserError

MOST_VARIANTS = 64
"""Of one block's code: numbers of pairs, with and without a gradient, either side of a LoRA, each class of block."""


class CompiledBlock:
    """Stands in for a block's own forward: compiled code, and one operation to whatever intercepts operations."""

    def __init__(self, block: nn.Module, recompute: bool, backend: str) -> None:
        self.block, self.recompute, self.backend = block, recompute, backend

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's own forward."""
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if has_torch_function(tensors):
            return handle_torch_function(self, tensors, *args, **kwargs)
        return self._compiled(type(self.block).forward)(self.block, *args, **kwargs)

    def uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward as it is written, operation by operation."""
        return type(self.block).forward(self.block, *args, **kwargs)

    def with_tangent(self, tangents: Mapping[Tensor, Tensor], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """(what the block returns, the same of its tangents, without a graph).

        Args:
            tangents: tensor -> its tangent, for those of the arguments that have one.
            args, kwargs: of the block's forward.
        """
        leaves, structure = tree_flatten((args, kwargs))
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf in tangents]
        along = [tangents[leaves[i]] for i in where]
        joint = self._compiled(_with_tangent)
        with torch.compiler.set_stance("default"):  # one_pass has other compiled code run uncompiled
            return joint(type(self.block).forward, self.block, leaves, structure, where, along)

    def _compiled(self, function: Any) -> Any:
        return _compiled(function, self.recompute and torch.is_grad_enabled(), self.backend)


@contextmanager
def compiled_blocks(
    blocks: Iterable[nn.Module], *, recompute: bool = False, backend: str = "inductor"
) -> Iterator[None]:
    """Within it the blocks run compiled, from their first call with each set of shapes on.

    Blocks of a class share their code, so a deep network takes no longer to compile than a shallow one.

    Args:
        blocks: whose forward is replaced, and put back at the end.
        recompute: whether the backward pass computes a block's forward again from its inputs, for less memory.
        backend: of torch.compile.

    Raises:
        UserError: the compiler is missing or fails.
    """
    from torch._dynamo.exc import TorchDynamoException  # imported late: it takes a second

    blocks = list(dict.fromkeys(blocks))
    for block in blocks:
        block.forward = CompiledBlock(block, recompute, backend)
    try:
        with torch._dynamo.config.patch(recompile_limit=MOST_VARIANTS):
            yield
    except TorchDynamoException as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"compiling the network's blocks failed ({reason}); on a CPU it needs a C++ compiler and the headers of "
            "Python (Debian: g++, python3-dev); or go on without: --set training.compile=false, or, where the tangent "
            "is what does not compile, --set training.tangent=two_pass"
        ) from None
    finally:
        for block in blocks:
            del block.forward


@cache
def _compiled(function: Any, recompute: bool, backend: str) -> Any:
    """One for all blocks, so that they find each other's code."""

    def compiler(graph: Any, inputs: Any) -> Any:
        from torch._functorch import config as autograd
        from torch._inductor import config as inductor

        from stepfold.maths.zeros import WithoutZeroProducts

        budget = {"activation_memory_budget": 0.0} if recompute else {}
        with autograd.patch(budget), inductor.patch(joint_custom_pre_pass=WithoutZeroProducts()):
            return torch._dynamo.lookup_backend(backend)(graph, inputs)

    return torch.compile(function, dynamic=False, backend=compiler)


def _with_tangent(
    forward: Any, block: nn.Module, leaves: list[Any], structure: Any, where: list[int], along: list[Tensor]
) -> tuple[Any, Any]:
    """(what the block returns, the same of its tangents); compiled, the tangent costs the backward pass nothing."""
    shape: list[Any] = []

    def of_duals(*duals: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, dual in zip(where, duals, strict=True):
            filled[i] = dual
        args, kwargs = tree_unflatten(filled, structure)
        flat, of_output = tree_flatten(forward(block, *args, **kwargs))
        shape[:] = [of_output, [leaf is None for leaf in flat]]
        return tuple(leaf for leaf in flat if leaf is not None)

    def as_returned(found: Iterable[Tensor]) -> Any:
        of_output, absent = shape
        values = iter(found)
        return tree_unflatten([None if is_absent else next(values) for is_absent in absent], of_output)

    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode rule
        out, tangent, *_ = torch.func.jvp(of_duals, tuple(leaves[i] for i in where), tuple(along))
    return as_returned(out), as_returned(part.detach() for part in tangent)
