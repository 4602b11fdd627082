"""What of this machine this process may use: its CPUs, by physical core."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """The CPUs of a list as the kernel writes them, such as "0-3,8", in its order.

    Raises:
        ValueError: It is no such list.
    """
    cpus: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        span = range(int(first), int(last or first) + 1)
        if not span:
            raise ValueError(f"{part} counts down")
        cpus += span
    return tuple(cpus)


def cpu_list(cpus: Iterable[int]) -> str:
    """`cpus` in their order as the kernel writes them: "0-3,8"."""
    runs = itertools.groupby(enumerate(sorted(cpus)), lambda item: item[1] - item[0])
    spans = [[cpu for _, cpu in run] for _, run in runs]
    return ",".join(f"{span[0]}-{span[-1]}" if span[1:] else f"{span[0]}" for span in spans)


def online_cpus() -> tuple[int, ...]:
    """CPUs that run; their numbers may have gaps."""
    return _read_cpus(CPUS / "online") or tuple(range(os.cpu_count() or 1))


def by_core(cpus: Sequence[int]) -> list[tuple[int, ...]]:
    """`cpus` by physical core: those that are threads (SMT siblings) of one core stand together.

    Order is kept. A CPU of which the kernel says nothing is a core of its own.
    """
    found: dict[int, list[int]] = defaultdict(list)
    for cpu in cpus:
        siblings = _read_cpus(CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list")
        found[min(siblings, default=cpu)].append(cpu)
    return [tuple(core) for core in found.values()]


def _read_cpus(path: Path) -> tuple[int, ...]:
    """The CPUs of a file of the kernel; none where it is missing or says nothing."""
    try:
        return parse_cpu_list(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return ()
