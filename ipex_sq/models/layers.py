"""The repeated layers of a model."""

from __future__ import annotations

from torch import nn


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of the model: the ModuleList that holds most modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(1 for _ in layers.modules()) for layers in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []
