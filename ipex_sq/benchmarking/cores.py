"""Which cores each instance gets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ipex_sq.benchmark_config import LATENCY, BenchmarkConfig
from ipex_sq.errors import ConfigError
from ipex_sq.resources import by_core, cpu_list, cpu_quota, online_cpus, parse_cpu_list

NODES = Path("/sys/devices/system/node")

LATENCY_CORES = 4
"""Of an instance in the latency preset, as IPEX's launcher has it."""


def parse_cores(text: str) -> tuple[int, ...]:
    """The cores of a list such as "0-3,8", in its order.

    Raises:
        ConfigError: It is no such list, or names a core twice.
    """
    try:
        cores = parse_cpu_list(text)
    except ValueError:
        raise ConfigError(f"--cores takes a list as 0-3,8, not {text!r}") from None
    if len(set(cores)) < len(cores):
        raise ConfigError(f"--cores {text} names a core twice")
    return cores


def usable_cores(config: BenchmarkConfig) -> tuple[int, ...]:
    """The cores that instances may be given, each by the number of one of its CPUs.

    Two CPUs of one physical core (SMT siblings) share its multipliers, so only the first that is
    allowed stands for the core. CPUs that the user lists are taken as listed.

    Raises:
        ConfigError: Cores that do not exist or are forbidden to this process.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if config.cores is None:
        return tuple(core[0] for core in by_core(allowed))
    cores, online = parse_cores(config.cores), online_cpus()
    missing = [core for core in cores if core not in online]
    if missing:
        raise ConfigError(
            f"core {missing[0]} does not exist or is offline: online are {cpu_list(online)}"
        )
    forbidden = [core for core in cores if core not in allowed]
    if forbidden:
        raise ConfigError(
            f"core {forbidden[0]} is forbidden to this process: its affinity mask allows "
            f"{cpu_list(allowed)}"
        )
    return cores


def core_notes(config: BenchmarkConfig, instances: Sequence[Sequence[int]]) -> list[str]:
    """What must stand beside figures that were measured on these cores."""
    every = [core for cores in instances for core in cores]
    cores = by_core(every)
    shared = [core for core in cores if len(core) > 1]
    notes = []
    if shared:
        notes.append(
            f"--cores {config.cores}: {len(every)} CPUs of {len(cores)} physical cores are counted "
            f"as {len(every)} cores; {cpu_list(shared[0])} share one"
        )
    exported, threads = os.environ.get("OMP_NUM_THREADS"), len(instances[0])
    if exported not in (None, str(threads)):
        notes.append(
            f"OMP_NUM_THREADS={exported} does not count here: every process has {threads} "
            "thread(s), one for each of its cores (--cores_per_instance)"
        )
    quota = cpu_quota()
    if quota is not None and quota < len(cores):
        notes.append(
            f"the CPU quota of this cgroup is {quota:.2f} cores, {len(cores)} are used: processes "
            "are stopped until the next period when it is spent, and times contain that"
        )
    return notes


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
    wanted = config.num_instances
    nodes = _nodes(cores) if config.numa else [cores]
    each = config.cores_per_instance or _largest(nodes, wanted)
    found = [tuple(node[i * each : (i + 1) * each]) for node in nodes for i in _whole(node, each)]
    if len(found) < wanted:
        where = " within a NUMA node each" if config.numa else ""
        cpus = len(os.sched_getaffinity(0))
        hint = f", or list in --cores which of its {cpus} CPUs to use, though they share cores"
        raise ConfigError(
            f"{wanted} instance(s) of {each} core(s){where} do not fit on {len(cores)} "
            f"core(s): ask for fewer{hint if config.cores is None and cpus > len(cores) else ''}"
        )
    return found[:wanted]


def _largest(nodes: Sequence[Sequence[int]], wanted: int) -> int:
    """Most cores that each of `wanted` instances can have within one node; 1 where none fit."""
    sizes = range(max(map(len, nodes)), 1, -1)
    return next((size for size in sizes if sum(len(node) // size for node in nodes) >= wanted), 1)


def _whole(node: Sequence[int], each: int) -> range:
    return range(len(node) // each)


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
