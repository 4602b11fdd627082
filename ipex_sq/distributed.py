"""Work shared by the processes that torchrun started, with the results of a single one.

torch.distributed (gloo) carries everything. Work is cut into items (a batch, a smooth group), each
is done whole by one process, and what comes of it is put together in the order of the items: no
sum depends on how many processes there are. A process by itself goes through the same calls.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from ipex_sq.errors import ResourceError

Item = TypeVar("Item")
Result = TypeVar("Result")

TIMEOUT = timedelta(days=2)
"""torchrun ends the run when a process dies; one that is merely slow is no error."""


def processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if _under_torchrun() else 1


def rank() -> int:
    """Number of this process, from 0. Only the first prints results and writes files."""
    return int(os.environ["RANK"]) if _under_torchrun() else 0


class Group:
    """The processes of a run, while `joined` holds them together."""

    def __init__(self, store: Any = None) -> None:
        self._store = store

    def fails_first(self) -> bool:
        """True for one process only, the first to ask: it tells the user what went wrong."""
        return self._store is None or self._store.add("ipex_sq/failed", 1) == 1


@contextmanager
def joined() -> Iterator[Group]:
    """Inside the block the processes share their work."""
    if processes() == 1:
        yield Group()
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, number, count = next(rendezvous("env://"))
    dist.init_process_group("gloo", timeout=TIMEOUT, rank=number, world_size=count, store=store)
    try:
        yield Group(store)
    finally:
        dist.destroy_process_group()


def owners(sizes: Sequence[int]) -> list[int]:
    """The process that does each item: the largest first, each to whoever has least to do.

    Args:
        sizes: Of the items, in any unit of work.
    """
    loads = [0] * processes()
    found = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: sizes[index], reverse=True):
        found[index] = loads.index(min(loads))
        loads[found[index]] += sizes[index]
    return found


def share(
    items: Sequence[Item],
    work: Callable[[Item], Result],
    *,
    size: Callable[[Item], int],
    progress: Callable[[list[Item]], Iterable[Item]] = iter,
) -> Iterator[Result]:
    """Do `work` for every item, on one of the processes.

    To be iterated to its end: a process alone works as it goes.

    Args:
        items: The same on every process.
        work: What it returns is pickled where another process did it.
        size: How much work an item is, to give all processes as much.
        progress: Wraps the items of this process, for a progress bar.

    Yields:
        The results in the order of the items, on every process.

    Raises:
        ResourceError: Another process has ended.
    """
    if processes() == 1:
        yield from map(work, progress(list(items)))
        return
    doers = owners([size(item) for item in items])
    mine = [item for item, doer in zip(items, doers, strict=True) if doer == rank()]
    results = iter([work(item) for item in progress(mine)])
    for doer in doers:
        yield _broadcast(next(results) if doer == rank() else None, doer)


def gather(value: Item) -> list[Item]:
    """The value of every process, on every process, by rank.

    Raises:
        ResourceError: Another process has ended.
    """
    if processes() == 1:
        return [value]
    return [_broadcast(value, number) for number in range(processes())]


def collect(value: Item, owner: int) -> list[Item]:
    """The value of every process, on the process `owner` by rank, and nothing on the others.

    Raises:
        ResourceError: Another process has ended.
    """
    if processes() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] | None = [None] * processes() if rank() == owner else None
    with _watched():
        dist.gather_object(value, found, owner)
    return found or []


def _broadcast(value: Any, source: int) -> Any:
    import torch.distributed as dist

    held = [value]
    with _watched():
        dist.broadcast_object_list(held, source)
    return held[0]


@contextmanager
def _watched() -> Iterator[None]:
    """What gloo raises when a process is gone, as one of our errors."""
    try:
        yield
    except RuntimeError as error:
        raise ResourceError(
            "another process of this run has ended: torchrun says which, and how"
        ) from error


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ
