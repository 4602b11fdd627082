"""Inductor as it compiles layers: own attention, shared work once, levels at once, fast tanh."""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table

from ipex_sq.compiling.rounded_outputs import rounded_outputs
from ipex_sq.kernels import attention

VERSION = "ipex_sq layers 8"
"""Part of Inductor's cache key: to be changed with `short_attention` and the passes below."""

_OWN_MEMORY = (torch.ops.aten.empty, torch.ops.aten.clone)


class SharedWork(CustomGraphPass):
    """Lets readers of a tensor share what is the same for all, and its writer do some of it."""

    def __call__(self, graph: fx.Graph) -> None:
        """Change `graph` in place."""
        _without_asserts(graph)
        every_operation_once(graph)
        rounded_outputs(graph)
        products_together(graph)

    def uuid(self) -> str:
        """What the cache key holds: graphs with the kernel cannot be loaded without it."""
        return f"{VERSION}, {'kernel' if attention.has_kernel() else 'matmuls'}"


def _without_asserts(graph: fx.Graph) -> None:
    # torch.export has each cast assert what it casts from, which makes another reader of it.
    for node in graph.find_nodes(
        op="call_function", target=torch.ops.aten._assert_tensor_metadata.default
    ):
        graph.erase_node(node)


def every_operation_once(graph: fx.Graph) -> None:
    """Replace, in place, every operation that was there before: rounding to int8, of each reader.

    Inductor fuses equal operations where it can, and writes each result all the same.
    """
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


def products_together(graph: fx.Graph) -> None:
    """Make one call, in place, of int8 products of a few rows that have their levels in common.

    A call costs as much as reading a small weight, and small weights leave cores without work.
    """
    alike: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if _is_rows(node) and all(of.op == "placeholder" for of in _weights_of(node)):
            levels, scale, zero_point, *_, dtype = node.args
            alike.setdefault((levels, scale, zero_point, dtype), []).append(node)
    for (*inputs, dtype), nodes in alike.items():
        if len(nodes) > 1:
            _join(graph, nodes, inputs, dtype)


def _join(graph: fx.Graph, nodes: list[fx.Node], inputs: list[Any], dtype: Any) -> None:
    together: Any = torch.ops.ipex_sq.int8_rows_together.default
    weights = [[node.args[at] for node in nodes] for at in (3, 4, 5, 6)]
    with graph.inserting_before(nodes[0]):
        joined = graph.call_function(together, (*inputs, *weights, dtype))
        joined.meta["val"] = [node.meta["val"] for node in nodes]
        outputs = [graph.call_function(getitem, (joined, n)) for n in range(len(nodes))]
    for node, output in zip(nodes, outputs, strict=True):
        output.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(output)
        graph.erase_node(node)


def _is_rows(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.name() == "ipex_sq::int8_rows"


def _weights_of(node: fx.Node) -> list[fx.Node]:
    return [of for of in node.all_input_nodes if of not in node.args[:3]]


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
    """Inductor with short attention and `SharedWork`, as a backend for torch.compile."""
    table = {**select_decomp_table(), attention.SDPA: attention.short_attention}
    patches = {
        "post_grad_custom_pre_pass": SharedWork(),
        # What the asserts would check, Dynamo's guards have checked: 4 % of a step of generation.
        "size_asserts": False,
        "alignment_asserts": False,
        # From the exponential, to 1e-7: half the time of the library's tanh, in BLOOM's GELU.
        "cpp.use_decompose_tanh": True,
    }
    compiled: Any = compile_fx(graph, inputs, config_patches=patches, decompositions=table)
    return compiled  # type: ignore[no-any-return]
