"""Scales and zero points, and the rounding they stand for.

Activations: uint8, affine, per tensor, zero exactly representable, x ~ (q - zero_point) * scale;
or, rounded per token at run time, int8, symmetric, held as uint8 with zero point 128.
Weights: int8, symmetric, per output channel, scale = absmax / 127, q in [-127, 127].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ipex_sq.recipe.row_blocks import row_blocks
from ipex_sq.recipe.splitting import append_rest, before_parts, number_of_parts
from ipex_sq.system import EXACT_INT8_ISA, int8_isa

ACTIVATION_LEVELS = 255
WEIGHT_MAXIMUM = 127
TOKEN_MAXIMUM = 127
TOKEN_ZERO_POINT = 128
SMALLEST_SCALE = 1e-8
"""Lower bound of every scale: an input or a weight row that is all zero still divides by it."""

SHORTEST_INT8_SUM = 2
"""Products per sum that torch's int8 matrix product needs."""


@dataclass(frozen=True)
class ActivationQParams:
    """Static per-tensor parameters of a uint8 activation.

    Attributes:
        scale: Step of one level, > 0.
        zero_point: Level that stands for 0.0, 0 to 255.
    """

    scale: float
    zero_point: int

    @property
    def ends(self) -> tuple[float, float]:
        """Smallest and largest value that a level stands for."""
        low = -self.zero_point * self.scale
        return low, low + ACTIVATION_LEVELS * self.scale


def activation_qparams(minimum: float, maximum: float) -> ActivationQParams:
    """Parameters that cover [minimum, maximum], widened to contain zero."""
    low, high = min(minimum, 0.0), max(maximum, 0.0)
    scale = max((high - low) / ACTIVATION_LEVELS, SMALLEST_SCALE)
    zero_point = min(max(round(-low / scale), 0), ACTIVATION_LEVELS)
    return ActivationQParams(scale, zero_point)


def quantize_activation(x: Tensor, qparams: ActivationQParams) -> Tensor:
    """Round x `[..., in_features]` to its levels; returns uint8 of the same shape."""
    return _activation_levels(x, qparams).to(torch.uint8)


def fake_quantize_activation(x: Tensor, qparams: ActivationQParams) -> Tensor:
    """The values that the levels of x stand for: quantize, then dequantize, in fp32."""
    return _activation_levels(x, qparams).sub_(qparams.zero_point).mul_(qparams.scale)


def _activation_levels(x: Tensor, qparams: ActivationQParams) -> Tensor:
    levels = (x.float() / qparams.scale).round_().add_(qparams.zero_point)
    return levels.clamp_(0, ACTIVATION_LEVELS)


class TokenParts(NamedTuple):
    """How channels of an input that is rounded per token are written down in parts.

    Attributes:
        channels: `[copies]`, sorted.
        number: `[in_features]`, parts of each channel.
        held: From `before_parts`, in levels.
    """

    channels: Tensor
    number: Tensor
    held: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, channels: Tensor, in_features: int) -> TokenParts:
        """Of an input of that width, `channels` being those that have copies."""
        held = before_parts(channels, -TOKEN_MAXIMUM, TOKEN_MAXIMUM)
        return cls(channels, number_of_parts(channels, in_features), held)


def token_scale(x: Tensor) -> Tensor:
    """Scale `[..., 1]` of each token of x `[..., in_features]`: its absmax / 127."""
    absmax = x.detach().float().abs().amax(dim=-1, keepdim=True)
    return (absmax / TOKEN_MAXIMUM).clamp(min=SMALLEST_SCALE)


def quantize_tokens(shares: Tensor, scale: Tensor, parts: TokenParts | None = None) -> Tensor:
    """Round tokens to uint8 around `TOKEN_ZERO_POINT`.

    Args:
        shares: `[..., in_features]`, of a channel in n parts an n-th.
        scale: `[..., 1]`, their `token_scale`.
        parts: Of channels in parts, or None.

    Returns:
        `[..., in_features + copies]`.
    """
    return (_signed_levels(shares, scale, parts) + TOKEN_ZERO_POINT).to(torch.uint8)


def fake_quantize_tokens(shares: Tensor, parts: TokenParts | None = None) -> Tensor:
    """The fp32 values that the levels of tokens stand for: see `quantize_tokens`."""
    scale = token_scale(shares)
    return _signed_levels(shares, scale, parts).mul_(scale)


