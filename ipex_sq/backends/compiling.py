"""torch.compile, one graph for all decoder layers.

Compiling a whole model costs minutes; its layers are alike, so one compiled layer serves them all
in seconds. A call with a key-value cache runs as written: the cache's Python would be compiled
anew for every layer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

KINDS = 256
"""Forms of one layer (model, precision, recipe, grad mode) that a process may compile.

Past PyTorch's own limit of 8 it goes on uncompiled, several times slower and with other last bits.
"""


def compiler_problem() -> str | None:
    """Why torch.compile cannot build CPU code here, or None."""
    if any(shutil.which(name) for name in ("g++", "clang++")):
        return None
    return "torch.compile needs a C++ compiler: install g++"


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of the model: the ModuleList that holds most modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(1 for _ in layers.modules()) for layers in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []


def compile_layers(model: nn.Module) -> nn.Module:
    """Compile every repeated layer of `model` in place, for any batch size and length."""
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, KINDS)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * KINDS)
    for layer in find_layers(model):
        layer.forward = _CompiledForward(layer.forward)  # type: ignore[assignment, method-assign]
    return model


class _CompiledForward:
    """Runs the compiled layer, or the layer as written where a key-value cache is passed.

    The compiler is imported with the first call that needs it: a process that only generates saves
    2 s and 41 MB (2026-11-23).
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._eager = forward
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values())):
            return self._eager(*args, **kwargs)
        if self._compiled is None:
            from ipex_sq.backends.attention import inductor

            self._compiled = torch.compile(self._eager, dynamic=True, backend=inductor)
        return self._compiled(*args, **kwargs)
