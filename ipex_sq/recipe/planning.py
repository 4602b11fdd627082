"""From statistics and weights to a plan: pure tensor math, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ipex_sq.config import AUTO, AUTO_GLOBAL, DYNAMIC, MIXED, STATIC
from ipex_sq.errors import CalibrationError
from ipex_sq.recipe.alpha import ALPHA_GRID, AlphaSearch, GroupInputs, search_alpha
from ipex_sq.recipe.correction import mean_output_errors
from ipex_sq.recipe.mixing import LEAST_SAVING, MASSIVE, massive_groups
from ipex_sq.recipe.observers import LinearStats
from ipex_sq.recipe.plan import (
    DYNAMIC_INT8,
    FLOAT,
    FOLD,
    PRESCALE,
    STATIC_INT8,
    GroupPlan,
    LinearPlan,
    QuantPlan,
    SmoothGroup,
    fold_into_producers,
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
        unsampled: As `linears`, without the few texts that samples are taken from.
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
    unsampled: Mapping[str, LinearStats] = field(default_factory=dict)


KEPT = "to meet --max_drop"


@dataclass(frozen=True)
class Rounding:
    """What a plan is asked for.

    Attributes:
        alpha: Number, "auto" (search, for each group), "auto-global" (search, one for all), or
            None (no smoothing).
        activations: "static", "dynamic" or "mixed".
        forced: Mode of groups (by key) that are decided already: "dynamic_int8" or "float".
        measured: Whether each group's expected KL is wanted even where nothing is searched.
    """

    alpha: float | str | None
    activations: str = STATIC
    forced: Mapping[str, str] = field(default_factory=dict)
    measured: bool = False

    @property
    def searches_alpha(self) -> bool:
        """Whether alpha is "auto" or "auto-global"."""
        return isinstance(self.alpha, str)

    @property
    def needs_samples(self) -> bool:
        """Whether the decision is made by the effect on predictions."""
        return self.searches_alpha or self.activations == MIXED or self.measured

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that a Linear may get."""
        both = {STATIC: (STATIC_INT8,), DYNAMIC: (DYNAMIC_INT8,)}
        modes = both.get(self.activations, (STATIC_INT8, DYNAMIC_INT8))
        forced = DYNAMIC_INT8 in self.forced.values() and DYNAMIC_INT8 not in modes
        return (*modes, DYNAMIC_INT8) if forced else modes


def make_plan(stats: ActStats, weights: Mapping[str, Tensor], wanted: Rounding) -> QuantPlan:
    """Decide the numerics of every Linear.

    Args:
        stats: From calibration.
        weights: `[out_features, in_features]` of every Linear in `stats.linears`.
        wanted: What to decide, and what is given.

    Raises:
        CalibrationError: A search needs samples, and the statistics hold none.
    """
    inputs = {group.key: _inputs(group, stats, weights, wanted) for group in stats.groups}
    search = _search(inputs, wanted) if wanted.needs_samples else None
    alphas = {mode: _alphas(stats.groups, search, wanted, mode) for mode in wanted.modes}
    mixed = search is not None and wanted.activations == MIXED
    massive = massive_groups(stats.groups, search, alphas) if search and mixed else set()
    groups, linears = {}, dict[str, LinearPlan]()
    for name, reason in stats.float_reasons.items():
        linears[name] = LinearPlan(FLOAT, reason)
    for group in stats.groups:
        mode = wanted.forced.get(group.key) or wanted.modes[0]
        if mode == FLOAT:
            groups[group.key] = GroupPlan(group)
            linears |= {name: LinearPlan(FLOAT, KEPT) for name in group.readers}
            continue
        if group.key in massive:
            mode = DYNAMIC_INT8
        alpha = alphas[mode][group.key]
        item = _plan_group(group, inputs[group.key], alpha)
        if search is not None:
            item = replace(item, expected_kl=search.cost(group.key, alpha, mode))
        groups[group.key] = item
        reason = MASSIVE if group.key in massive else KEPT if wanted.forced else "asked for"
        linears |= _plan_linears(item, inputs[group.key], (mode, reason))
        if search is not None and inputs[group.key].sample is not None:
            linears |= _corrected(item, inputs[group.key], linears)
    calibration = {"texts": stats.texts, "tokens": stats.tokens, **stats.source}
    return QuantPlan(
        _alpha_of_model(search, wanted),
        "minmax",
        fold_into_producers(linears, groups),
        groups,
        _costs_of_model(search, wanted),
        calibration,
    )


