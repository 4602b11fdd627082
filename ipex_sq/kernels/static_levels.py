"""Static rounding to uint8 levels in operators of torch, which a compiler fuses with others."""

from __future__ import annotations

import torch
from torch import Tensor

from ipex_sq.recipe.qparams import ACTIVATION_LEVELS


def static_levels(
    x: Tensor,
    multiplier: Tensor,
    zero_point: Tensor,
    copies: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    """Round x `[..., in_features - copies]` to uint8 levels `[..., in_features]`.

    Args:
        x: Any float.
        multiplier: See `Int8Linear`.
        zero_point: As well.
        copies: Its `channels`, `held_low` and `held_high`, each None without parts.
    """
    levels = _cut_off(torch.round(x.float() * multiplier), zero_point)
    channels, held_low, held_high = copies
    if channels is None:
        return levels
    # As `append_rest`, in bytes: as floats, all of x would be written twice.
    rest = torch.round(x[..., channels].float() * multiplier[channels])
    rest = rest - rest.clamp(held_low, held_high)
    return torch.cat((levels, _cut_off(rest, zero_point)), dim=-1)


def _cut_off(levels: Tensor, zero_point: Tensor) -> Tensor:
    return (levels + zero_point).clamp(0, ACTIVATION_LEVELS).to(torch.uint8)
