"""One alpha for the model, chosen by what int8 does to the outputs of its Linears.

For every candidate each smooth group is smoothed, its weights and a few of its recorded inputs are
quantized exactly as the plan would, and the outputs are compared with the float ones. The range of
the activations is that of all calibration tokens, so a candidate cannot hide an outlier that the
recorded rows happen to miss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ipex_sq.recipe.observers import LinearStats
from ipex_sq.recipe.qparams import (
    activation_qparams,
    fake_quantize_activation,
    fake_quantize_weight,
    weight_scale,
)
from ipex_sq.recipe.smoothing import column_absmax, smoothing_scale

ALPHA_GRID = tuple(round(0.3 + 0.05 * step, 2) for step in range(15))
"""0.30 to 1.00. Below 0.3 the weights give more range to activations than smoothing takes away."""

GroupInputs = tuple[LinearStats, Sequence[Tensor]]
"""Statistics of a group's shared input, and the weights `[out_i, in_features]` of its readers."""


def search_alpha(
    groups: Mapping[str, GroupInputs],
    grid: Sequence[float] = ALPHA_GRID,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> tuple[float, dict[float, float]]:
    """Choose the alpha of least mean relative output error ||Yq - Y|| / ||Y||.

    The mean is of norms, not of squares: one layer with massive activations would otherwise decide
    alone (measured on SmolLM2-135M: squares choose 0.85, norms 0.90 to 0.95, and accuracy and
    perplexity prefer 0.90; docs/log.md).

    Args:
        groups: By group key.
        grid: Candidates, each in [0, 1].
        progress: Wraps the iteration over group keys, for a progress bar.

    Returns:
        The best alpha, and the error of each candidate.
    """
    totals = torch.zeros(len(grid))
    for key in progress(groups):
        stats, weights = groups[key]
        totals += torch.tensor(group_errors(stats, weights, grid))
    errors = (totals / max(len(groups), 1)).tolist()
    best = min(range(len(grid)), key=errors.__getitem__)
    return grid[best], dict(zip(grid, errors, strict=True))


def group_errors(
    stats: LinearStats, weights: Sequence[Tensor], grid: Sequence[float]
) -> list[float]:
    """Relative output error of one group at each alpha, ||Yq - Y|| / ||Y||."""
    stacked = torch.cat([weight.detach().float() for weight in weights])
    wanted = stats.rows @ stacked.T
    reference = float(wanted.norm().clamp(min=1e-12))
    columns = column_absmax([stacked])
    errors = []
    for alpha in grid:
        scale = smoothing_scale(stats.act_absmax, columns, alpha)
        outputs = int8_outputs(stats, stacked, scale)
        errors.append(float((outputs - wanted).norm()) / reference)
    return errors


def int8_outputs(stats: LinearStats, weight: Tensor, scale: Tensor | None) -> Tensor:
    """Outputs `[n, out_features]` of the recorded rows through the int8 Linear, bias left out.

    Args:
        stats: Of the Linear's input.
        weight: `[out_features, in_features]`, unsmoothed.
        scale: `[in_features]` smoothing scale, or None.
    """
    rows = stats.rows
    if scale is not None:
        rows, weight = rows / scale, weight * scale
    qparams = activation_qparams(*stats.smoothed_range(scale))
    quantized = fake_quantize_weight(weight, weight_scale(weight))
    return fake_quantize_activation(rows, qparams) @ quantized.T
