"""Cores of the instances: real ones, allowed ones, each used once."""

import os

import pytest

from ipex_sq import resources
from ipex_sq.benchmark_config import BenchmarkConfig
from ipex_sq.benchmarking import cores
from ipex_sq.benchmarking.cores import (
    core_notes,
    instance_cores,
    parse_cores,
    pinned,
    resolve_preset,
)
from ipex_sq.errors import ConfigError
from ipex_sq.resources import parse_cpu_list

ALLOWED = tuple(range(8))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Makes this machine another: CPUs of each NUMA node, of each core, and allowed ones."""

    def become(nodes, siblings, allowed=None):
        online = sorted(cpu for node in nodes for cpu in parse_cpu_list(node or "0"))
        for node, cpus in enumerate(nodes):
            folder = tmp_path / "nodes" / f"node{node}"
            folder.mkdir(parents=True)
            (folder / "cpulist").write_text(f"{cpus}\n")
        for group in siblings:
            for cpu in parse_cpu_list(group):
                folder = tmp_path / "cpus" / f"cpu{cpu}" / "topology"
                folder.mkdir(parents=True)
                (folder / "thread_siblings_list").write_text(f"{group}\n")
        (tmp_path / "cpus").mkdir(exist_ok=True)
        (tmp_path / "cpus" / "online").write_text(",".join(map(str, online)) + "\n")
        monkeypatch.setattr(cores, "NODES", tmp_path / "nodes")
        monkeypatch.setattr(resources, "CPUS", tmp_path / "cpus")
        monkeypatch.setattr(resources, "OWN_CGROUPS", tmp_path / "cgroup")
        mask = set(online if allowed is None else allowed)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: mask)
        monkeypatch.setattr(os, "cpu_count", lambda: len(online))
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    return become


@pytest.fixture
def eight_cores(machine):
    """A machine of 16 cores in two NUMA nodes, of which this process may use 0-7."""
    machine(["0-1,4-5,8-11", "2-3,6-7,12-15"], [], ALLOWED)


XEON = ["0-55,112-167", "56-111,168-223"], [f"{cpu},{cpu + 112}" for cpu in range(112)]
"""Two sockets of 56 cores, two CPUs a core, numbered as on most servers."""

NEIGHBOURS = ["0-15"], [f"{cpu}-{cpu + 1}" for cpu in range(0, 16, 2)]
"""Eight cores whose two CPUs follow each other, as on virtual machines."""


@pytest.mark.parametrize(
    ("text", "wanted"), [("0", (0,)), ("0-3", (0, 1, 2, 3)), ("4,0-1", (4, 0, 1))]
)
def test_lists_of_cores(text, wanted):
    assert parse_cores(text) == wanted


@pytest.mark.parametrize("text", ["", "a", "3-1", "0,,1", "1,0-2", "-1"])
def test_nonsense_is_refused(text):
    with pytest.raises(ConfigError, match="--cores"):
        parse_cores(text)


@pytest.mark.parametrize("numa", [False, True])
@pytest.mark.parametrize(("instances", "each"), [(1, None), (2, None), (2, 3), (4, 2), (3, 1)])
@pytest.mark.usefixtures("eight_cores")
def test_instances_share_no_core_and_have_equally_many(instances, each, numa):
    config = BenchmarkConfig(num_instances=instances, cores_per_instance=each, numa=numa)
    found = instance_cores(config)
    every = [core for cores in found for core in cores]
    shared = {(1, True): 4}.get((instances, numa), len(ALLOWED) // instances)
    assert len(found) == instances
    assert len(set(every)) == len(every)
    assert {len(cores) for cores in found} == {each or shared}


@pytest.mark.usefixtures("eight_cores")
def test_an_instance_stays_within_its_node():
    config = BenchmarkConfig(num_instances=2, cores_per_instance=4, numa=True)
    assert instance_cores(config) == [(0, 1, 4, 5), (2, 3, 6, 7)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_instances": 9}, "do not fit on 8"),
        ({"num_instances": 2, "cores_per_instance": 5}, "do not fit"),
        ({"num_instances": 1, "cores_per_instance": 5, "numa": True}, "NUMA node"),
        ({"num_instances": 9, "numa": True}, "NUMA node"),
        ({"cores": "0-16"}, "core 16 does not exist or is offline: online are 0-15"),
        ({"cores": "7-8"}, "core 8 is forbidden"),
    ],
)
@pytest.mark.usefixtures("eight_cores")
def test_what_cannot_be_had_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        instance_cores(BenchmarkConfig(**settings))


def test_the_affinity_of_this_process_comes_back():
    before = os.sched_getaffinity(0)
    one = min(before)
    with pinned([one]):
        assert os.sched_getaffinity(0) == {one}
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("preset", "usable", "wanted"),
    [
        ("latency", None, [(0, 1, 4, 5), (2, 3, 6, 7)]),
        ("latency", "0-2", [(0,), (1,), (2,)]),
        ("latency", "0,1", [(0, 1)]),
        ("throughput", None, [(0, 1, 4, 5), (2, 3, 6, 7)]),
        ("throughput", "0,1,4,2", [(0,), (1,), (4,), (2,)]),
    ],
)
@pytest.mark.usefixtures("eight_cores")
def test_presets_use_equal_instances_within_nodes(preset, usable, wanted):
    config = resolve_preset(BenchmarkConfig(preset=preset, cores=usable))
    assert instance_cores(config) == wanted
    assert (config.batch_size == 1) == (preset == "latency")


def test_a_preset_is_not_mixed_with_what_it_sets():
    with pytest.raises(ConfigError, match="--preset latency sets --batch_size"):
        BenchmarkConfig(preset="latency", batch_size=4)
    with pytest.raises(ConfigError, match="preset"):
        BenchmarkConfig(preset="fast")
    plain = BenchmarkConfig(batch_size=4)
    assert resolve_preset(plain) is plain


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_instances": 2},
        {"num_instances": 4, "cores_per_instance": 2},
        {"numa": True},
        {"preset": "latency"},
        {"preset": "throughput"},
    ],
)
@pytest.mark.parametrize(("nodes", "siblings"), [XEON, NEIGHBOURS])
def test_two_cpus_of_one_core_are_never_handed_out(machine, nodes, siblings, settings):
    machine(nodes, siblings)
    config = resolve_preset(BenchmarkConfig(**settings))
    found = instance_cores(config)
    owners = {cpu: group for group in siblings for cpu in parse_cpu_list(group)}
    used = [owners[cpu] for instance in found for cpu in instance]
    assert len(set(used)) == len(used)
    assert core_notes(config, found) == []
    if not config.pinned or "preset" in settings:
        assert len(used) == len(siblings), "every core is used"


def test_the_cpu_of_a_core_is_one_that_the_mask_allows(machine):
    machine(*NEIGHBOURS, allowed=[1, 2, 3, 7])
    assert instance_cores(BenchmarkConfig()) == [(1, 2, 7)]
    with pytest.raises(ConfigError, match=r"do not fit on 3 core\(s\): .* its 4 CPUs"):
        instance_cores(BenchmarkConfig(num_instances=4))


def test_listed_cpus_are_used_as_listed_and_said_to_share_cores(machine):
    machine(*XEON)
    config = BenchmarkConfig(cores="0-3,112-113", num_instances=2)
    found = instance_cores(config)
    assert found == [(0, 1, 2), (3, 112, 113)]
    (note,) = core_notes(config, found)
    assert "0,112" in note
    assert "6 CPUs of 4 physical cores" in note
    apart = BenchmarkConfig(cores="0,113")
    assert core_notes(apart, instance_cores(apart)) == []


@pytest.mark.parametrize(("exported", "notes"), [("1", 1), ("8", 0), ("8,2", 1)])
@pytest.mark.usefixtures("eight_cores")
def test_an_exported_number_of_threads_that_is_not_used_is_named(monkeypatch, exported, notes):
    monkeypatch.setenv("OMP_NUM_THREADS", exported)
    config = BenchmarkConfig()
    found = core_notes(config, instance_cores(config))
    assert len(found) == notes
    assert all(f"OMP_NUM_THREADS={exported} " in note for note in found)


@pytest.mark.parametrize(("quota", "notes"), [("800000", 0), ("750000", 1), ("max", 0)])
@pytest.mark.usefixtures("eight_cores")
def test_a_cpu_quota_below_the_cores_is_named(monkeypatch, tmp_path, quota, notes):
    (tmp_path / "cgroup").write_text("0::/\n")
    (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
    monkeypatch.setattr(resources, "CGROUPS", tmp_path)
    config = BenchmarkConfig()
    found = core_notes(config, instance_cores(config))
    assert len(found) == notes
    assert all("7.50 cores, 8 are used" in note for note in found)


@pytest.mark.parametrize(("instances", "each"), [(1, 56), (2, 56), (3, 28), (4, 28), (112, 1)])
def test_numa_alone_takes_the_largest_instances_that_fit_in_nodes(machine, instances, each):
    machine(*XEON)
    found = instance_cores(BenchmarkConfig(numa=True, num_instances=instances))
    assert [len(cores) for cores in found] == [each] * instances


def test_cores_are_judged_by_what_is_online(machine):
    machine(["0,2,4,6"], ["0", "2", "4", "6"])
    assert instance_cores(BenchmarkConfig(cores="4,6")) == [(4, 6)]
    with pytest.raises(ConfigError, match=r"core 1 does not exist or is offline: .* 0,2,4,6"):
        instance_cores(BenchmarkConfig(cores="0-2"))
