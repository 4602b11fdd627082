"""Hooks inside of a layer: a compiled layer does not call them.

Dynamo looks for hooks when it compiles and never again, and torch.export leaves them out.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

CAPTURING = "transformers.utils.output_capturing"
"""Hooks of transformers 5 that stay once hidden states were asked for, and sleep until they are
again."""


def hooks_of_all_modules() -> list[Any]:
    """The dictionaries of hooks that PyTorch calls for every module of the process."""
    every: Any = torch.nn.modules.module
    return [every._global_forward_hooks, every._global_forward_pre_hooks]


def is_awake(hook: Any) -> bool:
    """Whether a hook does something when it is called now, in this thread."""
    if getattr(hook, "__module__", None) != CAPTURING:
        return True
    collector = getattr(sys.modules.get(CAPTURING), "_active_collector", None)
    return collector is None or bool(collector.get())  # what is to be captured


class HooksInside:
    """The hooks of a layer's modules; PyTorch calls the layer's own, compiled or not."""

    def __init__(self, layer: nn.Module) -> None:
        inside = [module for module in layer.modules() if module is not layer]
        self._hooks = [getattr(module, name) for module in inside for name in HOOKS]
        self._hooks += hooks_of_all_modules()

    def any(self) -> bool:
        """Whether there is one that is awake. It takes about a microsecond."""
        return any(self._hooks) and any(
            is_awake(hook) for hooks in self._hooks for hook in hooks.values()
        )
