"""Logits of a bf16 head keep the bits of their sums."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ipex_sq.kernels import head
from ipex_sq.kernels.head import WideHead, widen_logits
from ipex_sq.models.tiny import tiny_model
from ipex_sq.system import has_bf16_instructions

bf16 = pytest.mark.skipif(
    not has_bf16_instructions(), reason="the CPU has neither AVX512-BF16 nor AMX"
)
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


@bf16
@pytest.mark.parametrize("rows", ROWS[2:])
def test_a_row_has_the_same_logits_among_any_others(rows):
    linear = _head(1000, 576)
    x = torch.randn(rows, 576).bfloat16()
    assert torch.equal(WideHead(linear)(x)[:2], WideHead(linear)(x[:2]))


@bf16
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


@bf16
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


def test_gradients_are_those_of_the_library():
    linear = _head(100, 64).requires_grad_(True)
    x = torch.randn(3, 5, 64).bfloat16().requires_grad_(True)
    weights = torch.randn(3, 5, 100)
    wanted = torch.autograd.grad((linear(x) * weights).sum(), (x, linear.weight))
    found = torch.autograd.grad((WideHead(linear)(x) * weights).sum(), (x, linear.weight))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= 2**-7 * theirs.abs().max()


def test_shapes_are_known_without_running():
    linear = _head(100, 64)
    WideHead(linear)(torch.randn(2, 64).bfloat16())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = WideHead(linear)(mode.from_tensor(torch.randn(3, 5, 64).bfloat16()))
    assert (fake.shape, fake.dtype) == ((3, 5, 100), torch.float32)


def test_a_head_with_a_forward_of_its_own_keeps_it():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_model("llama").to(torch.bfloat16)
    model.lm_head = Scaled(model.lm_head.in_features, model.lm_head.out_features)
    widen_logits(model)
    assert "forward" not in vars(model.lm_head)
