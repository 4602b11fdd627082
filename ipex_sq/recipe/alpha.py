"""Alpha, for each smooth group or for the model, chosen by what int8 does to the predictions.

For every candidate each group is smoothed, its weights and sampled inputs are quantized exactly as
the plan would, and the change of the outputs is weighed by its effect on the model's predictions
(`samples.py`). Ranges are those of all calibration tokens, so a candidate cannot hide an outlier
that the sample happens to miss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ipex_sq.recipe.observers import LinearStats
from ipex_sq.recipe.qparams import (
    activation_qparams,
    int8_sums,
    quantize_activation,
    quantize_weight,
    weight_scale,
)
from ipex_sq.recipe.samples import GroupSample
from ipex_sq.recipe.smoothing import column_absmax, smoothing_scale
from ipex_sq.recipe.splitting import append_copies, smoothed_weight, split_channels

ALPHA_GRID = tuple(round(0.3 + 0.05 * step, 2) for step in range(15))
"""0.30 to 1.00. Below 0.3 the weights give more range to activations than smoothing takes away."""


@dataclass(frozen=True)
class GroupInputs:
    """What is known about one smooth group.

    Attributes:
        stats: Range of its input.
        weights: `[out_i, in_features]` of its readers, fp32.
        copies: How many copies of outlier channels to make (`splitting.py`).
        sample: Of its tokens, for the search.
    """

    stats: LinearStats
    weights: Sequence[Tensor]
    copies: int = 0
    sample: GroupSample | None = None

    def smoothing(self, alpha: float) -> tuple[Tensor, Tensor | None]:
        """Smoothing scale `[in_features]`, and the channels to split `[copies]` or None."""
        scale = smoothing_scale(self.stats.act_absmax, self._columns, alpha)
        channels = split_channels(self._columns * scale, self.copies) if self.copies else None
        return scale, channels

    @cached_property
    def _columns(self) -> Tensor:
        return column_absmax(self.weights)


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
    return AlphaSearch(grid, {key: group_costs(groups[key], grid) for key in progress(groups)})


def group_costs(inputs: GroupInputs, grid: Sequence[float | None]) -> list[float]:
    """Expected KL divergence per prediction of one group's int8 Linears at each alpha.

    None in the grid stands for no smoothing.
    """
    sample = inputs.sample
    assert sample is not None  # noqa: S101
    stacked = torch.cat(list(inputs.weights))
    wanted = ((sample.inputs @ stacked.T) * sample.gradients).sum(dim=1)
    costs = []
    for alpha in grid:
        scale, channels = (None, None) if alpha is None else inputs.smoothing(alpha)
        qparams = activation_qparams(*inputs.stats.smoothed_range(scale))
        rows = sample.inputs if scale is None else sample.inputs / scale
        levels = append_copies(quantize_activation(rows, qparams), channels)
        weight = smoothed_weight(stacked, scale, channels)
        steps = weight_scale(weight)
        sums = int8_sums(levels, qparams.zero_point, quantize_weight(weight, steps))
        projected = sums.mul_(steps).mul_(sample.gradients).sum(dim=1) * qparams.scale
        costs.append(sample.expected_kl(projected - wanted))
    return costs
