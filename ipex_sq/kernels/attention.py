"""Attention of short sequences in bf16 layers.

Up to 2048 tokens one kernel of our own (`attention.cpp`), whose scores do not leave the core's
cache, takes a fourth of the time of PyTorch's kernel; for one token over any number another. Where
they do not build, two batched matmuls with a softmax between them take half of it, at 100 to 200
tokens (docs/log.md). Inductor is given either in the place of PyTorch's, and layers that run as
written the kernel, by PyTorch's dispatcher; the model's own code is not touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ipex_sq.kernels.brgemm import brgemm_built
from ipex_sq.system import has_bf16_instructions

MOST_TOKENS = 2048
"""Of the kernel: above, a block of scores and the keys do not fit into a core's cache."""

MOST_TOKENS_OF_MATMULS = 256
"""Above, the scores of all pairs cost more memory traffic than the matmuls save."""

SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

_LIBRARY = torch.library.Library("ipex_sq", "FRAGMENT")
_LIBRARY.define("causal_bias(SymInt tokens, SymInt keys) -> Tensor")


def _causal_bias(tokens: int, keys: int) -> Tensor:
    return torch.full((tokens, keys), torch.finfo(torch.float32).min / 2).triu(1)


# An operator of our own, because Inductor would compare int64 positions again for every score.
_LIBRARY.impl("causal_bias", _causal_bias, "CompositeExplicitAutograd")


@torch.library.register_fake("ipex_sq::causal_bias", lib=_LIBRARY)
def _bias_shape(tokens: int, keys: int) -> Tensor:
    return torch.empty(tokens, keys)


def short_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    """What `aten._scaled_dot_product_flash_attention_for_cpu` computes, with fp32 softmax.

    Args:
        query: `[batch, heads, tokens, size]`.
        key: `[batch, key heads, keys, size]`; the key heads divide the heads.
        value: As `key`.
        dropout_p: 0 only.
        is_causal: Each token sees itself and those before it.
        attn_mask: Added to the scores, broadcast to `[batch, heads, tokens, keys]`, or None.
        scale: Of the scores; None is 1 / sqrt(size).

    Returns:
        `[batch, heads, tokens, size]` and the logarithm of the softmax's sums; or
        `NotImplemented`, which leaves the kernel in its place.
    """
    batch, _, tokens, size = query.shape
    keys = key.shape[2]
    if dropout_p or query.dtype != torch.bfloat16:
        return NotImplemented
    scale = 1.0 / math.sqrt(size) if scale is None else scale
    step = tokens == 1  # of generation
    kernel = size % 2 == 0 and scale > 0 and has_kernel()
    most = MOST_TOKENS if kernel else MOST_TOKENS_OF_MATMULS
    # Without the kernel one text's step is as fast with PyTorch's; several are not.
    if (step and not kernel and batch == 1) or (not step and (tokens > most or keys > most)):
        return NotImplemented
    mask = attn_mask
    if kernel:
        mask = None if mask is None else mask[(None,) * (4 - mask.ndim)]
        output, largest, sums = torch.ops.ipex_sq.short_attention(
            query, key, value, mask, is_causal, scale
        )
        return output, largest + sums.log()
    if is_causal:
        mask = torch.ops.ipex_sq.causal_bias(tokens, keys)
    return _matmuls(query, key, value, mask, scale)


@contextmanager
def kernel_for_attention() -> Iterator[None]:
    """Within it, this thread's attention is the kernel, where that is faster; no gradients.

    Where that is, `attention_in_mode` in attention.cpp decides by the rules of `short_attention`: a
    prompt should not wait for Python in every layer.
    """
    if torch.is_grad_enabled() or not has_kernel():
        yield
        return
    torch.ops.ipex_sq.replace_attention(MOST_TOKENS)
    try:
        yield
    finally:
        torch.ops.ipex_sq.replace_attention(0)


def has_kernel() -> bool:
    """Whether `torch.ops.ipex_sq.short_attention` runs here: CPU and compiler know bf16."""
    return (
        has_bf16_instructions()
        and brgemm_built()
        and hasattr(torch.ops.ipex_sq, "replace_attention")  # not where an old compiler built them
    )


def _matmuls(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, size = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    rows = heads // key_heads * tokens  # heads that share keys become rows of one matmul
    scaled = query * scale
    # Contiguous and transposed: oneDNN takes twice as long over views of [batch, tokens, heads].
    transposed = key.transpose(2, 3).contiguous().view(batch * key_heads, size, keys)
    scores = torch.bmm(scaled.contiguous().view(batch * key_heads, rows, size), transposed)
    scores = scores.view(batch, heads, tokens, keys).float()
    if mask is not None:
        # Finite, so that a row that is masked all over stays finite too.
        scores = scores + mask.float().clamp(min=torch.finfo(torch.float32).min / 2)
    weights = scores.softmax(dim=-1).to(query.dtype).view(batch * key_heads, rows, keys)
    output = torch.bmm(weights, value.contiguous().view(batch * key_heads, keys, size))
    output = output.view(batch, heads, tokens, size)
    # The kernel's strides: [batch, tokens, heads, size] in memory.
    output = output.transpose(1, 2).contiguous().transpose(1, 2)
    return output, scores.logsumexp(dim=-1)
