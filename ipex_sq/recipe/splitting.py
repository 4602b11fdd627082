"""Channels in parts (after outlier channel splitting, Zhao et al. 2019, arXiv 1901.09504).

Smoothing gives one scale to all that a channel holds. A massive activation then has both ends
against it: its range sets the step of all other activations, or its smoothed weight column the step
of all weights. So such a channel is written down in several parts, each with the channel's weight
column and a range of its own, laid end to end: part 0 holds what lies in [low, high], part 1 what
lies beyond, in twice that range, and so on. n parts are n times the levels for that channel. All of
it is exact in float; the price is a few more columns.

Inputs that are rounded per token have a range of their own each, as wide as the largest share of a
channel makes it; their parts are laid end to end in levels of that step.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHANNELS_PER_COPY = 48
"""Twice as many copies gained nothing more on SmolLM2-135M (docs/log.md): once all channels have
the same range, none has room for what calibration has not seen."""

CHANNELS_PER_COPY_OF_HEAD = 12
"""A head's errors go into the logits as they are, and its input has a range for each token, so that
nothing is clipped: more copies go on to gain (docs/log.md)."""

MOST_PRODUCTS = (2**31 - 1) // (255 * 127)
"""Of levels with weights, that an int32 sum always holds: 66,311 columns, with copies."""

GROUP = 4
"""Copies come in multiples of this: int8 kernels add up four products at a time."""


def number_of_copies(in_features: int, *, head: bool = False) -> int:
    """How many copies a Linear of this width, or a head, gets over all of its channels."""
    share = CHANNELS_PER_COPY_OF_HEAD if head else CHANNELS_PER_COPY
    return GROUP * -(-in_features // (GROUP * share))


def split_channels(ranges: Tensor, copies: int) -> Tensor:
    """Which channel each copy is of: always the one whose parts have the largest range.

    Args:
        ranges: `[in_features]`, of activations times weights: how smoothing divides it between the
            two is decided later.
        copies: How many to make.

    Returns:
        `[copies]` int64, sorted.
    """
    parts = torch.ones_like(ranges)
    chosen = []
    for _ in range(copies):
        channel = int((ranges / parts).argmax())
        parts[channel] += 1
        chosen.append(channel)
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def number_of_parts(channels: Tensor | None, in_features: int) -> Tensor:
    """`[in_features]` fp32, how many parts each channel has; 1 where it has no copy."""
    if channels is None:
        return torch.ones(in_features)
    return torch.bincount(channels, minlength=in_features).float() + 1


def checked_channels(channels: Tensor | None, in_features: int) -> Tensor | None:
    """A copy of `channels`, which kernels may read by.

    Raises:
        RuntimeError: They are not int64 `[copies]`, sorted, from 0 to `in_features - 1`.
    """
    if channels is None:
        return None
    fit = channels.dtype == torch.int64 and channels.ndim == 1 and channels.numel() > 0
    if (
        not fit
        or channels[0] < 0
        or channels[-1] >= in_features
        or bool((channels.diff() < 0).any())
    ):
        raise RuntimeError(f"channels must be int64, sorted, from 0 to {in_features - 1}")
    return channels.clone()


def append_copies(x: Tensor, channels: Tensor | None) -> Tensor:
    """`[..., in_features]` and its copies behind it, `[..., in_features + copies]`."""
    return x if channels is None else torch.cat((x, x[..., channels]), dim=-1)


def before_parts(channels: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """What the parts before each copy hold: the ends of their ranges, laid end to end.

    Args:
        channels: `[copies]`, sorted.
        low: Lower end of one part's range, at most 0.
        high: Upper end, at least 0.

    Returns:
        Lower and upper ends, `[copies]` fp32 each.
    """
    _, counts = channels.unique_consecutive(return_counts=True)
    order = torch.cat([torch.arange(1.0, float(count) + 1) for count in counts])
    return order * low, order * high


def append_rest(x: Tensor, channels: Tensor, before: tuple[Tensor, Tensor]) -> Tensor:
    """`[..., in_features]` and, behind it, what is left for each copy by the parts before it.

    What a part cannot hold is cut off when it is rounded: that is what the next part gets.

    Args:
        x: `[..., in_features]`.
        channels: `[copies]`.
        before: From `before_parts`.
    """
    copied = x[..., channels]
    # Not clamp: the fuser of TorchScript takes numbers only for its ends.
    held = torch.maximum(torch.minimum(copied, before[1]), before[0])
    return torch.cat((x, copied - held), dim=-1)
