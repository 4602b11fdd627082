"""Compiling in one thread while others run the model.

PyTorch's tracers exchange methods of `nn.Module`, and torch.export turns off oneDNN and says that
it is exporting, for the whole process; two tracers at once put back what is not theirs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Within it, no other thread compiles, be it through torch.compile."""
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock:
        yield


@contextmanager
def traced_alone() -> Iterator[None]:
    """Within it, what torch.export does to the process it does to this thread alone.

    Other threads' modules would become part of the graph or fail, being none of its own, so would
    kernels that need oneDNN, and transformers would make masks that nobody needs. To be entered by
    one thread at a time.
    """
    from torch.export import _trace
    from torch.fx._symbolic_trace import _Patcher as patcher

    with ExitStack() as patches:
        thread = threading.get_ident()
        own = _patch_for(thread, patcher.patch_method)
        patches.enter_context(_replaced(patcher, "patch_method", own))
        # It keeps operators of oneDNN out of graphs that are to run elsewhere; these run here.
        patches.enter_context(_replaced(_trace, "_ignore_backend_decomps", nullcontext))
        flags = functools.partial(_exporting, _InThread(thread))
        patches.enter_context(_replaced(_trace, "_compiling_state_context", flags))
        yield


class _InThread:
    """True in one thread; stands for PyTorch's flags, which are asked for nothing else."""

    def __init__(self, thread: int) -> None:
        self._thread = thread

    def __bool__(self) -> bool:
        return threading.get_ident() == self._thread


@contextmanager
def _exporting(flag: _InThread) -> Iterator[None]:
    """As torch.export's own, with `flag` for True."""
    with (
        _replaced(torch.compiler, "_is_compiling_flag", flag),
        _replaced(torch.compiler, "_is_exporting_flag", flag),
    ):
        yield


def _patch_for(thread: int, patch_method: Callable[..., None]) -> Callable[..., None]:
    """`patch_method` of a tracer, but other threads still call the method as it was."""

    def patch(patcher: Any, owner: type, name: str, new: Any, deduplicate: bool = True) -> None:
        before = getattr(owner, name)

        @functools.wraps(new)
        def either(*args: Any, **kwargs: Any) -> Any:
            return (new if threading.get_ident() == thread else before)(*args, **kwargs)

        patch_method(patcher, owner, name, either, deduplicate)

    return patch


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Private names: where a release of PyTorch lacks one, only other threads notice."""
    if not hasattr(owner, name):
        yield
        return
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
