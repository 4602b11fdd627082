"""What fails costs its own row; the others are timed."""

import pytest

from ipex_sq.benchmark_config import BenchmarkConfig
from ipex_sq.benchmarking import run as running
from ipex_sq.benchmarking.contenders import Contender
from ipex_sq.benchmarking.limits import Limits
from ipex_sq.benchmarking.session import Load, Sample
from ipex_sq.benchmarking.subjects import RANDOM, Subject
from ipex_sq.benchmarking.work import Work
from ipex_sq.cli import benchmark
from ipex_sq.cli.running import run as run_command
from ipex_sq.errors import IpexSqError, NumericalCheckError, ResourceError
from ipex_sq.report.latency import latency_report
from ipex_sq.report.markdown import result_table

FP32 = Contender("fp32", "eager", "fp32")
BF16 = Contender("bf16", "eager", "bf16")
INT8 = Contender("int8", "native", "int8")
BERT = Subject("bert-base", RANDOM)
LIMITS = Limits(1.0, 1.0, 1.0, 1.0)


class Meter:
    def measure(self):
        return LIMITS


class FakeSession:
    """Fails as `failures` say: the error by label and method, a turn by its number."""

    failures: dict = {}  # noqa: RUF012
    stats: dict = {"setup_s": 1.0, "peak_rss_bytes": 1}  # noqa: RUF012

    def __init__(self, contender, _subject, _config):
        self.label, self.turns = contender.label, 0
        self._fail("start")

    def _fail(self, where):
        error = self.failures.get((self.label, where))
        if error is not None:
            raise error

    def describe(self):
        return Work(1, 1, "fp32", "fp32"), Load(1, 1), dict(self.stats)

    def take_turn(self, _runs, _seconds):
        self.turns += 1
        self._fail(f"turn {self.turns}")
        return [Sample(1.0)]

    def breakdown(self):
        self._fail("breakdown")
        return {"gemm": 1.0}


class FakeWorker:
    """In this process."""

    open: set = set()  # noqa: RUF012

    def __init__(self, name, factory, _cores, *, bind=True):
        del bind
        self.name, self.factory, self.asked = name, factory, None

    def ready(self):
        self.made = self.factory()

    def send(self, *asked):
        self.asked = asked

    def receive(self):
        method, *arguments = self.asked
        return getattr(self.made, method)(*arguments)

    def call(self, *asked):
        self.send(*asked)
        return self.receive()

    def __enter__(self):
        self.open.add(self.name)
        return self

    def __exit__(self, *_error):
        self.open.discard(self.name)


@pytest.fixture
def failures(monkeypatch):
    monkeypatch.setattr(running, "Worker", FakeWorker)
    monkeypatch.setattr(running, "Session", FakeSession)
    monkeypatch.setattr(running, "LimitsSession", Meter)
    monkeypatch.setattr(FakeSession, "failures", {})
    return FakeSession.failures


def _result(rows):
    return {
        "model": "bert-base",
        "system": {"cpu": "a CPU", "isa": "AVX2", "allocator": "libc"},
        "config": {"workload": "prefill", "padded": False, "logits": "all", "rounds": 3},
        "limits": vars(LIMITS),
        "results": rows,
    }


@pytest.mark.parametrize("where", ["start", "turn 1", "turn 3", "breakdown"])
@pytest.mark.parametrize(
    "error", [NumericalCheckError("other Linears"), ResourceError("the process died")], ids=str
)
@pytest.mark.parametrize("failing", ["fp32", "int8"])
def test_a_failure_is_the_reason_of_one_row(failures, where, error, failing):
    failures[failing, where] = error
    _, rows = running.run_benchmark([FP32, BF16, INT8], BERT, BenchmarkConfig(rounds=3))
    assert [row["label"] for row in rows] == ["fp32", "bf16", "int8"]
    for row in rows:
        failed = row["label"] == failing
        assert row["reason"] == (str(error) if failed else "")
        assert ("p50_ms" in row) != failed
        assert failed or row["runs"] == 3
    result = _result(rows)
    assert f"{failing} " in latency_report(result)
    assert str(error) in latency_report(result)
    assert str(error) in result_table(result)


