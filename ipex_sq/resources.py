"""What of this machine this process may use: CPUs by physical core, and memory and CPU time."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import psutil

CPUS = Path("/sys/devices/system/cpu")
OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")

_MEMORY_FILES = (
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
"""Of cgroups version 2 and 1: the limit, what is used, and how counters of all below begin."""


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


def available_memory() -> tuple[int, str]:
    """Bytes that can still be allocated, and whose they are: the machine's or a cgroup's.

    psutil knows of the machine only. As its figure does, that of a cgroup counts cached files as
    available.
    """
    left = psutil.virtual_memory().available
    where = "on this machine"
    for limit, used in _memory_limits():
        if limit - used < left:
            left, where = max(limit - used, 0), "under the memory limit of this cgroup"
    return left, where


def memory_limit() -> int | None:
    """Bytes that this process's cgroups allow; None where that is no less than is installed."""
    least = min((limit for limit, _ in _memory_limits()), default=None)
    return least if least is not None and least < psutil.virtual_memory().total else None


def cpu_quota() -> float | None:
    """CPU time that this process's cgroups allow, in cores; None where there is no quota."""
    quotas = []
    for group in _cgroups("cpu"):
        words = _read(group / "cpu.max").split()
        words = words or [_read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        numbers = [_number(word) for word in words]
        if len(numbers) == 2 and all(numbers):
            quotas.append(numbers[0] / numbers[1])
    return min(quotas, default=None)


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of every cgroup that limits this process's memory."""
    for group in _cgroups("memory"):
        for limit, current, prefix in _MEMORY_FILES:
            most = _number(_read(group / limit))
            if most:
                counters = dict.fromkeys((f"{prefix}active_file", f"{prefix}inactive_file"), 0)
                for line in _read(group / "memory.stat").splitlines():
                    name, _, value = line.partition(" ")
                    if name in counters:
                        counters[name] = _number(value)
                used = _number(_read(group / current)) - sum(counters.values())
                yield most, max(used, 0)


def _cgroups(controller: str) -> Iterator[Path]:
    """Folders of the cgroups that may limit this process, from its own up to the root.

    A container often sees its own cgroup as the root while the path is the host's: folders of the
    path are then missing, and the root has the limit.
    """
    for line in _read(OWN_CGROUPS).splitlines():
        if line.count(":") < 2:
            continue
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        places = (names, controller) if names else ("", "unified")  # without names: version 2
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for place in places:
            for depth in range(len(parts), -1, -1):
                yield CGROUPS.joinpath(place, *parts[:depth])


def _read(path: Path) -> str:
    """The text of a file of the kernel, empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(text: str) -> int:
    """A positive number; 0 for "max", -1 and what else sets no limit."""
    return int(text) if text.isdecimal() else 0


def _read_cpus(path: Path) -> tuple[int, ...]:
    """The CPUs of a file of the kernel; none where it is missing or says nothing."""
    try:
        return parse_cpu_list(_read(path))
    except ValueError:
        return ()
