"""What this process may use, as the kernel's files say it."""

import os
from types import SimpleNamespace

import psutil
import pytest

from ipex_sq import resources
from ipex_sq.resources import (
    available_memory,
    by_core,
    cpu_list,
    cpu_quota,
    memory_limit,
    online_cpus,
    parse_cpu_list,
)

GIB = 2**30


@pytest.mark.parametrize("text", ["0", "0-3", "4,6", "0-1,4,8-11"])
def test_lists_of_cpus_are_written_as_they_are_read(text):
    assert cpu_list(parse_cpu_list(text)) == text


def test_a_list_is_written_in_order_of_the_cpus():
    assert cpu_list([8, 3, 1, 2]) == "1-3,8"


def test_without_the_kernels_files_every_cpu_is_a_core(monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "CPUS", tmp_path)
    assert by_core([3, 1, 2]) == [(3,), (1,), (2,)]
    assert online_cpus() == tuple(range(os.cpu_count()))


def test_cpus_of_this_machine_are_online_and_of_one_core_each():
    allowed = sorted(os.sched_getaffinity(0))
    assert set(allowed) <= set(online_cpus())
    assert sorted(cpu for group in by_core(allowed) for cpu in group) == allowed


@pytest.fixture
def cgroups(monkeypatch, tmp_path):
    """Puts this process into other cgroups: its file of them, and files below the mount."""

    def become(own, files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "mount" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(resources, "OWN_CGROUPS", tmp_path / "own")
        monkeypatch.setattr(resources, "CGROUPS", tmp_path / "mount")
        plenty = SimpleNamespace(total=64 * GIB, available=48 * GIB)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: plenty)

    return become


NO_LIMIT_V1 = str(2**63 - 4096)
STAT = f"anon 5\nactive_file {GIB // 2}\ninactive_file {GIB // 2}\n"
STAT_V1 = f"active_file 7\ntotal_active_file {GIB // 2}\ntotal_inactive_file {GIB // 2}\n"
V1 = "9:name=systemd:/\n4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n"


@pytest.mark.parametrize(
    ("own", "files", "limit", "left"),
    [
        ("0::/\n", {}, None, 48),
        ("0::/\n", {"memory.max": "max\n", "memory.current": "7\n"}, None, 48),
        # A container sees its own cgroup as the root. Cached files can be given up: 3 GiB are used.
        (
            "0::/\n",
            {"memory.max": f"{8 * GIB}", "memory.current": f"{4 * GIB}", "memory.stat": STAT},
            8,
            5,
        ),
        # The limit is that of a parent.
        (
            "0::/pod/job\n",
            {
                "pod/memory.max": f"{8 * GIB}",
                "pod/memory.current": f"{GIB}",
                "pod/job/memory.max": "max",
            },
            8,
            7,
        ),
        # More than the machine has.
        ("0::/\n", {"memory.max": f"{99 * GIB}", "memory.current": "0"}, None, 48),
        # Nothing is left.
        ("0::/\n", {"memory.max": f"{2 * GIB}", "memory.current": f"{3 * GIB}"}, 2, 0),
        # Version 1: in a container the path is the host's and only the root is there.
        (
            V1,
            {
                "memory/memory.limit_in_bytes": f"{8 * GIB}",
                "memory/memory.usage_in_bytes": f"{4 * GIB}",
                "memory/memory.stat": STAT_V1,
            },
            8,
            5,
        ),
        (V1, {"memory/memory.limit_in_bytes": NO_LIMIT_V1}, None, 48),
        (
            V1,
            {
                "memory/docker/memory.limit_in_bytes": f"{8 * GIB}",
                "memory/docker/abc/memory.limit_in_bytes": f"{4 * GIB}",
            },
            4,
            4,
        ),
        # Both versions are mounted.
        (V1, {"unified/memory.max": f"{4 * GIB}", "unified/memory.current": "0"}, 4, 4),
        # Nonsense is no limit.
        ("nonsense\n", {"memory.max": f"{GIB}"}, None, 48),
        ("0::/../x\n", {"memory.max": "nonsense"}, None, 48),
    ],
)
def test_memory_is_that_of_the_narrowest_cgroup(cgroups, own, files, limit, left):
    cgroups(own, files)
    assert memory_limit() == (None if limit is None else limit * GIB)
    found, where = available_memory()
    assert found == left * GIB
    assert ("cgroup" in where) == (limit is not None)


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "100000 50000", "a/b/cpu.max": "400000 100000"}, 2.0),
        (
            V1,
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            None,
        ),
        (
            V1,
            {"cpu,cpuacct/cpu.cfs_quota_us": "50000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        (V1, {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
        (V1, {"cpu/cpu.cfs_quota_us": "200000"}, None),
        ("0::/\n", {"cpu.max": "nonsense"}, None),
    ],
)
def test_the_cpu_quota_is_in_cores(cgroups, own, files, cores):
    cgroups(own, files)
    assert cpu_quota() == cores


def test_a_machine_without_cgroups_has_its_own_memory(cgroups, tmp_path):
    cgroups("", {})
    (tmp_path / "own").unlink()
    assert available_memory() == (48 * GIB, "on this machine")
    assert cpu_quota() is None
