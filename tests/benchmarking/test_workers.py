"""Objects in processes of their own."""

import os

import pytest

from ipex_sq.benchmarking.workers import Worker
from ipex_sq.errors import ResourceError, UnsupportedModelError


class Thing:
    def cores(self):
        return os.sched_getaffinity(0)

    def add(self, a, b):
        return a + b

    def refuse(self):
        raise UnsupportedModelError("not this one")

    def fail(self):
        raise ValueError("a mistake")

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


def test_an_object_that_cannot_be_made():
    with (
        Worker("nothing", broken, sorted(os.sched_getaffinity(0))) as worker,
        pytest.raises(UnsupportedModelError, match="cannot be made"),
    ):
        worker.ready()
