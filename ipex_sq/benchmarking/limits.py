"""What this machine's kernels reach at best: the roof over every row."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ipex_sq.kernels.int8_linear import Int8Linear
from ipex_sq.recipe.qparams import ActivationQParams
from ipex_sq.system import EXACT_INT8_ISA, int8_isa

ROWS, INPUTS, OUTPUTS = 2048, 2048, 2048
COPIED_BYTES = 256 * 2**20
"""Far above any cache."""

ROUNDS, LEAST_SECONDS = 3, 0.5
"""Every kernel's turns, and the time of each: for a second after a process has started its threads
may still share a core, and every rate is half of what it is."""

BYTES = {"int8": 1, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Limits:
    """Rates measured with one large matrix product of each precision, and one large copy.

    Attributes:
        int8_gops: Of oneDNN's int8 Linear, 10^9 operations (two per product) a second; None where
            the CPU has no exact int8.
        bf16_gflops: Of torch's bf16 product.
        fp32_gflops: Of torch's fp32 product.
        bandwidth_gbs: Bytes read and written, 10^9 a second.
    """

    int8_gops: float | None
    bf16_gflops: float
    fp32_gflops: float
    bandwidth_gbs: float

    def rate(self, precision: str) -> float:
        """Operations a second of a precision."""
        found = {"bf16": self.bf16_gflops, "fp32": self.fp32_gflops, "int8": self.int8_gops}
        return 1e9 * (found[precision] or self.fp32_gflops)


class LimitsSession:
    """Measures the limits in a process of its own."""

    @torch.inference_mode()
    def measure(self) -> Limits:
        """Takes six seconds."""
        x, weight = torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS)
        operations = 2 * ROWS * INPUTS * OUTPUTS / 1e9
        low, low_weight = x.bfloat16(), weight.bfloat16()
        source, target = torch.zeros(COPIED_BYTES // 4), torch.empty(COPIED_BYTES // 4)
        calls: dict[str, Callable[[], object]] = {
            "bf16": lambda: torch.mm(low, low_weight.T),
            "fp32": lambda: torch.mm(x, weight.T),
            "copy": lambda: target.copy_(source),
        }
        if int8_isa() in EXACT_INT8_ISA:
            calls["int8"] = _int8_product()
        least = least_seconds_of(calls)
        return Limits(
            operations / least["int8"] if "int8" in least else None,
            operations / least["bf16"],
            operations / least["fp32"],
            2 * COPIED_BYTES / 1e9 / least["copy"],
        )


def _int8_product() -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    shape = (OUTPUTS, INPUTS)
    weight = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    linear = Int8Linear(weight, torch.ones(OUTPUTS), None)
    linear.set_input(ActivationQParams(1.0, 128), None)
    linear.output_dtype = torch.bfloat16
    levels = torch.randint(0, 256, (ROWS, INPUTS), generator=generator, dtype=torch.uint8)
    return lambda: linear.multiply(levels, linear.input_scale)


def least_seconds_of(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The shortest time of each call, of many in turns."""
    least = dict.fromkeys(calls, math.inf)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()
            began = time.perf_counter()
            end = began
            while end - began < LEAST_SECONDS:
                start = time.perf_counter()
                call()
                end = time.perf_counter()
                least[name] = min(least[name], end - start)
    return least
