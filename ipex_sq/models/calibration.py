"""One pass over the calibration texts: statistics of every Linear, and who feeds whom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ipex_sq.config import QuantConfig
from ipex_sq.distributed import gather, share
from ipex_sq.errors import CheckpointError
from ipex_sq.models.body import logits_at
from ipex_sq.models.conv1d import convert_conv1d
from ipex_sq.models.folding import smoothed_linear
from ipex_sq.models.identity import model_sha256, tokenizer_sha256
from ipex_sq.models.onednn import calibration_dtype, fits_packed, onednn_linears
from ipex_sq.models.readiness import check_linears, prepare_float, readable_rows
from ipex_sq.models.running import run_body, run_model
from ipex_sq.models.sampling import sample_groups, set_apart
from ipex_sq.models.topology import (
    Topology,
    find_topology,
    has_small_head,
    quantizable_linears,
)
from ipex_sq.recipe.act_stats import ActStats
from ipex_sq.recipe.batching import Batch, without_padding
from ipex_sq.recipe.gptq import (
    fit_hessians,
    joined_hessians,
    record_hessians,
)
from ipex_sq.recipe.histograms import record_histograms
from ipex_sq.recipe.observers import LinearStats, record_stats
from ipex_sq.recipe.plan import STATIC_INT8, QuantPlan
from ipex_sq.recipe.scales_files import Scales, scales_from_json

PROBED_TOKENS = 32
"""Of one text: enough to see who reads what, and the pass is run several times."""


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    source: Mapping[str, Any] | None = None,
    *,
    samples: bool = True,
    hessians: bool = True,
    lm_head: bool | None = None,
) -> ActStats:
    """Run the float model over `batches` and record what its Linears are fed.

    Args:
        model: In fp32; put in eval mode, and GPT-2's transposed Linears (Conv1D) become Linears.
        batches: Texts; padding is taken out first (`without_padding`).
        source: Where the texts came from, kept with the statistics.
        samples: Also run a few texts backward, as the search of alpha needs (`add_samples`).
        hessians: Also gather what GPTQ needs, unless it takes more than `MOST_HESSIAN_BYTES`.
        lm_head: Also for a language model's head (`QuantConfig.quant_lm_head`). None: with
            `samples`, where it becomes int8 by default.

    Raises:
        CalibrationError: No batches, a mask with holes, a Linear never reached, a value not finite.
        ConfigError: A model in bf16 or fp16.
        DataError, UnsupportedModelError: Texts that it cannot read; nothing to quantize.
    """
    start = time.perf_counter()
    rows = readable_rows(model, batches)
    lm_head = samples and has_small_head(model) if lm_head is None else lm_head
    _prepare(model, lm_head=lm_head)
    example = {key: value[:1] for key, value in rows[0].items()}
    short = {key: value[:, :PROBED_TOKENS] for key, value in example.items()}
    topology = find_topology(model, [short, *rows], lm_head=lm_head)
    linears = {name: smoothed_linear(model, name) for name in topology.readers}
    readers = _first_readers(linears, topology) if hessians else {}
    packed = fits_packed(linear.weight.numel() for linear in _of_body(linears, topology.head))
    seen = observe(model, rows, linears, readers=readers, packed=packed, head=topology.head)
    stats = ActStats(
        linears=seen.linears,
        groups=topology.groups,
        float_reasons=topology.float_reasons,
        example=example,
        texts=sum(len(row["input_ids"]) for row in rows),
        tokens=_tokens(rows),
        source={**(source or {}), "dtype": str(seen.dtype).removeprefix("torch.")},
        seconds=time.perf_counter() - start,
        unsampled=seen.unsampled,
        hessians=seen.hessians,
        head=topology.head,
    )
    return add_samples(model, stats, rows) if samples else stats


def _first_readers(linears: Mapping[str, nn.Linear], topology: Topology) -> dict[str, nn.Linear]:
    """One Linear of each group, by group key; none where Hessians of their inputs would not fit."""
    readers = {group.key: linears[group.key] for group in topology.groups}
    return readers if fit_hessians(item.in_features for item in readers.values()) else {}


def _prepare(model: nn.Module, *, lm_head: bool = False) -> None:
    prepare_float(model)
    convert_conv1d(model)
    check_linears(quantizable_linears(model, lm_head=lm_head)[0])


@dataclass(frozen=True)
class Observed:
    """What a pass has seen: see `ActStats`, and the dtype that Linears multiplied in."""

    linears: Mapping[str, LinearStats]
    unsampled: Mapping[str, LinearStats]
    hessians: Mapping[str, Tensor]
    dtype: torch.dtype


def observe(
    model: nn.Module,
    rows: Sequence[Batch],
    linears: Mapping[str, nn.Linear],
    *,
    readers: Mapping[str, nn.Linear],
    packed: bool,
    head: str | None = None,
) -> Observed:
    """Run all texts, those that will be sampled last, and record what enters `linears`.

    Args:
        model: Holds the Linears.
        rows: Unpadded batches.
        linears: By path.
        readers: Those of them to take Hessians of, by group key.
        packed: Multiply with oneDNN, in bf16 where the CPU does so in hardware.
        head: Path of a language model's head where it is one of the Linears; nothing reads what it
            gives, so that it is not packed.
    """
    run = _as_far_as(head)
    body = _of_body(linears, head)
    unsampled, sampled = set_apart(rows)
    ordered = [*unsampled, *sampled]
    before = accumulate((_tokens([batch]) for batch in ordered), initial=0)
    placed = list(zip(before, ordered, strict=False))
    with (
        onednn_linears(body if packed else (), calibration_dtype()) as dtype,
        record_stats(linears) as recorder,
        record_hessians(readers, _tokens(rows)) as recorders,
        torch.no_grad(),
    ):

        def watched(item: _Placed) -> None:
            for hessian in recorders.values():
                hessian.begin(item[0])
            run(model, item[1])

        _run_shared(placed[: len(unsampled)], watched, "calibrate")
        recorder.merge(gather(recorder.so_far()))
        without_sampled = recorder.so_far()
        _run_shared(placed[len(unsampled) :], watched, "calibrate")
        recorder.merge(gather(recorder.so_far()))
    return Observed(recorder.finish(), without_sampled, joined_hessians(recorders), dtype)


def _of_body(linears: Mapping[str, nn.Linear], head: str | None) -> list[nn.Linear]:
    return [linear for name, linear in linears.items() if name != head]


def _as_far_as(head: str | None) -> Callable[[nn.Module, Batch], object]:
    """What runs the model as far as its Linears; the head, which reads all, for one prediction."""
    if head is None:
        return run_body

    def run(whole: nn.Module, batch: Batch) -> None:
        with logits_at(whole, torch.zeros(1, dtype=torch.long)):
            run_model(whole, batch)

    return run


def _tokens(rows: Sequence[Batch]) -> int:
    return sum(row["input_ids"].numel() for row in rows)


def stats_from_file(model: nn.Module, path: Path, tokenizer: Any) -> ActStats:
    """As `stats_from_scales`, of a file.

    Raises:
        CheckpointError: It cannot be read, or is of another model.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return stats_from_scales(model, scales_from_json(content, str(path)), tokenizer)


