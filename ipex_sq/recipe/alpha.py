"""Alpha, for each smooth group or for the model, chosen by what int8 does to the predictions.

For every candidate each group is smoothed, its weights and sampled inputs are quantized exactly as
the plan would, and the change of the outputs is weighed by its effect on the model's predictions
(`samples.py`). Ranges are those of all calibration tokens, so a candidate cannot hide an outlier
that the sample happens to miss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ipex_sq.recipe.observers import LinearStats
from ipex_sq.recipe.qparams import (
    activation_qparams,
    fake_quantize_activation,
    fake_quantize_weight,
    weight_scale,
)
from ipex_sq.recipe.samples import GroupSample
from ipex_sq.recipe.smoothing import column_absmax, smoothing_scale

ALPHA_GRID = tuple(round(0.3 + 0.05 * step, 2) for step in range(15))
"""0.30 to 1.00. Below 0.3 the weights give more range to activations than smoothing takes away."""

GroupInputs = tuple[LinearStats, GroupSample, Sequence[Tensor]]
"""A group's input range, its sample, and the weights `[out_i, in_features]` of its readers."""


@dataclass(frozen=True)
class AlphaSearch:
    """What each candidate costs, in nats of KL divergence per prediction.

    Attributes:
        grid: The candidates.
        kl: By group key, one figure per candidate.
    """

    grid: Sequence[float]
    kl: Mapping[str, Sequence[float]]

    @property
    def total(self) -> dict[float, float]:
        """Cost of each candidate where all groups use it."""
        columns = zip(*self.kl.values(), strict=True)
        return {alpha: sum(column) for alpha, column in zip(self.grid, columns, strict=True)}

    @property
    def best_for_all(self) -> float:
        """The one alpha that costs least in total."""
        total = self.total
        return min(total, key=total.__getitem__)

    def best(self, key: str) -> float:
        """The alpha that costs least in this group; of a group without a sample, `best_for_all`."""
        if key not in self.kl:
            return self.best_for_all
        return min(zip(self.kl[key], self.grid, strict=True))[1]

    def cost(self, key: str, alpha: float) -> float:
        """Cost of `alpha` in this group; 0.0 for a group without a sample."""
        return self.kl[key][self.grid.index(alpha)] if key in self.kl else 0.0


def search_alpha(
    groups: Mapping[str, GroupInputs],
    grid: Sequence[float] = ALPHA_GRID,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> AlphaSearch:
    """Measure every candidate in every group.

    Args:
        groups: By group key.
        grid: Candidates, each in [0, 1].
        progress: Wraps the iteration over group keys, for a progress bar.
    """
    return AlphaSearch(grid, {key: group_costs(*groups[key], grid) for key in progress(groups)})


def group_costs(
    stats: LinearStats,
    sample: GroupSample,
    weights: Sequence[Tensor],
    grid: Sequence[float | None],
) -> list[float]:
    """Expected KL divergence per prediction of one group's int8 Linears at each alpha.

    None in the grid stands for no smoothing.
    """
    stacked = torch.cat([weight.detach().float() for weight in weights])
    wanted = _projected(sample, sample.inputs, stacked)
    columns = column_absmax([stacked])
    costs = []
    for alpha in grid:
        rows, weight, scale = sample.inputs, stacked, None
        if alpha is not None:
            scale = smoothing_scale(stats.act_absmax, columns, alpha)
            rows, weight = rows / scale, weight * scale
        rows = fake_quantize_activation(rows, activation_qparams(*stats.smoothed_range(scale)))
        weight = fake_quantize_weight(weight, weight_scale(weight))
        costs.append(sample.expected_kl(_projected(sample, rows, weight) - wanted))
    return costs


def _projected(sample: GroupSample, rows: Tensor, weight: Tensor) -> Tensor:
    """Outputs of `rows` `[n, in]` projected on their gradients, `[n]`."""
    return ((rows @ weight.T) * sample.gradients).sum(dim=1)
