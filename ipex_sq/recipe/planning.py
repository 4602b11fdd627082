"""From statistics and weights to a plan: pure tensor math, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ipex_sq.config import AUTO, AUTO_GLOBAL, DYNAMIC, GPTQ, MIXED, NEAREST, STATIC
from ipex_sq.errors import CalibrationError
from ipex_sq.recipe.act_stats import ActStats
from ipex_sq.recipe.alpha import ALPHA_GRID, AlphaSearch, GroupInputs, search_alpha
from ipex_sq.recipe.mixing import LEAST_SAVING, MASSIVE, massive_groups
from ipex_sq.recipe.plan import (
    DYNAMIC_INT8,
    FLOAT,
    FOLD,
    HEAD,
    PRESCALE,
    STATIC_INT8,
    GroupPlan,
    LinearPlan,
    QuantPlan,
    SmoothGroup,
    fold_into_producers,
)
from ipex_sq.recipe.qparams import weight_scale
from ipex_sq.recipe.splitting import number_of_copies

KEPT = "to meet --max_drop"


@dataclass(frozen=True)
class Rounding:
    """What a plan is asked for.

    Attributes:
        alpha: Number, "auto" (search, for each group), "auto-global" (search, one for all), or
            None (no smoothing).
        activations: "static", "dynamic" or "mixed".
        weights: "nearest" or "gptq".
        portable: Nothing that other programs' formats cannot say: no channels in parts, no
            corrected biases.
        lm_head: int8, per token, for a language model's head too.
        forced: Mode of groups (by key) that are decided already: "dynamic_int8" or "float".
    """

    alpha: float | str | None
    activations: str = STATIC
    weights: str = NEAREST
    portable: bool = False
    lm_head: bool = False
    forced: Mapping[str, str] = field(default_factory=dict)

    @property
    def searches_alpha(self) -> bool:
        """Whether alpha is "auto" or "auto-global"."""
        return isinstance(self.alpha, str)

    @property
    def needs_samples(self) -> bool:
        """Whether the decision is made by the effect on predictions."""
        return self.searches_alpha or self.activations == MIXED

    @property
    def needs_hessians(self) -> bool:
        """Whether weights are rounded by their effect on the outputs."""
        return self.weights == GPTQ

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that a Linear may get, the usual one first."""
        alone = {STATIC: (STATIC_INT8,), DYNAMIC: (DYNAMIC_INT8,)}
        return alone.get(self.activations, (STATIC_INT8, DYNAMIC_INT8))

    @property
    def grid(self) -> tuple[float | None, ...]:
        """The alphas to try."""
        return ALPHA_GRID if isinstance(self.alpha, str) else (self.alpha,)


def make_plan(
    stats: ActStats,
    weights: Mapping[str, Tensor],
    wanted: Rounding,
    search: AlphaSearch | None = None,
) -> QuantPlan:
    """Decide the numerics of every Linear.

    Args:
        stats: From calibration.
        weights: `[out_features, in_features]` of every Linear; may lie on disk.
        wanted: What to decide, and what is given.
        search: What `search_costs` found, where it is known already.

    Raises:
        CalibrationError: A search needs samples, or GPTQ Hessians, and the statistics hold none.
    """
    stats = _stats_for(stats, wanted)
    if search is None and wanted.needs_samples:
        search = search_modes(stats, weights, wanted)
    modes = wanted.modes if search is None else tuple(search.kl)
    head = (DYNAMIC_INT8,) if wanted.lm_head else ()
    alphas = {mode: _alphas(stats.groups, search, wanted, mode) for mode in {*modes, *head}}
    mixed = wanted.activations == MIXED and DYNAMIC_INT8 in modes
    massive = massive_groups(stats.groups, search, alphas) if search and mixed else set()
    groups = {}
    linears = {name: LinearPlan(FLOAT, why) for name, why in stats.float_reasons.items()}
    for group in stats.groups:
        mode, reason = _mode(group.key, wanted, massive, stats.head)
        if mode == FLOAT:
            groups[group.key] = GroupPlan(group)
            linears |= {name: LinearPlan(FLOAT, reason) for name in group.readers}
            continue
        alpha = alphas[mode][group.key]
        inputs = _group_inputs(group, stats, weights, wanted)
        item = _as_searched(_plan_group(group, inputs, alpha), search, mode)
        groups[group.key] = item
        linears |= _plan_linears(item, inputs, mode, reason)
    return QuantPlan(
        _alpha_of_model(search, wanted),
        "minmax",
        fold_into_producers(linears, groups),
        groups,
        _costs_of_model(search, wanted),
        {"texts": stats.texts, "tokens": stats.tokens, **stats.source},
        wanted.weights,
        corrects_biases=search is not None and not wanted.portable,
    )


def _stats_for(stats: ActStats, wanted: Rounding) -> ActStats:
    if wanted.needs_hessians and not stats.hessians:
        raise CalibrationError(
            "GPTQ needs Hessians: calibrate(model, batches, hessians=True), or round weights to "
            "nearest"
        )
    return stats if wanted.lm_head else stats.without_head()


