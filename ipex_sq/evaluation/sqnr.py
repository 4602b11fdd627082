"""Signal to quantization noise."""

from __future__ import annotations

import math

from torch import Tensor


def sqnr_db(got: Tensor, wanted: Tensor) -> float:
    """Signal to quantization noise: 20 log10(||wanted|| / ||got - wanted||), in dB."""
    noise = float((got.double() - wanted.double()).norm())
    return 20 * math.log10(float(wanted.double().norm()) / max(noise, 1e-30))
