"""What this process may use, as the kernel's files say it."""

import os

import pytest

from ipex_sq import resources
from ipex_sq.resources import by_core, cpu_list, online_cpus, parse_cpu_list


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
