"""Bias correction (Nagel et al. 2019, arXiv 1906.04721): take out the mean error of int8 outputs.

Rounding errors of a Linear average to nearly nothing over inputs that average to nothing; inputs of
a network do not. What remains is the same shift at every token, and it moves predictions one way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ipex_sq.recipe.alpha import GroupInputs, round_rows
from ipex_sq.recipe.plan import GroupPlan
from ipex_sq.recipe.qparams import int8_sums, quantize_weight, weight_scale
from ipex_sq.recipe.splitting import append_copies, smoothed_weight

MASSIVE_FACTOR = 8.0
"""A token this many times larger than the median one is left out: its error is its own, and the
others would pay for it."""


def mean_output_errors(inputs: GroupInputs, item: GroupPlan, mode: str) -> Sequence[Tensor]:
    """Mean error of the int8 output of each reader, `[out_i]`, over the ordinary sampled tokens.

    Args:
        inputs: Of the group, with a sample.
        item: How it is smoothed.
        mode: "static_int8" or "dynamic_int8".
    """
    sample = inputs.sample
    assert sample is not None  # noqa: S101
    stacked = torch.cat(list(inputs.weights))
    rows = sample.inputs if item.scale is None else sample.inputs / item.scale
    size = rows.abs().amax(dim=1)
    ordinary = size <= MASSIVE_FACTOR * size.median()
    rows, wanted = rows[ordinary], sample.inputs[ordinary] @ stacked.T
    weight = smoothed_weight(stacked, item.scale, item.channels)
    steps = weight_scale(weight)
    levels, zero_point, step = round_rows(rows, inputs.stats, item.scale, mode)
    sums = int8_sums(
        append_copies(levels, item.channels), zero_point, quantize_weight(weight, steps)
    )
    error = (sums.mul_(steps).mul_(step) - wanted).mean(dim=0)
    return [part.clone() for part in error.split([len(weight) for weight in inputs.weights])]
