"""Which Linears are rounded per token: those where massive activations make static rounding dear.

A static range must hold the largest token; where that one is a hundred times the others, they
share a few levels, and on texts that calibration has not seen it is clipped. A scale per token has
neither problem, costs one more reduction over the input, and not every backend has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ipex_sq.recipe.alpha import AlphaSearch
from ipex_sq.recipe.plan import DYNAMIC_INT8, STATIC_INT8, SmoothGroup

MASSIVE = "massive activations"

LARGEST_SHARE = 0.1
"""Of the Linears at most this many are rounded per token: the rest keeps the static speed."""

LEAST_SAVING = 1e-4
"""Nats per prediction; below, perplexity would change by less than 0.01 %."""

LEAST_SHARE_SAVED = 0.25
"""Of the group's own cost; below, its weights are the problem and not its activations."""


def massive_groups(
    groups: Sequence[SmoothGroup],
    search: AlphaSearch,
    alphas: Mapping[str, Mapping[str, float | None]],
) -> set[str]:
    """Keys of the groups to round per token.

    Args:
        groups: All smooth groups.
        search: Holds the cost of both modes.
        alphas: By mode, the alpha that each group would have.
    """
    candidates = []
    for group in groups:
        if group.key not in search.kl[DYNAMIC_INT8]:
            continue  # it costs less than the least saving
        static, dynamic = (
            search.cost(group.key, alphas[mode][group.key], mode)
            for mode in (STATIC_INT8, DYNAMIC_INT8)
        )
        saving = static - dynamic
        if saving >= max(LEAST_SAVING, LEAST_SHARE_SAVED * static):
            candidates.append((saving / len(group.readers), group))
    left = int(LARGEST_SHARE * sum(len(group.readers) for group in groups))
    chosen = set()
    for _, group in sorted(candidates, key=lambda item: item[0], reverse=True):
        if len(group.readers) <= left:
            left -= len(group.readers)
            chosen.add(group.key)
    return chosen
