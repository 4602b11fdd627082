"""One pass over the calibration texts: statistics of every Linear, and who feeds whom."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ipex_sq.config import QuantConfig
from ipex_sq.errors import CalibrationError
from ipex_sq.models.conv1d import convert_conv1d
from ipex_sq.models.folding import smoothed_linear
from ipex_sq.models.onednn import onednn_linears
from ipex_sq.models.running import run_body
from ipex_sq.models.sampling import Batch, sample_groups, set_apart
from ipex_sq.models.topology import find_topology
from ipex_sq.recipe.histograms import record_histograms
from ipex_sq.recipe.observers import record_stats
from ipex_sq.recipe.plan import STATIC_INT8, QuantPlan
from ipex_sq.recipe.planning import ActStats

PROBED_TOKENS = 32
"""Of one text: enough to see who reads what, and the pass is run several times."""


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    source: Mapping[str, Any] | None = None,
    *,
    samples: bool = True,
) -> ActStats:
    """Run the float model over `batches` and record what its Linears are fed.

    Args:
        model: Float model; it computes what it did (Conv1D modules, GPT-2's transposed Linears,
            become Linears).
        batches: Unpadded batches (padding would change the ranges).
        source: Where the texts came from, kept with the statistics.
        samples: Also run a few texts backward, as the search of alpha needs (`add_samples`).

    Raises:
        CalibrationError: No batches, a padded batch, a Linear never reached, a value not finite.
        UnsupportedModelError: Nothing to quantize.
    """
    start = time.perf_counter()
    rows = [_checked(batch) for batch in batches]
    if not rows:
        raise CalibrationError("there are no calibration batches: pass at least one text")
    convert_conv1d(model)
    example = {key: value[:1] for key, value in rows[0].items()}
    short = {key: value[:, :PROBED_TOKENS] for key, value in example.items()}
    topology = find_topology(model, [short, *rows])
    names = [name for group in topology.groups for name in group.readers]
    linears = {name: model.get_submodule(name) for name in names}
    unsampled, sampled = set_apart(rows)
    with onednn_linears(linears.values()), record_stats(linears) as recorder, torch.no_grad():
        for batch in _bar(unsampled, "calibrate"):
            run_body(model, batch)
        without_sampled = recorder.so_far()
        for batch in sampled:
            run_body(model, batch)
    stats = ActStats(
        linears=recorder.finish(),
        groups=topology.groups,
        float_reasons=topology.float_reasons,
        example=example,
        texts=sum(row["input_ids"].shape[0] for row in rows),
        tokens=sum(row["input_ids"].numel() for row in rows),
        source=dict(source or {}),
        seconds=time.perf_counter() - start,
        unsampled=without_sampled,
    )
    return add_samples(model, stats, rows) if samples else stats


def add_samples(model: nn.Module, stats: ActStats, batches: Sequence[Batch]) -> ActStats:
    """The same statistics with samples for the search of alpha."""
    start = time.perf_counter()
    samples = sample_groups(model, stats.groups, batches)
    return replace(stats, samples=samples, seconds=stats.seconds + time.perf_counter() - start)


def clipped_ranges(
    model: nn.Module, plan: QuantPlan, batches: Sequence[Batch], config: QuantConfig
) -> dict[str, tuple[float, float]]:
    """Second pass, over the smoothed model: the clipped range of every static Linear's input."""
    linears = {name: smoothed_linear(model, name) for name in plan.names(STATIC_INT8)}
    ranges = {name: _planned_range(plan, name) for name in linears}
    with (
        onednn_linears(linears.values()),
        record_histograms(linears, ranges) as histograms,
        torch.no_grad(),
    ):
        for batch in _bar(batches, f"{config.observer} histograms"):
            run_body(model, _checked(batch))
    return {
        name: histogram.clipped(config.observer, config.percentile)
        for name, histogram in histograms.items()
    }


def _planned_range(plan: QuantPlan, name: str) -> tuple[float, float]:
    activation = plan.linears[name].activation
    assert activation is not None  # noqa: S101
    low = -activation.zero_point * activation.scale
    return low, low + 255 * activation.scale


def _checked(batch: Batch) -> Batch:
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if ids.numel() == 0:
        raise CalibrationError("a calibration batch is empty")
    if mask is not None and not bool(mask.bool().all()):
        raise CalibrationError(
            "a calibration batch is padded, which would change the ranges: batch rows of equal "
            "length only (calibration_batches does)"
        )
    return batch


def _bar(batches: Sequence[Batch], text: str) -> Iterable[Batch]:
    return tqdm(batches, desc=text, unit="batch", disable=None, leave=False)