def stats_from_scales(model: nn.Module, scales: Scales, tokenizer: Any) -> ActStats:
    """The statistics of a scales file, for the model that they were gathered on.

    Args:
        model: Float model in fp32, put in eval mode; Conv1D modules become Linears.
        scales: From `scales_from_json`.
        tokenizer: The model's.

    Raises:
        CheckpointError: They are of another model or tokenizer.
        CalibrationError: A weight or a bias is not finite.
        ConfigError: A model in bf16 or fp16.
    """
    for kind, found, here in (
        ("model", scales.model, model_sha256(model)),
        ("tokenizer", scales.tokenizer, tokenizer_sha256(tokenizer)),
    ):
        if found.get("sha256") != here:
            raise CheckpointError(
                f"the scales are of another {kind} than this one (of {scales.model.get('name')}, "
                f"whose digest differs): make them again with generate-scales"
            )
    _prepare(model)
    topology = find_topology(model, [scales.example])
    missing = [name for name in topology.readers if name not in scales.linears]
    if missing:
        raise CheckpointError(f"the scales lack {missing[0]!r}: make them again")
    return ActStats(
        linears={name: scales.linears[name] for name in topology.readers},
        groups=topology.groups,
        float_reasons=topology.float_reasons,
        example=scales.example,
        texts=scales.texts,
        tokens=scales.tokens,
        source=scales.source,
    )


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
    packed = fits_packed(linear.weight.numel() for linear in linears.values())
    with (
        onednn_linears(linears.values() if packed else (), calibration_dtype()),
        record_histograms(linears, ranges) as histograms,
        torch.no_grad(),
    ):
        placed = list(enumerate(without_padding(batches)))
        _run_shared(placed, lambda item: run_body(model, item[1]), f"{config.observer} histograms")
    everywhere = gather({name: item.counts for name, item in histograms.items()})
    for name, histogram in histograms.items():
        histogram.counts = torch.stack([part[name] for part in everywhere]).sum(dim=0)
    return {
        name: histogram.clipped(config.observer, config.percentile)
        for name, histogram in histograms.items()
    }


def _planned_range(plan: QuantPlan, name: str) -> tuple[float, float]:
    activation = plan.linears[name].activation
    assert activation is not None  # noqa: S101
    return activation.ends


_Placed = tuple[int, Batch]
"""A batch with its place among the others."""


def _run_shared(batches: Sequence[_Placed], run: Callable[[_Placed], None], text: str) -> None:
    """Run each batch on one of the processes."""

    def bar(mine: Sequence[_Placed]) -> Iterable[_Placed]:
        return tqdm(mine, desc=text, unit="batch", disable=None, leave=False)

    for _ in share(batches, run, size=lambda item: _tokens([item[1]]), progress=bar):
        pass
