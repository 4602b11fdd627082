"""An int8 product whose output is only rounded for the next one gives levels at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._inductor.pattern_matcher import (
    CallFunction,
    KeywordArg,
    Match,
    PatternMatcherPass,
    register_graph_pattern,
)

aten = torch.ops.aten
_PRODUCT = (
    "levels",
    "scale",
    "zero_point",
    "packed",
    "weight_sums",
    "weight_scale",
    "bias",
)


def rounded_outputs(graph: fx.Graph) -> None:
    """Replace, in place, products, ReLU or GELU and static rounding by `int8_rows_levels`.

    The output between two products, which no cache holds, is then neither written nor read.
    """
    if hasattr(torch.ops.ipex_sq, "int8_rows_levels"):
        _passes().apply(graph)


def _passes() -> PatternMatcherPass:
    passes = PatternMatcherPass()
    for dtype in (torch.bfloat16, torch.float32):
        for activation, pattern in (("relu", _relu(dtype)), ("gelu", _gelu(dtype))):
            register_graph_pattern(_rounded(pattern), pass_dict=passes)(_Levels(dtype, activation))
    return passes


def _product(dtype: torch.dtype, users: int) -> Any:
    operator = torch.ops.ipex_sq.int8_rows.default
    return CallFunction(operator, *(KeywordArg(name) for name in _PRODUCT), dtype, _users=users)


def _cast(x: Any, dtype: torch.dtype, users: int = 1) -> Any:
    return CallFunction(torch.ops.prims.convert_element_type.default, x, dtype, _users=users)


def _widened(x: Any, dtype: torch.dtype) -> Any:
    return x if dtype == torch.float32 else _cast(x, torch.float32)


def _relu(dtype: torch.dtype) -> Any:
    return _widened(CallFunction(aten.relu.default, _product(dtype, 1)), dtype)


def _gelu(dtype: torch.dtype) -> Any:
    if dtype == torch.float32:
        x = _product(dtype, 2)
    else:
        x = _cast(_product(dtype, 1), torch.float32, users=2)
    scaled = CallFunction(aten.mul.Tensor, x, 0.7071067811865476)
    raised = CallFunction(aten.add.Tensor, CallFunction(aten.erf.default, scaled), 1)
    output = CallFunction(aten.mul.Tensor, CallFunction(aten.mul.Tensor, x, 0.5), raised)
    return output if dtype == torch.float32 else _widened(_cast(output, dtype), dtype)


def _rounded(x: Any) -> Any:
    """`Int8Linear`'s static rounding, of an input without parts."""
    x = CallFunction(aten.round.default, CallFunction(aten.mul.Tensor, x, KeywordArg("multiplier")))
    x = CallFunction(aten.add.Tensor, x, KeywordArg("next_zero_point"))
    x = CallFunction(aten.clamp_max.default, CallFunction(aten.clamp_min.default, x, 0), 255)
    return _cast(x, torch.uint8)


class _Levels:
    """Puts the one operator in the place of a match."""

    def __init__(self, dtype: torch.dtype, activation: str) -> None:
        self._end = dtype, activation

    def __call__(self, match: Match, **found: Any) -> None:
        last = match.output_node()
        product = [found[name] for name in _PRODUCT]
        next_input = found["multiplier"], found["next_zero_point"]
        with match.graph.inserting_before(last):
            levels: Any = torch.ops.ipex_sq.int8_rows_levels.default
            node = match.graph.call_function(levels, (*product, *self._end, *next_input))
        node.meta.update(last.meta)
        last.replace_all_uses_with(node)
        match.erase_nodes()
