"""Objects in processes of their own."""

import os
import signal
import time

import pytest
import torch

from ipex_sq.benchmarking.workers import Worker
from ipex_sq.errors import ResourceError, UnsupportedModelError


class Thing:
    def cores(self):
        return os.sched_getaffinity(0)

    def threads(self):
        return torch.get_num_threads()

    def add(self, a, b):
        return a + b

    def refuse(self):
        raise UnsupportedModelError("not this one")

    def fail(self):
        raise ValueError("a mistake")

    def number(self):
        return os.getpid()

    def sleep(self, seconds):
        time.sleep(seconds)

    def die(self):
        os._exit(9)


def broken():
    raise UnsupportedModelError("cannot be made")


def test_methods_run_in_a_pinned_process():
    one = min(os.sched_getaffinity(0))
    with Worker("a thing", Thing, [one]) as worker:
        worker.ready()
        assert worker.call("cores") == {one}
        assert worker.call("add", 2, 3) == 5


@pytest.mark.parametrize("exported", ["1", "8"])
def test_a_process_has_as_many_threads_as_cores(monkeypatch, exported):
    """Whatever is exported: the row says how many cores it used."""
    monkeypatch.setenv("OMP_NUM_THREADS", exported)
    monkeypatch.setenv("MKL_NUM_THREADS", exported)
    one = min(os.sched_getaffinity(0))
    with (
        Worker("one", Thing, [one]) as alone,
        Worker("three", Thing, [one] * 3, bind=False) as unbound,
    ):
        for worker, threads in ((alone, 1), (unbound, 3)):
            worker.ready()
            assert worker.call("threads") == threads


def test_an_unbound_process_may_use_what_this_one_may():
    allowed = os.sched_getaffinity(0)
    with Worker("a thing", Thing, [min(allowed)], bind=False) as worker:
        worker.ready()
        assert worker.call("cores") == allowed


def test_errors_come_back_and_the_process_lives_on():
    with Worker("a thing", Thing, sorted(os.sched_getaffinity(0))) as worker:
        worker.ready()
        with pytest.raises(UnsupportedModelError, match="not this one"):
            worker.call("refuse")
        with pytest.raises(RuntimeError, match="a mistake"):
            worker.call("fail")
        assert worker.call("add", 1, 1) == 2
        with pytest.raises(ResourceError, match="a thing died"):
            worker.call("die")


def test_a_process_that_was_killed_while_it_slept():
    with Worker("a thing", Thing, sorted(os.sched_getaffinity(0))) as worker:
        worker.ready()
        os.kill(worker.call("number"), signal.SIGKILL)
        time.sleep(0.2)
        with pytest.raises(ResourceError, match="a thing died"):
            worker.call("add", 1, 1)


def test_a_busy_process_ends_quietly(capfd):
    with Worker("a thing", Thing, sorted(os.sched_getaffinity(0))) as worker:
        worker.ready()
        worker.send("sleep", 0.2)
    assert "Traceback" not in capfd.readouterr().err


def test_an_object_that_cannot_be_made():
    with (
        Worker("nothing", broken, sorted(os.sched_getaffinity(0))) as worker,
        pytest.raises(UnsupportedModelError, match="cannot be made"),
    ):
        worker.ready()
