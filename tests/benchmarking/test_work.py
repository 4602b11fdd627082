"""Products are counted as often as they are made."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ipex_sq.benchmarking.limits import Limits
from ipex_sq.benchmarking.work import Work, work_of
from ipex_sq.models.loading import skeleton, task_of
from ipex_sq.models.tiny import tiny_model

LIMITS = Limits(int8_gops=800.0, bf16_gflops=400.0, fp32_gflops=200.0, bandwidth_gbs=40.0)
TOKENS = 32


def test_the_limit_is_products_or_bytes_whichever_takes_longer():
    work = Work(body=10**8, head=10**7, precision="int8", head_precision="bf16")
    many = work.least_seconds(LIMITS, tokens=1000, predictions=1000)
    assert many == pytest.approx(2e11 / 8e11 + 2e10 / 4e11)
    one = work.least_seconds(LIMITS, tokens=1, predictions=1)
    assert one == pytest.approx((1e8 + 2e7) / 4e10)


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
    elif family == "albert":
        behind = model.albert.pooler.weight.numel()
    assert work.first_token == behind


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "gpt2", "opt-350m", "falcon", "falcon-new", "gemma2", "bloom", "mixtral"),
        *("distilbert", "albert", "bert"),
    ],
)
def test_products_are_those_that_torch_counts(family):
    model = tiny_model(family, outliers=False)
    work = work_of(model, "fp32", "fp32")
    if work.unknown:
        assert family == "mixtral", "transformers 5 stacks experts"
        assert ".experts." in work.unknown
        return
    ids = torch.randint(2, 100, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    counts = counter.get_flop_counts()["Global"]
    made = sum(count for name, count in counts.items() if str(name) in ("aten.mm", "aten.addmm"))
    predictions = 1 if task_of(model) == "sequence-classification" else TOKENS
    counted = (work.body - work.first_token + work.float_body) * TOKENS + work.head * predictions
    counted += work.first_token * predictions
    if family == "bert":  # torch runs the last layer's tail on all tokens
        last = model.bert.encoder.layer[-1]
        tail = [last.attention.output.dense, last.intermediate.dense, last.output.dense]
        counted += (TOKENS - 1) * sum(linear.weight.numel() for linear in tail)
    assert 2 * counted == made


def test_a_layer_that_runs_again_is_multiplied_again_and_read_once():
    model = tiny_model("albert", outliers=False)
    once = sum(
        item.weight.numel()
        for item in model.albert.encoder.albert_layer_groups.modules()
        if isinstance(item, nn.Linear)
    )
    work = work_of(model, "int8", "bf16")
    assert work.repeated == once
    read = work.body - work.repeated + 2 * (work.head + work.float_body)
    assert work.least_seconds(LIMITS, tokens=1, predictions=1) == pytest.approx(read / 4e10)


def test_a_model_that_does_not_run_on_few_tokens_has_no_limit():
    model = tiny_model("llama", outliers=False)
    model.model.layers[0].forward = None
    assert "does not run" in work_of(model, "int8", "bf16").unknown
