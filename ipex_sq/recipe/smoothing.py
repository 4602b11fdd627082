"""SmoothQuant's per-channel scale (Xiao et al. 2022, arXiv 2211.10438, equation 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ipex_sq.recipe.row_blocks import row_blocks

SMALLEST_ABSMAX = 1e-5
"""Floor of both absmax vectors, as in the authors' code: a dead channel must not divide by zero."""


def smoothing_scale(act_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """Per input channel, s = absmax(X)^alpha / absmax(W)^(1 - alpha).

    A channel that calibration never saw above the floor keeps s = 1: its 1/s would amplify whatever
    arrives later without bound (a departure from the paper, which does not treat dead channels).
    Where that would make its weight column the largest of all, and so the step of every weight
    coarser, s is as small as makes it equal to the largest of the others.

    Args:
        act_absmax: `[in_features]`, largest absolute input per channel.
        weight_absmax: `[in_features]`, largest absolute weight per column, over every reader.
        alpha: Migration strength, 0 to 1.

    Returns:
        `[in_features]`, > 0. Weight columns are multiplied by it, activations divided.
    """
    activations = act_absmax.float().clamp(min=SMALLEST_ABSMAX)
    weights = weight_absmax.float().clamp(min=SMALLEST_ABSMAX)
    scale = activations.pow(alpha) / weights.pow(1.0 - alpha)
    dead = act_absmax <= SMALLEST_ABSMAX
    if bool(dead.all()):
        return torch.ones_like(scale)
    largest = (scale * weights)[~dead].max()
    return torch.where(dead, (largest / weights).clamp(max=1.0), scale)


def column_absmax(weights: Sequence[Tensor]) -> Tensor:
    """Largest absolute value `[in_features]` of each column over `[out_i, in_features]` weights."""
    blocks = [rows for weight in weights for rows in row_blocks(weight)]
    return torch.stack([rows.float().abs().amax(dim=0) for rows in blocks]).amax(dim=0)


def shared_absmax(absmax: Tensor, producer_channels: Tensor | None) -> Tensor:
    """Let channels that come from one channel of the producer have the same absmax.

    Args:
        absmax: `[in_features]`.
        producer_channels: `[in_features]`, or None where every channel stands for itself.
    """
    if producer_channels is None:
        return absmax
    largest = absmax.new_zeros(int(producer_channels.max()) + 1)
    largest.scatter_reduce_(0, producer_channels, absmax, "amax")
    return largest[producer_channels]
