"""Which cores each instance gets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ipex_sq.benchmark_config import LATENCY, BenchmarkConfig
from ipex_sq.errors import ConfigError

NODES = Path("/sys/devices/system/node")

LATENCY_CORES = 4
"""Of an instance in the latency preset, as IPEX's launcher has it."""


def parse_cores(text: str) -> tuple[int, ...]:
    """The cores of a list such as "0-3,8", in its order.

    Raises:
        ConfigError: It is no such list, or names a core twice.
    """
    cores: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            span = range(int(first), int(last or first) + 1)
            if not span:
                raise ValueError
            cores += span
    except ValueError:
        raise ConfigError(f"--cores takes a list as 0-3,8, not {text!r}") from None
    if len(set(cores)) < len(cores):
        raise ConfigError(f"--cores {text} names a core twice")
    return tuple(cores)


def usable_cores(config: BenchmarkConfig) -> tuple[int, ...]:
    """The cores that instances may be given.

    Raises:
        ConfigError: Cores that do not exist or are forbidden to this process.
    """
    allowed = tuple(sorted(os.sched_getaffinity(0)))
    cores = allowed if config.cores is None else parse_cores(config.cores)
    existing = os.cpu_count() or len(allowed)
    missing = [core for core in cores if core >= existing]
    if missing:
        raise ConfigError(f"core {missing[0]} does not exist: this machine has 0-{existing - 1}")
    forbidden = [core for core in cores if core not in allowed]
    if forbidden:
        raise ConfigError(
            f"core {forbidden[0]} is forbidden to this process: its affinity mask allows "
            f"{','.join(map(str, allowed))}"
        )
    return cores


def resolve_preset(config: BenchmarkConfig) -> BenchmarkConfig:
    """`config` with the batch size and the instances that its preset stands for on this machine.

    Raises:
        ConfigError: See `usable_cores`.
    """
    if config.preset is None:
        return config
    nodes = _nodes(usable_cores(config))
    latency = config.preset == LATENCY
    each = min(map(len, nodes))
    each = min(LATENCY_CORES, each) if latency else each
    return replace(
        config,
        preset=None,
        batch_size=1 if latency else config.batch_size,
        num_instances=sum(len(node) // each for node in nodes),
        cores_per_instance=each,
        numa=True,
    )


def instance_cores(config: BenchmarkConfig) -> list[tuple[int, ...]]:
    """The cores of each instance; where nothing is to be pinned, one instance on all.

    Raises:
        ConfigError: Cores that do not exist or are forbidden to this process, or too few.
    """
    cores = usable_cores(config)
    if not config.pinned:
        return [cores]
    wanted, each = config.num_instances, config.cores_per_instance
    each = each or len(cores) // wanted
    nodes = _nodes(cores) if config.numa else [cores]
    found = [tuple(node[i * each : (i + 1) * each]) for node in nodes for i in _whole(node, each)]
    if len(found) < wanted:
        where = " within a NUMA node each" if config.numa else ""
        raise ConfigError(
            f"{wanted} instance(s) of {max(each, 1)} core(s){where} do not fit on {len(cores)} "
            "core(s): ask for fewer"
        )
    return found[:wanted]


def _whole(node: Sequence[int], each: int) -> range:
    return range(len(node) // each) if each else range(0)


def _nodes(cores: Sequence[int]) -> list[tuple[int, ...]]:
    """The cores by NUMA node; one node where the kernel names none."""
    lists = sorted(NODES.glob("node*/cpulist"))
    members = [set(parse_cores(text)) for path in lists if (text := path.read_text().strip())]
    found = [tuple(core for core in cores if core in node) for node in members]
    return [node for node in found if node] or [tuple(cores)]


@contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """Processes started inside the block run on `cores` only, and count no others."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
