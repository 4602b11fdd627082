"""Outlier channel splitting (Zhao et al. 2019, arXiv 1901.09504), on top of smoothing.

Smoothing moves a massive activation into its weight column, which then sets the step of every
weight row and leaves a few levels to the other columns. Splitting such a channel into copies, each
with an equal part of the column, is exact in float and takes the column's range away again. The
price is a few more columns. It is done where a pre-scale stands in front of the Linear anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

COPIES_PER_BLOCK = 32
"""Copies come in multiples of this: kernels work in blocks, odd widths cost speed."""

CHANNELS_PER_BLOCK = 1536
"""One block of copies for this many channels, about 2 %. Twice as many gained nothing more on
SmolLM2-135M (docs/log.md)."""


def number_of_copies(in_features: int) -> int:
    """How many copies a Linear of this width gets."""
    return COPIES_PER_BLOCK * -(-in_features // CHANNELS_PER_BLOCK)


def split_channels(column_absmax: Tensor, copies: int) -> Tensor:
    """Which channel each copy is of: always the one whose part of the column is largest.

    Args:
        column_absmax: `[in_features]`, largest absolute smoothed weight per column.
        copies: How many to make.

    Returns:
        `[copies]` int64, sorted.
    """
    parts = torch.ones_like(column_absmax)
    chosen = []
    for _ in range(copies):
        channel = int((column_absmax / parts).argmax())
        parts[channel] += 1
        chosen.append(channel)
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def append_copies(x: Tensor, channels: Tensor | None) -> Tensor:
    """`[..., in_features]` and its copies behind it, `[..., in_features + copies]`."""
    return x if channels is None else torch.cat((x, x[..., channels]), dim=-1)


def smoothed_weight(weight: Tensor, scale: Tensor | None, channels: Tensor | None) -> Tensor:
    """The weight that reads a smoothed input with its copies.

    Args:
        weight: `[out_features, in_features]`.
        scale: `[in_features]` smoothing scale, or None.
        channels: Of the copies, or None; the parts of a channel have equal shares of its column.

    Returns:
        `[out_features, in_features + copies]`.
    """
    if scale is None:
        return weight
    if channels is None:
        return weight * scale
    parts = torch.bincount(channels, minlength=weight.shape[1]) + 1
    return append_copies(weight * (scale / parts), channels)
