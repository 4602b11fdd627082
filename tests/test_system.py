"""Memory that a process keeps and gives back."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource
import psutil
import torch
from ipex_sq.system import give_freed_memory_back, keep_freed_memory

def fill():
    torch.empty(1 << 26, dtype=torch.uint8).fill_(1)

keep_freed_memory()
for _ in range(24):  # aligned tensors do not fit where one of their size was: up to 8 are fresh
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    fill()
again = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
kept = psutil.Process().memory_info().rss
give_freed_memory_back()
print(again, kept - psutil.Process().memory_info().rss)
"""
PAGES = 2**26 // 4096
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or (HUGE.exists() and "[always]" in HUGE.read_text()),
    reason="no glibc, or huge pages for all: faults of small pages are counted",
)


def _run(**settings):
    chosen = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(chosen)}
    environment = {**kept, **settings}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


def test_freed_memory_serves_the_next_batch_and_can_be_given_back():
    again, given_back = _run()
    assert again <= 2 * PAGES, "of eight tensors at least six are where others were"
    assert given_back > 2**25


@pytest.mark.parametrize(
    "settings",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
    ],
)
def test_what_the_user_has_set_stays(settings):
    again, _ = _run(**settings)
    assert again > 6 * PAGES
