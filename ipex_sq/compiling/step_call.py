"""What a decoder layer is called with for one more token of each text: form, types and sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ipex_sq.models.caching import LayerCache, Room

TEXTS, TOKENS, CAPACITY = "texts", "tokens", "capacity"

Size = int | tuple[str, int]
"""Of a dimension: always the same, or so many times one of these three."""

Sizes = tuple[tuple[torch.dtype, tuple[Size, ...]], ...]
"""Of several tensors, with their types."""

Form = tuple[tuple[Any, ...], ...]
"""Of each argument its name; of a tuple of tensors also their number, of a constant its type and
value."""

_CONSTANTS = (bool, int, float, str, torch.dtype)


@dataclass(frozen=True)
class StepCall:
    """What a layer is called with for one more token of each text.

    Attributes:
        tensors: Keys and values of the room, one without elements `[tokens, 0]`, then those among
            the arguments in turn.
        cache: Name of the cache among the arguments.
        form: Of the other arguments.
        numbers: Of texts, of tokens with the new one, and for how many there is room.
    """

    tensors: tuple[Tensor, ...]
    cache: str
    form: Form
    numbers: dict[str, int]

    @classmethod
    def of(cls, name: str, room: Room, arguments: Mapping[str, Any]) -> StepCall | None:
        """None if an argument is neither a tensor, a tuple of tensors nor a constant."""
        # torch.export knows sizes of tensors, but no numbers that change.
        tensors = [room.keys, room.values, torch.empty(room.tokens, 0)]
        form: list[tuple[Any, ...]] = []
        for key, value in arguments.items():
            if isinstance(value, Tensor):
                tensors.append(value.contiguous())
                form.append((key,))
            elif value is None or isinstance(value, _CONSTANTS):
                form.append((key, type(value), value))
            elif isinstance(value, tuple) and all(isinstance(item, Tensor) for item in value):
                tensors.extend(item.contiguous() for item in value)
                form.append((key, len(value)))
            else:
                return None
        texts, _, capacity, _ = room.keys.shape
        numbers = {TEXTS: texts, TOKENS: room.tokens, CAPACITY: capacity}
        return cls(tuple(tensors), name, tuple(form), numbers)

    @property
    def texts(self) -> int:
        """How many."""
        return self.numbers[TEXTS]

    def cache_and_arguments(self, tensors: Sequence[Tensor]) -> tuple[LayerCache, dict[str, Any]]:
        """What the layer is to be called with, `tensors` in the place of this call's."""
        keys, values, tokens, *others = tensors
        rest = iter(others)
        cache = LayerCache(Room(keys, values, tokens.shape[0]))
        arguments: dict[str, Any] = {self.cache: cache}
        for key, *what in self.form:
            if not what:
                arguments[key] = next(rest)
            elif len(what) == 1:
                arguments[key] = tuple(next(rest) for _ in range(what[0]))
            else:
                arguments[key] = what[1]
        return cache, arguments

    def sizes(self) -> Sizes:
        """Types and sizes of the tensors, with texts and tokens by name."""
        held = self.tensors[:2]
        room = [
            (x.dtype, (self._leading(x.shape[0]), x.shape[1], (CAPACITY, 1), x.shape[3]))
            for x in held
        ]
        tokens = self.tensors[2].dtype, ((TOKENS, 1), 0)
        rest = zip(self._names(), self.tensors[3:], strict=True)
        others = [(x.dtype, self._sizes_of(name, x)) for name, x in rest]
        return *room, tokens, *others

    def _names(self) -> Iterator[str]:
        """The argument that each tensor is part of."""
        for name, *what in self.form:
            yield from [name] * (1 if not what else what[0] if len(what) == 1 else 0)

    def _sizes_of(self, name: str, tensor: Tensor) -> tuple[Size, ...]:
        if tensor.ndim == 0:
            return ()
        sizes: list[Size] = [self._leading(tensor.shape[0]), *tensor.shape[1:]]
        masks = any(part in name for part in ("mask", "alibi", "bias"))
        if masks and tensor.shape[-1] == self.numbers[TOKENS]:
            sizes[-1] = TOKENS, 1
        return tuple(sizes)

    def _leading(self, size: int) -> Size:
        # ALiBi has a row for each head of each text.
        each = (1, self.tensors[0].shape[1])
        several = self.texts > 1 and size in {self.texts * number for number in each}
        return (TEXTS, size // self.texts) if several else size


def shape_of(sizes: tuple[Size, ...], of: Mapping[str, int]) -> tuple[int, ...]:
    """What a tensor of `sizes` has with the numbers `of` texts, tokens and capacity."""
    return tuple(size if isinstance(size, int) else of[size[0]] * size[1] for size in sizes)
