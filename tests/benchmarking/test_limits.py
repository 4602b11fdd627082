"""What a machine reaches at best is not what it reaches in its first second."""

import pytest

from ipex_sq.benchmarking import limits
from ipex_sq.benchmarking.limits import least_seconds_of


class Machine:
    """A clock that calls move on; for a while threads share a core and everything takes twice."""

    def __init__(self, disturbed):
        self.now = 0.0
        self.disturbed = disturbed

    def perf_counter(self):
        return self.now

    def call(self, seconds):
        def run():
            self.now += seconds * (2 if self.now < self.disturbed else 1)

        return run


@pytest.mark.parametrize("disturbed", [0.0, 1.2])
def test_a_disturbed_start_is_not_the_limit(monkeypatch, disturbed):
    machine = Machine(disturbed)
    monkeypatch.setattr(limits, "time", machine)
    wanted = {"int8": 0.02, "bf16": 0.04, "fp32": 0.09, "copy": 0.8}
    found = least_seconds_of({name: machine.call(wanted[name]) for name in wanted})
    assert found == pytest.approx(wanted)
    assert machine.now < 15