def _signed_levels(shares: Tensor, scale: Tensor, parts: TokenParts | None) -> Tensor:
    if parts is None:
        return (shares.float() / scale).round_()
    whole = (shares.float() * parts.number / scale).round_()
    rest = append_rest(whole, parts.channels, parts.held)
    return rest.clamp_(-TOKEN_MAXIMUM, TOKEN_MAXIMUM)


def round_rows(
    rows: Tensor, activation: ActivationQParams | None, channels: Tensor | None = None
) -> tuple[Tensor, int, Tensor | float]:
    """Round smoothed rows: per tensor, or per token where `activation` is None.

    Args:
        rows: `[n, in_features]`.
        activation: Of one part of a channel.
        channels: `[copies]`, channels in parts (`splitting.py`), or None.

    Returns:
        Levels `[n, in_features + copies]` (uint8), their zero point, and the step: one, or
        `[n, 1]`.
    """
    if activation is None:
        parts = None if channels is None else TokenParts.of(channels, rows.shape[-1])
        shares = rows if parts is None else rows / parts.number
        step = token_scale(shares)
        return quantize_tokens(shares, step, parts), TOKEN_ZERO_POINT, step
    if channels is not None:
        rows = append_rest(rows, channels, before_parts(channels, *activation.ends))
    return quantize_activation(rows, activation), activation.zero_point, activation.scale


def weight_scale(weight: Tensor, smoothing: Tensor | None = None) -> Tensor:
    """Scale `[out_features]` of each output channel of `weight` `[out_features, in_features]`.

    `smoothing`: `[in_features]`, what its columns are multiplied by first, or None.
    """
    return torch.cat([_row_scale(_smoothed(rows, smoothing)) for rows in row_blocks(weight)])


def _row_scale(rows: Tensor) -> Tensor:
    return (rows.abs().amax(dim=1) / WEIGHT_MAXIMUM).clamp(min=SMALLEST_SCALE)


def _smoothed(rows: Tensor, smoothing: Tensor | None) -> Tensor:
    return rows.float() if smoothing is None else rows.float() * smoothing


def quantize_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Round `weight` `[out_features, in_features]` to int8 in [-127, 127]."""
    levels = (weight.detach().float() / scale[:, None]).round_()
    return levels.clamp_(-WEIGHT_MAXIMUM, WEIGHT_MAXIMUM).to(torch.int8)


def round_weight(weight: Tensor, smoothing: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`weight_scale` and `quantize_weight` in one go.

    Args:
        weight: `[out_features, in_features]`.
        smoothing: `[in_features]`, what its columns are multiplied by first, or None.

    Returns:
        Levels `[out_features, in_features]` int8 and scales `[out_features]`.
    """
    levels, scales = [], []
    for rows in row_blocks(weight):
        smoothed = _smoothed(rows, smoothing)
        scales.append(_row_scale(smoothed))
        levels.append(quantize_weight(smoothed, scales[-1]))
    return torch.cat(levels), torch.cat(scales)


def fake_quantize_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """The fp32 values that the int8 levels of `weight` stand for."""
    return quantize_weight(weight, scale).float() * scale[:, None]


def int8_sums(levels: Tensor, zero_point: int, weight_levels: Tensor) -> Tensor:
    """What an int8 kernel adds up: (levels - zero_point) @ weight_levels.T.

    Args:
        levels: `[n, in_features]` uint8.
        zero_point: Level that stands for 0.0.
        weight_levels: `[out_features, in_features]` int8.

    Returns:
        `[n, out_features]` fp32, of exact integers where the CPU multiplies int8 exactly; elsewhere
        fp32 adds them up.
    """
    # torch._int_mm leaves its output unwritten where there is one product per sum (torch 2.13).
    if int8_isa() not in EXACT_INT8_ISA or levels.shape[1] < SHORTEST_INT8_SUM:
        return (levels.float() - zero_point) @ weight_levels.float().T
    # Four times as fast as fp32. The operator takes signed levels: 128 less, put right afterwards.
    # A row of ones gives the sums of the weights, sooner than adding them up takes.
    ones = torch.ones(1, levels.shape[1], dtype=torch.uint8)
    signed = torch.cat((levels ^ 128, ones)).view(torch.int8)
    sums, totals = torch._int_mm(signed, weight_levels.t()).split((len(levels), 1))
    return sums.add_((128 - zero_point) * totals).float()
