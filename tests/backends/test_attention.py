"""Attention as batched matmuls computes what PyTorch's kernel does."""

from uuid import uuid4

import pytest
import torch
from torch.nn import functional

from ipex_sq.backends import attention
from ipex_sq.backends.attention import MOST_TOKENS, batched_attention, inductor

BATCH, HEADS, SIZE = 3, 4, 16
MODES = ("plain", "causal", "padded", "biased")


def _inputs(tokens, dtype, key_heads=HEADS):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(BATCH, tokens, heads, SIZE, generator=generator).to(dtype).transpose(1, 2)
        for heads in (HEADS, key_heads, key_heads)
    ]


def _options(mode, tokens):
    if mode == "padded":
        mask = torch.ones(BATCH, 1, tokens, tokens, dtype=torch.bool)
        mask[0, ..., tokens // 2 :] = False
        return {"attn_mask": mask}
    if mode == "biased":
        generator = torch.Generator().manual_seed(1)
        bias = torch.randn(BATCH, HEADS, tokens, tokens, generator=generator)
        return {"attn_mask": bias.bfloat16()}
    return {"is_causal": mode == "causal"}


def _difference(got, wanted):
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("mode", MODES)
def test_compiled_attention_agrees_with_exact_attention(mode):
    torch._dynamo.reset()
    for tokens in (20, 33):
        query, key, value = _inputs(tokens, torch.bfloat16)
        options = _options(mode, tokens)

        def attend(query, key, value, options=options):
            return functional.scaled_dot_product_attention(query, key, value, **options)

        exact = {name: x.double() if name == "attn_mask" and x.is_floating_point() else x
                 for name, x in options.items()}  # fmt: skip
        wanted = attend(query.double(), key.double(), value.double(), exact)
        with torch.inference_mode():
            got = torch.compile(attend, dynamic=True, backend=inductor)(query, key, value)
            kernel = attend(query, key, value)
        # Both round the weights and the output to bf16 (8 bits), the matmuls the query and the
        # scores as well: four roundings instead of two.
        assert _difference(got, wanted) < 2 * _difference(kernel, wanted) < 0.01


def test_grouped_keys_are_shared_as_the_kernel_shares_them():
    query, key, value = _inputs(24, torch.bfloat16, key_heads=2)
    got, sums = batched_attention(query, key, value, is_causal=True)
    spread = [x.repeat_interleave(2, dim=1) for x in (key, value)]
    wanted = functional.scaled_dot_product_attention(query, *spread, is_causal=True)
    assert _difference(got, wanted) < 0.01
    assert sums.shape == (BATCH, HEADS, 24)


def test_rows_that_are_masked_all_over_stay_finite():
    query, key, value = _inputs(8, torch.bfloat16)
    mask = torch.zeros(BATCH, 1, 8, 8)
    mask[1] = float("-inf")
    got, _ = batched_attention(query, key, value, attn_mask=mask)
    assert bool(got.isfinite().all())


@pytest.mark.parametrize(
    ("tokens", "dtype", "dropout"),
    [(MOST_TOKENS + 1, torch.bfloat16, 0.0), (8, torch.float32, 0.0), (8, torch.bfloat16, 0.1)],
)
def test_what_the_kernel_does_better_is_left_to_it(tokens, dtype, dropout):
    assert batched_attention(*_inputs(tokens, dtype), dropout) is NotImplemented


def test_the_compiled_graph_has_it(monkeypatch):
    """A cached graph without it would be as right and twice as slow."""
    calls = []
    original = attention.batched_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(attention, "batched_attention", counted)
    monkeypatch.setattr(attention, "VERSION", str(uuid4()))  # no graph of a run before
    torch._dynamo.reset()
    query, key, value = _inputs(20, torch.bfloat16)
    with torch.inference_mode():
        attend = torch.compile(functional.scaled_dot_product_attention, backend=inductor)
        attend(query, key, value)
    assert calls
