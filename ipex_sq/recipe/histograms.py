"""The KL observer: clip the activation range where clipping costs the least information.

A second pass over the smoothed model fills one histogram per Linear; its range is known from the
first pass, so the bins never move.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

BINS = 2048
COARSE_BINS = 128
CANDIDATE_STEP = 16


class Histogram:
    """Counts of |x| over [0, absmax] in `BINS` equal bins, for one Linear's input."""

    def __init__(self, minimum: float, maximum: float) -> None:
        self.minimum, self.maximum = minimum, maximum
        self.absmax = max(abs(minimum), abs(maximum), 1e-12)
        self.counts = torch.zeros(BINS)

    def add(self, x: Tensor) -> None:
        """Count an input `[..., in_features]`."""
        self.counts += torch.histc(x.detach().float().abs(), bins=BINS, min=0, max=self.absmax)

    def kl_range(self) -> tuple[float, float]:
        """The range, clipped symmetrically to the threshold of least KL divergence."""
        threshold = self.absmax * kl_threshold_bins(self.counts) / BINS
        return max(self.minimum, -threshold), min(self.maximum, threshold)


def kl_threshold_bins(counts: Tensor) -> int:
    """Number of leading bins to keep so that the 128-level distribution diverges least.

    The search is the one of TensorRT's calibrator (Migacz, GTC 2017): for each candidate the tail
    is folded into the last kept bin (P), the kept bins are merged into `COARSE_BINS` levels and
    spread back over the non-empty ones (Q), and KL(P || Q) is taken.

    Args:
        counts: `[BINS]`, counts of |x|.

    Returns:
        `COARSE_BINS` to `BINS`.
    """
    best, best_divergence = BINS, float("inf")
    for kept in range(COARSE_BINS, BINS + 1, CANDIDATE_STEP):
        divergence = _divergence(counts, kept)
        if divergence < best_divergence:
            best, best_divergence = kept, divergence
    return best


def _divergence(counts: Tensor, kept: int) -> float:
    reference = counts[:kept].clone()
    reference[-1] += counts[kept:].sum()
    level = torch.arange(kept) * COARSE_BINS // kept
    filled = counts[:kept] > 0
    mass = torch.zeros(COARSE_BINS).index_add_(0, level, counts[:kept])
    width = torch.zeros(COARSE_BINS).index_add_(0, level, filled.float())
    spread = torch.where(filled, (mass / width.clamp(min=1))[level], torch.zeros(()))
    p = reference / reference.sum().clamp(min=1)
    q = spread / spread.sum().clamp(min=1)
    used = p > 0
    # Where the folded tail lands on an empty bin q is 0: the floor makes that a large, finite cost.
    return float((p[used] * (p[used] / q[used].clamp(min=1e-10)).log()).sum())


@contextmanager
def record_histograms(
    linears: Mapping[str, nn.Module], ranges: Mapping[str, tuple[float, float]]
) -> Iterator[dict[str, Histogram]]:
    """Fill a histogram per Linear inside the `with` block; hooks go even where it raises.

    Args:
        linears: Modules whose input is counted.
        ranges: Smallest and largest input of each, known from the first pass.
    """
    histograms = {name: Histogram(*ranges[name]) for name in linears}

    def hook_for(name: str) -> object:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            histograms[name].add(args[0])

        return hook

    handles = [
        module.register_forward_pre_hook(hook_for(name))  # type: ignore[arg-type]
        for name, module in linears.items()
    ]
    try:
        yield histograms
    finally:
        for handle in handles:
            handle.remove()
