"""Inductor as it compiles layers: attention of its own, every operation once, a fast tanh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table

from ipex_sq.backends import attention

VERSION = "ipex_sq layers 3"
"""Part of Inductor's cache key: to be changed with `short_attention` and the pass below."""

_OWN_MEMORY = (torch.ops.aten.empty, torch.ops.aten.clone)


class EveryOperationOnce(CustomGraphPass):
    """Lets readers of one tensor share what each of them computes from it: its rounding to int8.

    Inductor fuses equal operations where it can, and writes each result all the same.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Replace every operation that was there before, in place."""
        returned = graph.output_node().all_input_nodes
        seen: dict[Any, fx.Node] = {}
        for node in list(graph.nodes):
            if node in returned or not _is_function(node):
                continue
            # As text: nodes have names of their own there, and 1 is not 1.0.
            first = seen.setdefault((node.target, str(node.args), str(node.kwargs)), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)

    def uuid(self) -> str:
        """What the cache key holds: graphs with the kernel cannot be loaded without it."""
        return f"{VERSION}, {'kernel' if attention.has_kernel() else 'matmuls'}"


def _is_function(node: fx.Node) -> bool:
    """Whether the node gives the same for the same arguments and changes none of them."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
        and target.overloadpacket not in _OWN_MEMORY
    )


def inductor(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """Inductor with short attention and `EveryOperationOnce`, as a backend for torch.compile."""
    table = {**select_decomp_table(), attention.SDPA: attention.short_attention}
    patches = {
        "post_grad_custom_pre_pass": EveryOperationOnce(),
        # What the asserts would check, Dynamo's guards have checked: 4 % of a step of generation.
        "size_asserts": False,
        # From the exponential, to 1e-7: half the time of the library's tanh, in BLOOM's GELU.
        "cpp.use_decompose_tanh": True,
    }
    compiled: Any = compile_fx(graph, inputs, config_patches=patches, decompositions=table)
    return compiled  # type: ignore[no-any-return]
