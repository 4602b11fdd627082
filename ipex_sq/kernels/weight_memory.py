"""Memory for the packed weights of a model, in pages of 2 MiB where the system has them.

A step of generation reads all weights once. In pages of 4 KiB a core looks up a page for every 64
lines, and what fetches ahead stops at its end.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

_LINE = 64


class WeightMemory:
    """One stretch of memory for weights, one after the other.

    It lives as long as one of them. Pages count as used only once there is something in them, and
    it ends where the last weight does: nothing is lost to the size of pages.
    """

    def __init__(self, shapes: Iterable[tuple[int, ...]]) -> None:
        """Memory for int8 weights of these `shapes`."""
        size = sum(map(_room, shapes))
        self._next = 0
        self._memory = memoryview(b"") if size == 0 else memoryview(_mapped(size))

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """Room for the next weight, int8 of `shape`, with nothing in it.

        Raises:
            ValueError: There is none.
        """
        size = torch.Size(shape).numel()
        place = self._memory[self._next : self._next + size]
        if len(place) < size:
            raise ValueError(f"there is no room for another weight {tuple(shape)}")
        self._next += _room(shape)
        return torch.frombuffer(place, dtype=torch.int8).view(shape)


def _room(shape: tuple[int, ...]) -> int:
    return -(-torch.Size(shape).numel() // _LINE) * _LINE


def _mapped(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # of a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
