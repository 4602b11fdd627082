"""Which layers of a model are alike: what one of them is compiled to is right for the others."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_TORCHS_OWN = frozenset(vars(nn.Module())) - {"training"}
_CONSTANTS = (bool, int, float, str, torch.dtype)


def kind_of(layer: nn.Module) -> Hashable:
    """Equal for layers that run the same Python on tensors of the same types and sizes.

    All that a module has counts but its layer's number: no graph is made that has used it.
    """
    places: dict[int, int] = {}
    return tuple(
        (
            path,
            type(module),
            tuple((name, _kind_of_value(value)) for name, value in _attributes(module, layer)),
            tuple(_kind_of_tensor(name, tensor, places) for name, tensor in _tensors(module)),
        )
        for path, module in layer.named_modules()
    )


def _attributes(module: nn.Module, layer: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        own_forward = name == "forward" and module is layer
        if name not in _TORCHS_OWN and name != "layer_idx" and not own_forward:
            yield name, value


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    yield from module._parameters.items()
    yield from module._buffers.items()


def _kind_of_value(value: Any) -> Hashable:
    if value is None or isinstance(value, _CONSTANTS):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_kind_of_value(item) for item in value)
    if isinstance(value, partial):
        options = tuple((name, _kind_of_value(item)) for name, item in value.keywords.items())
        return _kind_of_value(value.func), _kind_of_value(value.args), options
    return _Same(value)


def _kind_of_tensor(name: str, tensor: Tensor | None, places: dict[int, int]) -> Hashable:
    if tensor is None:
        return name, None
    place = places.setdefault(id(tensor), len(places))  # which of them are one and the same
    return name, place, tensor.dtype, tensor.layout, tuple(tensor.shape)


class _Same:
    """Equal to what stands for the same object."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)
