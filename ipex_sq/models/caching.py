"""The key-value cache of transformers as one layer sees it: tensors with room for another token.

A cache is Python that knows its layer's number, so a layer compiled with it is compiled anew for
every number. A layer compiled with `LayerCache` in its place is one graph for all of them, and
writes the keys and values of its token behind those that are there: transformers copies all of a
cache for every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

KeysAndValues = tuple[Tensor, Tensor]
"""Each `[batch, key heads, tokens, size]`."""

SPARE = 64
"""Tokens for which a growing cache gets room at least."""

APPENDED = "DynamicLayer"
"""Kind of a cache's layer that holds what it has been given, in turn."""

SLIDING = "DynamicSlidingWindowLayer"
"""Kind that returns what it holds followed by what is new, and then lets go of the oldest."""


@dataclass(frozen=True)
class Room:
    """Memory for the keys and values of a layer, the last token among them still free.

    Attributes:
        keys: `[batch, key heads, capacity, size]`, contiguous.
        values: As well.
        tokens: How many count, at most the capacity.
    """

    keys: Tensor
    values: Tensor
    tokens: int

    def shown(self) -> KeysAndValues:
        """The tokens that count, in the same memory."""
        return _first(self.keys, self.tokens), _first(self.values, self.tokens)


def _first(buffer: Tensor, tokens: int) -> Tensor:
    # A slice would have torch.export compare tokens with the capacity, which it knows nothing of.
    batch, heads, capacity, size = buffer.shape
    strides = heads * capacity * size, capacity * size, size, 1
    return torch.as_strided(buffer, (batch, heads, tokens, size), strides)


class LayerCache:
    """Stands for a growing cache inside one layer that runs on one token."""

    def __init__(self, room: Room) -> None:
        self._room = room

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> KeysAndValues:
        """What the cache would return: all keys and values, the new ones at the end."""
        shown = self._room.shown()
        shown[0][:, :, -1].copy_(keys[:, :, 0])
        shown[1][:, :, -1].copy_(values[:, :, 0])
        return shown

    def get_seq_length(self, _index: int = 0) -> int:
        """How many tokens the cache holds."""
        return self._room.tokens - 1


class _Buffers:
    """Memory behind the keys and values that a cache shows.

    It is the cache's as long as the cache shows the very tensors that were put there: reordered,
    cropped or copied ones are others.
    """

    def __init__(self, held: KeysAndValues) -> None:
        spare = max(SPARE, held[0].shape[2] // 4)
        self._keys = _with_spare(held[0], spare)
        self._values = _with_spare(held[1], spare)
        self.shown = held

    def is_behind(self, held: KeysAndValues) -> bool:
        # What inference mode has made cannot be written to outside of it.
        writable = torch.is_inference_mode_enabled() or not self._keys.is_inference()
        return writable and self.shown[0] is held[0] and self.shown[1] is held[1]

    def has_room(self) -> bool:
        return self.shown[0].shape[2] < self._keys.shape[2]

    def room(self) -> Room:
        return Room(self._keys, self._values, self.shown[0].shape[2] + 1)


_BUFFERS: WeakKeyDictionary[Any, dict[int, _Buffers]] = WeakKeyDictionary()
"""Of each cache, or layer of a cache, under the layer's number."""


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
        return _unless_empty(*cache[index]) if growing else None
    if index >= len(layers) or type(layers[index]).__name__ not in (APPENDED, SLIDING):
        return None
    layer = layers[index]
    return _unless_empty(layer.keys, layer.values) if layer.is_initialized else None


def _unless_empty(keys: Tensor, values: Tensor) -> KeysAndValues | None:
    # Before the first token they are tensors of one dimension.
    return (keys, values) if keys.numel() else None


def room_for_one(cache: Any, index: int, held: KeysAndValues) -> Room:
    """What the cache `held` of layer `index`, and behind it room for one more token."""
    if _owner(cache, index) is None:
        return Room(_with_spare(held[0], 1), _with_spare(held[1], 1), held[0].shape[2] + 1)
    buffers = _BUFFERS.setdefault(_owner(cache, index), {})
    own = buffers.get(index)
    if own is None or not own.is_behind(held) or not own.has_room():
        own = buffers[index] = _Buffers(held)
    return own.room()


def keep_token(cache: Any, index: int, room: Room) -> None:
    """Let the cache hold all of `room`, which `room_for_one` gave and a layer has filled."""
    owner = _owner(cache, index)
    shown = room.shown()
    if owner is None:
        cache.update(shown[0][:, :, -1:], shown[1][:, :, -1:], index)
        return
    if owner is cache:  # transformers 4
        cache.key_cache[index], cache.value_cache[index] = shown
        if index == 0:
            cache._seen_tokens += 1
    else:
        owner.keys, owner.values = shown
    _BUFFERS[owner][index].shown = shown


def with_cache(outputs: Any, cache: Any) -> Any:
    """`outputs` of a layer that hands its cache on, with `cache` for what stood in its place."""
    if not isinstance(outputs, tuple):
        return outputs
    return tuple(cache if isinstance(item, LayerCache) else item for item in outputs)


def _owner(cache: Any, index: int) -> Any:
    """What has the layer's tensors as attributes; None where it is not to be appended to."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return cache
    return layers[index] if type(layers[index]).__name__ == APPENDED else None


def _with_spare(held: Tensor, spare: int) -> Tensor:
    batch, heads, tokens, size = held.shape
    buffer = held.new_empty(batch, heads, tokens + spare, size)
    buffer[:, :, :tokens].copy_(held)
    return buffer
