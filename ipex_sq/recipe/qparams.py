"""Scales and zero points, and the rounding they stand for.

Activations: uint8, affine, per tensor, zero exactly representable, x ~ (q - zero_point) * scale.
Weights: int8, symmetric, per output channel, scale = absmax / 127, q in [-127, 127].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVATION_LEVELS = 255
WEIGHT_MAXIMUM = 127
SMALLEST_SCALE = 1e-8
"""Lower bound of every scale: an input or a weight row that is all zero still divides by it."""


@dataclass(frozen=True)
class ActivationQParams:
    """Static per-tensor parameters of a uint8 activation.

    Attributes:
        scale: Step of one level, > 0.
        zero_point: Level that stands for 0.0, 0 to 255.
    """

    scale: float
    zero_point: int


def activation_qparams(minimum: float, maximum: float) -> ActivationQParams:
    """Parameters that cover [minimum, maximum], widened to contain zero."""
    low, high = min(minimum, 0.0), max(maximum, 0.0)
    scale = max((high - low) / ACTIVATION_LEVELS, SMALLEST_SCALE)
    zero_point = min(max(round(-low / scale), 0), ACTIVATION_LEVELS)
    return ActivationQParams(scale, zero_point)


def quantize_activation(x: Tensor, qparams: ActivationQParams) -> Tensor:
    """Round x `[..., in_features]` to its levels; returns uint8 of the same shape."""
    levels = torch.round(x.float() / qparams.scale) + qparams.zero_point
    return levels.clamp(0, ACTIVATION_LEVELS).to(torch.uint8)


def fake_quantize_activation(x: Tensor, qparams: ActivationQParams) -> Tensor:
    """The values that the levels of x stand for: quantize, then dequantize, in fp32."""
    levels = torch.round(x.float() / qparams.scale) + qparams.zero_point
    return (levels.clamp(0, ACTIVATION_LEVELS) - qparams.zero_point) * qparams.scale


def weight_scale(weight: Tensor) -> Tensor:
    """Scale `[out_features]` of each output channel of `weight` `[out_features, in_features]`."""
    absmax = weight.detach().float().abs().amax(dim=1)
    return (absmax / WEIGHT_MAXIMUM).clamp(min=SMALLEST_SCALE)


def quantize_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Round `weight` `[out_features, in_features]` to int8 in [-127, 127]."""
    levels = torch.round(weight.detach().float() / scale[:, None])
    return levels.clamp(-WEIGHT_MAXIMUM, WEIGHT_MAXIMUM).to(torch.int8)


def fake_quantize_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """The fp32 values that the int8 levels of `weight` stand for."""
    return quantize_weight(weight, scale).float() * scale[:, None]
