"""From statistics and weights to a plan: pure tensor math, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ipex_sq.config import AUTO, AUTO_GLOBAL
from ipex_sq.errors import CalibrationError
from ipex_sq.recipe.alpha import AlphaSearch, search_alpha
from ipex_sq.recipe.observers import LinearStats
from ipex_sq.recipe.plan import (
    FLOAT,
    FOLD,
    PRESCALE,
    STATIC_INT8,
    GroupPlan,
    LinearPlan,
    QuantPlan,
    SmoothGroup,
)
from ipex_sq.recipe.qparams import activation_qparams, weight_scale
from ipex_sq.recipe.samples import GroupSample
from ipex_sq.recipe.smoothing import column_absmax, smoothing_scale


@dataclass(frozen=True)
class ActStats:
    """All that calibration learned; enough to plan for any alpha without another pass.

    Attributes:
        linears: Input statistics of each Linear that may become int8, by module path.
        groups: Which Linears read the same tensor, and who wrote it.
        float_reasons: Linears that stay float, and why.
        example: A calibration batch (`input_ids` and `attention_mask`, `[1, tokens]`), for the
            equivalence check and for tracing.
        texts: Number of calibration texts.
        tokens: Number of calibration tokens.
        source: Name and digest of the texts.
        seconds: Wall time of the calibration.
        samples: By group key, for the search of alpha; empty until they are asked for.
    """

    linears: Mapping[str, LinearStats]
    groups: Sequence[SmoothGroup]
    float_reasons: Mapping[str, str]
    example: Mapping[str, Tensor]
    texts: int
    tokens: int
    source: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    samples: Mapping[str, GroupSample] = field(default_factory=dict)


def make_plan(
    stats: ActStats, weights: Mapping[str, Tensor], alpha: float | str | None
) -> QuantPlan:
    """Decide the numerics of every Linear.

    Args:
        stats: From calibration.
        weights: `[out_features, in_features]` of every Linear in `stats.linears`.
        alpha: Number, "auto" (search, for each group), "auto-global" (search, one for all), or
            None (no smoothing).

    Raises:
        CalibrationError: A search needs samples, and the statistics hold none.
    """
    search = _search(stats, weights) if isinstance(alpha, str) else None
    if search is not None and alpha == AUTO_GLOBAL:
        alpha = search.best_for_all
    groups = {}
    for group in stats.groups:
        strength = search.best(group.key) if search and alpha == AUTO else alpha
        assert not isinstance(strength, str)  # noqa: S101
        cost = None if search is None else search.cost(group.key, float(strength or 0.0))
        groups[group.key] = replace(_plan_group(group, stats, weights, strength), expected_kl=cost)
    linears = {name: LinearPlan(FLOAT, reason) for name, reason in stats.float_reasons.items()}
    for item in groups.values():
        linears |= _plan_linears(item, stats, weights)
    calibration = {"texts": stats.texts, "tokens": stats.tokens, **stats.source}
    costs = {} if search is None else search.total
    return QuantPlan(alpha, "minmax", linears, groups, costs, calibration)


def _search(stats: ActStats, weights: Mapping[str, Tensor]) -> AlphaSearch:
    if not stats.samples:
        raise CalibrationError(
            "the search of alpha needs samples: calibrate(model, batches, samples=True), or pass a "
            "number as alpha"
        )
    inputs = {
        group.key: (
            stats.linears[group.key],
            stats.samples[group.key],
            [weights[name] for name in group.readers],
        )
        for group in stats.groups
        if group.key in stats.samples
    }
    return search_alpha(inputs, progress=_bar)


def _bar(keys: Any) -> Any:
    return tqdm(keys, desc="alpha search", unit="group", disable=None, leave=False)


def _plan_group(
    group: SmoothGroup, stats: ActStats, weights: Mapping[str, Tensor], alpha: float | None
) -> GroupPlan:
    if alpha is None:
        return GroupPlan(group)
    columns = column_absmax([weights[name] for name in group.readers])
    scale = smoothing_scale(stats.linears[group.key].act_absmax, columns, alpha)
    foldable = group.producer is not None and not group.fold_problem
    return GroupPlan(group, FOLD if foldable else PRESCALE, alpha, scale)


def _plan_linears(
    item: GroupPlan, stats: ActStats, weights: Mapping[str, Tensor]
) -> dict[str, LinearPlan]:
    low, high = stats.linears[item.group.key].smoothed_range(item.scale)
    activation = activation_qparams(low, high)
    planned = {}
    for name in item.group.readers:
        weight = weights[name].detach().float()
        smoothed = weight if item.scale is None else weight * item.scale
        planned[name] = LinearPlan(
            STATIC_INT8, "", item.group.key, activation, weight_scale(smoothed)
        )
    return planned
