"""Products with zero, which torch's forward-mode differentiation leaves in compiled code, taken out of it."""

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

aten = torch.ops.aten
PRODUCTS = {aten.convolution.default, aten.bmm.default, aten.mm.default}
SAME_VALUES = {
    aten.alias.default, aten.clone.default, aten.detach.default, aten.expand.default, aten.permute.default,
    aten.view.default, torch.ops.prims.convert_element_type.default,
}  # fmt: skip


class WithoutZeroProducts(CustomGraphPass):
    """Makes each product with zero of a graph a zero, which the compiler's own passes then take out of the sums.

    Weights have no tangent, so the product of an input with it is zero. Uncompiled code leaves it out; compiled code
    computes it, a third convolution for each two that count.
    """

    def __call__(self, graph: Graph) -> None:
        """Changes the graph in place."""
        for node in list(graph.nodes):
            bias = node.args[2] if len(node.args) > 2 else None
            if node.target in PRODUCTS and any(map(is_zero, node.args[:2])) and (bias is None or is_zero(bias)):
                value = node.meta["val"]
                with graph.inserting_before(node):
                    zero = graph.call_function(
                        aten.full.default, (list(value.shape), 0), {"dtype": value.dtype, "device": value.device}
                    )
                zero.meta.update(node.meta)
                node.replace_all_uses_with(zero)
                graph.erase_node(node)

    def uuid(self) -> bytes:
        """Under which the compiler's caches keep what came of it."""
        return get_hash_for_files((__file__,))


def is_zero(node: object) -> bool:
    """Whether all that a node of a graph stands for is zero."""
    if not isinstance(node, Node):
        return False
    if node.target == aten.full.default:
        return bool(node.args[1] == 0)
    return node.target in SAME_VALUES and is_zero(node.args[0])
