"""Logits of a bf16 head keep the bits of their sums."""

import pytest
import torch
from torch import nn

from ipex_sq.backends import head
from ipex_sq.backends.head import WideHead, widen_logits
from ipex_sq.models.tiny import tiny_model

ROWS = [1, 2, 16, 17, 32, 33, 70, 200]
"""Each way to multiply, with whole and broken tiles."""


def _head(vocabulary, width, *, bias=False):
    torch.manual_seed(0)
    return nn.Linear(width, vocabulary, bias=bias, dtype=torch.bfloat16).requires_grad_(False)


def _exact(linear, x):
    product = x.double() @ linear.weight.double().T
    return product if linear.bias is None else product + linear.bias.double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("vocabulary", "width"), [(64, 32), (1000, 66), (2049, 576), (70, 33)])
@pytest.mark.parametrize("rows", ROWS)
def test_logits_are_the_sums_in_fp32(rows, vocabulary, width, bias):
    linear = _head(vocabulary, width, bias=bias)
    x = torch.randn(rows, width).bfloat16()
    found = WideHead(linear)(x)
    exact = _exact(linear, x)
    assert found.dtype == torch.float32
    # fp32 sums of 576 products: far from the 2**-9 that rounding to bf16 costs.
    assert (found - exact).abs().max() <= 2**-19 * exact.abs().max()


@pytest.mark.parametrize("rows", ROWS[2:])
def test_a_row_has_the_same_logits_among_any_others(rows):
    linear = _head(1000, 576)
    x = torch.randn(rows, 576).bfloat16()
    assert torch.equal(WideHead(linear)(x)[:2], WideHead(linear)(x[:2]))


def test_leading_dimensions_and_strides_stay():
    linear = _head(100, 64)
    x = torch.randn(3, 5, 64).bfloat16()
    wide = WideHead(linear)
    assert torch.equal(wide(x), wide(x.view(15, 64)).view(3, 5, 100))
    assert torch.equal(wide(x.transpose(0, 1)), wide(x).transpose(0, 1))
    assert wide(x[:, :0]).shape == (3, 0, 100)


def test_without_the_kernels_the_numbers_are_the_same(monkeypatch):
    linear = _head(5000, 64)
    x = torch.randn(3, 64).bfloat16()
    wanted = WideHead(linear)(x)
    monkeypatch.setattr(head, "brgemm_built", lambda: False)
    found = WideHead(linear)(x)
    assert (found - wanted).abs().max() <= 2**-19 * wanted.abs().max()


def test_a_head_in_fp32_stays_with_the_library():
    linear = nn.Linear(16, 8)
    x = torch.randn(1, 3, 16)
    assert torch.equal(WideHead(linear)(x), linear(x))


def test_of_a_model_only_the_logits_change(unseen):
    model = tiny_model("llama").to(torch.bfloat16)
    with torch.no_grad():
        narrow = model(**unseen).logits
        widen_logits(model)
        widen_logits(model)
        wide = model(**unseen).logits
    assert narrow.dtype == torch.bfloat16
    assert wide.dtype == torch.float32
    assert torch.equal(wide.bfloat16(), narrow)
