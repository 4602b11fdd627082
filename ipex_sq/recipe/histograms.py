"""Observers that clip: percentile, least squared error, least KL divergence.

A second pass over the smoothed model fills one histogram per Linear; its range is known from the
first pass, so the bins never move.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ipex_sq.recipe.hooks import hooked

BINS = 2048
MOST_COUNTED = 2**24
"""Values at once: torch.histc counts in fp32, which holds whole numbers up to here."""
COARSE_BINS = 128
CANDIDATE_STEP = 16
LEVELS = 127
"""Of |x|: half of an activation's 255."""


class Histogram:
    """Counts of |x| in one Linear's input.

    Attributes:
        counts: `[BINS]`, of |x| in equal bins over [0, absmax].
        minimum: Smallest value, known from the first pass.
        maximum: Largest value.
    """

    def __init__(self, minimum: float, maximum: float) -> None:
        self.minimum, self.maximum = minimum, maximum
        self.absmax = max(abs(minimum), abs(maximum), 1e-12)
        self.counts = torch.zeros(BINS, dtype=torch.float64)  # whole numbers: sums are exact

    def add(self, x: Tensor) -> None:
        """Count an input `[..., in_features]`."""
        for values in x.detach().reshape(-1).split(MOST_COUNTED):
            size = values.float().abs()
            self.counts += torch.histc(size, bins=BINS, min=0, max=self.absmax)

    def clipped(self, observer: str, percentile: float) -> tuple[float, float]:
        """The range, clipped symmetrically as the observer says.

        Args:
            observer: "percentile", "mse" or "kl".
            percentile: Share of the values to keep, in percent; only "percentile" uses it.
        """
        counts = self.counts.float()
        if observer == "percentile":
            kept = percentile_bins(counts, percentile)
        elif observer == "mse":
            kept = mse_bins(counts)
        else:
            kept = kl_threshold_bins(counts)
        threshold = self.absmax * kept / BINS
        return max(self.minimum, -threshold), min(self.maximum, threshold)


def percentile_bins(counts: Tensor, percentile: float) -> int:
    """Number of leading bins that hold `percentile` percent of the values."""
    cumulative = counts.double().cumsum(dim=0)
    wanted = cumulative[-1] * percentile / 100.0
    return min(int(torch.searchsorted(cumulative, wanted)) + 1, BINS)


def mse_bins(counts: Tensor) -> int:
    """Number of leading bins to keep for the least squared error.

    What is kept is rounded to `LEVELS` steps, evenly distributed within one; what is not is off by
    its distance to the threshold.
    """
    centres = (torch.arange(BINS) + 0.5).double()
    counts = counts.double()
    best, least = BINS, float("inf")
    for kept in range(COARSE_BINS, BINS + 1, CANDIDATE_STEP):
        rounding = counts[:kept].sum() * (kept / LEVELS) ** 2 / 12
        clipping = (counts[kept:] * (centres[kept:] - kept) ** 2).sum()
        if float(rounding + clipping) < least:
            best, least = kept, float(rounding + clipping)
    return best


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

    with hooked(
        module.register_forward_pre_hook(hook_for(name))  # type: ignore[arg-type]
        for name, module in linears.items()
    ):
        yield histograms
