"""The key-value cache of transformers as one compiled layer sees it: tensors in, tensors out.

A cache is Python that knows its layer's number, so a layer compiled with it is compiled anew for
every number. A layer compiled with `LayerCache` in its place is one graph for all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

KeysAndValues = tuple[Tensor, Tensor]
"""Each `[batch, key heads, tokens, size]`."""

GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""Kinds of a cache's layers that return what they hold followed by what is new."""


class LayerCache:
    """Stands for a growing cache inside one layer.

    Attributes:
        added: Keys and values that the layer computed, once it has run.
    """

    added: KeysAndValues

    def __init__(self, past: KeysAndValues) -> None:
        """`past` is what the cache holds for this layer."""
        self._past = past

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> KeysAndValues:
        """What the cache would return: all keys and values so far."""
        self.added = keys, values
        past_keys, past_values = self._past
        return torch.cat((past_keys, keys), dim=-2), torch.cat((past_values, values), dim=-2)

    def get_seq_length(self, _index: int = 0) -> int:
        """How many tokens the cache holds."""
        return self._past[0].shape[-2]


def is_cache(value: Any) -> bool:
    """Whether an argument of a layer is a cache."""
    return hasattr(value, "get_seq_length")


def layer_index(layer: nn.Module) -> int | None:
    """The number under which a decoder layer asks the cache; None where it has none of its own."""
    indices = {module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")}
    return indices.pop() if len(indices) == 1 else None  # type: ignore[return-value]


def past_of(cache: Any, index: int | None) -> KeysAndValues | None:
    """What `cache` holds for layer `index`; None where `LayerCache` cannot stand for it.

    Only a growing cache is its content; an empty one, one of fixed size, and none have no past.
    """
    if index is None or cache is None:
        return None
    layers = getattr(cache, "layers", None)
    if layers is None:  # transformers 4
        growing = type(cache).__name__ == "DynamicCache" and index < len(cache)
        return _contiguous(*cache[index]) if growing else None
    if index >= len(layers) or type(layers[index]).__name__ not in GROWING:
        return None
    layer = layers[index]
    return _contiguous(layer.keys, layer.values) if layer.is_initialized else None


def _contiguous(keys: Tensor, values: Tensor) -> KeysAndValues:
    # After a prompt they may be views of another order, which would be a graph of its own.
    return keys.contiguous(), values.contiguous()


def with_cache(outputs: Any, cache: Any) -> Any:
    """`outputs` of a layer that hands its cache on, with `cache` for what stood in its place."""
    if not isinstance(outputs, tuple):
        return outputs
    return tuple(cache if isinstance(item, LayerCache) else item for item in outputs)
