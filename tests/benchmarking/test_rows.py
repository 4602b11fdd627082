"""From samples to rows: ratios, limits, comparisons."""

import pytest
import torch

from ipex_sq.benchmarking.limits import Limits
from ipex_sq.benchmarking.run import add_speedups, quantile
from ipex_sq.models.generating import timed_generation
from ipex_sq.models.tiny import tiny_model

LIMITS = Limits(int8_gops=800.0, bf16_gflops=400.0, fp32_gflops=200.0, bandwidth_gbs=40.0)


def _row(label, backend, p50, **others):
    return {
        "label": label,
        "backend": backend,
        "precision": label.split("+")[0],
        "workload": "prefill",
        "batch": 1,
        "tokens": 8,
        "instances": 1,
        "cores": 2,
        "reason": "",
        "p50_ms": p50,
        "p05_ms": 0.95 * p50,
        "p95_ms": 1.1 * p50,
        "batches_per_s": 1000 / p50,
        "runs": 9,
        **others,
    }


def test_speedups_are_over_eager_fp32_and_the_best_bf16():
    rows = [
        _row("fp32", "eager", 40.0),
        _row("fp32", "compiled", 30.0),
        _row("bf16", "eager", 20.0),
        _row("bf16", "compiled", 16.0),
        _row("int8", "native", 8.0),
        {"label": "int8", "backend": "ipex", "precision": "int8", "reason": "cannot"},
    ]
    add_speedups(rows)
    assert rows[4]["speedup_vs_fp32"] == pytest.approx(5.0)
    assert rows[4]["speedup_vs_bf16"] == pytest.approx(2.0)
    assert "speedup_vs_fp32" not in rows[5]


def test_instances_are_compared_by_throughput():
    rows = [_row("fp32", "eager", 40.0, instances=2, batches_per_s=50.0)]
    rows += [_row("int8", "native", 20.0, instances=2, batches_per_s=200.0)]
    add_speedups(rows)
    assert rows[1]["speedup_vs_fp32"] == pytest.approx(4.0)


def test_quantiles_are_samples():
    times = [float(value) for value in range(1, 101)]
    assert [quantile(times, share) for share in (0.05, 0.9, 0.95)] == [5.0, 90.0, 95.0]
    assert quantile([3.0], 0.05) == 3.0


def test_every_new_token_is_clocked():
    torch.manual_seed(0)
    times = timed_generation(tiny_model("llama"), torch.tensor([[5, 6, 7], [8, 9, 10]]), 6)
    assert len(times) == 6
    assert times == sorted(times)
    assert times[0] > 0
