"""From samples to rows: ratios, limits, comparisons."""

import pytest
import torch
from torch import nn

from ipex_sq.benchmarking.limits import Limits, Work, work_of
from ipex_sq.benchmarking.run import add_speedups, quantile
from ipex_sq.models.generating import timed_generation
from ipex_sq.models.loading import skeleton, task_of
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


def test_the_limit_is_products_or_bytes_whichever_takes_longer():
    work = Work(body=10**8, head=10**7, precision="int8", head_precision="bf16")
    many = work.least_seconds(LIMITS, tokens=1000, predictions=1000)
    assert many == pytest.approx(2e11 / 8e11 + 2e10 / 4e11)
    one = work.least_seconds(LIMITS, tokens=1, predictions=1)
    assert one == pytest.approx((1e8 + 2e7) / 4e10)


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


def test_work_counts_what_stays_float_apart():
    model = tiny_model("llama")
    work = work_of(model, "int8", "bf16")
    every = sum(item.weight.numel() for item in model.modules() if isinstance(item, nn.Linear))
    assert work.body + work.head == every
    assert work.head == model.lm_head.weight.numel()


def test_a_classifier_needs_few_products_behind_its_last_attention():
    work = Work(body=10**8, head=10**4, precision="int8", head_precision="bf16", first_token=10**7)
    least = work.least_seconds(LIMITS, tokens=1000, predictions=10)
    assert least == pytest.approx((2 * 9e7 * 1000 + 2 * 1e7 * 10) / 8e11 + 2e5 / 4e11)
    read = work.least_seconds(LIMITS, tokens=1, predictions=1)
    assert read == pytest.approx((1e8 + 2e4) / 4e10), "every weight is read all the same"


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert", "albert", "llama"])
def test_work_of_a_checkpoint_is_that_of_its_float_model(family, tmp_path):
    model = tiny_model(family)
    work = work_of(model, "int8", "bf16")
    model.config.save_pretrained(tmp_path)
    task, attention = task_of(model), model.config._attn_implementation
    assert work_of(skeleton(tmp_path, attention, task), "int8", "bf16") == work
    behind = 0
    if family in ("bert", "roberta", "electra"):
        last = model.base_model.encoder.layer[-1]
        linears = [last.attention.output.dense, last.intermediate.dense, last.output.dense]
        if family == "bert":
            linears.append(model.bert.pooler.dense)
        behind = sum(linear.weight.numel() for linear in linears)
    assert work.first_token == behind
