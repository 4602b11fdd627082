"""Alpha, for each smooth group or for the model, chosen by what int8 does to the predictions.

For every candidate each group is smoothed, its weights and sampled inputs are quantized exactly as
the plan would, and the change of the outputs is weighed by its effect on the model's predictions
(`samples.py`). Ranges are those of the calibration texts that were not sampled: alpha near 1 gives
every channel exactly the range that calibration saw, and only other texts show what clipping costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from ipex_sq.distributed import share
from ipex_sq.recipe.observers import LinearStats
from ipex_sq.recipe.plan import STATIC_INT8
from ipex_sq.recipe.qparams import (
    ActivationQParams,
    activation_qparams,
    int8_sums,
    round_rows,
    round_weight,
)
from ipex_sq.recipe.row_blocks import joined_rows
from ipex_sq.recipe.samples import GroupSample
from ipex_sq.recipe.smoothing import column_absmax, shared_absmax, smoothing_scale
from ipex_sq.recipe.splitting import append_copies, number_of_parts, split_channels

ALPHA_GRID = tuple(round(0.3 + 0.05 * step, 2) for step in range(15))
"""0.30 to 1.00. Below 0.3 the weights give more range to activations than smoothing takes away."""

HEADROOMS = (1.25, 1.5, 2.0)
"""What the ranges of calibration are multiplied with, tried in turn while the cost falls: few texts
leave more unseen than many. On SmolLM2-135M with 128 texts hardly any group wants it."""

SEARCH_ROWS = 256
"""Of a sample. 512 choose no better on SmolLM2-135M and take two thirds longer (docs/log.md)."""

Costs = dict[float | None, float]
"""Nats of KL divergence per prediction, by alpha."""


@dataclass(frozen=True)
class GroupInputs:
    """What is known about one smooth group.

    Attributes:
        stats: Range of its input.
        unsampled_stats: The same without the texts that were sampled, or None: by it the search
            clips as int8 will clip texts that calibration has not seen.
        producer_channels: As of the group: channels that share one producer channel share a scale.
        weights: `[out_i, in_features]` of its readers, fp32.
        copies: How many copies of outlier channels to make (`splitting.py`).
        sample: Of its tokens, for the search.
    """

    stats: LinearStats
    weights: Sequence[Tensor]
    copies: int = 0
    sample: GroupSample | None = None
    unsampled_stats: LinearStats | None = None
    producer_channels: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(weight.numel() for weight in self.weights)

    def without_sampled_texts(self) -> GroupInputs:
        """As if calibration had not seen the texts that were sampled: scale and range."""
        return replace(self, stats=self.unsampled_stats or self.stats)

    def smoothing(self, alpha: float) -> tuple[Tensor, Tensor | None]:
        """Smoothing scale `[in_features]` of one part, and the channels in parts or None."""
        activations = self.stats.act_absmax / number_of_parts(self._channels, len(self._columns))
        return smoothing_scale(
            shared_absmax(activations, self.producer_channels),
            shared_absmax(self._columns, self.producer_channels),
            alpha,
        ), self._channels

    def activation(
        self, scale: Tensor | None, channels: Tensor | None, headroom: float
    ) -> ActivationQParams:
        """Static parameters of the smoothed input in parts, its range `headroom` times as large."""
        if scale is not None:
            scale = scale * number_of_parts(channels, len(scale))
        low, high = self.stats.smoothed_range(scale)
        return activation_qparams(headroom * low, headroom * high)

    @cached_property
    def _channels(self) -> Tensor | None:
        ranges = self.stats.act_absmax * self._columns
        return split_channels(ranges, self.copies) if self.copies else None

    @cached_property
    def _columns(self) -> Tensor:
        return column_absmax(self.weights)


@dataclass(frozen=True)
class AlphaSearch:
    """What each candidate costs, in nats of KL divergence per prediction.

    Attributes:
        kl: By mode ("static_int8", "dynamic_int8"), group key and alpha; None stands for no
            smoothing.
        headroom: Of groups whose static range is better larger than calibration's, by group key;
            their least cost is with it.
    """

    kl: Mapping[str, Mapping[str, Mapping[float | None, float]]]
    headroom: Mapping[str, float] = field(default_factory=dict)

    def joined(self, other: AlphaSearch) -> AlphaSearch:
        """The costs of both, which are of other groups."""
        modes = dict.fromkeys((*self.kl, *other.kl))
        kl = {mode: {**self.kl.get(mode, {}), **other.kl.get(mode, {})} for mode in modes}
        return AlphaSearch(kl, {**self.headroom, **other.headroom})

    def total(self, mode: str = STATIC_INT8) -> dict[float | None, float]:
        """Cost of each alpha where all groups use it, of those that were tried in all groups."""
        groups = list(self.kl[mode].values())
        alphas = [alpha for alpha in groups[0] if all(alpha in costs for costs in groups)]
        return {alpha: sum(costs[alpha] for costs in groups) for alpha in alphas}

    def best_for_all(self, mode: str = STATIC_INT8) -> float | None:
        """The one alpha that costs least in total."""
        total = self.total(mode)
        return min(total, key=total.__getitem__)

    def best(self, key: str, mode: str = STATIC_INT8) -> float | None:
        """The alpha that costs least in this group; of a group without a sample, `best_for_all`."""
        if key not in self.kl[mode]:
            return self.best_for_all(mode)
        costs = self.kl[mode][key]
        return min(costs, key=costs.__getitem__)

    def cost(self, key: str, alpha: float | None, mode: str = STATIC_INT8) -> float:
        """Cost of `alpha` in this group; 0.0 for a group without a sample."""
        costs = self.kl[mode].get(key)
        return 0.0 if costs is None else costs[alpha]

    def room(self, key: str, mode: str = STATIC_INT8) -> float:
        """Headroom of this group; 1.0 per token, which needs none."""
        return self.headroom.get(key, 1.0) if mode == STATIC_INT8 else 1.0


def search_alpha(
    groups: Mapping[str, GroupInputs],
    grid: Sequence[float | None] = ALPHA_GRID,
    modes: Sequence[str] = (STATIC_INT8,),
    *,
    refine: bool = False,
    least_cost: float = 0.0,
    progress: Callable[[list[str]], Iterable[str]] = iter,
) -> AlphaSearch:
    """Measure the candidates in every group.

    Args:
        groups: By group key.
        grid: Alphas, each in [0, 1] or None.
        modes: How the input is rounded: "static_int8", "dynamic_int8".
        refine: Try every second alpha, then only those beside the best: two thirds of the work,
            and the sum of the least costs 1 % higher on SmolLM2-135M (docs/log.md). With the best
            of them, try whether a larger static range is better.
        least_cost: Other modes than the first are tried only in groups that cost as much in it.
        progress: Wraps the iteration over group keys, for a progress bar.
    """

    def costs_of(key: str) -> tuple[dict[str, Costs], float]:
        group, found, headroom = GroupCosts(groups[key]), {}, 1.0
        for mode in modes:
            found[mode] = group.refined(grid, mode) if refine else group.over(grid, mode)
            if refine and mode == STATIC_INT8:
                headroom = group.give_room(found[mode])
            if min(found[mode].values()) < least_cost:
                break
        return found, headroom

    kl: dict[str, dict[str, Costs]] = {mode: {} for mode in modes}
    headroom = {}
    searched = share(list(groups), costs_of, size=lambda key: groups[key].size, progress=progress)
    for key, (found, room) in zip(groups, searched, strict=True):
        for mode, costs in found.items():
            kl[mode][key] = costs
        if room > 1.0:
            headroom[key] = room
    return AlphaSearch({mode: costs for mode, costs in kl.items() if costs}, headroom)


class GroupCosts:
    """Expected KL divergence per prediction that int8 costs in one group."""

    def __init__(self, inputs: GroupInputs) -> None:
        """`inputs` hold a sample."""
        assert inputs.sample is not None  # noqa: S101
        self._inputs = inputs.without_sampled_texts()
        self._sample = inputs.sample.thinned(SEARCH_ROWS)
        self._stacked = joined_rows(inputs.weights)
        outputs = self._sample.inputs @ self._stacked.T
        self._wanted = outputs.mul_(self._sample.gradients).sum(dim=1)

    def over(self, alphas: Iterable[float | None], mode: str) -> Costs:
        """The cost of every alpha, the input rounded as `mode` says."""
        return {alpha: self._at(alpha, mode) for alpha in alphas}

    def refined(self, grid: Sequence[float | None], mode: str) -> Costs:
        """The same for every second alpha of `grid` and the two beside the best of them."""
        costs = self.over(grid[::2], mode)
        best = grid.index(min(costs, key=costs.__getitem__))
        beside = [index for index in (best - 1, best + 1) if 0 <= index < len(grid)]
        return costs | self.over((grid[index] for index in beside), mode)

    def give_room(self, costs: Costs) -> float:
        """Headroom that the static range is best given; lowers the least of `costs` to its cost."""
        alpha, headroom = min(costs, key=costs.__getitem__), 1.0
        for larger in HEADROOMS:
            cost = self._at(alpha, STATIC_INT8, larger)
            if cost >= costs[alpha]:
                break
            costs[alpha], headroom = cost, larger
        return headroom

    def _at(self, alpha: float | None, mode: str, headroom: float = 1.0) -> float:
        inputs, sample = self._inputs, self._sample
        scale, channels = (None, None) if alpha is None else inputs.smoothing(alpha)
        rows = sample.inputs if scale is None else sample.inputs / scale
        weight_levels, steps = round_weight(self._stacked, scale)
        static = mode == STATIC_INT8
        activation = inputs.activation(scale, channels, headroom) if static else None
        levels, zero_point, step = round_rows(rows, activation, channels)
        sums = int8_sums(levels, zero_point, append_copies(weight_levels, channels))
        projected = sums.mul_(steps).mul_(step).mul_(sample.gradients).sum(dim=1)
        return sample.expected_kl(projected - self._wanted)
