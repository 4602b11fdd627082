"""How inputs become uint8 levels: in one pass, or in operators that a compiler fuses."""

from __future__ import annotations

import torch
from torch import Tensor

from ipex_sq.kernels.brgemm import brgemm_built
from ipex_sq.recipe.qparams import (
    ACTIVATION_LEVELS,
    SMALLEST_SCALE,
    TokenParts,
    quantize_tokens,
    token_scale,
)

Copies = tuple[Tensor | None, Tensor | None, Tensor | None]
"""`channels`, `held_low` and `held_high` of an `Int8Linear`, each None without parts."""


def input_levels(x: Tensor, multiplier: Tensor, zero_point: Tensor, copies: Copies) -> Tensor:
    """`static_levels`, in one pass where nothing is compiled around it."""
    if torch.compiler.is_compiling() or not brgemm_built():
        # Where a compiler fuses them with what wrote x, these cost less than that one pass.
        return static_levels(x, multiplier, zero_point, copies)
    levels: Tensor = torch.ops.ipex_sq.round_static(x.contiguous(), multiplier, zero_point, *copies)
    return levels


def token_levels(
    x: Tensor, multiplier: Tensor, parts: TokenParts | None, *, one_pass: bool
) -> tuple[Tensor, Tensor]:
    """Round x `[..., in_features - copies]` per token to uint8 levels around 128.

    Args:
        x: Any float.
        multiplier: See `Int8Linear`.
        parts: Of channels in parts, or None.
        one_pass: By the kernel, which must be there.

    Returns:
        Levels `[..., in_features]`, and their scales `[..., 1]`, fp32.
    """
    if one_pass:
        channels = None if parts is None else parts.channels
        levels, scale = torch.ops.ipex_sq.round_tokens(
            x.contiguous(), multiplier, SMALLEST_SCALE, channels
        )
        return levels, scale
    shares = x.float() * multiplier
    scale = token_scale(shares)
    return quantize_tokens(shares, scale, parts), scale


def static_levels(x: Tensor, multiplier: Tensor, zero_point: Tensor, copies: Copies) -> Tensor:
    """Round x `[..., in_features - copies]` to uint8 levels `[..., in_features]`.

    Args:
        x: Any float.
        multiplier: See `Int8Linear`.
        zero_point: As well.
        copies: As well.
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
