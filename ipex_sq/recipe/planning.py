"""From statistics and weights to a plan: pure tensor math, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ipex_sq.config import AUTO, AUTO_GLOBAL
from ipex_sq.errors import CalibrationError
from ipex_sq.recipe.alpha import AlphaSearch, GroupInputs, search_alpha
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
from ipex_sq.recipe.splitting import number_of_copies, smoothed_weight


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
    inputs = {group.key: _inputs(group, stats, weights, alpha) for group in stats.groups}
    search = _search(inputs) if isinstance(alpha, str) else None
    if search is not None and alpha == AUTO_GLOBAL:
        alpha = search.best_for_all
    groups = {}
    for group in stats.groups:
        strength = search.best(group.key) if search and alpha == AUTO else alpha
        assert not isinstance(strength, str)  # noqa: S101
        item = _plan_group(group, inputs[group.key], strength)
        if search is not None and strength is not None:
            item = replace(item, expected_kl=search.cost(group.key, strength))
        groups[group.key] = item
    linears = {name: LinearPlan(FLOAT, reason) for name, reason in stats.float_reasons.items()}
    for item in groups.values():
        linears |= _plan_linears(item, inputs[item.group.key])
    calibration = {"texts": stats.texts, "tokens": stats.tokens, **stats.source}
    costs = {} if search is None else search.total
    return QuantPlan(alpha, "minmax", linears, groups, costs, calibration)


def _inputs(
    group: SmoothGroup,
    stats: ActStats,
    weights: Mapping[str, Tensor],
    alpha: float | str | None,
) -> GroupInputs:
    """What the group's plan is made of; channels are split where alpha is searched."""
    readers = [weights[name].detach().float() for name in group.readers]
    searched = isinstance(alpha, str) and not group.foldable
    return GroupInputs(
        stats=stats.linears[group.key],
        weights=readers,
        copies=number_of_copies(readers[0].shape[1]) if searched else 0,
        sample=stats.samples.get(group.key),
    )


def _search(inputs: Mapping[str, GroupInputs]) -> AlphaSearch:
    sampled = {key: item for key, item in inputs.items() if item.sample is not None}
    if not sampled:
        raise CalibrationError(
            "the search of alpha needs samples: calibrate(model, batches, samples=True), or pass a "
            "number as alpha"
        )
    return search_alpha(sampled, progress=_bar)


def _bar(keys: Any) -> Any:
    return tqdm(keys, desc="alpha search", unit="group", disable=None, leave=False)


def _plan_group(group: SmoothGroup, inputs: GroupInputs, alpha: float | None) -> GroupPlan:
    if alpha is None:
        return GroupPlan(group)
    scale, channels = inputs.smoothing(alpha)
    return GroupPlan(group, FOLD if group.foldable else PRESCALE, alpha, scale, channels)


def _plan_linears(item: GroupPlan, inputs: GroupInputs) -> dict[str, LinearPlan]:
    activation = activation_qparams(*inputs.stats.smoothed_range(item.scale))
    return {
        name: LinearPlan(
            STATIC_INT8,
            "",
            item.group.key,
            activation,
            weight_scale(smoothed_weight(weight, item.scale, item.channels)),
        )
        for name, weight in zip(item.group.readers, inputs.weights, strict=True)
    }
