"""Hooks that stay on for one `with` block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks after the `with` block, even where it raises.

    Args:
        handles: Of hooks; a generator may register them as it goes, and those that it got to
            register go even where it raises.
    """
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield
