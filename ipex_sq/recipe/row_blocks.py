"""Rows of weights: a few at a time, so that what is done to them stays in the CPU's cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NUMBERS_IN_CACHE = 2**20
"""4 MiB in fp32, and what is made of them; measured in docs/log.md."""


def row_blocks(weight: Tensor) -> tuple[Tensor, ...]:
    """Views of `weight` `[out_features, in_features]` with some of its rows each, in order."""
    return weight.detach().split(max(1, NUMBERS_IN_CACHE // weight.shape[1]))


def joined_rows(weights: Sequence[Tensor]) -> Tensor:
    """Rows of all `weights` `[out_i, in_features]`; of a single one itself, without a copy."""
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))