def search_costs(
    stats: ActStats,
    weights: Mapping[str, Tensor],
    wanted: Rounding,
    modes: Sequence[str],
    *,
    least_cost: float = 0.0,
) -> AlphaSearch:
    """What every smooth group costs at each alpha that is wanted, in each of `modes`.

    Other modes than the first are tried only in groups that cost `least_cost` in it.

    Raises:
        CalibrationError: The statistics hold no samples.
    """
    sampled = [group for group in stats.groups if group.key in stats.samples]
    if not sampled:
        raise CalibrationError(
            "this plan needs samples: calibrate(model, batches, samples=True), or pass a number as "
            "alpha and static or dynamic activations"
        )
    groups = {group.key: _group_inputs(group, stats, weights, wanted) for group in sampled}
    head = {stats.head: groups.pop(stats.head)} if stats.head in groups else {}
    refine = wanted.alpha == AUTO
    costs = search_alpha(
        groups, wanted.grid, modes, refine=refine, least_cost=least_cost, progress=_bar
    )
    return costs.joined(search_alpha(head, wanted.grid, (DYNAMIC_INT8,), refine=refine))


def search_modes(stats: ActStats, weights: Mapping[str, Tensor], wanted: Rounding) -> AlphaSearch:
    """As `search_costs`, for what a plan may choose from.

    A group that costs less than the least saving in one mode cannot gain it in the other.
    """
    return search_costs(stats, weights, wanted, wanted.modes, least_cost=LEAST_SAVING)


def _mode(key: str, wanted: Rounding, massive: set[str], head: str | None) -> tuple[str, str]:
    """Mode of a group, and why it is not static int8."""
    if key in wanted.forced:
        return wanted.forced[key], KEPT
    if key == head:
        return DYNAMIC_INT8, HEAD
    if key in massive:
        return DYNAMIC_INT8, MASSIVE
    mode = wanted.modes[0]
    return mode, "" if mode == STATIC_INT8 else "asked for"


def _alpha_of_model(search: AlphaSearch | None, wanted: Rounding) -> float | str | None:
    if search is not None and wanted.alpha == AUTO_GLOBAL:
        return search.best_for_all(wanted.modes[0])
    return wanted.alpha


def _costs_of_model(search: AlphaSearch | None, wanted: Rounding) -> dict[float, float]:
    if search is None:
        return {}
    total = search.total(wanted.modes[0])
    return {alpha: cost for alpha, cost in total.items() if alpha is not None}


def _group_inputs(
    group: SmoothGroup, stats: ActStats, weights: Mapping[str, Tensor], wanted: Rounding
) -> GroupInputs:
    """What a group's plan is made of; channels get parts where alpha is searched."""
    readers = [weights[name].detach().float() for name in group.readers]
    width = readers[0].shape[1]
    splits = wanted.searches_alpha and not wanted.portable
    return GroupInputs(
        stats=stats.linears[group.key],
        weights=readers,
        copies=number_of_copies(width, head=group.key == stats.head) if splits else 0,
        sample=stats.samples.get(group.key),
        unsampled_stats=stats.unsampled.get(group.key),
        producer_channels=group.producer_channels,
    )


def _alphas(
    groups: Sequence[SmoothGroup], search: AlphaSearch | None, wanted: Rounding, mode: str
) -> dict[str, float | None]:
    """The alpha of each group were it of this mode."""
    alpha, keys = wanted.alpha, [group.key for group in groups]
    if not isinstance(alpha, str):
        return dict.fromkeys(keys, alpha)
    assert search is not None  # noqa: S101
    if alpha == AUTO:
        return {key: search.best(key, mode) for key in keys}
    return dict.fromkeys(keys, search.best_for_all(wanted.modes[0]))


def _bar(keys: Any) -> Any:
    return tqdm(keys, desc="alpha search", unit="group", disable=None, leave=False)


def _plan_group(group: SmoothGroup, inputs: GroupInputs, alpha: float | None) -> GroupPlan:
    if alpha is None:
        return GroupPlan(group)
    scale, channels = inputs.smoothing(alpha)
    return GroupPlan(group, FOLD if group.foldable else PRESCALE, alpha, scale, channels)


def _as_searched(item: GroupPlan, search: AlphaSearch | None, mode: str) -> GroupPlan:
    if search is None:
        return item
    key = item.group.key
    cost, room = search.cost(key, item.alpha, mode), search.room(key, mode)
    return replace(item, expected_kl=cost, headroom=room)


def _plan_linears(
    item: GroupPlan, inputs: GroupInputs, mode: str, reason: str
) -> dict[str, LinearPlan]:
    static = mode == STATIC_INT8
    activation = inputs.activation(item.scale, item.channels, item.headroom) if static else None
    return {
        name: LinearPlan(
            mode,
            reason,
            item.group.key,
            activation,
            weight_scale(weight, item.scale),
        )
        for name, weight in zip(item.group.readers, inputs.weights, strict=True)
    }
