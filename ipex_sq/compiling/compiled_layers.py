"""torch.compile, one graph for all decoder layers.

Compiling a whole model costs minutes; its layers are alike, so one compiled layer serves them all
in seconds. With a key-value cache the prompt runs as written, so that the first token comes at
once, and every further token goes through a graph for steps (`stepping.py`).
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from contextvars import ContextVar
from functools import cached_property
from types import MethodType
from typing import Any

import torch
from torch import nn

from ipex_sq.compiling.hooks import HooksInside
from ipex_sq.compiling.last_layer import ClassifierForward, CutLayer
from ipex_sq.compiling.one_thread import one_at_a_time
from ipex_sq.compiling.stepping import LayerStep, StepGraphs
from ipex_sq.kernels.attention import kernel_for_attention
from ipex_sq.kernels.brgemm import MOST_ROWS
from ipex_sq.kernels.head import widen_logits
from ipex_sq.models.caching import is_cache, layer_index, past_of
from ipex_sq.models.first_token import find_first_token
from ipex_sq.models.layers import find_layers
from ipex_sq.system import keep_freed_memory

KINDS = 256
"""Forms of one layer (model, precision, recipe, grad mode) that a process may compile.

Past PyTorch's own limit of 8 it goes on uncompiled, several times slower and with other last bits.
"""


_SET: ContextVar[bool] = ContextVar("_SET", default=False)
"""Whether `_set_compiler` was called where this thread runs: Dynamo may have settings for each."""


def compiler_problem() -> str | None:
    """Why torch.compile cannot build CPU code here, or None."""
    if any(shutil.which(name) for name in ("g++", "clang++")):
        return None
    return "torch.compile needs a C++ compiler: install g++"


def compile_layers(model: nn.Module) -> nn.Module:
    """Compile every repeated layer of `model` in place, for any batch size and length.

    A bf16 head gives logits in fp32, a classifier that reads the first token alone ends its last
    layer with that one (ADR 16), and the process keeps the memory that it frees.
    """
    graphs = StepGraphs()
    first_token = find_first_token(model)
    forwards = [_CompiledForward(layer, graphs) for layer in find_layers(model)]
    if first_token is not None:
        forwards[-1].cut = CutLayer(first_token)
        model.forward = ClassifierForward(model, first_token)  # type: ignore[assignment, method-assign]
    for layer, forward in zip(find_layers(model), forwards, strict=True):
        layer.forward = forward  # type: ignore[assignment, method-assign]
    widen_logits(model)
    keep_freed_memory()
    return model


class _CompiledForward:
    """Runs the compiled layer; with a key-value cache, compiled steps after a prompt as written.

    The compiler is imported with the first call that needs it: a process that loads a model has its
    first token 2 s earlier.

    Attributes:
        cut: What may run in the layer's place, or None.
    """

    cut: CutLayer | None = None

    def __init__(self, layer: nn.Module, graphs: StepGraphs) -> None:
        forward: Any = layer.forward
        self._layer = layer
        self._function = forward.__func__
        self._graphs = graphs

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a file: what was compiled is bound to this layer, and stays behind."""
        state = {"_layer": self._layer, "_function": self._function, "_graphs": self._graphs}
        return state if self.cut is None else {**state, "cut": self.cut}

    @cached_property
    def _eager(self) -> Callable[..., Any]:
        return MethodType(self._function, self._layer)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self._eager).parameters)

    @cached_property
    def _index(self) -> int | None:
        return layer_index(self._layer)

    @cached_property
    def _hooks(self) -> HooksInside:
        return HooksInside(self._layer)

    @cached_property
    def _step(self) -> LayerStep:
        return LayerStep(self._layer, self._function, self._graphs)

    @cached_property
    def _unprepared(self) -> list[Any]:
        return [module for module in self._layer.modules() if hasattr(module, "keep_rows")]

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        return _compile(self._eager)

    @cached_property
    def _compiled_cut(self) -> Callable[..., Any]:
        return _compile(self._function)

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns; by its own graphs, also where a caller compiles the model."""
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        name = next((name for name, value in named.items() if is_cache(value)), None)
        if name is None:
            if self._hooks.any() or _wants_gradient(named):
                return self._as_written(*args, **kwargs)
            if not _SET.get():
                _set_compiler()
            if self.cut is not None and self.cut.is_enough():
                return self._compiled_cut(self.cut.current(), *args, **kwargs)
            return self._compiled(*args, **kwargs)
        shape = _hidden_shape(named)
        past = past_of(named[name], self._index)
        # Gradients need each step's keys and values as they were, not a buffer that is written to.
        if self._index is None or past is None or shape[-2] != 1 or torch.is_grad_enabled():
            return self._as_written(*args, **kwargs)
        if self._unprepared and shape[0] <= MOST_ROWS:
            self._prepare()
        cache = named.pop(name)
        return self._step.run(name, cache, self._index, named)

    def _as_written(self, *args: Any, **kwargs: Any) -> Any:
        with kernel_for_attention():
            return self._eager(*args, **kwargs)

    def _prepare(self) -> None:
        with one_at_a_time():
            for module in self._unprepared:
                module.keep_rows()
            self._unprepared = []


def _set_compiler() -> None:
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, KINDS)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * KINDS)
    # While one thread compiles, a compiled layer of another one runs as written, and does not fail.
    dynamo.error_on_nested_fx_trace = False
    _SET.set(True)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    from ipex_sq.compiling.inductor import inductor

    compiled: Callable[..., Any] = torch.compile(function, dynamic=True, backend=inductor)
    return compiled


def _wants_gradient(arguments: dict[str, Any]) -> bool:
    """Int8 Linears refuse it, and what raises while Dynamo reads it is never compiled again."""
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in arguments.values()
    )


def _hidden_shape(arguments: dict[str, Any]) -> torch.Size:
    """Of the layer's first tensor, `[batch, tokens, hidden]`."""
    return next(value.shape for value in arguments.values() if isinstance(value, torch.Tensor))