def test_processes_of_a_failed_model_end_at_once(failures, monkeypatch):
    failures["int8", "turn 1"] = ResourceError("died")
    seen = []
    turn = FakeSession.take_turn

    def watched(self, *arguments):
        seen.append(set(FakeWorker.open))
        return turn(self, *arguments)

    monkeypatch.setattr(FakeSession, "take_turn", watched)
    running.run_benchmark([FP32, INT8], BERT, BenchmarkConfig(rounds=2))
    assert seen[0] == {"fp32 eager", "int8 native"}
    assert seen[-1] == {"fp32 eager"}
    assert FakeWorker.open == set()


@pytest.mark.parametrize("where", ["start", "turn 2"])
def test_an_interrupt_ends_all(failures, where):
    failures["fp32", where] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        running.run_benchmark([FP32, INT8], BERT, BenchmarkConfig())
    assert FakeWorker.open == set()


def test_a_mistake_of_ours_keeps_its_traceback(failures):
    failures["fp32", "turn 1"] = RuntimeError("a mistake")
    with pytest.raises(RuntimeError, match="a mistake"):
        running.run_benchmark([FP32, INT8], BERT, BenchmarkConfig())


def _command(tmp_path, capsys):
    output = tmp_path / "result.json"
    code = run_command(
        benchmark.command, ["--random_weights", "bert-base", "--output", str(output)]
    )
    return code, output, capsys.readouterr()


def test_a_run_succeeds_if_anything_was_timed(failures, tmp_path, capsys):
    failures["bf16", "start"] = ResourceError("no bf16 today")
    code, output, shown = _command(tmp_path, capsys)
    assert code == 0
    assert "bf16 compiled: no figures: no bf16 today" in shown.out
    assert output.is_file()


def test_a_run_in_which_nothing_was_timed_fails(failures, tmp_path, capsys):
    failures["fp32", "turn 3"] = ResourceError("no memory")
    failures["bf16", "start"] = ResourceError("no bf16 today")
    code, output, shown = _command(tmp_path, capsys)
    assert code == 2
    assert "nothing was timed" in shown.err
    assert "fp32 eager: no memory" in shown.err
    assert "no bf16 today" in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not output.exists(), "a result of an earlier run stays"
    with pytest.raises(IpexSqError, match="nothing was timed"):
        running.check_timed([{"label": "fp32", "backend": "eager", "reason": "cannot"}])


def test_an_unknown_share_is_null_and_said(failures, monkeypatch):
    reason = "experts.down_proj is the weight of no Linear"
    described = Work(0, 0, "fp32", "fp32", unknown=reason), Load(1, 1), FakeSession.stats
    monkeypatch.setattr(FakeSession, "describe", lambda _self: described)
    _, rows = running.run_benchmark([FP32], BERT, BenchmarkConfig())
    assert rows[0]["limit_share"] is None
    assert rows[0]["limit_unknown"] == reason
    assert reason in latency_report(_result(rows))
    assert "| - |" in result_table(_result(rows))


def test_tables_do_without_a_baseline():
    row = {
        "label": "int8",
        "backend": "native",
        "precision": "int8",
        "workload": "prefill",
        "batch": 1,
        "tokens": 8,
        "instances": 1,
        "cores": 2,
        "reason": "",
        "p50_ms": 2.0,
        "p90_ms": 2.0,
        "min_ms": 2.0,
        "p05_ms": 2.0,
        "p95_ms": 2.0,
        "batches_per_s": 500.0,
        "tokens_per_s": 4000.0,
        "limit_share": 0.5,
        "breakdown": {},
        "setup_s": 1.0,
        "peak_rss_bytes": 1,
    }
    running.add_speedups([row])
    result = _result([row])
    for table in (latency_report(result), result_table(result)):
        assert "50%" in table
        assert "-" in table
    nothing = {"label": "int8", "backend": "ipex", "reason": "it cannot"}
    assert result_table(_result([nothing])).strip() == "int8 ipex: no figures: it cannot"
