"""`--max_drop`: the fewest layers out of static int8 that keep the loss below a bound.

It starts from static int8 everywhere. Smooth groups are ordered by the KL divergence that it is
expected to cost in them. A prefix of that order is rounded per token; if all of them do not
suffice, a prefix stays float. The loss is measured for each length that a binary search tries, over
every token of texts that were held out of the calibration: a plan loses nothing on those that it
was made from.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ipex_sq.backends.base import Backend
from ipex_sq.backends.native import int8_linear
from ipex_sq.backends.quantization import rounding_of
from ipex_sq.backends.reference import simulate_linear
from ipex_sq.config import STATIC, Drop, QuantConfig, parse_drop
from ipex_sq.errors import ConfigError
from ipex_sq.evaluation.next_tokens import NextTokens, predict_tokens
from ipex_sq.evaluation.pairing import paired_difference
from ipex_sq.models.folding import apply_smoothing, replace_module
from ipex_sq.models.rounding import round_weights
from ipex_sq.recipe.act_stats import ActStats
from ipex_sq.recipe.batching import Batch
from ipex_sq.recipe.plan import DYNAMIC_INT8, FLOAT, STATIC_INT8, QuantPlan
from ipex_sq.recipe.planning import make_plan, search_costs
from ipex_sq.system import EXACT_INT8_ISA, int8_isa

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Search:
    """What the search works on.

    Attributes:
        model: Float model; it is not changed.
        stats: Of the calibration texts, with samples.
        held_out: Batches of other texts, unpadded.
    """

    model: nn.Module
    stats: ActStats
    held_out: Sequence[Batch]


def plan_within_drop(search: Search, config: QuantConfig, backend: Backend) -> QuantPlan:
    """The plan with the fewest Linears out of static int8 that loses no more than `max_drop`.

    Raises:
        ConfigError: Not even with every Linear in float does it lose so little.
    """
    assert config.max_drop is not None  # noqa: S101
    allowed = parse_drop(config.max_drop)
    asked = rounding_of(config, backend, search.stats, search.model)
    start = asked.activations if config.activations else STATIC
    wanted = replace(asked, activations=start)
    weights = {name: search.model.get_submodule(name).weight for name in search.stats.linears}
    modes = (STATIC_INT8, DYNAMIC_INT8) if backend.rounds_tokens else (STATIC_INT8,)
    costs = search_costs(search.stats, weights, wanted, modes)  # type: ignore[arg-type]
    fp32 = predict_tokens(search.model, search.held_out)

    def planned(forced: dict[str, str]) -> QuantPlan:
        return make_plan(search.stats, weights, replace(wanted, forced=forced), costs)  # type: ignore[arg-type]

    def meets(forced: dict[str, str]) -> bool:
        scores = _score(search, planned(forced))
        logger.info(
            "max_drop: %d groups out of static int8: %+.2f points, perplexity x%.4f",
            len(forced),
            paired_difference(scores, fp32).delta,
            scores.perplexity / fp32.perplexity,
        )
        return _within(scores, fp32, allowed)

    damage = {key: item.expected_kl or 0.0 for key, item in planned({}).groups.items()}
    order = sorted(damage, key=damage.__getitem__, reverse=True)
    per_token = dict.fromkeys(order, DYNAMIC_INT8)
    stages = [(DYNAMIC_INT8, {}), (FLOAT, per_token)] if backend.rounds_tokens else [(FLOAT, {})]
    for mode, others in stages:
        forced = _fewest(order, (mode, others), meets)
        if forced is not None:
            return planned(forced)
    raise ConfigError(f"--max_drop {config.max_drop} cannot be met: allow a larger loss")


def _fewest(
    order: Sequence[str],
    mode_and_others: tuple[str, Mapping[str, str]],
    meets: Callable[[dict[str, str]], bool],
) -> dict[str, str] | None:
    """The shortest prefix of `order` in a mode that meets the bound, found by bisection; or None.

    A longer prefix is taken to lose less, which noise may contradict by a document or two.
    """
    mode, others = mode_and_others

    def prefix(count: int) -> dict[str, str]:
        return {**others, **dict.fromkeys(order[:count], mode)}

    if meets(prefix(0)):
        return prefix(0)
    if not meets(prefix(len(order))):
        return None
    too_few, enough = 0, len(order)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if meets(prefix(middle)):
            enough = middle
        else:
            too_few = middle
    return prefix(enough)


def _score(search: Search, decided: QuantPlan) -> NextTokens:
    """Scores of the plan on the held-out texts, uncompiled."""
    model = copy.deepcopy(search.model)
    decided, _ = apply_smoothing(model, decided, search.stats.example)
    round_weights(model, decided, search.stats)
    for name in decided.int8_names:
        if int8_isa() in EXACT_INT8_ISA:
            replace_module(model, name, int8_linear(model, decided, name))
        else:
            simulate_linear(model, decided, name)
    return predict_tokens(model, search.held_out)


def _within(scores: NextTokens, fp32: NextTokens, allowed: Drop) -> bool:
    if allowed.points is not None:
        return -paired_difference(scores, fp32).delta <= allowed.points
    assert allowed.ratio is not None  # noqa: S101
    return scores.perplexity <= allowed.ratio * fp32.perplexity