def _corrected(
    item: GroupPlan, inputs: GroupInputs, linears: Mapping[str, LinearPlan]
) -> dict[str, LinearPlan]:
    readers = [linears[name] for name in item.group.readers]
    errors = mean_output_errors(inputs, item, readers[0].mode)
    return {
        name: replace(reader, output_error=error.clone())
        for name, reader, error in zip(item.group.readers, readers, errors, strict=True)
    }


def _alpha_of_model(search: AlphaSearch | None, wanted: Rounding) -> float | str | None:
    if search is not None and wanted.alpha == AUTO_GLOBAL:
        return search.best_for_all(wanted.modes[0])
    return wanted.alpha


def _costs_of_model(search: AlphaSearch | None, wanted: Rounding) -> dict[float, float]:
    if search is None:
        return {}
    total = search.total(wanted.modes[0])
    return {alpha: cost for alpha, cost in total.items() if alpha is not None}


def _inputs(
    group: SmoothGroup, stats: ActStats, weights: Mapping[str, Tensor], wanted: Rounding
) -> GroupInputs:
    """What the group's plan is made of; channels are split where alpha is searched."""
    readers = [weights[name].detach().float() for name in group.readers]
    splits = wanted.searches_alpha and not group.folds_into_norm
    return GroupInputs(
        stats=stats.linears[group.key],
        weights=readers,
        copies=number_of_copies(readers[0].shape[1]) if splits else 0,
        sample=stats.samples.get(group.key),
        unsampled_stats=stats.unsampled.get(group.key),
        producer_channels=group.producer_channels,
    )


def _search(inputs: Mapping[str, GroupInputs], wanted: Rounding) -> AlphaSearch:
    sampled = {key: item for key, item in inputs.items() if item.sample is not None}
    if not sampled:
        raise CalibrationError(
            "this plan needs samples: calibrate(model, batches, samples=True), or pass a number as "
            "alpha and static or dynamic activations"
        )
    alpha = wanted.alpha
    grid = ALPHA_GRID if isinstance(alpha, str) else (alpha,)
    first, *others = wanted.modes
    found = search_alpha(sampled, grid, (first,), progress=_bar)
    for mode in others:
        # A group that costs less than the least saving cannot gain it.
        worth = {
            key: item
            for key, item in sampled.items()
            if key in wanted.forced or min(found.kl[first][key]) >= LEAST_SAVING
        }
        more = search_alpha(worth, grid, (mode,), progress=_bar)
        found = AlphaSearch(grid, {**found.kl, **more.kl})
    return found


def _alphas(
    groups: Sequence[SmoothGroup], search: AlphaSearch | None, wanted: Rounding, mode: str
) -> dict[str, float | None]:
    """The alpha of each group were it of this mode; a second mode only where it was measured."""
    alpha, keys = wanted.alpha, [group.key for group in groups]
    if not isinstance(alpha, str):
        return dict.fromkeys(keys, alpha)
    assert search is not None  # noqa: S101
    if mode != wanted.modes[0]:
        keys = [key for key in keys if key in search.kl[mode]]
    if alpha == AUTO:
        return {key: search.best(key, mode) for key in keys}
    return dict.fromkeys(keys, search.best_for_all(mode)) if keys else {}


def _bar(keys: Any) -> Any:
    return tqdm(keys, desc="alpha search", unit="group", disable=None, leave=False)


def _plan_group(group: SmoothGroup, inputs: GroupInputs, alpha: float | None) -> GroupPlan:
    if alpha is None:
        return GroupPlan(group)
    scale, channels = inputs.smoothing(alpha)
    return GroupPlan(group, FOLD if group.foldable else PRESCALE, alpha, scale, channels)


def _plan_linears(
    item: GroupPlan, inputs: GroupInputs, mode_and_reason: tuple[str, str]
) -> dict[str, LinearPlan]:
    mode, reason = mode_and_reason
    static = mode == STATIC_INT8
    activation = activation_qparams(*inputs.stats.smoothed_range(item.scale)) if static else None
    return {
        name: LinearPlan(
            mode,
            "" if static else reason,
            item.group.key,
            activation,
            weight_scale(smoothed_weight(weight, item.scale, item.channels)),
        )
        for name, weight in zip(item.group.readers, inputs.weights, strict=True)
    }
