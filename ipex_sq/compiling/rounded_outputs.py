"""An int8 product whose output is only rounded for the next one gives levels at once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.pattern_matcher import (
    Match,
    PatternMatcherPass,
    fwd_only,
    gen_pattern,
    register_graph_pattern,
)

from ipex_sq.kernels.levels import static_levels

Activation = Callable[[Tensor], Tensor]


def rounded_outputs(graph: fx.Graph) -> None:
    """Replace, in place, bf16 products, an activation and static rounding by `int8_levels`.

    The outputs between two products, which no cache holds, are then neither written nor read.
    """
    if hasattr(torch.ops.ipex_sq, "int8_levels"):
        _passes().apply(graph)


def _bloom_gelu(x: Tensor) -> Tensor:
    # Its constant is a little short of sqrt(2 / pi).
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def _new_gelu(x: Tensor) -> Tensor:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def _gelu_tanh(x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh")


_ACTIVATIONS: tuple[tuple[str, Activation], ...] = (
    ("relu", torch.relu),
    ("silu", nn.functional.silu),
    ("gelu", nn.functional.gelu),
    ("gelu_tanh", _gelu_tanh),
    ("gelu_tanh", _bloom_gelu),
    ("gelu_tanh", _new_gelu),
)
"""Names that the operator knows, and how models write them."""

_WEIGHT = ("packed", "sums", "weight_scale", "bias")
_FACTOR = ("factor_packed", "factor_sums", "factor_scale", "factor_bias")
_INPUT = ("levels", "scale", "zero_point")
_NEXT = ("multiplier", "next_zero_point")
_COPIES = ("channels", "held_low", "held_high")


@cache
def _passes() -> PatternMatcherPass:
    """What is searched for is traced from the code that models run: it looks the same."""
    passes = PatternMatcherPass()
    for name, activation in _ACTIVATIONS:
        for gated in (False, True):
            for copies in (False, True):
                searched, inputs = _search(activation, gated=gated, copies=copies)
                trace: Any = _traced
                replace: Any = _Levels(name)
                pattern = gen_pattern(searched, inputs, trace)
                register_graph_pattern(pattern, pass_dict=passes)(replace)
    return passes


def _traced(function: Callable[..., Any], inputs: Sequence[Any], **options: Any) -> fx.GraphModule:
    # Models' graphs have been through these passes; torch 2.8's drop the cast to bf16 and back.
    graph: fx.GraphModule = joint_graph_passes(fwd_only(function, inputs, **options))
    return graph


def _search(
    activation: Activation, *, gated: bool, copies: bool
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A function from the inputs, by name, to levels, and an example of these inputs."""
    rows: Any = torch.ops.ipex_sq.int8_rows
    examples = dict(_examples())
    names = [*_INPUT, *_WEIGHT, *(_FACTOR if gated else ()), *_NEXT, *(_COPIES if copies else ())]

    def searched(*inputs: Tensor) -> Tensor:
        of = dict(zip(names, inputs, strict=True))
        levels = [of[name] for name in _INPUT]
        x = activation(rows(*levels, *(of[name] for name in _WEIGHT), torch.bfloat16))
        if gated:
            x = x * rows(*levels, *(of[name] for name in _FACTOR), torch.bfloat16)
        multiplier, zero_point = (of[name] for name in _NEXT)
        channels, held_low, held_high = (of.get(name) for name in _COPIES)
        return static_levels(x, multiplier, zero_point, (channels, held_low, held_high))

    return _with_parameters(searched, names), [examples[name] for name in names]


def _with_parameters(function: Callable[..., Tensor], names: list[str]) -> Callable[..., Tensor]:
    """Inductor reads the names of a pattern's inputs from its signature."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def _examples() -> Iterator[tuple[str, Tensor]]:
    yield "levels", torch.zeros(2, 3, 4, dtype=torch.uint8)
    yield "scale", torch.ones(())
    yield "zero_point", torch.zeros((), dtype=torch.int32)
    for packed, sums, scale, bias in (_WEIGHT, _FACTOR):
        yield packed, torch.zeros(1, 1, 64, 4, dtype=torch.int8)
        yield sums, torch.zeros(8, dtype=torch.int32)
        yield scale, torch.ones(8)
        yield bias, torch.zeros(8)
    yield "multiplier", torch.ones(8)
    yield "next_zero_point", torch.zeros((), dtype=torch.int32)
    yield "channels", torch.tensor([1, 2])
    yield "held_low", torch.zeros(2)
    yield "held_high", torch.zeros(2)


class _Levels:
    """Puts the one operator in the place of a match."""

    def __init__(self, activation: str) -> None:
        self._activation = activation

    def __call__(self, match: Match, **found: Any) -> None:
        last = match.output_node()
        weights = [names for names in (_WEIGHT, _FACTOR) if names[0] in found]
        lists = [[found[name] for name in names] for names in zip(*weights, strict=True)]
        arguments = [
            *(found[name] for name in _INPUT),
            *lists,
            self._activation,
            *(found[name] for name in _NEXT),
            *(found.get(name) for name in _COPIES),
        ]
        with match.graph.inserting_before(last):
            levels: Any = torch.ops.ipex_sq.int8_levels.default
            node = match.graph.call_function(levels, tuple(arguments))
        node.meta.update(last.meta)
        last.replace_all_uses_with(node)
        match.erase_nodes()
