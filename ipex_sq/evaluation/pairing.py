"""Accuracies compared on the same documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Scored(Protocol):
    """A result of documents that are right or wrong."""

    @property
    def correct(self) -> Sequence[bool]:
        """Whether the model has each document right, in the order given."""


def perplexity_of(log_probability: float) -> float:
    """Exp of the negated mean log-probability, in nats; infinity where a double cannot hold it."""
    try:
        return math.exp(-log_probability)
    except OverflowError:  # a model so broken that right answers have e^-710 on average
        return math.inf


def standard_error(correct: Sequence[bool]) -> float:
    """Of the share of True (sample deviation over root n, as lm-eval); 0 for one document."""
    count = len(correct)
    mean = sum(correct) / count
    return math.sqrt(mean * (1 - mean) / (count - 1)) if count > 1 else 0.0


@dataclass(frozen=True)
class PairedDifference:
    """A result against the fp32 one on the same documents.

    Attributes:
        delta: Difference of the accuracies, in points (hundredths).
        gained: Documents that only the candidate has right.
        lost: Documents that only fp32 has right.
        stderr: Standard error of `delta`, in points; smaller than of either accuracy alone.
    """

    delta: float
    gained: int
    lost: int
    stderr: float


def paired_difference(candidate: Scored, baseline: Scored) -> PairedDifference:
    """Compare two results document by document."""
    pairs = list(zip(candidate.correct, baseline.correct, strict=True))
    gained = sum(new and not old for new, old in pairs)
    lost = sum(old and not new for new, old in pairs)
    count = len(pairs)
    mean = (gained - lost) / count
    variance = (gained + lost) / count - mean**2
    stderr = math.sqrt(variance / (count - 1)) if count > 1 else 0.0
    return PairedDifference(100 * mean, gained, lost, 100 * stderr)
